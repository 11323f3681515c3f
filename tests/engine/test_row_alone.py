"""What goes wrong over one row ends that row, and its neighbours are answered as ever."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import Any

import numpy as np
import pytest
from formula_program import EOS, VOCAB, FormulaProgram, answer, run_all
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import IoContract, Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.sampler import Selector
from qaic_ray.engine.steps import Sequence
from qaic_ray.errors import DeviceError, RowError, UsageError
from qaic_ray.rows import ROW_ALONE
from qaic_ray.sampling_params import SamplingParams


class PanicException(BaseException):
    """As libraries written in Rust raise it."""


class StumblingReader:
    """Reads along, and fails once it has read so many tokens."""

    def __init__(self, at: int, error: BaseException) -> None:
        self._left = at
        self._error = error

    def read(self, token_ids: Listed[int]) -> int | None:
        self._left -= len(token_ids)
        if self._left <= 0:
            raise self._error
        return None


class StumblingSelector(Selector):
    """Fails over rows with a certain seed, when they enter or when their tokens are chosen."""

    poison = 10**6

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._seeds: dict[int, int] = {}

    def enter(self, slot: int, sequence: Any) -> None:
        if sequence.seed == self.poison:
            raise OverflowError("Python int too large to convert to C long")
        super().enter(slot, sequence)
        self._seeds[slot] = sequence.seed

    def choose(self, logits: Any, slots: list[int]) -> Any:
        if any(self._seeds[slot] == self.poison + 1 for slot in slots):
            raise IndexError("index 7 is out of bounds")
        return super().choose(logits, slots)


CONTRACTS = st.sampled_from([
    (IoContract.POSITION_IDS, True), (IoContract.POSITION_IDS, False),
    (IoContract.CACHE_INDEX, False),
])  # fmt: skip


@given(
    contract=CONTRACTS,
    slots=st.integers(1, 4),
    prefill_rows=st.integers(1, 4),
    rows=st.lists(
        st.tuples(
            st.integers(0, 8),
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
            st.integers(1, 12),
            st.sampled_from(["well", "well", "reader", "enters", "chosen"]),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_neighbours_of_a_row_that_fails_are_answered(
    contract: tuple[IoContract, bool],
    slots: int,
    prefill_rows: int,
    rows: list[tuple[int, list[int], int, str]],
) -> None:
    io_contract, continuous = contract
    shapes = Specializations.build(
        batch_size=slots, prompt_len=4, ctx_len=32, continuous=continuous
    )
    if continuous:
        shapes = shapes.with_prefill_rows(min(prefill_rows, slots))
    program = FormulaProgram(shapes, io_contract=io_contract)
    engine = Engine(program, selector=StumblingSelector(slots))
    arrivals, readers, expected = [], {}, {}
    for key, (step, prompt, wanted, kind) in enumerate(rows):
        limit = engine.new_token_limit(len(prompt), wanted)
        # The greedy answer by way of the selector.
        params = SamplingParams(logprobs=0) if key % 2 else SamplingParams()
        seed = key
        if kind in ("enters", "chosen"):
            params = SamplingParams(logprobs=0)
            seed = StumblingSelector.poison + (kind == "chosen")
        elif kind == "reader":
            readers[key] = StumblingReader(1 + limit // 2, PanicException("index out of range"))
        if kind == "well":
            expected[key] = answer(tuple(prompt), limit)
        row = Sequence(key, tuple(prompt), limit, frozenset({EOS}), params, seed=seed)
        arrivals.append((step, row))
    done = run_all(engine, arrivals, readers)
    assert done.keys() == set(range(len(rows)))
    for key, (_, prompt, _, kind) in enumerate(rows):
        finished = done[key]
        if kind == "well":
            assert finished.error is None
            assert finished.sequence.output_ids == expected[key]
        elif kind == "reader":
            # An answer that ends before the reader stumbles is none the worse.
            limit = finished.sequence.max_new_tokens
            stumbles = len(answer(tuple(prompt), limit)) >= 1 + limit // 2
            assert (finished.error is not None) == stumbles
        else:
            assert finished.error is not None
            assert "a fault of qaic-ray's" in str(finished.error)
    assert engine.measurement.rows == sum(finished.error is None for finished in done.values())


def test_a_panic_is_the_rows_and_an_interruption_is_nobodys() -> None:
    for error in (ValueError("x" * 10**6), MemoryError(), PanicException("x"), UsageError("x")):
        with pytest.raises(RowError) as raised, ROW_ALONE:
            raise error
        assert len(str(raised.value)) < 300
        assert raised.value.__cause__ is error
    for whole in (KeyboardInterrupt(), SystemExit(1), DeviceError("gone"), RowError("mine")):
        with pytest.raises(type(whole)) as same, ROW_ALONE:
            raise whole
        assert same.value is whole


ANY_PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "min_tokens": st.integers(0, 2**31 - 1),
        "temperature": st.floats(0, 100),
        "top_k": st.integers(-1, 2**31 - 1),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.01, 100),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "seed": st.integers(0, 2**63 - 1),
        "logprobs": st.integers(0, 20),
    },
)


@given(
    asked=st.lists(ANY_PARAMS, min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 1.0, 1e-30, 1e4, 1e30]),
    stop_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3),
)
def test_whatever_the_bounds_allow_can_be_sampled(
    asked: list[dict[str, Any]], scale: float, stop_ids: list[int]
) -> None:
    """Numbers that only some machines can hold are refused before; warnings are errors here."""
    selector = Selector(len(asked))
    for slot, fields in enumerate(asked):
        params = SamplingParams(**fields)
        ids = frozenset(stop_ids) - {7}
        selector.enter(slot, Sequence(slot, (1, 2), 9, ids, params, seed=params.seed or 0))
    random = np.random.default_rng(0)
    for _ in range(3):
        logits = (random.normal(size=(len(asked), VOCAB)) * scale).astype(np.float32)
        choice = selector.choose(logits, list(range(len(asked))))
        assert all(0 <= token < VOCAB for token in choice.tokens)
