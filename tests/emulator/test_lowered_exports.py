"""Our own exports as a compiled step and on the lowered graph: equal to the reference graph.

Logits of all tokens, of the last few, token ids in their place, and a context computed in part.
That the reference graph equals transformers is shown in `tests/export`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from compiled import three_ways
from hypothesis import given, settings

from qaic_ray.contract import LOGITS, NEXT_TOKENS, Specialization, Specializations
from qaic_ray.emulator.container.execution import Activation, CompiledProgram
from qaic_ray.emulator.lowering.lowered import Probe

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

SLOTS, CTX_LEN, VOCAB = 3, 32, 300

OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"logits": "all"},
    "all, static": {"logits": "all", "continuous": False},
    "all, next_tokens": {"logits": "all", "next_tokens": True},
    "next_tokens": {"next_tokens": True},
    "speculation": {"num_speculative_tokens": 3},
    "speculation, static": {"num_speculative_tokens": 2, "continuous": False},
    "speculation, next_tokens": {"num_speculative_tokens": 3, "next_tokens": True},
    "contexts": {"comp_ctx_lengths": (8, 16)},
    "contexts, static": {"comp_ctx_lengths": (8, 16), "continuous": False},
    "speculation, contexts": {
        "num_speculative_tokens": 3,
        "next_tokens": True,
        "comp_ctx_lengths": (8,),
    },
    "two prompt lengths": {"prompt_len": (4, 8)},
}


class Pair:
    """The same activation three times: the step, the lowered graph and the reference graph."""

    def __init__(self, tiny: TinyQpcs, **options: Any) -> None:
        shape = {"batch_size": SLOTS, "prompt_len": 4, "ctx_len": CTX_LEN}
        folder = tiny.qpc(**(shape | options))
        self.shapes = Specializations.load(folder / "specializations.json")
        self.logits = options.get("logits", "last")
        self.output = NEXT_TOKENS if options.get("next_tokens") else LOGITS
        qpc = CompiledProgram.open(str(folder))
        self.programs = three_ways(qpc)
        self.activations: list[Activation] = []

    def start(self) -> None:
        self.activations = [program.activate() for program in self.programs]

    def run(self, shape: Specialization, lengths: Any, starts: Any, slots: Any, ids: Any) -> None:
        """One inference; of what both make, what valid tokens have is compared."""
        num, seq_len = ids.shape
        steps = np.arange(seq_len)
        positions = np.where(steps < lengths[:, None], starts[:, None] + steps, -1)
        num_tokens = {"last": 1, "all": seq_len}[self.logits]
        inputs = {"input_ids": ids, "position_ids": positions}
        if self.shapes.continuous:
            inputs["batch_index"] = slots[:, None]
        if shape.num_logits_to_keep is not None:
            num_tokens = shape.num_logits_to_keep
            inputs["num_logits_to_keep"] = np.zeros((num_tokens, 1), np.int64)
        if shape.comp_ctx_lengths is not None:
            inputs["comp_ctx_lengths"] = np.zeros(shape.comp_ctx_lengths, np.int64)
        width = 1 if self.output == NEXT_TOKENS else VOCAB
        wanted = {self.output: (num, num_tokens, width)}
        *made, reference = (a.run(inputs, wanted)[self.output] for a in self.activations)
        for result in made:
            assert result.shape == reference.shape
            for row, length in enumerate(lengths):
                known = min(length, num_tokens)
                np.testing.assert_allclose(result[row, :known], reference[row, :known], atol=1e-4)
        for name in self.programs[0].qpc.states:
            *states, expected = (a.state(name) for a in self.activations)
            for state in states:
                np.testing.assert_allclose(state, expected, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request: pytest.FixtureRequest, tiny: TinyQpcs) -> Pair:
    return Pair(tiny, **OPTIONS[request.param])


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_lowered_equals_reference_on_random_schedules(pair: Pair, data: st.DataObject) -> None:
    """Rows of any number of tokens, idle ones too, in any order of slots."""
    pair.start()
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for shape in data.draw(st.lists(st.sampled_from(pair.shapes.entries), max_size=6)):
        num, room = shape.batch_size, shape.reach - shape.seq_len
        lengths = data.draw(st.lists(st.integers(0, shape.seq_len), min_size=num, max_size=num))
        starts = data.draw(st.lists(st.integers(0, room), min_size=num, max_size=num))
        slots = data.draw(st.permutations(range(SLOTS)))[:num]
        ids = rng.integers(0, VOCAB, (num, shape.seq_len))
        pair.run(shape, np.array(lengths), np.array(starts), np.array(slots), ids)


CHOICE = ["Add", "ArgMax", "Cast", "Gather", "Range", "Reshape", "Shape", "Unsqueeze"]
"""Operators of the one form in which lowered graphs choose tokens; `Mul` is one of the layers."""


@pytest.mark.parametrize("name", ["contexts", "speculation", "two prompt lengths"])
def test_tokens_with_logits_are_chosen_in_one_form(tiny: TinyQpcs, name: str) -> None:
    qpc = Pair(tiny, **OPTIONS[name]).programs[0].qpc
    ops = [node.op_type for node in onnx.ModelProto.FromString(qpc.graphs["lowered"]).graph.node]
    of_layers = {"MatMul", "Mul", "Sigmoid", "GroupQueryAttention", "RotaryEmbedding"}
    of_layers |= {"SimplifiedLayerNormalization", "Constant"}
    kept = {"Max", "Sub"} if "num_speculative_tokens" in OPTIONS[name] else set()
    assert set(ops) - of_layers == {*CHOICE, *kept}


def test_several_tokens_of_several_rows_run_at_once(tiny: TinyQpcs) -> None:
    pair = Pair(tiny, num_speculative_tokens=3)
    assert pair.programs[1].joint_length == 4
    pair.start()
    shape, ids = pair.shapes.decode, np.arange(SLOTS * 4).reshape(SLOTS, 4)
    calls = []
    joint = pair.programs[1].joint()

    class Counting:
        """The session, which tells of its runs."""

        def __getattr__(self, name: str) -> Any:
            return getattr(joint, name)

        def run_with_iobinding(self, binding: Any) -> None:
            calls.append(binding)
            joint.run_with_iobinding(binding)

    pair.programs[1]._joint = Counting()
    for lengths in ([4, 2, 3], [1, 1, 1], [0, 4, 0], [4, 0, 4]):
        pair.run(shape, np.array(lengths), np.array([3, 28, 0]), np.arange(SLOTS), ids)
    assert len(calls) == 2  # rows of one token, and a row alone, need no joint graph


def test_rows_run_one_by_one_where_joint_ones_differ(
    tiny: TinyQpcs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Probe, "joins", lambda *_: False)
    pair = Pair(tiny, num_speculative_tokens=3)
    pair.start()
    ids = np.arange(SLOTS * 4).reshape(SLOTS, 4)
    lengths, starts = np.array([4, 2, 3]), np.array([3, 28, 0])
    pair.run(pair.shapes.decode, lengths, starts, np.arange(SLOTS), ids)
    assert "one by one" in caplog.text
