"""What an exporter declares of shapes, against what the graph computes: the graph is right.

The vendor's generator of SDXL declares a pooled output [batch, 1280] as [batch, sequence_length].
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from compiled import SLOTS, three_ways, write_inputs
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tiny_llama import NumpyLlama, TinyLlama

from qaic_ray.emulator import compiler
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram

ROWS, LENGTH = 3, 5
SYMBOLS = [f"-onnx-define-symbol={s}" for s in (f"batch,{ROWS}", f"length,{LENGTH}")]
NAMES = ["batch", "length", "nobody", 1, 2, 4, 7]
"""Symbols that have a value, one that has none, and numbers: what an exporter may declare."""

WRONG = {
    "a symbol of another size": ["batch", "length"],
    "symbols in another order": ["length", "batch"],
    "a symbol without a value": ["batch", "nobody"],
    "another number": [ROWS, 9],
    "a rank too low": ["batch"],
    "a rank too high": ["batch", "length", 4],
    "no rank": None,
}


def save(path: Path, nodes: list[Any], outputs: list[Any], *inside: Any, domain: str = "") -> Any:
    """A model of float x [batch, 4], with what it declares of its outputs and the values inside."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    weight = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    made = helper.make_graph(
        nodes, "net", [x], outputs, [numpy_helper.from_array(weight, "W")], value_info=inside
    )
    sets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(made, opset_imports=sets, ir_version=8), path)


def declared(name: str, dims: Any) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the compiler says of a model that it refuses; it leaves nothing."""
    assert compile_(folder, *flags) != 0
    assert not (folder / "qpc").exists()
    return capsys.readouterr().err


def compile_(folder: Path, *flags: str) -> int:
    argv = [f"-m={folder / 'net.onnx'}", "-aic-hw", "-compile-only", *SYMBOLS, *flags]
    return compiler.main([*argv, f"-aic-binary-dir={folder / 'qpc'}"])


def computed(path: Path, x: Any) -> dict[str, Any]:
    """What onnxruntime makes of the same graph without any shape declared of what it makes."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    names = [output.name for output in model.graph.output]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def assert_right(folder: Path) -> None:
    """The program's outputs have the dims and the values that onnxruntime's have."""
    assert compile_(folder) == 0
    program = CompiledProgram.open(str(folder / "qpc"))
    x = np.random.default_rng(1).standard_normal((ROWS, 4), np.float32)
    expected = computed(folder / "net.onnx", x)
    dims = {binding.name: tuple(binding.dims) for binding in program.bindings}
    assert dims == {"x": (ROWS, 4), **{name: array.shape for name, array in expected.items()}}
    found = LoadedProgram(program, 1).activate().run({"x": x}, {n: dims[n] for n in expected})
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", WRONG.values(), ids=WRONG)
def test_an_output_has_the_shape_that_the_graph_computes(dims: Any, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["y"]),
    ]
    save(tmp_path / "net.onnx", nodes, [declared("y", dims)])
    assert_right(tmp_path)


def test_values_that_are_said_to_be_of_one_size_get_memory_of_their_own(tmp_path: Path) -> None:
    # onnxruntime would give `grown` the memory of `small`, and fail on it.
    nodes = [
        helper.make_node("Relu", ["x"], ["small"]),
        helper.make_node("Concat", ["small", "small"], ["both"], axis=0),
        helper.make_node("Exp", ["both"], ["grown"]),
        helper.make_node("Abs", ["grown"], ["y"]),
    ]
    inside = [declared(name, ["batch", 4]) for name in ("small", "both", "grown")]
    save(tmp_path / "net.onnx", nodes, [declared("y", ["batch", 4])], *inside)
    as_declared = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    with pytest.raises(Exception, match="re-use buffer"):
        as_declared.run(None, {"x": np.zeros((ROWS, 4), np.float32)})
    assert_right(tmp_path)


STEPS: dict[str, tuple[int, int, Any]] = {
    "transposed": (2, 0, lambda a, b, r: node("Transpose", a, b, perm=list(range(r))[::-1])),
    "doubled": (1, 0, lambda a, b, r: node("Concat", a, a, b, axis=r - 1)),
    "mean": (2, -1, lambda a, b, r: node("ReduceMean", a, b, axes=[0], keepdims=0)),
    "kept": (1, 0, lambda a, b, r: node("ReduceMax", a, b, axes=[r - 1])),
    "flat": (2, 0, lambda a, b, r: node("Flatten", a, b, axis=r - 1)),
    "bent": (1, 0, lambda a, b, r: node("Tanh", a, b)),
}
"""Least rank, how the rank changes, and the node from a to b where a has rank r."""


def node(kind: str, *names: str, **attributes: Any) -> Any:
    """A node whose last name is what it makes."""
    return helper.make_node(kind, names[:-1], names[-1:], **attributes)


def chain(steps: list[str]) -> list[Any]:
    """Nodes of these steps, as far as the rank lets them; v1 is what the first makes."""
    rank, nodes = 2, [node("Relu", "x", "v1")]
    for needed, change, make in (STEPS[step] for step in steps):
        if rank >= needed:
            nodes.append(make(f"v{len(nodes)}", f"v{len(nodes) + 1}", rank))
            rank += change
    return nodes


@given(
    st.lists(st.sampled_from(list(STEPS)), max_size=6),
    st.lists(st.none() | st.lists(st.sampled_from(NAMES), max_size=3), min_size=7, max_size=7),
    st.integers(1, 3),
)
def test_nothing_that_is_declared_changes_what_is_computed(
    steps: list[str], claims: list[Any], num_outputs: int
) -> None:
    nodes = chain(steps)
    values = [declared(n.output[0], dims) for n, dims in zip(nodes, claims, strict=False)]
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "net.onnx", nodes, values[-num_outputs:], *values[:-num_outputs])
        assert_right(Path(folder))


def test_where_nothing_can_be_inferred_what_is_declared_is_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # onnx has no inference for operators of onnxruntime's own.
    gelu = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    save(tmp_path / "net.onnx", [gelu], [declared("y", ["batch", 4])], domain="com.microsoft")
    assert_right(tmp_path)
    for dims in (None, ["batch", "nobody"]):
        other = tmp_path / str(dims)
        other.mkdir()
        save(other / "net.onnx", [gelu], [declared("y", dims)], domain="com.microsoft")
        assert "The shape of output 'y' cannot be inferred" in refusal(other, capsys)


def test_of_an_output_only_the_axes_that_cannot_be_inferred_are_believed(tmp_path: Path) -> None:
    # As many rows as are not zero: that is told by the values, the width by the graph.
    nodes = [
        node("ReduceMax", "x", "largest", axes=[1], keepdims=0),
        node("Cast", "largest", "chosen", to=TensorProto.BOOL),
        node("Compress", "x", "chosen", "y", axis=0),
    ]
    save(tmp_path / "net.onnx", nodes, [declared("y", ["batch", "length"])])
    assert_right(tmp_path)


def test_branches_have_the_shapes_that_they_compute(tmp_path: Path) -> None:
    branches = {
        name: helper.make_graph([node(kind, "hidden", name)], name, [], [declared(name, ["batch"])])
        for name, kind in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    nodes = [
        node("MatMul", "x", "W", "hidden"),
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Cast", "sum", "chosen", to=TensorProto.BOOL),
        node("If", "chosen", "y", **branches),
    ]
    save(tmp_path / "net.onnx", nodes, [declared("y", ["batch"])])
    assert_right(tmp_path)


def test_a_state_that_does_not_keep_its_shape_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A cache that grows by a token each step, as exporters make it without a place for each.
    past, token = (declared(name, [1, n, 4]) for name, n in (("past", 8), ("token", 1)))
    present = declared("past_RetainedState", [1, 8, 4])
    grown = helper.make_node("Concat", ["past", "token"], ["past_RetainedState"], axis=1)
    made = helper.make_graph([grown], "net", [past, token], [present])
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "net.onnx",
    )
    said = refusal(tmp_path, capsys, "-retained-state")
    assert "'past' has the shape [1, 8, 4] and its output 'past_RetainedState' [1, 9, 4]" in said


CACHES = """
<ir_version: 8, opset_import: ["": 17, "com.qualcomm.cloud": 1]>
net (float[1, 1, short, 2] past_0, float[1, 1, long, 2] past_1, float[1, 1, 1, 2] new,
     int64[1, 1] where, int64[1, 1, 3] read)
     => (float[1, 1, short, 2] past_0_RetainedState, float[1, 1, short, 2] past_1_RetainedState,
         float[a] seen_0, float[b] seen_1)
{
  past_0_RetainedState = com.qualcomm.cloud.CtxScatter (past_0, where, new)
  past_1_RetainedState = com.qualcomm.cloud.CtxScatter (past_1, where, new)
  seen_0 = com.qualcomm.cloud.CtxGather (past_0_RetainedState, read)
  seen_1 = com.qualcomm.cloud.CtxGather (past_1_RetainedState, read)
}
"""


def test_caches_of_two_lengths_that_are_declared_as_one(tmp_path: Path) -> None:
    # As a model with a sliding window has them. What a position is in one it is not in the other.
    onnx.save(onnx.parser.parse_model(CACHES), tmp_path / "net.onnx")
    flags = ["-retained-state", "-onnx-define-symbol=short,4", "-onnx-define-symbol=long,8"]
    assert compile_(tmp_path, *flags) == 0
    program = CompiledProgram.open(str(tmp_path / "qpc"))
    dims = {b.name: tuple(b.dims) for b in program.bindings}
    assert dims["past_1_RetainedState"] == (1, 1, 8, 2)
    run = LoadedProgram(program, 1).activate().run
    for position in (2, 6):  # the short cache has no place for the second
        feeds = {
            "new": np.full((1, 1, 1, 2), position + 1, np.float32),
            "where": np.array([[position]]),
            "read": np.array([[[2, 3, 6]]]),
        }
        found = run(feeds, {name: dims[name] for name in ("seen_0", "seen_1")})
    assert found["seen_0"][0, 0, :2, 0].tolist() == [3, 0]
    assert found["seen_1"][0, 0, :, 0].tolist() == [3, 0, 7]


@pytest.mark.parametrize(("kv", "error"), [(None, 1e-4), ("float16", 1e-2), ("mxint8", 0.1)])
@pytest.mark.parametrize("dims", WRONG.values(), ids=WRONG)
def test_a_language_model_is_the_same_whatever_it_declares(
    dims: Any, kv: str | None, error: float, tmp_path: Path
) -> None:
    llama = TinyLlama(hidden=128)
    argv = write_inputs(tmp_path, llama, kv=kv)
    model = onnx.load(tmp_path / "tiny.onnx")
    names = {None: None, "batch": "batch_size", "length": "seq_len"}
    dims = dims and [names.get(dim, dim) for dim in dims]
    for output in model.graph.output:
        output.CopyFrom(declared(output.name, dims))
    inside = [name for n in model.graph.node[:-1] for name in n.output]
    model.graph.value_info.extend(declared("hidden_0", dims) for _ in inside[:1])
    onnx.save(model, tmp_path / "tiny.onnx")
    assert compiler.main(argv) == 0
    program = CompiledProgram.open(str(tmp_path / "qpc"))
    found = {b.name: tuple(b.dims) for b in program.bindings}
    assert found["logits"] == (SLOTS, 1, llama.vocab)
    numpy_model = NumpyLlama(llama, llama.weights)
    tokens = np.array([[7], [50], [3]])
    expected = [numpy_model.forward(slot, int(t), 0) for slot, t in enumerate(tokens[:, 0])]
    for loaded in three_ways(program):
        feeds = {"input_ids": tokens, "position_ids": np.zeros_like(tokens)}
        feeds["batch_index"] = np.arange(SLOTS)[:, None]
        made = loaded.activate().run(feeds, {"logits": found["logits"]})["logits"]
        np.testing.assert_allclose(made[:, 0], expected, rtol=error, atol=error)


MALFORMED: dict[str, Any] = {
    "a Concat without an axis": lambda: [node("Concat", "x", "x", "y")],
    "a Slice without an end": lambda: [node("Slice", "x", "W", "y")],
    "a Constant without a value": lambda: [node("Constant", "c"), node("Add", "x", "c", "y")],
    "a Cast of nothing": lambda: [helper.make_node("Cast", [], ["y"], to=1)],
    "a TopK of one output": lambda: [node("TopK", "x", "y")],
}


@pytest.mark.parametrize("dims", [["batch", 4], None], ids=["declared", "undeclared"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_nodes_are_refused_in_one_line(
    name: str, dims: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "net.onnx", MALFORMED[name](), [declared("y", dims)])
    err = refusal(tmp_path, capsys).splitlines()
    assert err[0] == "QAIC_ERROR:"
    assert err[-1].startswith("QAICException:")


def test_a_constant_whose_bytes_are_too_few_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "net.onnx", [node("MatMul", "x", "W", "y")], [declared("y", ["batch", 6])])
    model = onnx.load(tmp_path / "net.onnx")
    model.graph.initializer[0].dims[1] = 7
    onnx.save(model, tmp_path / "net.onnx")
    assert "'W'" in refusal(tmp_path, capsys)


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2", "STRING"])
def test_a_large_constant_of_a_type_that_no_card_holds_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = TensorProto.DataType.Value(kind)
    values = [b"1"] * 4096 if kind == "STRING" else [1] * 4096
    nodes = [helper.make_node("Cast", ["q"], ["wide"], to=1), node("MatMul", "x", "wide", "y")]
    save(tmp_path / "net.onnx", nodes, [declared("y", ["batch", 1024])])
    model = onnx.load(tmp_path / "net.onnx")
    model.graph.initializer.append(helper.make_tensor("q", number, [4, 1024], values))
    model.opset_import[0].version = 21
    onnx.save(model, tmp_path / "net.onnx")
    assert f"The constant 'q' is of the type {kind}" in refusal(tmp_path, capsys)
