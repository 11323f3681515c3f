"""The token loop against a program whose every answer follows from a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaic_ray import contract
from qaic_ray.contract import IoContract, Specializations
from qaic_ray.errors import UsageError
from qaic_ray.rows import FinishReason
from qaic_ray.run.batch import Sequence
from qaic_ray.run.engine import Engine

VOCAB = 97
EOS = 5


def next_token(ids: list[int]) -> int:
    """The formula: depends on every token and its place, as a language model's answer does."""
    value = 1
    for token in ids:
        value = (value * 31 + token + 7) % 10_007
    return value % VOCAB


def answer(prompt: list[int], limit: int) -> list[int]:
    """What a row must get, whatever else runs beside it."""
    ids, output = list(prompt), []
    while len(output) < limit and EOS not in output:
        output.append(next_token(ids))
        ids.append(output[-1])
    return output


class FormulaProgram:
    """Keeps each slot's tokens by position, as a card keeps keys and values."""

    def __init__(
        self,
        *,
        slots: int,
        prompt_len: int,
        ctx_len: int,
        continuous: bool,
        every_token: bool = False,
    ) -> None:
        self.every_token = every_token
        self.contract = IoContract.POSITION_IDS
        self.specializations = Specializations.build(
            batch_size=slots, prompt_len=prompt_len, ctx_len=ctx_len, continuous=continuous
        )
        self.cache = np.full((slots, ctx_len), -1)
        self.shapes = {s.seq_len: s.batch_size for s in self.specializations.entries}

    @property
    def prefill_rows(self) -> int:
        return self.specializations.prefill.batch_size

    def input_dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.int64)

    def run(
        self, seq_len: int, inputs: dict[str, npt.NDArray[Any]], output: str
    ) -> npt.NDArray[Any]:
        ids, positions = inputs[contract.INPUT_IDS], inputs[contract.POSITION_IDS]
        assert ids.shape == positions.shape == (self.shapes[seq_len], seq_len)
        slots = inputs.get(contract.BATCH_INDEX, np.arange(len(ids))[:, None])[:, 0]
        assert len(set(slots.tolist())) == len(slots)
        logits = np.zeros((len(ids), seq_len if self.every_token else 1, VOCAB), np.float32)
        for row, slot in enumerate(slots):
            for token, position in zip(ids[row], positions[row], strict=True):
                if position >= 0:
                    self.cache[slot, position] = token
            last = positions[row].max()
            seen = self.cache[slot, : last + 1].tolist()
            assert -1 not in seen, "a position was skipped"
            at = max(int((positions[row] >= 0).sum()) - 1, 0) if self.every_token else 0
            logits[row, at, next_token(seen) if seen else 0] = 1.0
        return logits


def run_all(engine: Engine, arrivals: list[tuple[int, Sequence]]) -> dict[int, Sequence]:
    """Feed each sequence at its step, and go on to the end."""
    done: dict[int, Sequence] = {}
    step = 0
    while arrivals or engine.busy:
        while arrivals and arrivals[0][0] <= step:
            engine.add(arrivals.pop(0)[1])
        for sequence, ttft_s, decode_s in engine.step():
            assert ttft_s > 0
            assert decode_s >= 0
            done[sequence.key] = sequence
        step += 1
    return done


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    prompt_len=st.sampled_from([1, 2, 8]),
    continuous=st.booleans(),
    every_token=st.booleans(),
    rows=st.lists(
        st.tuples(
            st.integers(0, 12),
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=32),
            st.integers(1, 40),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_every_row_gets_its_own_answer_whatever_runs_beside_it(
    slots: int,
    prompt_len: int,
    continuous: bool,
    every_token: bool,
    rows: list[tuple[int, list[int], int]],
) -> None:
    program = FormulaProgram(
        slots=slots,
        prompt_len=prompt_len,
        ctx_len=32,
        continuous=continuous,
        every_token=every_token,
    )
    engine = Engine(program)
    arrivals = []
    for key, (step, prompt, wanted) in enumerate(sorted(rows, key=lambda r: r[0])):
        limit = engine.new_token_limit(len(prompt), wanted)
        arrivals.append((step, Sequence(key, tuple(prompt), limit, frozenset({EOS}))))
    expected = {s.key: answer(list(s.prompt_ids), s.max_new_tokens) for _, s in arrivals}

    done = run_all(engine, arrivals)

    assert {key: s.output_ids for key, s in done.items()} == expected
    for sequence in done.values():
        stopped = sequence.output_ids[-1] == EOS
        assert (sequence.finish_reason is FinishReason.STOP) == stopped
    work = engine.measurement
    assert work.rows == len(rows)
    assert work.generated_tokens == sum(map(len, expected.values()))
    assert work.prompt_tokens == sum(len(prompt) for _, prompt, _ in rows)
    assert len(work.ttft_s) == len(rows)


def test_decode_tokens_are_those_of_decode_steps() -> None:
    program = FormulaProgram(slots=2, prompt_len=4, ctx_len=32, continuous=True)
    ticks = iter(range(100))
    engine = Engine(program, clock=lambda: float(next(ticks)))
    limit = 3
    prompts = [[1, 2, 3], [4, 6, 8]]
    run_all(engine, [(0, Sequence(i, tuple(p), limit)) for i, p in enumerate(prompts)])
    work = engine.measurement
    # Each first token comes from its prefill; the other two from decode steps shared by both.
    assert (work.prefill_steps, work.decode_steps, work.decode_tokens) == (2, 2, 4)
    assert (work.prefill_s, work.decode_s) == (2.0, 2.0)
    assert work.decode_tokens_per_s == 2.0


def test_program_of_the_other_contract_is_refused() -> None:
    program = FormulaProgram(slots=1, prompt_len=4, ctx_len=8, continuous=False)
    program.contract = IoContract.CACHE_INDEX
    with pytest.raises(UsageError, match="--io position-ids"):
        Engine(program)
