"""`compile` looks at what it is given first: a refusal stops it, a remark is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from qaic_ray.check import builds as checked_builds
from qaic_ray.check.reading import inference
from qaic_ray.compile.store import BuildRequest
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.options import CompileOptions, EmulatorOptions
from qaic_ray.pipeline import compile_step
from qaic_ray.pipeline.compile_step import requested_builds
from qaic_ray.sdk import Sdk, find_sdk

MakeModel = Callable[..., Path]


@pytest.fixture
def sdk() -> Sdk:
    return find_sdk("emulated", EmulatorOptions())


def grid(folder: Path, **more: Any) -> CompileOptions:
    how = {"precision": ("mx6",), "num_cores": (14,), "prompt_len": (32,), "ctx_len": (128,)}
    return CompileOptions(**{**how, "output": str(folder / "qpc"), **more})


def graph_of(model_dir: Path) -> Path:
    return next(model_dir.glob("generatedModels/*.onnx"))


def edited(path: Path, *nodes: Any, tensors: tuple[Any, ...] = ()) -> None:
    model = onnx.load(path)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    onnx.save(model, path)


def test_a_good_model_is_compiled_without_a_word(
    make_model_dir: MakeModel, sdk: Sdk, tmp_path: Path
) -> None:
    builds = requested_builds(make_model_dir(), grid(tmp_path, batch_size=(1, 8)), sdk)
    assert len(builds) == 2
    assert checked_builds.check_builds(builds) == []


def test_a_refusal_stops_it_before_the_compiler(
    make_model_dir: MakeModel, sdk: Sdk, tmp_path: Path
) -> None:
    model_dir = make_model_dir()
    edited(graph_of(model_dir), helper.make_node("FlashAttention", ["hidden"], ["x"]))
    with pytest.raises(UsageError, match="FlashAttention is no operator of ONNX") as stop:
        requested_builds(model_dir, grid(tmp_path), sdk)
    assert "\n" not in str(stop.value)
    assert "Export it as plain operators" in str(stop.value)
    assert not (tmp_path / "qpc").exists()


def test_a_cache_that_no_card_holds_stops_it(
    make_model_dir: MakeModel, sdk: Sdk, tmp_path: Path
) -> None:
    model_dir = make_model_dir(max_position=2**24)
    # 16 bytes a position of this tiny cache.
    huge = grid(tmp_path, batch_size=(2**10,), ctx_len=(2**21,))
    with pytest.raises(UsageError, match=r"32\.0 of cache.*a Standard SoC has 15\.9"):
        requested_builds(model_dir, huge, sdk)


def test_a_remark_is_said_once_for_a_model_of_many_variants(
    make_model_dir: MakeModel, sdk: Sdk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model_dir()
    edited(
        graph_of(model_dir),
        helper.make_node("Add", ["hidden", "mask"], ["masked"]),
        tensors=(helper.make_tensor("mask", TensorProto.FLOAT, [1], [-1e30]),),
    )
    builds = requested_builds(model_dir, grid(tmp_path, batch_size=(1, 2)), sdk)
    said: list[str] = []

    class Ears:
        def remark(self, text: str) -> None:
            said.append(text)

        def compiling(self, number: int) -> None:
            raise CompileError("far enough")

    monkeypatch.setattr(compile_step, "build", None)
    with pytest.raises(CompileError, match="far enough"):
        compile_step.compile_on(None, builds, 1, Ears())  # type: ignore[arg-type]
    assert len(said) == 1
    assert "'mask' has 1e+30" in said[0]


def test_no_shapes_are_inferred(
    make_model_dir: MakeModel, sdk: Sdk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the dear part")

    monkeypatch.setattr(inference, "shapes", never)
    assert requested_builds(make_model_dir(), grid(tmp_path), sdk)


def test_what_is_compiled_already_is_not_looked_at(
    make_model_dir: MakeModel, sdk: Sdk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[BuildRequest] = requested_builds(make_model_dir(), grid(tmp_path), sdk)
    graph_of(tmp_path / "m-kv").write_bytes(b"no model any more")
    with pytest.raises(UsageError, match="no ONNX model"):
        checked_builds.check_builds(builds)
    monkeypatch.setattr(checked_builds, "is_current", lambda *_: True)
    assert checked_builds.check_builds(builds) == []
