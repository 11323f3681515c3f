"""Small graphs through the compiler: which weights are stored how, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qaic_ray.emulator import compiler
from qaic_ray.emulator.container.constants import read_constant
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram
from qaic_ray.emulator.numbers import mxfp6


def run(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str], list[str]]:
    """Status, lines of stdout, lines of stderr."""
    status = compiler.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def save_small(folder: Path, nodes: list[Any], initializers: list[Any]) -> None:
    """A graph y = f(x) over float[2, 40]."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(
        model,
        folder / "small.onnx",
        save_as_external_data=True,
        location="small.data",
        size_threshold=0,
    )


def small_argv(folder: Path, *flags: str) -> list[str]:
    where = [f"-m={folder / 'small.onnx'}", f"-aic-binary-dir={folder / 'qpc'}"]
    return [*where, "-aic-hw", "-aic-hw-version=2.0", *flags]


def constants_of(qpc: CompiledProgram) -> dict[str, tuple[str, np.ndarray]]:
    return {
        c.name: (c.kind, read_constant(qpc.constants_segment(), c)) for c in qpc.program.constants
    }


def test_an_unknown_operator_is_named_as_the_vendor_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("Teleport", ["x"], ["y"], name="/model/Teleport")
    save_small(tmp_path, [node], [])
    status, _, err = run(small_argv(tmp_path), capsys)
    assert status == 1
    assert "[Operator-'/model/Teleport', opset_version-17, ir_version-8] : " in err[1]


def test_external_gemm_and_batched_weights_are_packed_along_k(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gemm = rng.standard_normal((3, 40)).astype(np.float32)
    batched = rng.standard_normal((2, 3, 50)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "gemm"], ["a"], transB=1),
        helper.make_node("MatMul", ["a", "batched"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in (("gemm", gemm), ("batched", batched))]
    save_small(tmp_path, nodes, tensors)
    assert compiler.main(small_argv(tmp_path, "-mxfp6-matmul", "-convert-to-fp16")) == 0
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
    stored = constants_of(qpc)
    assert {kind for kind, _ in stored.values()} == {"mxfp6"}
    gemm_rounded = mxfp6.quantize(gemm.T).T
    batched_rounded = np.stack([mxfp6.quantize(b) for b in batched])
    np.testing.assert_array_equal(stored["gemm"][1], gemm_rounded)
    np.testing.assert_array_equal(stored["batched"][1], batched_rounded)
    x = rng.standard_normal((2, 40)).astype(np.float32)
    made = LoadedProgram(qpc, 1).activate().run({"x": x}, {"y": (2, 2, 50)})["y"]
    np.testing.assert_allclose(made, (x @ gemm_rounded.T) @ batched_rounded, atol=1e-4)


def test_a_weight_behind_a_transpose_or_read_twice_is_packed_on_its_own(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["a"]),
        helper.make_node("MatMul", ["a", "table"], ["b"]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Add", ["b", "rows"], ["y"]),
    ]
    ids = numpy_helper.from_array(np.array([3, 4]), "ids")
    save_small(tmp_path, nodes, [numpy_helper.from_array(table, "table"), ids])
    assert compiler.main(small_argv(tmp_path, "-mxfp6-matmul", "-convert-to-fp16")) == 0
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
    assert sorted(kind for kind, _ in constants_of(qpc).values()) == ["float16", "mxfp6", "mxfp6"]
    x = np.random.default_rng(1).standard_normal((2, 40)).astype(np.float32)
    made = LoadedProgram(qpc, 1).activate().run({"x": x}, {"y": (2, 40)})["y"]
    turned = mxfp6.quantize(np.ascontiguousarray(table.T))
    expected = x @ turned @ mxfp6.quantize(table) + table[[3, 4]].astype(np.float16)
    np.testing.assert_allclose(made, expected, atol=1e-3)


def test_weights_in_constant_nodes_and_graphs_inside_of_nodes_run(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "outer"], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3])],
    )
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
        helper.make_node("If", ["yes"], ["a"], then_branch=inner, else_branch=inner),
        helper.make_node("MatMul", ["x", "w"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    yes = numpy_helper.from_array(np.array(True), "yes")
    save_small(tmp_path, nodes, [numpy_helper.from_array(weight, "outer"), yes])
    assert compiler.main(small_argv(tmp_path, "-mxfp6-matmul")) == 0
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
    assert set(constants_of(qpc)) == {"w", "outer"}
    x = np.ones((2, 40), np.float32)
    made = LoadedProgram(qpc, 1).activate().run({"x": x}, {"y": (2, 3)})["y"]
    np.testing.assert_allclose(made, 2 * x @ weight, atol=1e-4)


def test_functions_of_a_model_are_expanded(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    save_small(
        tmp_path,
        [helper.make_node("Outer", ["x", "w"], ["y"], domain="own")],
        [numpy_helper.from_array(weight, "w")],
    )
    model = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    model.opset_import.append(helper.make_opsetid("own", 1))
    for text in (
        "Outer (a, b) => (c) { d = MatMul (a, b)  c = own.Inner (d) }",
        "Inner (a) => (c) { b = Sigmoid (a)  c = Mul (a, b) }",
    ):
        header = '<domain: "own", opset_import: ["" : 17, "own" : 1]>'
        model.functions.append(onnx.parser.parse_function(header + text))
    onnx.save(model, tmp_path / "small.onnx")
    assert compiler.main(small_argv(tmp_path, "-mxfp6-matmul", "-sub-functions")) == 0
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
    assert constants_of(qpc)["w"][0] == "mxfp6"
    x = np.ones((2, 40), np.float32)
    product = x @ mxfp6.quantize(weight)
    made = LoadedProgram(qpc, 1).activate().run({"x": x}, {"y": (2, 3)})["y"]
    np.testing.assert_allclose(made, product / (1 + np.exp(-product)), atol=1e-4)


def test_fp16_rounds_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.full((40, 3), 0.1, np.float32)
    weight[0], weight[1] = 1e-9, 70000
    save_small(
        tmp_path,
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [numpy_helper.from_array(weight, "w")],
    )
    status, out, _ = run(small_argv(tmp_path, "-convert-to-fp16"), capsys)
    assert status == 0
    warnings = [line for line in out if "after conversion to 16-bit" in line]
    assert len(warnings) == 2
    assert "3 values of constant 'w' will underflow" in warnings[0]
    assert "3 values of constant 'w' will overflow" in warnings[1]
    kind, stored = constants_of(CompiledProgram.open(str(tmp_path / "qpc")))["w"]
    assert kind == "float16"
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(stored, weight.astype(np.float16).astype(np.float32))


def test_external_data_must_be_inside_of_the_models_folder_and_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = numpy_helper.from_array(np.ones((40, 3), np.float32), "w")
    save_small(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [weight])
    data = tmp_path / "small.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    status, _, err = run(small_argv(tmp_path), capsys)
    assert (status, "too short" in err[1]) == (1, True)
    data.write_bytes(whole)
    model = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../small.data"
    onnx.save(model, tmp_path / "small.onnx")
    status, _, err = run(small_argv(tmp_path), capsys)
    assert (status, "outside" in err[1]) == (1, True)
    for key, value in (("location", "a\0b"), ("offset", "many"), ("offset", "-64")):
        damaged = onnx.load(tmp_path / "small.onnx", load_external_data=False)
        entries = damaged.graph.initializer[0].external_data
        entries[0].value = "small.data"
        next(entry for entry in entries if entry.key == key).value = value
        onnx.save(damaged, tmp_path / "damaged.onnx")
        argv = [a.replace("small.onnx", "damaged.onnx") for a in small_argv(tmp_path)]
        status, _, err = run(argv, capsys)
        assert (status, "cannot be read" in err[1], len(err)) == (1, True, 3)
    assert not (tmp_path / "qpc").exists()
