"""The model folder around the graph: options, manifest, custom IO, and whose folder it is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qaic_ray.contract import IoContract
from qaic_ray.errors import CheckpointError, ExportError, UsageError
from qaic_ray.export import export
from qaic_ray.export.architecture import read_architecture
from qaic_ray.export.check.replay import Activation
from qaic_ray.export.check.verify import (
    ScenarioDifference,
    VerifyReport,
    read_report,
    write_report,
)
from qaic_ray.export.export import custom_io, default_level, export_model
from qaic_ray.export.own_folder import check_ours
from qaic_ray.files.documents import checked
from qaic_ray.files.folders import SourceFile
from qaic_ray.model.checkpoint import (
    MANIFEST_FORMAT,
    Checkpoint,
    ModelManifest,
    open_checkpoint,
    read_manifest,
)
from qaic_ray.options import ExportOptions

MANIFEST = ModelManifest(
    format=MANIFEST_FORMAT,
    name="m-kv",
    source="org/m",
    contract=IoContract.POSITION_IDS,
    continuous=True,
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=10,
    max_position=64,
    opset=17,
    dtype="float32",
    eos_ids=(2, 3),
    onnx_file="generatedModels/m-kv_fp16_simplified.onnx",
    weights_sha256="ab",
    architecture_sha256="cd",
    num_clipped=0,
    tool_versions={"onnx": "1"},
    sources=(SourceFile("model.safetensors", 1, 2, 3, 4),),
)

REPORT = VerifyReport(
    level="full",
    layers=(0, 1),
    ctx_len=64,
    tolerance=2e-3,
    scenarios=(ScenarioDifference("prefill", 1e-5, 1e-6, 1e-6, 2, 2),),
    largest=Activation(0, "/model/layers.0/Add_output_0", 7e4),
    overflows=(Activation(0, "/model/layers.0/Add_output_0", 7e4),),
)


def test_custom_io_is_the_published_text() -> None:
    assert custom_io(1, "float16") == (
        " - IOName: past_key.0\n   Precision: float16\n\n"
        " - IOName: past_value.0\n   Precision: float16\n\n"
        " - IOName: past_key.0_RetainedState\n   Precision: float16\n\n"
        " - IOName: past_value.0_RetainedState\n   Precision: float16\n\n"
    )


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(MANIFEST.to_json())
    assert read_manifest(tmp_path) == MANIFEST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not an exported model"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", f"has format None, not {MANIFEST_FORMAT}"),
        (
            json.dumps({"format": MANIFEST_FORMAT + 1}),
            f"has format {MANIFEST_FORMAT + 1}, not {MANIFEST_FORMAT}",
        ),
        (
            MANIFEST.to_json().replace("position-ids", "other"),
            r"manifest\.json: contract: .*'other'",
        ),
        (MANIFEST.to_json().replace("generatedModels", ".."), "leads out of the folder"),
    ],
)
def test_a_manifest_we_cannot_use_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_manifest(tmp_path)
    assert "export" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": MANIFEST_FORMAT + 1},
        {"contract": IoContract.CACHE_INDEX},
        {"continuous": False},
        {"opset": 13},
        {"dtype": "float16"},
        {"eos_ids": (2,)},
        {"onnx_file": "other.onnx"},
        {"weights_sha256": "x"},
        {"architecture_sha256": "x"},
        {"tool_versions": {"onnx": "2"}},
        {"kv_dtype": "mxint8"},
        {"logits": "all"},
        {"next_tokens": True},
        {"num_replicate_kv_heads": 2},
        {"comp_ctx_lengths": True},
    ],
)
def test_whatever_changes_the_files_changes_the_key(change: dict[str, Any]) -> None:
    assert not MANIFEST.same_making(replace(MANIFEST, **change))


def test_where_it_came_from_does_not_change_the_key() -> None:
    assert MANIFEST.same_making(replace(MANIFEST, source="./m", sources=()))


STATIC = {"io": IoContract.CACHE_INDEX, "continuous_batching": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opset": 12}, r"opset: must be 13 or 17, not 12"),
        ({"comp_ctx_lengths": True, "opset": 13}, "needs opset 17"),
        (STATIC | {"comp_ctx_lengths": True, "opset": 13}, "no comp_ctx_lengths"),
        ({"dtype": "bfloat16"}, "dtype: must be 'float32' or 'float16', not 'bfloat16'"),
        ({"kv_dtype": "int8"}, "kv_dtype: must be 'float16' or 'mxint8', not 'int8'"),
        ({"logits": "first"}, "logits: must be .*'all' or 'num_logits_to_keep', not 'first'"),
        ({"replicate_kv_heads": 0}, "replicate_kv_heads: must be at least 1, not 0"),
        ({"io": IoContract.CACHE_INDEX}, "no continuous batching"),
        (STATIC | {"logits": "num_logits_to_keep"}, "no num_logits_to_keep"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(ExportOptions, fields, "export")


def test_report_survives_the_disk(tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    write_report(REPORT, tmp_path)
    assert read_report(tmp_path) == REPORT
    assert json.loads((tmp_path / "verify.json").read_text())["passed"] is True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "[" * 100_000,
        "5",
        '{"level": 5}',
        json.dumps(asdict(REPORT) | {"scenarios": "x"}),
        json.dumps(asdict(REPORT) | {"largest": None}),
        json.dumps(asdict(REPORT) | {"tolerance": "x"}),
        json.dumps(asdict(REPORT) | {"layers": [None]}),
    ],
)
def test_a_damaged_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "verify.json").write_text(text)
    with pytest.raises(UsageError, match=r"verify\.json.* verify again") as caught:
        read_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("worst", [2.1e-3, float("inf"), float("nan")])
def test_a_difference_is_an_error_that_names_it(worst: float) -> None:
    REPORT.raise_if_different()
    bad = ScenarioDifference("slot reuse", worst, 0.0, 0.0, 1, 0)
    with pytest.raises(ExportError, match="slot reuse"):
        replace(REPORT, scenarios=(*REPORT.scenarios, bad)).raise_if_different()


def test_large_models_are_checked_quickly() -> None:
    llama_8b = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
    big = read_architecture(llama_8b)
    # 8,030,261,248 with the norms, which are not counted.
    assert big.num_parameters == 8_030_261_248 - 65 * 4096
    assert default_level(big) == "quick"
    assert default_level(read_architecture(llama_8b | {"num_hidden_layers": 2})) == "full"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A checkpoint whose weights are all there, by their names and shapes."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "vocab_size": 8,
        "max_position_embeddings": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    matrices = ["model.embed_tokens", "lm_head", f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
    matrices += [f"{layer}.mlp.down_proj", *(f"{layer}.self_attn.{x}_proj" for x in "qkvo")]
    norms = ["model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    tensors = {f"{name}.weight": np.ones((8, 8), np.float32) for name in matrices}
    tensors |= {f"{name}.weight": np.ones(8, np.float32) for name in norms}
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(str(folder))


def test_a_bad_checkpoint_leaves_nothing_behind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out" / "tiny-kv"
    (checkpoint.folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="cut short"):
        export_model(checkpoint, output=out, verify="off")
    assert not out.parent.exists()


@pytest.mark.parametrize("kind", ["file", "foreign folder"])
def test_somebody_elses_folder_is_left_alone(
    checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "work"
    if kind == "file":
        out.touch()
    else:
        out.mkdir()
        (out / "thesis.tex").touch()
    with pytest.raises(UsageError, match="exists and is not an exported model"):
        export_model(checkpoint, output=out, verify="off")
    assert out.is_file() or os.listdir(out) == ["thesis.tex"]


@pytest.mark.parametrize(
    "text", ['{"name": "my extension", "version": "1.0"}', "{", "[]", '{"format": 2}']
)
def test_a_stranger_s_manifest_is_no_mark_of_ours(
    checkpoint: Checkpoint, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "extension"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=r"not an exported model .*'manifest\.json'"):
        export_model(checkpoint, output=out, verify="off")
    assert (out / "manifest.json").read_text() == text


@pytest.mark.parametrize("name", ["notes.txt", "generatedModels/mine.onnx", "empty/"])
def test_what_somebody_has_put_into_an_export_is_never_deleted(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "m-kv"
    (out / "generatedModels").mkdir(parents=True)
    (out / "manifest.json").write_text(MANIFEST.to_json())
    for ours in (MANIFEST.onnx_file, f"{MANIFEST.onnx_file}.data", "custom_io.yaml", "verify.json"):
        (out / ours).write_text("of an export")
    check_ours(out)
    if name.endswith("/"):
        (out / name).mkdir()
    else:
        (out / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds what no export put there .'{name}'"):
        export_model(checkpoint, output=out, verify="off")
    assert (out / name).exists()


def test_the_recipe_s_own_export_is_never_replaced(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "m-kv"
    (out / "generatedModels").mkdir(parents=True)
    (out / MANIFEST.onnx_file).write_text("of generateONNX.py")
    with pytest.raises(UsageError, match="not an exported model of this tool"):
        export_model(checkpoint, output=out, verify="off")
    assert (out / MANIFEST.onnx_file).is_file()


def test_a_missing_extra_is_named_with_the_command(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    for verify, names in (("off", "onnxsim"), ("quick", "onnxsim and torch")):
        with pytest.raises(UsageError, match=rf"needs {names},.*qaic-ray\[export\]"):
            export_model(checkpoint, output=tmp_path / "out", verify=verify)


def test_unknown_verify_level(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="full, quick or off, not 'half'"):
        export_model(checkpoint, output=tmp_path / "out", verify="half")


def test_a_parent_that_is_a_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    header = b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    checkpoint.weight_files[0].write_bytes(data)
    with pytest.raises(UsageError, match="Cannot write"):
        export_model(checkpoint, output=tmp_path / "file" / "tiny-kv", verify="off")
