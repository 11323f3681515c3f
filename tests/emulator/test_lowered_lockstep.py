"""Exports with `--io cache-index` on the lowered graph: what a caller sees is the reference's.

Rows are padded on the left by any amounts and write the same slots; waves of several chunks begin
anew at slot 0, and what an earlier wave left lies behind them. Logits, the mask, and every slot of
the cache that is looked at are compared, the padding's too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from compiled import three_ways
from hypothesis import given, settings

from qaic_ray.contract import ATTENTION_MASK, CACHE_INDEX, LOGITS, NEXT_TOKENS, IoContract
from qaic_ray.emulator.container.execution import (
    Activation,
    CompiledProgram,
    ExecutionError,
)
from qaic_ray.emulator.lowering.lowered import Runner

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

ROWS, PROMPT_LEN, CTX_LEN, VOCAB = 3, 4, 16, 300
BLIND_STEP = 2**-9
"""What float32 tells apart of the scores of padding, which sees no slot: each is about -32000. A
score's last bit, which any order of sums may have, moves them by as much."""
OPTIONS: dict[str, dict[str, Any]] = {
    "last": {},
    "all": {"logits": "all"},
    "next_tokens": {"next_tokens": True},
}


class Pair:
    """The same activation again and again; the last one is on the reference graph."""

    def __init__(self, tiny: TinyQpcs, **options: Any) -> None:
        shape = {"batch_size": ROWS, "prompt_len": PROMPT_LEN, "ctx_len": CTX_LEN}
        folder = tiny.qpc(io=IoContract.CACHE_INDEX, **(shape | options))
        self.is_all = options.get("logits") == "all"
        self.output = NEXT_TOKENS if options.get("next_tokens") else LOGITS
        self.qpc = CompiledProgram.open(str(folder))
        self.programs = three_ways(self.qpc)
        self.start()

    def start(self) -> None:
        self.activations: list[Activation] = [program.activate() for program in self.programs]
        # Slots of padding that an earlier wave left: nothing ever computed them.
        self.unknown = np.zeros((ROWS, CTX_LEN), bool)
        # Slots of padding that saw nothing, so that they are the mean of whatever was there.
        self.blind = np.zeros((ROWS, CTX_LEN), bool)

    def run(
        self,
        index: int,
        ids: Any,
        positions: Any,
        mask: Any = None,
        *,
        pads: Any = None,
        past: Any = None,
    ) -> None:
        """One inference; compares what it makes of tokens, those from `pads` on, and the mask."""
        length = ids.shape[1]
        inputs = {"input_ids": ids, "position_ids": positions, CACHE_INDEX: np.array([index])}
        inputs |= {} if mask is None else {ATTENTION_MASK: mask.astype(np.int8)}
        inputs |= past or {}
        columns = (length,) if self.is_all else ()
        width = 1 if self.output == NEXT_TOKENS else VOCAB
        kept = ATTENTION_MASK + "_RetainedState"
        wanted = {self.output: (ROWS, *columns, width), kept: (ROWS, CTX_LEN)}
        *results, reference = (a.run(inputs, wanted) for a in self.activations)
        seen = np.ones((ROWS, length), bool)
        if pads is not None:
            seen = index + np.arange(length) >= pads[:, None]
        seen = (
            seen if self.is_all else seen[:, -1]
        )  # a chunk of nothing but padding answers nothing
        for result in results:
            np.testing.assert_array_equal(result[kept], reference[kept])
            made, expected = (m[self.output] for m in (result, reference))
            assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
            np.testing.assert_allclose(made[seen], expected[seen], atol=1e-4)
        self.unknown[:, index : index + length] = self.blind[:, index : index + length] = False

    def compare_caches(self) -> None:
        for name in self.programs[0].caches:
            states = [a.state(name) for a in self.activations]
            *made, expected = (np.where(self.unknown[:, None, :, None], 0, s) for s in states)
            # Twice that in each of two layers, of the largest value that is weighed.
            wide = 4 * BLIND_STEP * np.abs(expected).max()
            allowed = np.where(self.blind[:, None, :, None], wide, 1e-4)
            for state in made:
                beyond = np.abs(state - expected) > allowed
                assert not beyond.any(), (name, np.argwhere(beyond)[:5].tolist())

    def wave(self, pads: Any, num_chunks: int, ids: Any, *, whole_mask: bool = False) -> None:
        """Prefill of prompts padded to `num_chunks`; the mask ends with the chunk, or with all."""
        self.begin_wave()
        slots = np.arange(CTX_LEN)
        for start in range(0, num_chunks * PROMPT_LEN, PROMPT_LEN):
            chunk = np.arange(start, start + PROMPT_LEN)
            stop = num_chunks * PROMPT_LEN if whole_mask else start + PROMPT_LEN
            mask = (slots >= pads[:, None]) & (slots < stop)
            where = np.maximum(chunk - pads[:, None], 0)
            self.run(start, ids[:, chunk], where, mask, pads=pads)
            if whole_mask:
                # Padding attends to slots of later chunks, whatever they held.
                self.unknown[:, chunk] |= chunk < pads[:, None]
            else:
                self.blind[:, chunk] = chunk < pads[:, None]
        self.pads, self.index = pads, num_chunks * PROMPT_LEN

    def begin_wave(self) -> None:
        state = self.activations[0]._lockstep
        assert state is not None
        self.unknown |= state._is_open

    def decode(self, ids: Any) -> None:
        self.run(self.index, ids, (self.index - self.pads)[:, None])
        self.index += 1


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request: pytest.FixtureRequest, tiny: TinyQpcs) -> Pair:
    return Pair(tiny, **OPTIONS[request.param])


@given(data=st.data())
def test_lowered_equals_reference_wave_after_wave(pair: Pair, data: st.DataObject) -> None:
    pair.start()
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for _ in range(data.draw(st.integers(1, 3))):
        num_chunks = data.draw(st.integers(1, CTX_LEN // PROMPT_LEN))
        padding = st.integers(0, num_chunks * PROMPT_LEN - 1)
        pads = np.array(data.draw(st.lists(padding, min_size=ROWS, max_size=ROWS)))
        ids = rng.integers(0, VOCAB, (ROWS, CTX_LEN))
        pair.wave(pads, num_chunks, ids, whole_mask=data.draw(st.booleans()))
        if data.draw(st.booleans()):
            pair.compare_caches()
        for _ in range(data.draw(st.integers(0, CTX_LEN - pair.index))):
            pair.decode(rng.integers(0, VOCAB, (ROWS, 1)))
    pair.compare_caches()


@st.composite
def any_step(draw: st.DrawFn) -> dict[str, Any]:
    """An inference that no generation loop makes: any index, positions and mask, or none."""
    length = draw(st.sampled_from([1, PROMPT_LEN]))
    index = draw(st.integers(0, CTX_LEN - length))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=ROWS * CTX_LEN))
    if mask is not None:
        mask = np.array(mask[: ROWS * CTX_LEN]).reshape(ROWS, CTX_LEN)
        if draw(st.booleans()):
            mask = np.maximum.accumulate(mask, axis=1)
    offset = draw(st.sampled_from([0, 0, 1, -1]))
    return {"index": index, "length": length, "mask": mask, "offset": offset}


@settings(max_examples=2 * settings().max_examples)
@given(
    steps=st.lists(any_step(), min_size=1, max_size=5),
    pads=st.lists(st.integers(0, PROMPT_LEN - 1), min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 1000),
    reads=st.booleans(),
)
def test_whatever_is_asked_a_valid_answer_is_the_reference_graphs(
    pair: Pair, steps: list[dict[str, Any]], pads: list[int], seed: int, reads: bool
) -> None:
    """After a wave, so that padding is skipped first and asked for afterwards."""
    pair.start()
    rng = np.random.default_rng(seed)
    pair.wave(np.array(pads), 1, rng.integers(0, VOCAB, (ROWS, CTX_LEN)))
    for step in steps:
        index, length = step["index"], step["length"]
        state = pair.activations[-1].state(ATTENTION_MASK) if step["mask"] is None else step["mask"]
        seen = state.astype(bool).copy()
        seen[:, index + length - 1] = True
        first = seen[:, : index + length].argmax(axis=1)
        if (seen & pair.unknown)[:, :index].any():
            break  # a token whose keys and values nobody computed
        if index == 0:
            pair.begin_wave()
        slots = index + np.arange(length)
        where = np.maximum(slots - first[:, None], 0) + step["offset"] * (slots >= first[:, None])
        ids = rng.integers(0, VOCAB, (ROWS, length))
        pair.run(index, ids, np.maximum(where, 0), step["mask"], pads=first)
        # Of padding before tokens of an earlier wave, or of holes, nothing is promised.
        pair.unknown[:, slots] |= slots < first[:, None]
        if reads:
            pair.compare_caches()


@pytest.mark.parametrize("opened", [[0], [0, 1, 2]])
def test_padding_that_a_later_mask_calls_tokens_is_computed_then(
    pair: Pair, opened: list[int]
) -> None:
    pair.start()
    rng = np.random.default_rng(0)
    pads = np.array([3, 0, 2])
    pair.wave(pads, 1, rng.integers(0, VOCAB, (ROWS, CTX_LEN)))
    mask = pair.activations[-1].state(ATTENTION_MASK).astype(bool)
    mask[opened, :PROMPT_LEN] = True
    pads[opened] = 0
    pair.run(pair.index, np.array([[5], [6], [7]]), (pair.index - pads)[:, None], mask)
    pair.compare_caches()


def test_no_padding_is_computed_and_no_reference_graph_loaded(
    tiny: TinyQpcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(tiny)
    ran: list[tuple[int, ...]] = []

    execute = Runner.execute

    def counted(runner: Runner, first: int, tokens: Any, *rest: Any) -> Any:
        ran.append(tokens.shape)
        return execute(runner, first, tokens, *rest)

    monkeypatch.setattr(Runner, "execute", counted)
    ids = np.arange(ROWS * CTX_LEN).reshape(ROWS, CTX_LEN) % VOCAB
    pair.wave(np.array([3, 0, 2]), 1, ids)
    assert ran == [(1, 1), (1, 4), (1, 2)]
    pair.decode(ids[:, :1])
    assert ran[3:] == [(ROWS, 1)]
    assert pair.programs[0]._reference is None


def test_the_lowered_graph_has_neither_mask_nor_index(tiny: TinyQpcs) -> None:
    qpc = Pair(tiny).qpc
    model = onnx.ModelProto.FromString(qpc.graphs["lowered"])
    names = {value.name for value in [*model.graph.input, *model.graph.output]}
    assert not {n for n in names if n.startswith((ATTENTION_MASK, CACHE_INDEX))}
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("GroupQueryAttention") == 2
    assert ops.count("RotaryEmbedding") == 4
    assert ops.count("SimplifiedLayerNormalization") == 5
    assert not {"Softmax", "ScatterND", "Pow", "Sqrt", "Transpose", "Where"} & set(ops)


def test_a_caller_may_give_the_cache_of_another_run(pair: Pair) -> None:
    pair.start()
    rng = np.random.default_rng(0)
    pair.wave(np.array([1, 0, 3]), 2, rng.integers(0, VOCAB, (ROWS, CTX_LEN)))
    past = {name: pair.activations[-1].state(name).copy() for name in pair.programs[0].caches}
    mask, index, pads = pair.activations[-1].state(ATTENTION_MASK).copy(), pair.index, pair.pads
    pair.start()
    pair.wave(np.array([0, 2, 1]), 1, rng.integers(0, VOCAB, (ROWS, CTX_LEN)))
    ids = rng.integers(0, VOCAB, (ROWS, 1))
    pair.unknown[:] = False
    pair.run(index, ids, (index - pads)[:, None], mask, past=past)
    pair.pads, pair.index = pads, index + 1
    pair.decode(ids)
    pair.compare_caches()


@pytest.mark.parametrize("index", [-1, CTX_LEN - PROMPT_LEN + 1])
def test_slots_beyond_the_context_are_the_reference_graphs_matter(pair: Pair, index: int) -> None:
    pair.start()
    ids = np.ones((ROWS, PROMPT_LEN), np.int64)
    mask = np.ones((ROWS, CTX_LEN), np.int8)
    columns = (PROMPT_LEN,) if pair.is_all else ()
    wanted = {pair.output: (ROWS, *columns, 1 if pair.output == NEXT_TOKENS else VOCAB)}
    outcomes = []
    for activation in pair.activations:
        inputs = {"input_ids": ids, "position_ids": ids, CACHE_INDEX: np.array([index])}
        try:
            made = activation.run({**inputs, ATTENTION_MASK: mask}, wanted)
            outcomes.append(np.asarray(made[pair.output]).tolist())
        except ExecutionError as error:
            outcomes.append(type(error).__name__)
    assert outcomes[0] == outcomes[1]
