"""Exports whose weights stay in the checkpoint: small, right, and bound to the bytes there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from compiled_here import compile_here
from random_models import export_untouched, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_parity import CACHE_INDEX, CONTINUOUS, STATIC, check

from qaic_ray.compile.compiler import run_compiler
from qaic_ray.compile.store import build
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.export.architecture import read_architecture
from qaic_ray.export.check.verify import verify_export
from qaic_ray.export.export import ExportResult, kept_export
from qaic_ray.export.graph import author, simplifying
from qaic_ray.export.own_folder import check_ours
from qaic_ray.model.checkpoint import Checkpoint
from qaic_ray.options import CompileOptions, EmulatorOptions, ExportOptions
from qaic_ray.pipeline.compile_step import open_folder, requested_builds
from qaic_ray.sdk import Sdk, find_sdk
from qaic_ray.weight_files.spec import METADATA_KEY
from qaic_ray.weight_files.tensors import read_entries

REFERENCE = ExportOptions(weights="reference")


def in_type(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The same checkpoint with its weights in another type."""
    for path in checkpoint.weight_files:
        tensors = {k: t.to(getattr(torch, dtype)) for k, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return checkpoint


def exported(
    checkpoint: Checkpoint, output: Path, options: ExportOptions = REFERENCE
) -> ExportResult:
    return export_untouched(checkpoint, options, output=output, verify="off")


@pytest.fixture(scope="module")
def sdk() -> Sdk:
    return find_sdk("emulated", EmulatorOptions(apps_version="1.22"))


def grid(folder: Path, precision: str = "fp32") -> CompileOptions:
    said: dict[str, Any] = {"precision": [precision], "num_cores": [14], "batch_size": [2]}
    said |= {"prompt_len": [8], "ctx_len": [32], "output": str(folder)}
    return CompileOptions.model_validate(said)


def test_the_graph_points_at_every_tensor_and_copies_none(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", max_shard_size="60KB")
    assert len(checkpoint.weight_files) > 1
    result = exported(checkpoint, tmp_path / "tiny-kv")
    model = onnx.load(result.onnx_path, load_external_data=False)
    spec = json.loads(result.onnx_path.with_name("weight_spec.json").read_text())
    (metadata,) = [p.value for p in model.metadata_props if p.key == METADATA_KEY]
    assert metadata == json.dumps(spec, separators=(",", ":"), sort_keys=True)
    assert spec["version"] == 5
    assert spec["model_id"] == str(tmp_path / "tiny")
    assert [f["path"] for f in spec["files"]] == sorted(
        f"tiny/{path.name}" for path in checkpoint.weight_files
    )
    # Each entry finds a tensor of the shape and type that the graph's input has.
    inputs = {i.name: i.type.tensor_type for i in model.graph.input}
    for item in spec["inputs"]:
        place = spec["files"][item["location"]["file"]]["path"]
        with safe_open(tmp_path / place, framework="pt") as file:
            tensor = file.get_tensor(item["location"]["key"])
        kind = inputs[item["name"]]
        assert [d.dim_value for d in kind.shape.dim] == list(tensor.shape)
        assert kind.elem_type == onnx.TensorProto.FLOAT
    named = {item["name"] for item in spec["inputs"]}
    assert named == {k for path in checkpoint.weight_files for k in load_file(path)}
    # The model's own inputs come first; of weights only the rotary tables are beside the graph.
    order = [i.name for i in model.graph.input]
    assert all(name in named for name in order[-len(named) :])
    external = [t.name for t in model.graph.initializer if t.data_location]
    assert sorted(external) == ["model.cos_cached", "model.sin_cached"]
    link = result.onnx_path.parent / "tiny"
    assert link.is_symlink()
    assert link.resolve() == tmp_path / "tiny"
    assert result.manifest.weights == "reference"


@pytest.mark.parametrize("contract", ["continuous", "static", "cache-index"])
@pytest.mark.parametrize(
    ("kind", "changes", "dtype"),
    [
        ("Llama", {}, "float32"),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True}, "bfloat16"),
        ("Qwen2", {}, "float16"),
        ("Qwen3", {"head_dim": 12}, "bfloat16"),
        ("Granite", {"logits_scaling": 2.0, "mlp_bias": True}, "bfloat16"),
    ],
)
def test_it_equals_pytorch(
    tmp_path: Path, kind: str, changes: dict[str, Any], dtype: str, contract: str
) -> None:
    options = {"continuous": CONTINUOUS, "static": STATIC, "cache-index": CACHE_INDEX}[contract]
    options = options.model_copy(update={"weights": "reference"})
    checkpoint = in_type(write_checkpoint(tmp_path / "m", kind, **changes), dtype)
    result = exported(checkpoint, tmp_path / "m-kv", options)
    check(verify_export(result.folder, checkpoint), options)


def test_layers_in_the_middle_are_left_out_of_a_quick_check(tmp_path: Path) -> None:
    checkpoint = in_type(write_checkpoint(tmp_path / "m", num_hidden_layers=6), "bfloat16")
    result = export_untouched(
        checkpoint, REFERENCE, output=tmp_path / "m-kv", verify="quick"
    ).verification
    assert result is not None
    assert (result.layers, result.passed) == ((0, 1, 4, 5), True)


@pytest.mark.parametrize("contract", ["continuous", "static", "cache-index"])
def test_onnxsim_would_change_nothing(tmp_path: Path, contract: str) -> None:
    options = {"continuous": CONTINUOUS, "static": STATIC, "cache-index": CACHE_INDEX}[contract]
    options = options.model_copy(update={"weights": "reference"})
    checkpoint = in_type(write_checkpoint(tmp_path / "m", "Qwen3", head_dim=12), "bfloat16")
    entries = read_entries(checkpoint.weight_files)
    stored = {name: entry.dtype for name, entry in entries.items()}
    authored = author(read_architecture(checkpoint.config), options, stored).model
    with simplifying(authored, tmp_path) as simplified:
        graph = simplified().graph
    assert list(graph.node) == list(authored.graph.node)
    assert list(graph.input) == list(authored.graph.input)
    assert {t.name for t in graph.initializer} == {t.name for t in authored.graph.initializer}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "mx6"])
def test_its_program_computes_as_that_of_a_copy(tmp_path: Path, sdk: Sdk, precision: str) -> None:
    checkpoint = in_type(write_checkpoint(tmp_path / "m", tie_word_embeddings=True), "bfloat16")
    results = []
    for name, weights in (("copy", "copy"), ("reference", "reference")):
        options = ExportOptions.model_validate({"weights": weights})
        result = exported(checkpoint, tmp_path / f"{name}-kv", options)
        (request,) = requested_builds(result.folder, grid(tmp_path / "qpc", precision), sdk)
        built = build(request, compiler=compile_here)
        qpc = CompiledProgram.open(str(built.path))
        program = LoadedProgram(qpc, 1)
        assert program.step is not None
        feed = {
            "input_ids": np.arange(8)[None] + 5,
            "position_ids": np.arange(8)[None],
            "batch_index": np.array([[1]]),
        }
        made = program.activate().run(feed, {"logits": (1, 1, 300)})
        results.append((qpc.constants_bytes, [b.name for b in qpc.bindings], made["logits"]))
    copied, pointed = results
    assert copied[0] == pointed[0]
    assert [n for n in copied[1] if "past" not in n] == [n for n in pointed[1] if "past" not in n]
    assert np.array_equal(copied[2], pointed[2])


def test_made_again_when_the_checkpoint_changed_or_moved(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    out = tmp_path / "m-kv"

    def made_again(checkpoint: Checkpoint, options: ExportOptions = REFERENCE) -> bool:
        return not exported(checkpoint, out, options).reused

    assert made_again(checkpoint)
    assert not made_again(checkpoint)
    assert kept_export(checkpoint, REFERENCE, output=out, verify="off") is not None
    assert made_again(checkpoint, ExportOptions())
    assert made_again(checkpoint)
    os.utime(checkpoint.weight_files[0])
    assert made_again(checkpoint)
    shutil.move(tmp_path / "m", tmp_path / "elsewhere")
    from qaic_ray.model.checkpoint import open_checkpoint

    moved = open_checkpoint(str(tmp_path / "elsewhere"))
    assert made_again(moved)
    assert not made_again(moved)


def test_a_changed_or_moved_checkpoint_is_said_before_a_compile(tmp_path: Path, sdk: Sdk) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    result = exported(checkpoint, tmp_path / "m-kv")
    (before,) = requested_builds(result.folder, grid(tmp_path / "qpc"), sdk)
    path = checkpoint.weight_files[0]
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"model\.safetensors has changed since m-kv was exported"):
        requested_builds(result.folder, grid(tmp_path / "qpc"), sdk)
    with pytest.raises(CompileError, match="have changed since they were looked at"):
        build(before, compiler=compile_here)
    assert not before.target.exists()
    assert not exported(checkpoint, tmp_path / "m-kv").reused
    (after,) = requested_builds(result.folder, grid(tmp_path / "qpc"), sdk)
    keys = [dict(request.entries)["model"] for request in (before, after)]
    assert keys[0] != keys[1]
    shutil.move(tmp_path / "m", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="The weights are not where the model points"):
        requested_builds(result.folder, grid(tmp_path / "qpc"), sdk)


def test_weights_that_change_while_they_are_compiled_make_no_program(
    tmp_path: Path, sdk: Sdk
) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    result = exported(checkpoint, tmp_path / "m-kv")
    (request,) = requested_builds(result.folder, grid(tmp_path / "qpc"), sdk)

    def compiling(argv: list[str], log: Path) -> None:
        compile_here(argv, log)
        os.utime(checkpoint.weight_files[0])

    with pytest.raises(CompileError, match="have changed since they were looked at"):
        build(request, compiler=compiling)
    assert not request.target.exists()


def test_the_key_is_of_the_bytes_and_not_of_their_place(tmp_path: Path) -> None:
    """Equal tensors in one file and in several: the graph differs, the digest of bytes does not."""
    whole = write_checkpoint(tmp_path / "whole")
    shards = write_checkpoint(tmp_path / "shards", max_shard_size="60KB")
    other = write_checkpoint(tmp_path / "other", seed=1)
    digests = []
    for checkpoint in (whole, shards, other):
        folder = exported(checkpoint, tmp_path / f"{checkpoint.base}-kv").folder
        external = open_folder(folder).source.external
        assert external is not None
        digests.append(external.sha256)
    assert digests[0] == digests[1] != digests[2]


def test_an_sdk_that_does_not_read_them_is_said(tmp_path: Path) -> None:
    result = exported(write_checkpoint(tmp_path / "m"), tmp_path / "m-kv")
    old = find_sdk("emulated", EmulatorOptions(apps_version="1.21.6"))
    with pytest.raises(
        UsageError, match=r"emulated SDK 1\.21\.6 reads no weights .*--weights copy"
    ):
        requested_builds(result.folder, grid(tmp_path / "qpc"), old)


def test_a_folder_of_another_tool_is_keyed_by_its_weights_too(tmp_path: Path) -> None:
    """Without our manifest, as QEfficient leaves one: the graph's metadata says where they are."""
    checkpoint = write_checkpoint(tmp_path / "m")
    folder = exported(checkpoint, tmp_path / "m-kv").folder
    (folder / "manifest.json").unlink()
    first = open_folder(folder).source
    tensors = load_file(checkpoint.weight_files[0])
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, checkpoint.weight_files[0], metadata={"format": "pt"})
    second = open_folder(folder).source
    assert first.external is not None
    assert first.digest != second.digest


def test_only_our_own_link_may_be_replaced(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    folder = exported(checkpoint, tmp_path / "m-kv").folder
    check_ours(folder)
    (folder / "generatedModels" / "other").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="generatedModels/other"):
        check_ours(folder)


def test_copies_of_heads_cannot_be_pointed_at() -> None:
    with pytest.raises(ValueError, match="weights cannot be reference; use copy"):
        ExportOptions(weights="reference", replicate_kv_heads=2)


@pytest.mark.parametrize("name", ["old", "new"])
def test_the_export_step_asks_the_sdk_first(
    tmp_path: Path, name: str, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    from qaic_ray.api.quiet import LogListener
    from qaic_ray.options import ModelOptions
    from qaic_ray.pipeline.export_step import export_step

    checkpoint = make_checkpoint()
    version = {"old": "1.20", "new": "1.22"}[name]
    asked = find_sdk("emulated", EmulatorOptions(apps_version=version))
    out = tmp_path / "out-kv"
    options = ExportOptions(weights="reference", output=str(out), verify="off")
    model = ModelOptions(name=str(checkpoint.folder))
    if name == "old":
        with pytest.raises(UsageError, match=r"SDK 1\.20 reads no weights"):
            export_step(model, options, LogListener(), sdk=asked)
        assert not out.exists()
    else:
        export_step(model, options, LogListener(), sdk=asked)
        assert out.exists()


def test_the_real_command_compiles_it(tmp_path: Path, sdk: Sdk) -> None:
    result = exported(write_checkpoint(tmp_path / "m"), tmp_path / "m-kv")
    (request,) = requested_builds(result.folder, grid(tmp_path / "qpc", "mx6"), sdk)
    built = build(request, compiler=run_compiler)
    assert not built.reused
    assert build(requested_builds(result.folder, grid(tmp_path / "qpc", "mx6"), sdk)[0]).reused


def test_a_moved_checkpoint_is_found_by_the_variable_of_compilers(
    tmp_path: Path, sdk: Sdk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same key and constants as before, though neither the link nor the old path is there."""
    result = exported(write_checkpoint(tmp_path / "m"), tmp_path / "m-kv")
    (request,) = requested_builds(result.folder, grid(tmp_path / "before"), sdk)
    before = CompiledProgram.open(str(build(request, compiler=run_compiler).path))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "m", tmp_path / "elsewhere" / "m")
    with pytest.raises(UsageError, match="The weights are not where the model points"):
        requested_builds(result.folder, grid(tmp_path / "after"), sdk)
    monkeypatch.setenv("AIC_EXTERNAL_DATA_ROOT", str(tmp_path / "elsewhere"))
    (moved,) = requested_builds(result.folder, grid(tmp_path / "after"), sdk)
    assert dict(moved.entries)["model"] == dict(request.entries)["model"]
    after = CompiledProgram.open(str(build(moved, compiler=run_compiler).path))
    assert after.constants_bytes == before.constants_bytes
