"""Inputs and outputs of a graph as buffers: their order, and those that the compiler refuses."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qaic_ray.emulator import compiler
from qaic_ray.emulator.container.execution import CompiledProgram


def refusal(
    folder: Path, given: list[Any], made: list[Any], capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """What the compiler says of a graph of one Add, which it has to refuse."""
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", given, made)
    opset = [helper.make_opsetid("", 14)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "m.onnx")
    argv = [f"-m={folder / 'm.onnx'}", f"-aic-binary-dir={folder / 'qpc'}", "-aic-hw"]
    assert compiler.main([*argv, "-aic-hw-version=2.0", "-compile-only"]) == 1
    return capsys.readouterr().err.splitlines()


NAMES: dict[str, tuple[Any, str]] = {
    "an input that is an output": ((["x"], ["x", "y"]), "'x' is an input and an output"),
    "two inputs of one name": ((["x", "x"], ["y"]), "two inputs 'x'"),
    "two outputs of one name": ((["x"], ["y", "y"]), "two outputs 'y'"),
    "an input without a name": ((["x", ""], ["y"]), "an input without a name"),
    "an output without a name": ((["x"], ["y", ""]), "an output without a name"),
    "an output of no operator": ((["x"], ["z"]), "'z' is computed by no operator"),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_no_buffer_can_be_called_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    sides, text = NAMES[name]
    given, made = (
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in side]
        for side in sides
    )
    err = refusal(tmp_path, given, made, capsys)
    assert (err[0], err[2]) == (
        "QAIC_ERROR:",
        "QAICException:Unable to AddNodesToGraphFromModel",
    )
    assert text in err[1]
    assert not (tmp_path / "qpc").exists()


def test_a_buffer_without_elements_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [0, 3]) for name in "xy")
    err = refusal(tmp_path, [value], [made], capsys)
    assert "has the shape [0, 3]: no buffer is that big" in err[1]


@pytest.mark.parametrize("side", ["x", "y"])
def test_sequences_have_no_buffers(
    side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"}
    values[side] = helper.make_tensor_sequence_value_info(side, TensorProto.FLOAT, [2])
    err = refusal(tmp_path, [values["x"]], [values["y"]], capsys)
    assert f"Unsupported data type UNDEFINED of input or output '{side}'" in err[1]


@given(st.permutations(["hidden", "pooled", "flags", "images"]))
def test_outputs_stand_in_the_order_in_which_the_graph_makes_them(listed: list[str]) -> None:
    # As the vendor's stable-diffusion samples take them, by position: CLIP's hidden state before
    # its pooled one, a safety checker's flags before its images.
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["hidden"]),
        helper.make_node("ReduceSum", ["hidden"], ["pooled"]),
        helper.make_node("Greater", ["hidden", "pooled"], ["flags"]),
        helper.make_node("Where", ["flags", "x", "hidden"], ["images"]),
    ]
    real, truth = TensorProto.FLOAT, TensorProto.BOOL
    io = {n: helper.make_tensor_value_info(n, real, [2, 3]) for n in ("x", "hidden", "images")}
    io["pooled"] = helper.make_tensor_value_info("pooled", real, [1, 1])
    io["flags"] = helper.make_tensor_value_info("flags", truth, [2, 3])
    outputs = [io[name] for name in listed]
    model = helper.make_model(
        helper.make_graph(nodes, "order", [io["x"]], outputs),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, f"{folder}/net.onnx")
        flags = ["-aic-hw", "-compile-only", f"-aic-binary-dir={folder}/qpc"]
        assert compiler.main([f"-m={folder}/net.onnx", *flags]) == 0
        names = [b.name for b in CompiledProgram.open(f"{folder}/qpc").bindings]
    assert names == ["x", "hidden", "pooled", "flags", "images"]
