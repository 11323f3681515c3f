"""Model folders as the compiler takes them, and the file of shapes of the recipe's way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from qaic_ray.compile.compiler import MAX_VARIANTS, Source, grid_variants
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import checked
from qaic_ray.options import CompileOptions
from qaic_ray.pipeline.compile_step import (
    open_folder,
    requested_builds,
    requested_variants,
    specializations_file,
)
from qaic_ray.sdk import Sdk

SDK = Sdk(Path("/opt/qti-aic"), "real", "1.20")


def recipe_folder(where: Path, *more: str, name: str = "", data: str = "weights") -> Path:
    """What generateONNX.py leaves: a graph, its weights and custom_io.yaml, and no manifest."""
    graphs = where / "generatedModels"
    graphs.mkdir(parents=True, exist_ok=True)
    inputs = ["input_ids", "past_key.0", "past_value.0", *more]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in inputs]
    node = helper.make_node("Add", ["past_key.0", "w"], ["logits"])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n"])
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=data)
    graph = helper.make_graph([node], "g", values, [output], initializer=[weight])
    onnx.save(helper.make_model(graph), graphs / (name or f"{where.name}_fp16_simplified.onnx"))
    (graphs / "weights").write_bytes(bytes(16))
    (where / "custom_io.yaml").write_text("")
    return where


def grid(**changes: Any) -> CompileOptions:
    document = {"batch_size": 4, "prompt_len": 32, "ctx_len": 128, **changes}
    return checked(CompileOptions, document, "compile")


def test_a_folder_of_the_recipe_is_read_by_its_graph(tmp_path: Path) -> None:
    model = open_folder(recipe_folder(tmp_path / "e691f-kv", "attention_mask", "cache_index"))
    assert (model.source.name, model.max_position) == ("e691f-kv", None)
    assert model.source.onnx.name == "e691f-kv_fp16_simplified.onnx"
    assert model.source.custom_io == tmp_path / "e691f-kv" / "custom_io.yaml"
    assert not (model.continuous)
    assert not (model.num_logits_to_keep)
    assert not (model.comp_ctx_lengths)
    (variant,) = requested_variants(tmp_path / "e691f-kv", grid(), SDK)
    assert variant.name == "e691f-kv-32pl-128cl-14c-4BS-mx6"
    assert variant.specializations.entries[0].full_batch_size is None


def test_inputs_say_what_a_graph_without_manifest_is(tmp_path: Path) -> None:
    more = ("batch_index", "num_logits_to_keep", "comp_ctx_lengths")
    model = open_folder(recipe_folder(tmp_path / "m-kv", *more))
    assert model.continuous
    assert model.num_logits_to_keep
    assert model.comp_ctx_lengths


def test_other_weights_are_another_source(tmp_path: Path) -> None:
    folder = recipe_folder(tmp_path / "m-kv")
    before = open_folder(folder).source.digest
    assert open_folder(folder).source.digest == before
    (folder / "generatedModels" / "weights").write_bytes(bytes(15) + b"x")
    assert open_folder(folder).source.digest != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "generatedModels" / "weights").unlink(), "weights.*is not there"),
        (lambda f: recipe_folder(f, data="../../x"), "'../../x': a path leads out"),
        (
            lambda f: (f / "generatedModels" / f"{f.name}_fp16_simplified.onnx").write_bytes(b"x"),
            "cannot be read as an ONNX model",
        ),
        (
            lambda f: os.rename(
                f / "generatedModels" / f"{f.name}_fp16_simplified.onnx",
                recipe_folder(f, name="a.onnx") / "generatedModels" / "b.onnx",
            ),
            "holds 2 graphs .a.onnx, b.onnx.",
        ),
    ],
)
def test_a_folder_of_the_recipe_that_cannot_be_compiled(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    folder = recipe_folder(tmp_path / "m-kv")
    change(folder)
    with pytest.raises(UsageError, match=words) as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_graph_of_something_else_is_refused(tmp_path: Path) -> None:
    graphs = tmp_path / "resnet" / "generatedModels"
    graphs.mkdir(parents=True)
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([], "g", [value], [value])
    onnx.save(helper.make_model(graph), graphs / "resnet.onnx")
    with pytest.raises(UsageError, match=r"not a language model .*\['image'\]"):
        open_folder(tmp_path / "resnet")


def test_the_file_of_this_folder_is_used_where_no_shape_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path("specializations.json")
    given = tmp_path / "other.json"
    assert specializations_file(None, CompileOptions(num_cores=7)) is None
    assert specializations_file(None, CompileOptions(ctx_len=64)) is None
    here.touch()
    assert specializations_file(None, CompileOptions(num_cores=7)) == here
    assert specializations_file(given, CompileOptions()) == given
    with pytest.raises(UsageError, match=r"and --batch-size and --ctx-len too: the file in this"):
        specializations_file(None, CompileOptions(ctx_len=64, batch_size=2))
    with pytest.raises(UsageError, match="leave one of them out"):
        specializations_file(given, CompileOptions(batch_size=2))


def test_equal_variants_are_one_and_paths_are_the_driver_s(
    make_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_model_dir()
    monkeypatch.chdir(tmp_path)
    twice = grid(
        precision=["mx6", "MX6"],
        num_cores=[14, 14],
        prompt_len=["32+64", "64+32", 32, "32"],
    )
    (tmp_path / "sdk" / "exec").mkdir(parents=True)
    (tmp_path / "sdk" / "exec" / "qaic-exec").touch()
    builds = requested_builds(Path(folder.name), twice, Sdk(tmp_path / "sdk", "real", "1.20"))
    assert [build.target for build in builds] == [
        tmp_path / "qpc" / f"m-kv-{lens}pl-128cl-14c-4BS-mx6" for lens in ("32+64", "32")
    ]
    for build in builds:
        assert build.store.is_absolute()
        assert build.variant.source.onnx.is_absolute()
        assert build.variant.source.custom_io is not None
        assert build.variant.source.custom_io.is_absolute()


def test_a_grid_of_millions_is_counted_and_not_made() -> None:
    many = tuple(range(1, 1001))
    cores = tuple(range(1, 17))
    grid = CompileOptions(num_cores=cores, batch_size=many, prompt_len=32, ctx_len=many)
    with pytest.raises(UsageError, match=f"grid of 16000000 variants: at most {MAX_VARIANTS}"):
        grid_variants(Source("m", Path("m"), None, ""), grid, continuous=True)


def test_a_name_that_no_file_system_takes_is_refused_at_once(
    make_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model_dir()
    lens = "+".join(map(str, [2**n for n in range(1, 30)] + [2] * 300))
    with pytest.raises(UsageError, match="no path: File name too long"):
        requested_builds(
            folder, grid(prompt_len=lens, ctx_len=2**29, output=str(tmp_path / ("x" * 300))), SDK
        )
