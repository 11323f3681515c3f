"""The batcher as a table of steps, and under random arrivals."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qaic_ray.errors import RowError
from qaic_ray.rows import FinishReason
from qaic_ray.run.batch import Batcher, Sequence, Step

EOS = 2


def make_batcher(**changes: object) -> Batcher:
    options: dict[str, object] = {
        "num_slots": 2,
        "prompt_len": 4,
        "ctx_len": 16,
        "prefill_rows": 1,
        "continuous": True,
    }
    return Batcher(**(options | changes))  # type: ignore[arg-type]


def sequence(key: int, prompt_tokens: int, max_new_tokens: int) -> Sequence:
    ids = tuple(range(100, 100 + prompt_tokens))
    return Sequence(key, ids, max_new_tokens, frozenset({EOS}))


def told(step: Step | None) -> tuple[int, list[tuple[int, int, int, int, bool]]] | None:
    """A step as a table row: seq_len, and for each chunk slot, key, start, tokens, samples."""
    if step is None:
        return None
    chunks = [(c.slot, c.sequence.key, c.start, len(c.ids), c.samples) for c in step.chunks]
    return step.seq_len, chunks


def run_table(batcher: Batcher, token: int = 7) -> list[object]:
    """Every step until nothing is left, each answered with `token`."""
    table: list[object] = []
    while (step := batcher.plan()) is not None:
        table.append(told(step))
        batcher.commit(step, [token] * len(step.chunks))
        batcher.check()
    return table


def test_continuous_steps_prefill_in_chunks_then_decode_together_and_refill_slots() -> None:
    batcher = make_batcher()
    for added in (sequence(0, 6, 2), sequence(1, 3, 1), sequence(2, 1, 2)):
        batcher.add(added)
    assert run_table(batcher) == [
        (4, [(0, 0, 0, 4, False)]),  # six tokens: four now, two later
        (4, [(0, 0, 4, 2, True)]),
        (4, [(1, 1, 0, 3, True)]),  # done with its one token: the slot is free again
        (1, [(0, 0, 6, 1, True), (1, 2, 0, 1, True)]),  # a prompt of one token needs no prefill
        (1, [(1, 2, 1, 1, True)]),
    ]


def test_last_prompt_token_alone_in_its_chunk_rides_in_the_decode_shape() -> None:
    batcher = make_batcher(num_slots=1)
    batcher.add(sequence(0, 5, 1))
    assert run_table(batcher) == [(4, [(0, 0, 0, 4, False)]), (1, [(0, 0, 4, 1, True)])]


def test_static_rows_start_together_and_the_next_wave_waits() -> None:
    batcher = make_batcher(prefill_rows=2, continuous=False)
    for added in (sequence(0, 2, 2), sequence(1, 6, 1), sequence(2, 2, 1)):
        batcher.add(added)
    assert run_table(batcher) == [
        (4, [(0, 0, 0, 2, True), (1, 1, 0, 4, False)]),  # row 0's logits are taken here, not later
        (4, [(1, 1, 4, 2, True)]),
        (1, [(0, 0, 2, 1, True)]),
        (4, [(0, 2, 0, 2, True)]),
    ]


def test_program_without_prefill_shape_feeds_prompts_token_by_token() -> None:
    batcher = make_batcher(prompt_len=1, prefill_rows=2)
    batcher.add(sequence(0, 3, 1))
    assert run_table(batcher) == [
        (1, [(0, 0, 0, 1, False)]),
        (1, [(0, 0, 1, 1, False)]),
        (1, [(0, 0, 2, 1, True)]),
    ]


def test_eos_ends_a_row_and_is_kept() -> None:
    batcher = make_batcher(num_slots=1)
    row = sequence(0, 2, 9)
    batcher.add(row)
    run_table(batcher, token=EOS)
    assert (row.output_ids, row.finish_reason) == ([EOS], FinishReason.STOP)


def test_limit_ends_a_row_as_length_even_in_its_last_place() -> None:
    batcher = make_batcher(num_slots=1)
    row = sequence(0, 2, 3)
    batcher.add(row)
    run_table(batcher)
    assert (row.output_ids, row.finish_reason) == ([7, 7, 7], FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("prompt_tokens", "wanted", "allowed"),
    [(1, None, 16), (15, None, 2), (16, None, 1), (16, 5, 1), (4, 5, 5), (4, 50, 13)],
)
def test_answers_fit_the_context(prompt_tokens: int, wanted: int | None, allowed: int) -> None:
    assert make_batcher().new_token_limit(prompt_tokens, wanted) == allowed


def test_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(RowError, match=r"17 tokens, more than the context of 16"):
        make_batcher().new_token_limit(17, 1)


def test_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(RowError, match="empty"):
        make_batcher().new_token_limit(0, 1)


class AnyArrival(RuleBasedStateMachine):
    """Rows arrive whenever they like; each gets exactly its tokens, in order, at its positions."""

    @initialize(
        num_slots=st.integers(1, 4),
        prompt_len=st.sampled_from([1, 2, 4]),
        continuous=st.booleans(),
    )
    def start(self, num_slots: int, prompt_len: int, continuous: bool) -> None:
        prefill_rows = 1 if continuous and prompt_len > 1 else num_slots
        self.batcher = make_batcher(
            num_slots=num_slots,
            prompt_len=prompt_len,
            prefill_rows=prefill_rows,
            continuous=continuous,
        )
        self.added: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.seen: dict[int, list[int]] = {}
        self.slot: dict[int, int] = {}

    @rule(prompt_tokens=st.integers(1, 16), wanted=st.integers(1, 20))
    def add(self, prompt_tokens: int, wanted: int) -> None:
        limit = self.batcher.new_token_limit(prompt_tokens, wanted)
        row = sequence(len(self.added), prompt_tokens, limit)
        self.added.append(row)
        self.batcher.add(row)

    @rule(token=st.integers(0, 9))
    def step(self, token: int) -> None:
        step = self.batcher.plan()
        if step is None:
            assert len(self.finished) == len(self.added)
            return
        assert len({c.slot for c in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            key = chunk.sequence.key
            assert self.slot.setdefault(key, chunk.slot) == chunk.slot
            seen = self.seen.setdefault(key, [])
            assert chunk.start == len(seen)
            assert 1 <= len(chunk.ids) <= step.seq_len
            assert chunk.start + len(chunk.ids) <= self.batcher.ctx_len
            seen.extend(chunk.ids)
        self.finished += self.batcher.commit(step, [token] * len(step.chunks))

    @invariant()
    def holds_together(self) -> None:
        if not hasattr(self, "batcher"):
            return
        self.batcher.check()

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        while self.batcher.busy:
            self.step(3)
        assert sorted(s.key for s in self.finished) == [s.key for s in self.added]
        for row in self.finished:
            tokens = [*row.prompt_ids, *row.output_ids]
            assert self.seen[row.key] == tokens[:-1]  # the last token is never fed back
            ended = row.output_ids[-1] == EOS
            assert row.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert EOS not in row.output_ids[:-1]


TestAnyArrival = AnyArrival.TestCase
TestAnyArrival.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
