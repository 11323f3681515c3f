"""Rows in lockstep, as a table of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qaic_ray.engine.batching.lockstep import LockstepBatcher
from qaic_ray.engine.steps import ProgramShapes, Sequence
from qaic_ray.errors import RowError

EOS = 2
SHAPES = ProgramShapes(
    num_slots=2,
    num_rows=2,
    prefill_rows=2,
    prefill_lens=(4,),
    prefill_ctx_len=16,
    ctx_len=16,
    decode_len=1,
    continuous=False,
)
Told = tuple[str, int, list[tuple[int, int]], bool]


def sequence(key: int, prompt_tokens: int, max_new_tokens: int) -> Sequence:
    return Sequence(key, tuple(range(100, 100 + prompt_tokens)), max_new_tokens, frozenset({EOS}))


def run_table(batcher: LockstepBatcher) -> list[Told]:
    """Every step: its kind, cache index, slot and key of the rows that run, whether it answers."""
    table: list[Told] = []
    while (step := batcher.plan()) is not None:
        kind = "prefill" if step.is_prefill else "decode"
        rows = [(slot, row.key) for slot, row in step.rows]
        table.append((kind, step.cache_index, rows, step.ends_padded))
        batcher.commit(step, [[7]] * len(rows))
        batcher.check()
    return table


def test_rows_of_as_many_chunks_go_together_and_early_ends_keep_their_place_empty() -> None:
    batcher = LockstepBatcher(SHAPES)
    for added in (sequence(0, 6, 2), sequence(1, 3, 9), sequence(2, 8, 4)):
        batcher.add(added)
    assert run_table(batcher) == [
        # Rows 0 and 2 have two chunks; row 1 arrived before row 2 and has one.
        ("prefill", 0, [(0, 0), (1, 2)], False),
        ("prefill", 4, [(0, 0), (1, 2)], True),
        ("decode", 8, [(0, 0), (1, 2)], True),
        ("decode", 9, [(1, 2)], True),
        ("decode", 10, [(1, 2)], True),
        ("prefill", 0, [(0, 1)], True),
        *[("decode", 4 + i, [(0, 1)], True) for i in range(8)],
    ]


def test_a_shorter_row_takes_a_place_left_over_where_it_loses_nothing_by_the_padding() -> None:
    batcher = LockstepBatcher(SHAPES)
    batcher.add(sequence(0, 8, 1))
    batcher.add(sequence(1, 4, 13))  # 8 + 13 - 1 is more than the context: not beside row 0
    batcher.add(sequence(2, 4, 2))
    table = run_table(batcher)
    assert table[1] == ("prefill", 4, [(0, 0), (1, 2)], True)
    assert [rows for kind, _, rows, _ in table if kind == "prefill"][-1] == [(0, 1)]


def test_the_row_that_waits_longest_leads_its_wave() -> None:
    batcher = LockstepBatcher(SHAPES)
    for key, length in enumerate((3, 9, 3, 3)):
        batcher.add(sequence(key, length, 6))
    leaders = [
        rows for kind, index, rows, _ in run_table(batcher) if (kind, index) == ("prefill", 0)
    ]
    assert leaders == [[(0, 0), (1, 2)], [(0, 1)], [(0, 3)]]


def test_decode_only_program_feeds_prompts_token_by_token() -> None:
    batcher = LockstepBatcher(replace(SHAPES, prefill_lens=()))
    batcher.add(sequence(0, 3, 2))
    batcher.add(sequence(1, 2, 1))
    assert run_table(batcher) == [
        ("prefill", 0, [(0, 0), (1, 1)], False),
        ("prefill", 1, [(0, 0), (1, 1)], False),
        ("prefill", 2, [(0, 0), (1, 1)], True),
        ("decode", 3, [(0, 0)], True),
    ]


@pytest.mark.parametrize(
    ("prompt_tokens", "wanted", "allowed"), [(1, None, 13), (4, None, 13), (5, 50, 9), (16, 5, 1)]
)
def test_answers_fit_the_context_behind_the_padding(
    prompt_tokens: int, wanted: int | None, allowed: int
) -> None:
    assert LockstepBatcher(SHAPES).new_token_limit(prompt_tokens, wanted) == allowed


@pytest.mark.parametrize("prompt_tokens", [0, 17])
def test_prompts_that_do_not_fit_are_refused(prompt_tokens: int) -> None:
    with pytest.raises(RowError):
        LockstepBatcher(SHAPES).new_token_limit(prompt_tokens, 1)
