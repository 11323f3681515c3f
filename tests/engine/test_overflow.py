"""Logits that are no numbers: the row says so, and its neighbours are answered as ever."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from formula_program import EOS, VOCAB, Array, FormulaProgram, answer, run_all
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import IoContract, Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.sampler import overflowed
from qaic_ray.engine.steps import Sequence
from qaic_ray.sampling_params import SamplingParams

POISON = 60
"""Prompts that begin so overflow from a certain length on."""
WAYS = {
    "greedy": {},
    "logprobs": {"logprobs": 2},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    "min_tokens": {"min_tokens": 3},
    "sampling": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 5},
}


class Overflowing(FormulaProgram):
    """Gives `values` among the logits of a poisoned row that is `length` tokens long or longer."""

    length = 0
    values: tuple[float, ...] = (math.nan,)

    def _logits(self, seen: Array) -> Array:
        logits = super()._logits(seen)
        if seen[0] != POISON or len(seen) < self.length:
            return logits
        logits = logits.copy()
        logits[: len(self.values)] = self.values
        return logits


@given(
    contract=st.sampled_from([
        (IoContract.POSITION_IDS, True), (IoContract.POSITION_IDS, False),
        (IoContract.CACHE_INDEX, False),
    ]),
    slots=st.integers(1, 4),
    rows=st.lists(
        st.tuples(
            st.integers(0, 6),
            st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=8),
            st.booleans(),
            st.sampled_from(sorted(WAYS)),
        ),
        min_size=1,
        max_size=8,
    ),
    values=st.sampled_from(
        [(math.nan,), (math.inf,), (0.0, math.nan), (math.inf, math.nan), (-math.inf,) * VOCAB]
    ),
    length=st.integers(0, 12),
)  # fmt: skip
def test_a_row_whose_logits_overflow_is_an_error_and_no_other(
    contract: tuple[IoContract, bool],
    slots: int,
    rows: list[tuple[int, list[int], bool, str]],
    values: tuple[float, ...],
    length: int,
) -> None:
    io_contract, continuous = contract
    shapes = Specializations.build(
        batch_size=slots, prompt_len=4, ctx_len=32, continuous=continuous
    )
    program = Overflowing(shapes, io_contract=io_contract)
    program.values, program.length = values, length
    engine = Engine(program)
    arrivals = []
    for key, (step, prompt, is_poisoned, way) in enumerate(rows):
        ids = (POISON, *prompt) if is_poisoned else tuple(prompt)
        limit = engine.new_token_limit(len(ids), 15)
        params = SamplingParams(**WAYS[way])  # type: ignore[arg-type]
        arrivals.append((step, Sequence(key, ids, limit, frozenset({EOS}), params, seed=key)))
    done = run_all(engine, arrivals)
    for key, (_, prompt, is_poisoned, way) in enumerate(rows):
        finished = done[key]
        if is_poisoned and finished.error is not None:
            assert "float16" in str(finished.error)
            assert "verify.json" in str(finished.error)
            whole = len(finished.sequence.prompt_ids) + len(finished.sequence.output_ids)
            assert whole >= length, "it ended before its logits overflowed"
            continue
        assert finished.error is None
        output = finished.sequence.output_ids
        if is_poisoned:  # it ended before
            assert len(finished.sequence.prompt_ids) + len(output) <= max(length, 1)
        if way in ("greedy", "logprobs"):
            ids = (POISON, *prompt) if is_poisoned else tuple(prompt)
            assert output == answer(ids, finished.sequence.max_new_tokens)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_draft_is_kept_up_to_where_the_logits_overflow(bad: int) -> None:
    """The row overflows at the token that follows so many right ones of its draft."""

    class Right:
        def propose(self, rows: Any, room: Any, known: Any) -> list[list[int]]:
            return [
                answer((*row.prompt_ids, *row.output_ids), 3)[:some]
                for row, some in zip(rows, room, strict=True)
            ]

        def release(self, sequence: Sequence) -> None:
            pass

    shapes = Specializations.build(
        batch_size=1,
        prompt_len=4,
        ctx_len=32,
        continuous=True,
        num_logits_to_keep=True,
        num_speculative_tokens=3,
    )
    prompt = (POISON, 7, 9)
    program = Overflowing(shapes)
    program.length = len(prompt) + 1 + bad
    engine = Engine(program, proposer=Right())
    row = Sequence(0, prompt, 15, frozenset({EOS}), SamplingParams(), seed=0)
    finished = run_all(engine, [(0, row)])[0]
    assert "float16" in str(finished.error)


def test_ids_in_place_of_logits_tell_nothing() -> None:
    shapes = Specializations.build(batch_size=1, prompt_len=4, ctx_len=32, continuous=True)
    engine = Engine(Overflowing(shapes, emits_tokens=True))
    row = Sequence(0, (POISON, 7), 3, frozenset({EOS}), SamplingParams(), seed=0)
    assert run_all(engine, [(0, row)])[0].error is None


def test_large_finite_logits_are_no_overflow() -> None:
    logits = np.full((4, 8), np.finfo(np.float32).max, np.float32)
    logits[2, 3] = np.inf
    assert overflowed(logits, logits.argmax(axis=-1)) == [2]


@pytest.mark.parametrize("num_rows", [1, 2, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_row_and_many_are_told_alike(num_rows: int, bad: float) -> None:
    logits = np.random.default_rng(0).normal(size=(num_rows, 9)).astype(np.float32)
    logits[::3] = bad
    tokens = logits.argmax(axis=-1)
    expected = list(range(0, num_rows, 3))
    assert overflowed(logits, tokens) == overflowed(logits, tokens.tolist()) == expected
