"""The batcher as a table of steps, and under random arrivals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qaic_ray.engine.batching.batcher import Batcher, num_common
from qaic_ray.engine.steps import ProgramShapes, Sequence, Step
from qaic_ray.errors import RowError
from qaic_ray.rows import FinishReason

EOS = 2
SHAPES = ProgramShapes(
    num_slots=2,
    num_rows=2,
    prefill_rows=1,
    prefill_lens=(4,),
    prefill_ctx_len=16,
    ctx_len=16,
    decode_len=1,
    continuous=True,
)
PL1 = replace(SHAPES, prefill_lens=())
STATIC = replace(SHAPES, prefill_rows=2, continuous=False)
Told = tuple[str, list[tuple[int, int, int, int, bool]]]


def sequence(key: int, prompt_tokens: int, max_new_tokens: int, first: int = 100) -> Sequence:
    ids = tuple(range(first, first + prompt_tokens))
    return Sequence(key, ids, max_new_tokens, frozenset({EOS}))


def told(step: Step) -> Told:
    """A step as a table row: its shape, and for each row slot, key, start, tokens, answered."""
    rows = [
        (slot, row.key, row.num_computed, count, row.num_computed + count == row.num_tokens)
        for (slot, row), count in zip(step.rows, step.counts, strict=True)
    ]
    return f"prefill {step.seq_len}" if step.is_prefill else "decode", rows


def run_table(batcher: Batcher, token: int = 7) -> list[Told]:
    """Every step until nothing is left, each answered with `token`."""
    table = []
    while (step := batcher.plan()) is not None:
        table.append(told(step))
        batcher.commit(step, [[token]] * len(step.rows))
        batcher.check()
    return table


def test_continuous_steps_prefill_in_chunks_then_decode_together_and_refill_slots() -> None:
    batcher = Batcher(SHAPES)
    for added in (sequence(0, 6, 2), sequence(1, 3, 1, 200), sequence(2, 1, 2, 300)):
        batcher.add(added)
    assert run_table(batcher) == [
        ("prefill 4", [(0, 0, 0, 4, False)]),  # six tokens: four now, two later
        ("prefill 4", [(0, 0, 4, 2, True)]),
        ("prefill 4", [(1, 1, 0, 3, True)]),  # done with its one token: the slot is free again
        ("decode", [(0, 0, 6, 1, True), (1, 2, 0, 1, True)]),  # one token needs no prefill
        ("decode", [(1, 2, 1, 1, True)]),
    ]


def test_static_rows_start_together_and_the_next_wave_waits_for_all_of_them() -> None:
    batcher = Batcher(STATIC)
    for added in (sequence(0, 5, 1), sequence(1, 2, 3, 200), sequence(2, 2, 1, 300)):
        batcher.add(added)
    assert run_table(batcher) == [
        # The short row is answered in its own chunk, not in the last one of the longest row.
        ("prefill 4", [(0, 0, 0, 4, False), (1, 1, 0, 2, True)]),
        # One token is left of row 0: it rides in the decode shape.
        ("decode", [(0, 0, 4, 1, True), (1, 1, 2, 1, True)]),
        ("decode", [(1, 1, 3, 1, True)]),
        ("prefill 4", [(0, 2, 0, 2, True)]),
    ]


def test_rows_that_decode_ride_along_in_a_prefill_with_a_row_for_each() -> None:
    batcher = Batcher(STATIC)
    for added in (sequence(0, 10, 1), sequence(1, 2, 9, 200)):
        batcher.add(added)
    assert run_table(batcher)[:3] == [
        ("prefill 4", [(0, 0, 0, 4, False), (1, 1, 0, 2, True)]),
        ("prefill 4", [(0, 0, 4, 4, False), (1, 1, 2, 1, True)]),
        ("prefill 4", [(0, 0, 8, 2, True), (1, 1, 3, 1, True)]),
    ]


MANY = replace(SHAPES, num_slots=8, num_rows=8, prefill_rows=3, ctx_len=64, prefill_ctx_len=64)


def test_rows_that_wait_share_a_prefill_and_a_row_that_decodes_takes_a_place_left_over() -> None:
    batcher = Batcher(replace(MANY, num_slots=4, num_rows=4))
    for key, prompt_tokens in enumerate((3, 4, 2, 6)):
        batcher.add(sequence(key, prompt_tokens, 3, 100 * (key + 1)))
    assert run_table(batcher) == [
        # Row 3 has two chunks, for which there are two steps: it may miss none.
        ("prefill 4", [(0, 0, 0, 3, True), (1, 1, 0, 4, True), (3, 3, 0, 4, False)]),
        ("prefill 4", [(0, 0, 3, 1, True), (2, 2, 0, 2, True), (3, 3, 4, 2, True)]),
        (
            "decode",
            [(0, 0, 4, 1, True), (1, 1, 4, 1, True), (2, 2, 2, 1, True), (3, 3, 6, 1, True)],
        ),
        ("decode", [(1, 1, 5, 1, True), (2, 2, 3, 1, True), (3, 3, 7, 1, True)]),
    ]


@given(st.integers(1, 8), st.lists(st.integers(2, 40), min_size=1, max_size=8))
def test_rows_that_came_together_are_prefilled_in_the_fewest_steps_there_can_be(
    places: int, lengths: list[int]
) -> None:
    batcher = Batcher(replace(MANY, prefill_rows=places))
    for key, prompt_tokens in enumerate(lengths):
        batcher.add(sequence(key, prompt_tokens, 20, 100 * (key + 1)))
    steps = 0
    while (step := batcher.plan()) is not None and step.is_prefill:
        steps += 1
        batcher.commit(step, [[7]] * len(step.rows))
        batcher.check()
    # One row has one chunk a step, and a step has so many places; a last token rides in a decode.
    chunks = [-(-(length - 1) // 4) for length in lengths]
    assert steps == max(*chunks, -(-sum(chunks) // places))


def test_decode_only_program_feeds_a_prompt_token_by_token() -> None:
    batcher = Batcher(PL1)
    batcher.add(sequence(0, 3, 1))
    assert run_table(batcher) == [
        ("decode", [(0, 0, 0, 1, False)]),
        ("decode", [(0, 0, 1, 1, False)]),
        ("decode", [(0, 0, 2, 1, True)]),
    ]


def test_a_decode_shape_of_several_tokens_takes_the_end_of_a_prompt() -> None:
    batcher = Batcher(replace(SHAPES, decode_len=3))
    batcher.add(sequence(0, 7, 2))
    assert run_table(batcher) == [
        ("prefill 4", [(0, 0, 0, 4, False)]),
        ("decode", [(0, 0, 4, 3, True)]),
        ("decode", [(0, 0, 7, 1, True)]),
    ]


def test_drafts_that_were_right_are_computed_and_what_follows_a_stop_is_not_kept() -> None:
    batcher = Batcher(replace(SHAPES, decode_len=4))
    row = sequence(0, 4, 9)
    batcher.add(row)
    step = batcher.plan()
    assert step is not None
    batcher.commit(step, [[7]])
    step = batcher.plan()
    assert step is not None
    batcher.commit(step, [[8, 9, 10]])  # two drafts were right, the third token is the card's own
    assert (row.output_ids, row.num_computed) == ([7, 8, 9, 10], 7)
    step = batcher.plan()
    assert step is not None
    assert batcher.commit(step, [[11, EOS, 12, 13]]) == [row]
    assert row.output_ids == [7, 8, 9, 10, 11, EOS]
    assert row.finish_reason is FinishReason.STOP


def test_positions_beyond_the_prefills_context_are_for_the_decode_shape() -> None:
    batcher = Batcher(replace(SHAPES, prefill_ctx_len=6))
    batcher.add(sequence(0, 9, 1))
    assert run_table(batcher) == [
        ("prefill 4", [(0, 0, 0, 4, False)]),
        ("prefill 4", [(0, 0, 4, 2, False)]),
        ("decode", [(0, 0, 6, 1, False)]),
        ("decode", [(0, 0, 7, 1, False)]),
        ("decode", [(0, 0, 8, 1, True)]),
    ]


def test_a_prompt_is_covered_by_the_cheapest_of_several_prefill_lengths() -> None:
    batcher = Batcher(replace(SHAPES, prefill_lens=(4, 16), ctx_len=64, prefill_ctx_len=64))
    batcher.costs.measured(4, 0.1)
    batcher.costs.measured(16, 0.2)
    for added in (sequence(0, 21, 1), sequence(1, 6, 1, 200), sequence(2, 9, 1, 300)):
        batcher.add(added)
    assert [(shape, rows[0][1], rows[0][3]) for shape, rows in run_table(batcher)] == [
        ("prefill 16", 0, 16),  # 21 = 16 + 4, and the last one rides in a decode
        ("prefill 4", 0, 4),
        ("prefill 16", 1, 6),  # of the same price as 4 + 4, and one step
        ("prefill 16", 2, 9),
        ("decode", 0, 1),
    ]


def test_a_waiting_row_is_not_prefilled_when_those_that_run_have_waited_long_enough() -> None:
    batcher = Batcher(SHAPES)
    batcher.add(sequence(0, 4, 5))
    step = batcher.plan()
    assert step is not None
    batcher.commit(step, [[7]])
    batcher.add(sequence(1, 4, 1, 200))
    assert [told(s)[0] for s in (batcher.plan(decode_first=True), batcher.plan()) if s] == [
        "decode",
        "prefill 4",
    ]
    # A batch that only waits for prefill is never told to decode nothing.
    alone = Batcher(SHAPES)
    alone.add(sequence(2, 4, 1))
    step = alone.plan(decode_first=True)
    assert step is not None
    assert step.is_prefill


def test_longest_wait_goes_first() -> None:
    batcher = Batcher(replace(SHAPES, num_slots=1, num_rows=1))
    for key in range(4):
        batcher.add(sequence(key, 2, 1, 100 * key))
    assert [rows[0][1] for _, rows in run_table(batcher)] == [0, 1, 2, 3]


def test_a_row_starts_after_the_longest_beginning_that_a_free_slot_holds() -> None:
    batcher = Batcher(SHAPES)
    batcher.add(sequence(0, 8, 1))
    batcher.add(sequence(1, 8, 1, 500))
    run_table(batcher)
    again = sequence(2, 10, 1)  # its first eight tokens are those of row 0
    batcher.add(again)
    assert run_table(batcher) == [("prefill 4", [(0, 2, 8, 2, True)])]
    assert again.num_reused == 8
    other = sequence(3, 10, 1, 500)
    batcher.add(other)
    assert run_table(batcher)[0] == ("prefill 4", [(1, 3, 8, 2, True)])


def test_of_a_prompt_that_a_slot_holds_whole_the_last_token_is_computed_again() -> None:
    batcher = Batcher(SHAPES)
    for key in range(2):
        batcher.add(sequence(key, 8, 1))
        run_table(batcher)
    row = sequence(2, 8, 1)
    batcher.add(row)
    assert run_table(batcher) == [("decode", [(row.slot or 0, 2, 7, 1, True)])]


def test_answers_are_reused_too_but_not_their_last_token() -> None:
    batcher = Batcher(replace(SHAPES, num_slots=1, num_rows=1))
    batcher.add(sequence(0, 3, 3))
    run_table(batcher)
    row = Sequence(1, (100, 101, 102, 7, 7, 7, 7, 7), 1)
    batcher.add(row)
    run_table(batcher)
    assert row.num_reused == 5  # three of the prompt, two of the answer: the third was never fed


def test_nothing_is_reused_where_it_is_turned_off() -> None:
    batcher = Batcher(SHAPES, prefix_reuse=False)
    rows = [sequence(key, 8, 1) for key in range(3)]
    for row in rows:
        batcher.add(row)
    assert len(run_table(batcher)) == 6
    assert [row.num_reused for row in rows] == [0, 0, 0]


def test_slots_beyond_the_decoded_rows_only_remember() -> None:
    batcher = Batcher(replace(SHAPES, num_slots=4, num_rows=1))
    for key in range(3):
        batcher.add(sequence(key, 4, 1, 100 * key))
    run_table(batcher)
    again = sequence(3, 4, 1, 100)
    batcher.add(again)
    run_table(batcher)
    assert again.num_reused == 3


def test_a_row_that_its_reader_ends_gives_its_slot_back() -> None:
    batcher = Batcher(SHAPES)
    row = sequence(0, 4, 9)
    batcher.add(row)
    for token in (7, 8, 9):
        step = batcher.plan()
        assert step is not None
        batcher.commit(step, [[token]])
    assert batcher.stop(row, 1) == 2
    assert (row.output_ids, row.finish_reason) == ([7], FinishReason.STOP)
    assert not batcher.busy
    batcher.check()


def test_eos_ends_a_row_and_is_kept() -> None:
    batcher = Batcher(SHAPES)
    row = sequence(0, 2, 9)
    batcher.add(row)
    run_table(batcher, token=EOS)
    assert (row.output_ids, row.finish_reason) == ([EOS], FinishReason.STOP)


def test_limit_ends_a_row_as_length_even_in_its_last_place() -> None:
    batcher = Batcher(SHAPES)
    row = sequence(0, 2, 3)
    batcher.add(row)
    run_table(batcher)
    assert (row.output_ids, row.finish_reason) == ([7, 7, 7], FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("prompt_tokens", "wanted", "allowed"),
    [(1, None, 16), (15, None, 2), (16, None, 1), (16, 5, 1), (4, 5, 5), (4, 50, 13)],
)
def test_answers_fit_the_context(prompt_tokens: int, wanted: int | None, allowed: int) -> None:
    assert Batcher(SHAPES).new_token_limit(prompt_tokens, wanted) == allowed


def test_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(RowError, match=r"17 tokens, more than the context of 16"):
        Batcher(SHAPES).new_token_limit(17, 1)


def test_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(RowError, match="empty"):
        Batcher(SHAPES).new_token_limit(0, 1)


@given(st.lists(st.integers(0, 1)).map(tuple), st.lists(st.integers(0, 1)).map(tuple))
def test_common_beginning(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    length = num_common(left, right)
    assert left[:length] == right[:length]
    assert left == right or left[length : length + 1] != right[length : length + 1]


class AnyArrival(RuleBasedStateMachine):
    """Rows arrive whenever they like; each gets exactly its tokens, in order, at its positions."""

    @initialize(
        num_rows=st.integers(1, 4),
        prefill_rows=st.integers(1, 6),
        spare=st.integers(0, 2),
        lens=st.sampled_from([(), (2,), (4,), (2, 8)]),
        continuous=st.booleans(),
        decode_len=st.integers(1, 3),
        prefill_ctx_len=st.sampled_from([7, 16]),
        prefix_reuse=st.booleans(),
    )
    def start(
        self,
        num_rows: int,
        prefill_rows: int,
        spare: int,
        lens: tuple[int, ...],
        continuous: bool,
        decode_len: int,
        prefill_ctx_len: int,
        prefix_reuse: bool,
    ) -> None:
        num_slots = num_rows + (spare if continuous else 0)
        shapes = ProgramShapes(
            num_slots=num_slots,
            num_rows=num_rows,
            prefill_rows=min(prefill_rows, num_slots) if continuous and lens else num_rows,
            prefill_lens=lens,
            prefill_ctx_len=prefill_ctx_len,
            ctx_len=16,
            decode_len=decode_len,
            continuous=continuous,
        )
        self.batcher = Batcher(shapes, prefix_reuse=prefix_reuse)
        self.added: list[Sequence] = []
        self.finished: list[Sequence] = []
        # What a card would hold: the token at each position of each slot.
        self.cache = [[-1] * (16 + decode_len) for _ in range(num_slots)]

    @rule(
        prompt=st.lists(st.integers(3, 4), min_size=1, max_size=16),
        wanted=st.integers(1, 20),
        late=st.booleans(),
    )
    def add(self, prompt: list[int], wanted: int, late: bool) -> None:
        limit = self.batcher.new_token_limit(len(prompt), wanted)
        key = len(self.added)
        row = Sequence(key, tuple(prompt), limit, frozenset({EOS}), background=late)
        self.added.append(row)
        self.batcher.add(row)

    @rule(tokens=st.lists(st.integers(2, 5), min_size=3, max_size=3), decode_first=st.booleans())
    def step(self, tokens: list[int], decode_first: bool) -> None:
        step = self.batcher.plan(decode_first=decode_first)
        if step is None:
            assert len(self.finished) == len(self.added)
            return
        assert len({slot for slot, _ in step.rows}) == len(step.rows) > 0
        shapes = self.batcher.shapes
        assert len(step.rows) <= (shapes.prefill_rows if step.is_prefill else shapes.num_rows)
        room = self.batcher.shapes.decode_len
        chosen = []
        for (slot, row), count in zip(step.rows, step.counts, strict=True):
            assert 1 <= count <= step.seq_len
            ids = row.next_ids(count)
            assert len(ids) == count
            assert row.newest == ids[0]
            start = row.num_computed
            self.cache[slot][start : start + count] = ids
            every = [*row.prompt_ids, *row.output_ids]
            # All that the row's answer depends on is there, whoever had the slot before.
            assert self.cache[slot][: start + count] == every[: start + count]
            if step.is_prefill:
                assert start + count <= self.batcher.shapes.prefill_ctx_len
            drafted = (
                0
                if step.is_prefill
                else min(room - count, row.max_new_tokens - len(row.output_ids) - 1)
            )
            kept = tokens[: drafted + 1]
            if start + count == row.num_tokens:
                self.cache[slot][start + count : start + count + drafted] = kept[:-1]
            chosen.append(kept)
        self.finished += self.batcher.commit(step, chosen)

    @rule()
    def make_room(self) -> None:
        before = {row: list(row.output_ids) for row in self.batcher.running.values()}
        lost = self.batcher.make_room()
        assert all(row.background and row.output_ids == before[row] for row in lost)
        self.batcher.admit()
        if self.batcher.shapes.continuous:
            kinds = {row.background for row in self.batcher.waiting}
            running = self.batcher.running.values()
            assert not (False in kinds and any(row.background for row in running))

    @rule(keep=st.integers(0, 3))
    def stop(self, keep: int) -> None:
        for row in self.batcher.running.values():
            if len(row.output_ids) > keep:
                self.batcher.stop(row, keep)
                self.finished.append(row)
                return

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "batcher"):
            self.batcher.check()

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        while self.batcher.busy:
            self.step([3, 3, 3], decode_first=False)
        assert sorted(s.key for s in self.finished) == [s.key for s in self.added]
        for row in self.finished:
            assert EOS not in row.output_ids[:-1]
            assert len(row.output_ids) <= row.max_new_tokens
            assert row.slot is None


TestAnyArrival = AnyArrival.TestCase
TestAnyArrival.settings = settings(stateful_step_count=40)
