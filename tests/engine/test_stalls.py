"""Who waits for whose prefill, on a card whose time is simulated: 0.05 s a chunk, 0.02 s a decode.

A gap is the time between two tokens of a row, counted here from the outside, after each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from formula_program import EOS, FormulaProgram, answer
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import Specialization, Specializations
from qaic_ray.engine.batching.stalls import BACKGROUND_S, RARE
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.steps import Sequence

CHUNK_S, DECODE_S = 0.05, 0.02
CHUNK = 4


@dataclass
class Watched:
    """An engine and the times at which each of its rows got tokens."""

    slots: int
    max_stall_s: float = 0.0
    prefill_rows: int = 1
    ctx_len: int = 128
    now_s: float = 0.0
    kinds: str = ""
    given: dict[int, Sequence] = field(default_factory=dict)
    came_s: dict[int, list[float]] = field(default_factory=dict)
    away: set[tuple[int, int]] = field(default_factory=set)
    """Rows of the background that gave their slot to others, and how many tokens they had."""

    def __post_init__(self) -> None:
        entries = (
            Specialization(self.prefill_rows, CHUNK, self.ctx_len, self.slots),
            Specialization(self.slots, 1, self.ctx_len, self.slots),
        )
        program = FormulaProgram(Specializations(entries))
        run = program.run

        def timed(shape, inputs, meanwhile=None):  # type: ignore[no-untyped-def]
            self.now_s += DECODE_S if shape.is_decode else CHUNK_S
            self.kinds += "d" if shape.is_decode else "p"
            return run(shape, inputs, meanwhile)

        program.run = timed  # type: ignore[method-assign]
        self.engine = Engine(
            program, clock=lambda: self.now_s, max_stall_s=self.max_stall_s, prefix_reuse=False
        )

    def add(
        self, num_prompt: int, num_answer: int, *, background: bool = False, eos: bool = False
    ) -> int:
        key = len(self.given)
        prompt = tuple((key * 7 + i) % 50 + 6 for i in range(num_prompt))
        row = Sequence(
            key, prompt, num_answer, frozenset({EOS} if eos else ()), background=background
        )
        self.given[key] = row
        self.came_s[key] = [self.now_s]
        self.engine.add(row)
        return key

    def step(self) -> None:
        before = {key: len(row.output_ids) for key, row in self.given.items()}
        self.engine.step()
        self.engine.batcher.check()
        for key, row in self.given.items():
            self.came_s[key] += [self.now_s] * (len(row.output_ids) - before[key])
            if row.background and row.slot is None:
                self.away.add((key, len(row.output_ids)))

    def run(self) -> None:
        while self.engine.busy:
            self.step()
        for row in self.given.values():
            right = answer(row.prompt_ids, row.max_new_tokens)
            assert row.output_ids[: len(right)] == right
            assert row.stop_ids or len(row.output_ids) == row.max_new_tokens

    def gaps(self, key: int) -> list[float]:
        """Between its tokens, but for those between which it had no slot: such a row waits as long
        as requests do. The time to the first token is none of them."""
        times = enumerate(pairwise(self.came_s[key][1:]), 1)
        return [after - before for count, (before, after) in times if (key, count) not in self.away]


rows = st.tuples(st.integers(1, 30), st.integers(1, 25), st.integers(0, 12), st.booleans())


@given(st.lists(rows, min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 3))
def test_with_no_stall_allowed_a_row_waits_for_one_chunk_at_most(
    asked: list[tuple[int, int, int, bool]], slots: int, prefill_rows: int
) -> None:
    """Whatever arrives when: a chunk, then tokens for all rows of the foreground that run."""
    watched = Watched(slots, prefill_rows=min(slots, prefill_rows))
    for num_prompt, num_answer, num_steps, background in asked:
        watched.add(num_prompt, num_answer, background=background, eos=True)
        for _ in range(num_steps):
            watched.step()
    watched.run()
    for key, row in watched.given.items():
        most = max([0.0, *watched.gaps(key)])
        limit = BACKGROUND_S if row.background else 0.0
        assert most <= max(limit, CHUNK_S) + DECODE_S + 1e-9


def test_rows_that_wait_for_prefill_alternate_with_decode_steps() -> None:
    watched = Watched(4)
    watched.add(CHUNK, 100)
    watched.step()
    for _ in range(3):
        watched.add(5 * CHUNK, 2)
    watched.run()
    assert watched.kinds.startswith("p" + "pd" * 15)


def test_a_clock_that_stands_still_changes_nothing_about_that() -> None:
    """Each step takes no time: what was waited is 0 s, and still not to be made longer."""
    watched = Watched(2)
    watched.engine._clock = lambda: 0.0
    watched.add(CHUNK, 30)
    watched.step()
    watched.add(6 * CHUNK, 1)
    watched.run()
    assert "pp" not in watched.kinds[1:]


def test_beside_the_foreground_the_background_rides_and_is_rarely_prefilled() -> None:
    watched = Watched(4, ctx_len=1024)
    online = watched.add(CHUNK, 3 * RARE)
    watched.step()
    late = [watched.add(60 * CHUNK, 1, background=True) for _ in range(3)]
    watched.run()
    gaps = watched.gaps(online)
    assert all(watched.came_s[key][1] < watched.came_s[online][-1] for key in late)
    slow = [number for number, gap in enumerate(gaps) if gap > 1.5 * DECODE_S]
    assert max(gaps) <= CHUNK_S + DECODE_S + 1e-9
    assert slow, "a long prompt has its chunk"
    assert min(after - before for before, after in pairwise([-RARE, *slow])) >= RARE


def test_where_the_foreground_waits_for_itself_the_background_adds_nothing() -> None:
    watched = Watched(4, ctx_len=1024)
    watched.add(CHUNK, 600)
    watched.add(120 * CHUNK, 1, background=True)
    for number in range(300):
        if number % 40 == 0:
            watched.add(CHUNK, 1)
        watched.step()
    before = watched.kinds.count("p")
    for _ in range(100):
        watched.step()
    assert watched.kinds.count("p") == before
    assert watched.kinds.count("p") <= 2 + 300 // 40 + 1
    watched.run()


def test_a_prompt_of_the_foreground_is_prefilled_as_if_the_background_were_not_there() -> None:
    """It arrives in the middle of a long prefill, beside rows of the background that decode."""
    first_s = []
    for is_alone in (True, False):
        watched = Watched(4)
        if not is_alone:
            watched.add(CHUNK, 60, background=True)
            watched.step()
            watched.add(20 * CHUNK, 4, background=True)
            for _ in range(5):
                watched.step()
        key = watched.add(6 * CHUNK, 2)
        watched.run()
        first_s.append(watched.came_s[key][1] - watched.came_s[key][0])
    assert first_s[1] == pytest.approx(first_s[0])


def test_rows_of_the_background_are_not_forgotten_behind_a_foreground_that_never_ends() -> None:
    watched = Watched(3)
    slow = watched.add(CHUNK, 20, background=True)
    while watched.engine.batcher.num_background:
        if watched.engine.batcher.running.keys() <= {0}:
            watched.add(10 * CHUNK, 1)
        watched.step()
    watched.run()
    assert max(watched.gaps(slow)) <= BACKGROUND_S + DECODE_S + 1e-9


def test_free_places_of_a_prefill_are_the_backgrounds_and_no_others() -> None:
    watched = Watched(4, prefill_rows=2)
    late = watched.add(6 * CHUNK, 1, background=True)
    watched.add(2 * CHUNK, 1, background=True)
    keys = [watched.add(3 * CHUNK, 1), watched.add(CHUNK, 1)]
    for _ in range(3):
        watched.step()
    assert [len(watched.given[key].output_ids) for key in keys] == [1, 1]
    assert watched.given[late].num_computed == 2 * CHUNK, "two places were left, in two steps"
    watched.run()
