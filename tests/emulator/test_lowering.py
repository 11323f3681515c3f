"""A lowered graph equals its reference graph, on any schedule; and what is not equal stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from compiled import COMP_CTX_LENGTHS, CTX_LEN, PROMPT_LEN, SLOTS, compile_tiny, three_ways
from hypothesis import given
from tiny_llama import TinyLlama

from qaic_ray.emulator.container.execution import (
    Activation,
    CompiledProgram,
    LoadedProgram,
    NoMatchingDimension,
)
from qaic_ray.emulator.lowering import graph
from qaic_ray.emulator.lowering.lowered import MAX_IDLE_RUN, Call, plan

TOLERANCE = 1e-4


def ops_of(qpc: CompiledProgram) -> list[str]:
    model = onnx.ModelProto.FromString(qpc.graphs["lowered"])
    return [node.op_type for node in model.graph.node]


class Pair:
    """The same activation as a step, on the lowered graph, and on the reference graph."""

    def __init__(self, folder: Path, llama: TinyLlama, kv: str | None, *flags: str) -> None:
        self.llama = llama
        self.qpc = compile_tiny(folder, llama, *flags, kv=kv)
        self.programs = three_ways(self.qpc)
        # Where the last bits differ, a rounded cache may differ by one step of float16.
        self.tolerance = TOLERANCE if kv is None else 2e-3
        self.activations: list[Activation] = []

    def start(self) -> None:
        self.activations = [program.activate() for program in self.programs]

    def run(self, positions: np.ndarray, slots: np.ndarray, ids: np.ndarray) -> None:
        inputs = {"input_ids": ids, "position_ids": positions}
        if self.llama.continuous:
            inputs["batch_index"] = slots[:, None]
        wanted = {"logits": (len(ids), 1, self.llama.vocab)}
        *made, reference = (a.run(inputs, wanted)["logits"] for a in self.activations)
        active = (positions >= 0).any(axis=1)
        for result in made:
            np.testing.assert_allclose(result[active], reference[active], atol=self.tolerance)
        for name in self.llama.past_names():
            *states, expected = (a.state(name) for a in self.activations)
            for state in states:
                np.testing.assert_allclose(state, expected, atol=self.tolerance, err_msg=name)


@pytest.fixture(scope="module", params=["continuous", "static", "continuous-fp16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("lowering")
    llama = TinyLlama(continuous=request.param != "static")
    if request.param.endswith("fp16"):
        return Pair(folder, llama, "float16", "-convert-to-fp16")
    return Pair(folder, llama, None)


@st.composite
def prefill(draw: st.DrawFn, continuous: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions and slots of one chunk: ragged rows, any start, now and then no simple form."""
    num_rows = 1 if continuous else SLOTS
    positions = np.full((num_rows, PROMPT_LEN), -1, np.int64)
    for row in positions:
        length = draw(st.integers(0, PROMPT_LEN))
        start = draw(st.integers(0, CTX_LEN - PROMPT_LEN))
        row[:length] = np.arange(start, start + length)
        if draw(st.integers(0, 9)) == 0:
            row[:] = draw(st.permutations(list(row)))
    slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=num_rows, max_size=num_rows))
    return positions, np.array(slots, np.int64)


@st.composite
def decode(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Positions and slots of one decode step: idle rows, rows in any order."""
    where = st.one_of(st.just(-1), st.integers(0, CTX_LEN - 1))
    positions = draw(st.lists(where, min_size=SLOTS, max_size=SLOTS))
    slots = draw(st.permutations(range(SLOTS)))
    return np.array(positions, np.int64)[:, None], np.array(slots, np.int64)


@given(data=st.data())
def test_lowered_equals_reference_on_random_schedules(pair: Pair, data: st.DataObject) -> None:
    pair.start()
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    steps = st.lists(st.one_of(prefill(pair.llama.continuous), decode()), min_size=1, max_size=8)
    for positions, slots in data.draw(steps):
        pair.run(positions, slots, rng.integers(0, pair.llama.vocab, positions.shape))


def test_the_reference_graph_takes_over_for_positions_of_no_simple_form(pair: Pair) -> None:
    pair.start()
    rows = 1 if pair.llama.continuous else SLOTS
    for pattern in ([2, 0, 1, 3], [0, -1, 1, 2], [0, 2, 4, -1], [13, 14, 15, 16]):
        positions = np.tile(np.array(pattern, np.int64), (rows, 1))
        pair.run(positions, np.arange(rows), np.arange(rows * PROMPT_LEN).reshape(rows, -1))


def test_lowered_graph_is_made_of_fused_operators(pair: Pair) -> None:
    ops = ops_of(pair.qpc)
    layers = pair.llama.num_layers
    assert ops.count("GroupQueryAttention") == layers
    assert ops.count("RotaryEmbedding") == 2 * layers
    assert ops.count("SimplifiedLayerNormalization") == 2 * layers + 1
    others = {"Softmax", "Transpose", "ScatterND", "CtxScatter", "CtxGatherCB"}
    assert not (others | {"GatherElements", "Expand", "Slice", "Constant"}) & set(ops)


class ChoosesFirst(TinyLlama):
    """Logits are those of the token with the lowest position."""

    def onnx(self) -> Any:
        model = super().onnx()
        for node in model.graph.node:
            if node.op_type == "ArgMax":
                node.op_type = "ArgMin"
        return model


def test_another_choice_of_tokens_is_not_rewritten_and_not_trusted(tmp_path: Path) -> None:
    qpc = compile_tiny(tmp_path, ChoosesFirst())
    assert {"ArgMin", "GatherElements"} <= set(ops_of(qpc))
    assert LoadedProgram(qpc, 1).step is None
    assert LoadedProgram(qpc, 1).lowered is None


@pytest.mark.parametrize("position", [3, 6])
def test_only_as_much_context_as_the_specialization_has_is_read(
    tmp_path: Path, position: int
) -> None:
    pair = Pair(tmp_path, TinyLlama(comp_ctx_lengths=True), None)
    pair.start()
    positions = np.arange(position, position + PROMPT_LEN)[None]
    ids = np.array([[5, 6, 7, 8]])
    made = []
    for activation in pair.activations:
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "batch_index": np.array([[1]]),
            "comp_ctx_lengths": np.zeros(COMP_CTX_LENGTHS[0], np.int64),
        }
        wanted = {"logits": (1, 1, pair.llama.vocab)}
        made.append(activation.run(inputs, wanted)["logits"])
        inputs["comp_ctx_lengths"] = np.zeros(CTX_LEN, np.int64)
        with pytest.raises(NoMatchingDimension):
            activation.run(inputs, wanted)
    *made, expected = made
    for result in made:
        np.testing.assert_allclose(result, expected, atol=TOLERANCE)


# How torch.onnx writes `view(*input_shape, -1, head_dim)`: inference does not see through it.
VIEW = """sizes_{i} = Shape (normed_{i})
  rows_{i} = Gather (sizes_{i}, zero)
  tokens_{i} = Gather (sizes_{i}, one)
  rows_1d_{i} = Unsqueeze (rows_{i}, i0)
  tokens_1d_{i} = Unsqueeze (tokens_{i}, i0)
  view_{i} = Concat <axis = 0> (rows_1d_{i}, tokens_1d_{i}, last, full)
  q4_{i} = Reshape (q_{i}, view_{i})"""

# As exporters write a window of attention; 11 is more than the cases of the proof that are small.
WINDOW = """window_{i} = Constant <value = int64 {{11}}> ()
  before_{i} = Sub (row_positions, window_{i})
  old_3d_{i} = LessOrEqual (kv_index, before_{i})
  old_{i} = Unsqueeze (old_3d_{i}, i1)
  near_{i} = Where (old_{i}, minus, scaled_{i})
  cut_{i} = Where (masked, minus, near_{i})"""
CHUNKS = """chunk_{i} = Constant <value = int64 {{11}}> ()
  of_query_{i} = Div (row_positions, chunk_{i})
  of_key_{i} = Div (kv_index, chunk_{i})
  old_3d_{i} = Less (of_key_{i}, of_query_{i})
  old_{i} = Unsqueeze (old_3d_{i}, i1)
  near_{i} = Where (old_{i}, minus, scaled_{i})
  cut_{i} = Where (masked, minus, near_{i})"""
CUT = "cut_{i} = Where (masked, minus, scaled_{i})"

NORM = "normed_{i} = com.qti.aisw.onnx.CustomRMSNorm <epsilon = 0.00001> (hidden_{i}, norm1_{i})"
# As the recipe writes it: scaled by a root of the width that is measured, and then squared.
PLAIN_NORM = """ten_{i} = Constant <value = float {{0.00001}}> ()
  two_{i} = Constant <value = float {{2.0}}> ()
  unity_{i} = Constant <value = float {{1.0}}> ()
  wide_{i} = Cast <to = 1> (hidden_{i})
  hidden_dims_{i} = Shape (wide_{i})
  width_1d_{i} = Slice (hidden_dims_{i}, i2, i3)
  width_{i} = Cast <to = 1> (width_1d_{i})
  root_width_{i} = Sqrt (width_{i})
  small_{i} = Div (wide_{i}, root_width_{i})
  squares_{i} = Pow (small_{i}, two_{i})
  mean_{i} = ReduceSum <keepdims = 1> (squares_{i}, last)
  shifted_{i} = Add (mean_{i}, ten_{i})
  root_{i} = Sqrt (shifted_{i})
  inverse_{i} = Div (unity_{i}, root_{i})
  unit_{i} = Mul (wide_{i}, inverse_{i})
  normed_{i} = Mul (norm1_{i}, unit_{i})"""
CUT_TABLE = """cut_table_{i} = Slice (cos_table, i0, ctx_1d, i0)
  near_cos_{i} = Gather (cut_table_{i}, safe_positions)
  near_cos_4d_{i} = Unsqueeze (near_cos_{i}, i1)
  kcos_{i} = Mul (kt_{i}, near_cos_4d_{i})"""
MEASURED = """update_dims_{i} = Shape (krope_{i})
  measured_{i} = Reshape (krope_{i}, update_dims_{i})
  past_key_{i}_RetainedState = {scatter} (past_key_{i}, {slots}scatter_pos, measured_{i})"""

# How torch.export counts rows where there are slots.
BY_SLOTS = """num_rows_{i} = Shape <start = 0, end = 1> (batch_index)
  heads_by_slots_{i} = Concat <axis = 0> (num_rows_{i}, last, all_heads, full)
  q4_{i} = Reshape (q_{i}, heads_by_slots_{i})"""

SAME = {
    "rows counted by slots": ("q4_{i} = Reshape (q_{i}, heads_4d)", BY_SLOTS),
    "norm in plain operators": (NORM, PLAIN_NORM),
    "rotary table cut to the context": ("kcos_{i} = Mul (kt_{i}, cos)", CUT_TABLE),
    "keys reshaped to what they are": (
        "past_key_{i}_RetainedState = {scatter} (past_key_{i}, {slots}scatter_pos, krope_{i})",
        MEASURED,
    ),
    "heads by a computed view": ("q4_{i} = Reshape (q_{i}, heads_4d)", VIEW),
    "scale by division": ("Mul (raw_{i}, scale)", "Mul (scale, raw_{i})"),
    "values not zeroed": ("Where (invalid_v, nought, vg_{i})", "Identity (vg_{i})"),
    "rotation negated twice": ("Add (kcos_{i}, ksin_{i})", "Add (ksin_{i}, kcos_{i})"),
}
OTHER = {
    "attention in chunks": (CUT, CHUNKS),
    "strict mask": ("Where (masked, minus, scaled_{i})", "Where (masked_3d, minus, scaled_{i})"),
    "no mask": ("Where (masked, minus, scaled_{i})", "Identity (scaled_{i})"),
    "scores squared": ("Mul (raw_{i}, scale)", "Mul (raw_{i}, raw_{i})"),
    "softmax over queries": ("Softmax <axis = -1>", "Softmax <axis = 1>"),
    "keys twice": ("Unsqueeze (kg_{i}, i2)", "Unsqueeze (vg_{i}, i2)"),
}


@pytest.mark.parametrize("edit", list(SAME))
def test_other_ways_to_write_the_same_are_lowered(tmp_path: Path, edit: str) -> None:
    pair = Pair(tmp_path, TinyLlama(edits=(SAME[edit],)), None)
    ops = ops_of(pair.qpc)
    assert (ops.count("SimplifiedLayerNormalization"), ops.count("RotaryEmbedding")) == (5, 4)
    pair.start()
    pair.run(np.array([[0, 1, 2, -1]]), np.array([1]), np.array([[5, 6, 7, 8]]))
    pair.run(np.array([[0], [3], [-1]]), np.arange(3), np.array([[5], [6], [7]]))


@given(data=st.data())
def test_a_window_of_attention_is_lowered(windowed: Pair, data: st.DataObject) -> None:
    windowed.start()
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for start in range(0, CTX_LEN, PROMPT_LEN):
        positions = np.arange(start, start + PROMPT_LEN)[None]
        windowed.run(positions, np.array([1]), rng.integers(0, 61, positions.shape))
    for positions, slots in data.draw(st.lists(decode(), min_size=1, max_size=4)):
        windowed.run(positions, slots, rng.integers(0, 61, positions.shape))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = Pair(tmp_path_factory.mktemp("window"), TinyLlama(edits=((CUT, WINDOW),)), None)
    model = onnx.ModelProto.FromString(pair.qpc.graphs["lowered"])
    nodes = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    windows = [a.i for n in nodes for a in n.attribute if a.name == "local_window_size"]
    assert windows == [11] * pair.llama.num_layers
    return pair


def test_a_norm_of_embeddings_that_are_stored_narrow_is_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_LARGE_TABLE", 1)
    llama = TinyLlama(edits=((NORM, PLAIN_NORM),))
    pair = Pair(tmp_path, llama, "float16", "-convert-to-fp16")
    assert ops_of(pair.qpc).count("SimplifiedLayerNormalization") == 5
    pair.start()
    pair.run(np.array([[0, 1, 2, -1]]), np.array([1]), np.array([[5, 6, 7, 8]]))


class WithMadeUpNames(TinyLlama):
    """The dims of logits have names that nothing gives a value, as in QEfficient's exports."""

    def onnx(self) -> Any:
        model = super().onnx()
        for axis, dim in enumerate(model.graph.output[0].type.tensor_type.shape.dim[:2]):
            dim.dim_param = f"Castlogits_dim_{axis}"
        return model


def test_outputs_whose_dims_have_made_up_names_are_lowered(tmp_path: Path) -> None:
    pair = Pair(tmp_path, WithMadeUpNames(edits=(SAME["heads by a computed view"],)), None)
    pair.start()
    pair.run(np.array([[0, 1, 2, -1]]), np.array([1]), np.array([[5, 6, 7, 8]]))
    pair.run(np.array([[0], [3], [-1]]), np.arange(3), np.array([[5], [6], [7]]))


@pytest.mark.parametrize("edit", list(OTHER))
def test_other_attention_is_not_lowered(
    tmp_path: Path, edit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = TinyLlama(num_kv_heads=4, edits=(OTHER[edit],))
    qpc = compile_tiny(tmp_path, llama)
    assert "lowered" not in qpc.graphs
    assert "runs as it is" in capsys.readouterr().out
    activation = LoadedProgram(qpc, 1).activate()
    inputs = {
        "input_ids": np.array([[1, 2, 3, 4]]),
        "position_ids": np.array([[0, 1, 2, 3]]),
        "batch_index": np.array([[0]]),
    }
    assert activation.run(inputs, {"logits": (1, 1, llama.vocab)})["logits"].shape[2] == llama.vocab


def rows_of(calls: list[Call]) -> Iterator[tuple[int, int, int]]:
    for call in calls:
        for index, row in enumerate(call.rows):
            if row >= 0:
                yield row, call.first + index, call.length


@given(
    slots=st.permutations(range(40)),
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    starts=st.lists(st.integers(0, 5), min_size=40, max_size=40),
    joint_length=st.integers(1, 3),
)
def test_plan_covers_every_valid_row_once(
    slots: list[int], lengths: list[int], starts: list[int], joint_length: int
) -> None:
    positions = np.full((len(lengths), 3), -1)
    for row, (length, start) in enumerate(zip(lengths, starts, strict=False)):
        positions[row, :length] = np.arange(start, start + length)
    index = np.array(slots[: len(lengths)])
    calls = plan(positions, index, 40, 8, joint_length=joint_length)
    assert calls is not None
    expected = [(r, int(index[r]), n) for r, n in enumerate(lengths) if n]
    covers = sorted(rows_of(calls))
    assert [found[:2] for found in covers] == [wanted[:2] for wanted in expected]
    for call in calls:
        assert call.length == max(lengths[row] for row in call.rows if row >= 0)
    covered = [call.first + i for call in calls for i in range(call.num_slots)]
    assert len(set(covered)) == len(covered)
    assert all(call.rows[0] >= 0 and call.rows[-1] >= 0 for call in calls)
    assert all(call.length <= joint_length or call.num_slots == 1 for call in calls)


def test_plan_joins_decode_rows_over_short_gaps_only() -> None:
    def decode_of(*slots: int) -> Any:
        return plan(np.zeros((len(slots), 1), int), np.array(slots), 64, 8)

    assert decode_of(0, 3) == [Call(0, (0, -1, -1, 1), 1)]
    assert decode_of(3, 0) == [Call(0, (1, -1, -1, 0), 1)]
    far = MAX_IDLE_RUN + 2
    assert decode_of(0, far) == [Call(0, (0,), 1), Call(far, (1,), 1)]


@pytest.mark.parametrize(
    ("positions", "slots"),
    [
        ([[0, 2]], [0]),
        ([[-1, 0]], [0]),
        ([[7, 8]], [0]),
        ([[0], [0]], [1, 1]),
        ([[0]], [4]),
        ([[0]], [-1]),
    ],
)
def test_plan_refuses_what_is_not_simple(positions: Any, slots: Any) -> None:
    assert plan(np.array(positions), np.array(slots), 4, 8) is None
