"""Models of operator sets that samples still export: 7 to 12."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qaic_ray.emulator import compiler
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.compiler import preparation
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram
from qaic_ray.emulator.lowering import graph
from qaic_ray.emulator.qaic import Session

SIDE, CHANNELS = 6, 4
OLD = (7, 9, 10, 11, 12)


def classifier(opset: int, seed: int = 0) -> Any:
    """A convolution, then operators whose form changed until 13: bounds, axes, a flat Softmax."""
    values = np.random.default_rng(seed)
    weights = {"kernel": values.standard_normal((CHANNELS, 3, 3, 3), np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["c"], pads=[1] * 4),
        helper.make_node("Unsqueeze", ["c"], ["u"], axes=[1]),
        helper.make_node("Squeeze", ["u"], ["s"], axes=[1]),
        helper.make_node("ReduceSum", ["k"], ["summed"], axes=[3], keepdims=0),
        helper.make_node("Softmax", ["summed"], ["chances"], axis=1),
    ]
    if opset < 11:
        nodes.insert(3, helper.make_node("Clip", ["s"], ["k"], min=-1.0, max=6.0))
    else:
        weights |= {"low": np.float32(-1), "high": np.float32(6)}  # type: ignore[dict-item]
        nodes.insert(3, helper.make_node("Clip", ["s", "low", "high"], ["k"]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    out = helper.make_tensor_value_info("chances", TensorProto.FLOAT, ["batch", CHANNELS, SIDE])
    tensors = [numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items()]
    return _model(helper.make_graph(nodes, "old", [image], [out], tensors), opset)


def _model(made: Any, opset: int) -> Any:
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    onnx.checker.check_model(model, full_check=True)
    return model


def program_of(folder: Path, model: Any, *flags: str) -> CompiledProgram:
    onnx.save(model, folder / "old.onnx")
    target = folder / "qpc"
    argv = [f"-m={folder / 'old.onnx'}", "-aic-hw", "-compile-only", f"-aic-binary-dir={target}"]
    assert compiler.main([*argv, "-onnx-define-symbol=batch,2", *flags]) == 0
    return CompiledProgram.open(str(target))


def images(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((2, 3, SIDE, SIDE), np.float32)


def truth(model: Any, image: Any) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})[0]


@pytest.mark.parametrize("opset", OLD)
def test_an_old_model_means_what_it_meant(machine: Machine, tmp_path: Path, opset: int) -> None:
    model = classifier(opset)
    program_of(tmp_path, model)
    session = Session(str(tmp_path / "qpc"))
    image = images(opset)
    found = session.run({"image": image})["chances"]
    session.reset()
    np.testing.assert_allclose(found, truth(model, image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", OLD)
@pytest.mark.parametrize("flags", [(), ("-enable-channelwise",)], ids=["whole", "channels"])
def test_int8_of_an_old_model(tmp_path: Path, opset: int, flags: tuple[str, ...]) -> None:
    model, image = classifier(opset), images(1)
    image.tofile(tmp_path / "image.raw")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'image.raw'}\n")
    listed = f"-input-list-file={tmp_path / 'list.txt'}"
    program = program_of(tmp_path, model, "-convert-to-quantize", listed, *flags)
    wanted = {"chances": (2, CHANNELS, SIDE)}
    found = LoadedProgram(program, 1).activate().run({"image": image}, wanted)["chances"]
    expected = truth(model, image)
    # 256 levels of values up to 6 and of weights: some hundredths, and never the exact numbers.
    assert 0 < np.abs(found - expected).max() < 0.05


@pytest.mark.parametrize("external", [False, True], ids=["inside", "beside"])
def test_a_retained_state_of_an_old_model(tmp_path: Path, external: bool) -> None:
    names = ("total", "total_RetainedState", "x")
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in names}
    scale = numpy_helper.from_array(np.linspace(1, 2, 64, dtype=np.float32), "scale")
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("Add", ["total", "scaled"], ["total_RetainedState"]),
    ]
    inputs, outputs = [values["x"], values["total"]], [values["total_RetainedState"]]
    model = _model(helper.make_graph(nodes, "sum", inputs, outputs, [scale]), 11)
    path = tmp_path / "old.onnx"
    io = "".join(f" - IOName: {n}\n   Precision: mxint8\n" for n in names[:2])
    (tmp_path / "io.yaml").write_text(io)
    flags = ["-retained-state", f"-custom-IO-list-file={tmp_path / 'io.yaml'}"]
    onnx.save(model, path, save_as_external_data=external, location="w", size_threshold=0)
    argv = [f"-m={path}", "-aic-hw", "-compile-only", f"-aic-binary-dir={tmp_path / 'qpc'}"]
    assert compiler.main([*argv, *flags]) == 0
    activation = LoadedProgram(CompiledProgram.open(str(tmp_path / "qpc")), 1).activate()
    x = np.random.default_rng(3).standard_normal((1, 64), np.float32)
    wanted = {"total_RetainedState": (1, 66)}
    packed = activation.run({"x": x, "total": np.zeros((1, 66), np.int8)}, wanted)
    blocks = packed["total_RetainedState"].view(np.uint8).reshape(2, 33)
    # OCP MX 1.0: a power of two in front, then multiples of a 64th of it.
    exact = (x * np.linspace(1, 2, 64, dtype=np.float32)).reshape(2, 32)
    exponents = np.frexp(np.abs(exact).max(1))[1] - 1
    levels = np.clip(np.rint(np.ldexp(exact, 6 - exponents[:, None])), -127, 127)
    np.testing.assert_array_equal(blocks[:, 0], exponents + 127)
    np.testing.assert_array_equal(blocks[:, 1:].view(np.int8), levels)


def test_the_refusal_of_a_model_too_old_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    made = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", [x], [y])
    onnx.save(_model(made, 6), tmp_path / "old.onnx")
    argv = [f"-m={tmp_path / 'old.onnx'}", "-aic-hw", f"-aic-binary-dir={tmp_path / 'qpc'}"]
    assert compiler.main(argv) == 1
    assert "opset_version-6 is not supported, the oldest is 7" in capsys.readouterr().err
    assert not (tmp_path / "qpc").exists()


@given(opset=st.sampled_from(OLD), seed=st.integers(0, 1 << 16))
def test_raising_a_model_changes_no_value(opset: int, seed: int) -> None:
    model = classifier(opset, seed)
    raised = preparation.raised(model)
    assert graph.opset_of(raised) >= 13
    onnx.checker.check_model(raised, full_check=True)
    assert [i.name for i in raised.graph.input] == ["image"]
    image = images(seed)
    np.testing.assert_allclose(truth(raised, image), truth(model, image), rtol=1e-5, atol=1e-7)
