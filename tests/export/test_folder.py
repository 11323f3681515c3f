"""An export is made once, made again when anything behind it changes, and never half."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import onnx
import pytest
from random_models import export_untouched
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from qaic_ray.contract import IoContract
from qaic_ray.errors import CheckpointError, ExportError, UsageError
from qaic_ray.export.export import export_model
from qaic_ray.export.graph import simplifying
from qaic_ray.model.checkpoint import Checkpoint, load_tokenizer, open_checkpoint, read_manifest
from qaic_ray.options import ExportOptions
from qaic_ray.pipeline.compile_step import open_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from qaic_ray.export import export
from qaic_ray.model.checkpoint import open_checkpoint
export.onnx.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export.export_model(open_checkpoint(sys.argv[1]), output=Path(sys.argv[2]), verify="off")
"""


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_layout_is_the_published_one(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export_untouched(make_checkpoint(name="e691f"), verify="off")
    assert result.folder == tmp_path / "e691f-kv"
    graph = "generatedModels/e691f-kv_fp16_simplified.onnx"
    assert files(result.folder) == ["custom_io.yaml", graph, f"{graph}.data", "manifest.json"]
    assert result.onnx_path == result.folder / graph
    assert read_manifest(result.folder) == result.manifest
    assert result.manifest.onnx_file == graph
    named = export_untouched(make_checkpoint(), output=Path("D"), verify="off")
    assert "generatedModels/D_fp16_simplified.onnx" in files(named.folder)


def test_made_again_only_when_something_changed(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    out = tmp_path / "out-kv"

    def made_again(checkpoint: Checkpoint, options: ExportOptions | None = None) -> bool:
        return not export_untouched(checkpoint, options, output=out, verify="off").reused

    checkpoint = make_checkpoint()
    assert made_again(checkpoint)
    assert not made_again(checkpoint)
    assert made_again(checkpoint, ExportOptions(continuous_batching=True))
    assert made_again(checkpoint)
    path = checkpoint.weight_files[0]
    os.utime(path)  # touched, and the same
    assert not made_again(checkpoint)
    status = path.stat()
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # changed under its old date
    assert made_again(checkpoint)
    assert made_again(make_checkpoint(name="elsewhere", seed=1))
    assert made_again(checkpoint)
    (out / "generatedModels" / "out-kv_fp16_simplified.onnx.data").unlink()
    assert made_again(checkpoint)


GRAPH = "generatedModels/out-kv_fp16_simplified.onnx"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (f"{GRAPH}.data", lambda data: data[:-1]),
        (f"{GRAPH}.data", lambda data: data[:100] + b"\0" * 8 + data[108:]),
        (GRAPH, lambda data: data + b"\0"),
        ("custom_io.yaml", lambda _: b""),
        ("manifest.json", lambda _: b"[]"),
        ("manifest.json", lambda data: data[:-9]),
        ("manifest.json", lambda data: data.replace(b'"num_layers": 3', b'"num_layers": 300000')),
    ],
)
def test_an_export_that_is_not_what_was_written_is_neither_kept_nor_compiled(
    make_checkpoint: Callable[..., Checkpoint],
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes],
) -> None:
    checkpoint, out = make_checkpoint(), tmp_path / "out-kv"
    export_untouched(checkpoint, output=out, verify="off")
    good = {file: (out / file).read_bytes() for file in files(out)}
    open_folder(out)
    (out / name).write_bytes(damage(good[name]))
    assert (out / name).read_bytes() != good[name]
    if b"300000" not in (out / name).read_bytes():  # what is compiled does not depend on it
        with pytest.raises(UsageError, match="export"):
            open_folder(out)
    assert not export_untouched(checkpoint, output=out, verify="off").reused
    made = {file: (out / file).read_bytes() for file in files(out)}
    assert {k: v for k, v in made.items() if k != "manifest.json"} == {
        k: v for k, v in good.items() if k != "manifest.json"
    }
    (out / f"{GRAPH}.data").touch()  # another time, the same bytes
    open_folder(out)
    assert export_untouched(checkpoint, output=out, verify="off").reused


def test_same_weights_elsewhere_are_the_same_export(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    out = tmp_path / "out-kv"
    export_untouched(make_checkpoint(name="one"), output=out, verify="off")
    sharded = make_checkpoint(name="two", max_shard_size="20KB")
    assert len(sharded.weight_files) > 1
    assert export_untouched(sharded, output=out, verify="off").reused


def test_a_check_is_added_to_an_export_that_had_none(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint, out = make_checkpoint(num_hidden_layers=5), tmp_path / "out-kv"
    levels = []
    for level in ("off", "quick", "off", "full", "quick"):
        result = export_untouched(checkpoint, output=out, verify=level)
        levels.append(result.verification and result.verification.level)
    assert levels == [None, "quick", "quick", "full", "full"]


def test_a_kill_leaves_nothing_or_the_old(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint, out = make_checkpoint(), tmp_path / "out" / "tiny-kv"
    command = [sys.executable, "-c", KILLED, str(checkpoint.folder), str(out)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    result = export_model(checkpoint, output=out, verify="off")
    assert not result.reused
    assert os.listdir(out.parent) == ["tiny-kv"]


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(continuous_batching=True),
        ExportOptions(io=IoContract.CACHE_INDEX, opset=13, continuous_batching=False),
    ],
    ids=["position-ids", "cache-index"],
)
def test_onnxsim_finds_nothing_to_simplify(
    make_checkpoint: Callable[..., Checkpoint],
    tmp_path: Path,
    options: ExportOptions,
) -> None:
    """So the graph that other tests take without it is the one that is shipped."""
    seen: list[onnx.ModelProto] = []

    @contextmanager
    def watched(model: Any, scratch: Path) -> Iterator[Callable[[], Any]]:
        with simplifying(model, scratch) as simplified:
            seen.extend([model, simplified()])
            yield lambda: seen[1]

    checkpoint = make_checkpoint("Granite", attention_bias=True, embedding_multiplier=2.0)
    written = export_model(
        checkpoint, options, output=tmp_path / "out-kv", verify="full", simplifier=watched
    )
    authored, simplified = seen
    assert [n.name for n in simplified.graph.node] == [n.name for n in authored.graph.node]
    graph = onnx.load(written.onnx_path, load_external_data=False).graph
    annotated = {v.name for v in (*graph.value_info, *graph.output)}
    assert annotated == {name for node in graph.node for name in node.output}


def test_external_data_is_what_onnx_reads(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    result = export_untouched(checkpoint, output=tmp_path / "out-kv", verify="off")
    model = onnx.load(result.onnx_path)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, tensor in load_file(checkpoint.weight_files[0]).items():
        expected = tensor.numpy()
        transposed = expected.ndim == 2 and name != "model.embed_tokens.weight"
        assert (found[name] == (expected.T if transposed else expected)).all(), name
    assert {i.name for i in model.graph.input}.isdisjoint(found)


def test_a_full_disk_leaves_nothing(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qaic_ray.export.weights.os.posix_fallocate", full)
    out = tmp_path / "out" / "tiny-kv"
    with pytest.raises(ExportError, match="No space left on device"):
        export_untouched(make_checkpoint(), output=out, verify="off")
    assert os.listdir(out.parent) == []


def test_hub_id_without_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        open_checkpoint("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_tokenizer_is_transformers_own(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old tokenizer files are converted once, and then read with no transformers."""
    monkeypatch.setenv("QAIC_RAY_CACHE", str(tmp_path / "cache"))
    checkpoint = make_checkpoint("Qwen2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<|endoftext|>", "he", "Ġhe"])}
    (checkpoint.folder / "vocab.json").write_text(json.dumps(vocab))
    (checkpoint.folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n")
    (checkpoint.folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    truth = AutoTokenizer.from_pretrained(checkpoint.folder)
    tokenizer = load_tokenizer(checkpoint)
    for text in ("he said: he\n", "  é漢字🎉 ", "<|endoftext|>x", ""):
        assert tokenizer.encode(text) == truth(text)["input_ids"]
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1
    assert load_tokenizer(checkpoint).decode(tokenizer.encode(" he ")) == " he "
