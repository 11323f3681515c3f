"""What is wrong with a checkpoint or a disk is said in one sentence, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import export_untouched
from safetensors.torch import load_file, save_file

from qaic_ray.errors import CheckpointError, ExportError, QaicRayError, UsageError
from qaic_ray.model.checkpoint import Checkpoint, open_checkpoint


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 100)


def change_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = next(
        path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path)
    )
    tensors = load_file(path)
    tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
    save_file(tensors, path, metadata={"format": "pt"})


def shorten(folder: Path) -> None:
    change_tensor(folder, lambda tensor: tensor[:-1].clone())


def spoil(folder: Path) -> None:
    change_tensor(folder, lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bend_rope(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1.0})


def leave_the_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../../etc/model.safetensors"
    path.write_text(json.dumps(index))


DAMAGES: dict[Callable[[Path], None], str] = {
    remove_shard: "shard model-.* is missing",
    truncate: "cut short",
    shorten: r"model\.norm\.weight has the shape \[31\]; config\.json says \[32\]",
    spoil: r"model\.norm\.weight of .* \(NaN\)",
    bend_rope: "rope type 'spiral'",
    leave_the_folder: r"names '\.\./\.\./etc/model\.safetensors', which is not a file of that",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder, out = make_checkpoint(max_shard_size="20KB").folder, tmp_path / "out"
    out.mkdir()
    damage(folder)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
        export_untouched(open_checkpoint(str(folder)), output=out / "tiny-kv", verify="off")
    check_one_sentence(caught.value)
    assert os.listdir(out) == []


def check_one_sentence(error: QaicRayError) -> None:
    text = str(error)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 300


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory; only root may make one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["20k", "100k", "160k"])
def test_full_disk_keeps_the_old_export(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, size: str
) -> None:
    """The new weights, or the new graph, find no room beside the old export."""
    checkpoint = make_checkpoint()
    made = export_untouched(checkpoint, output=tmp_path / "tiny-kv", verify="off")
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        # An export of ours whose graph is damaged: it would be made again.
        old = disk / "tiny-kv" / made.manifest.onnx_file
        old.parent.mkdir(parents=True)
        old.write_bytes(b"old")
        shutil.copy(made.folder / "manifest.json", disk / "tiny-kv")
        before = tree(disk)
        with pytest.raises(ExportError, match="No space left on device") as caught:
            export_untouched(checkpoint, output=disk / "tiny-kv", verify="off")
        check_one_sentence(caught.value)
        assert tree(disk) == before


def test_read_only_disk(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        pytest.raises(UsageError, match=r"Cannot write .*: Read-only") as caught,
    ):
        export_untouched(checkpoint, output=disk / "tiny-kv", verify="off")
    check_one_sentence(caught.value)


def test_unwritable_folder(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    checkpoint, out = make_checkpoint(), tmp_path / "out"
    out.mkdir(mode=0o500)
    with pytest.raises(UsageError, match=r"Cannot write .*: Permission denied") as caught:
        export_untouched(checkpoint, output=out / "tiny-kv", verify="off")
    check_one_sentence(caught.value)
    assert os.listdir(out) == []
