"""When a row's tokens came, and when it was scheduled, against a naive record of every step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from formula_program import EOS, VOCAB, FormulaProgram
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import IoContract, Specializations
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.steps import Sequence, Step
from qaic_ray.metrics import Durations, bin_of

Arrivals = list[tuple[int, list[int], int]]
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=8,
)


class Timed:
    """Runs rows on a program whose steps take the seconds it is told, and notes what it sees."""

    def __init__(self, program: FormulaProgram, step_s: list[float]) -> None:
        self.now_s = 0.0
        self.num_steps = 0
        self.step_s = step_s
        self.token_s: dict[int, list[float]] = {}
        self.scheduled_s: dict[int, float] = {}
        self._run = program.run
        program.run = self._timed  # type: ignore[method-assign]
        self.engine = Engine(program, clock=lambda: self.now_s)
        self._commit = self.engine.batcher.commit
        self.engine.batcher.commit = self._committed  # type: ignore[method-assign]

    def _timed(self, *arguments: Any) -> Any:
        self.begun_s = self.now_s
        self.now_s += self.step_s[self.num_steps % len(self.step_s)]
        self.num_steps += 1
        return self._run(*arguments)

    def _committed(self, step: Step, chosen: Any) -> list[Sequence]:
        for _, sequence in step.rows:
            self.scheduled_s.setdefault(sequence.key, self.begun_s)
        return self._commit(step, chosen)

    def run(self, arrivals: Arrivals) -> list[Finished]:
        """Every row to its end."""
        rows = []
        for key, (step, prompt, wanted) in enumerate(arrivals):
            limit = self.engine.new_token_limit(len(prompt), wanted)
            rows.append((step, Sequence(key, tuple(prompt), limit, frozenset({EOS}))))
        done: list[Finished] = []
        counts = {row.key: 0 for _, row in rows}
        waiting = sorted(rows, key=lambda row: row[0])
        step = 0
        while waiting or self.engine.busy:
            while waiting and waiting[0][0] <= step:
                self.engine.add(waiting.pop(0)[1])
            done += self.engine.step()
            for _, row in rows:
                if len(row.output_ids) > counts[row.key]:
                    counts[row.key] = len(row.output_ids)
                    self.token_s.setdefault(row.key, []).append(self.now_s)
            step += 1
        return done


@given(
    slots=st.integers(1, 4),
    prompt_len=st.sampled_from([1, 4, (2, 8)]),
    how=st.sampled_from(["continuous", "static", "lockstep"]),
    step_s=st.lists(st.sampled_from([0.5, 1.0, 2.0, 8.0]), min_size=1, max_size=5),
    arrivals=ARRIVALS,
)
def test_every_gap_between_tokens_is_counted_once(
    slots: int,
    prompt_len: int | tuple[int, ...],
    how: str,
    step_s: list[float],
    arrivals: Arrivals,
) -> None:
    if how == "lockstep" and isinstance(prompt_len, tuple):
        prompt_len = 4
    shapes = Specializations.build(
        batch_size=slots, prompt_len=prompt_len, ctx_len=32, continuous=how == "continuous"
    )
    contract = IoContract.CACHE_INDEX if how == "lockstep" else IoContract.POSITION_IDS
    timed = Timed(FormulaProgram(shapes, io_contract=contract), step_s)
    done = timed.run(arrivals)
    gaps = [b - a for times in timed.token_s.values() for a, b in pairwise(times)]
    assert timed.engine.measurement.inter_token == Durations.of(gaps)
    for finished in done:
        key = finished.sequence.key
        assert finished.scheduled_s == timed.scheduled_s[key]
        assert finished.entered_s <= finished.scheduled_s < timed.token_s[key][0]
        assert finished.entered_s + finished.ttft_s == timed.token_s[key][0]
        assert finished.entered_s + finished.ttft_s + finished.decode_s == timed.token_s[key][-1]


def test_counting_a_gap_of_many_rows_is_counting_it_for_each() -> None:
    many, each = Durations(), Durations()
    many.count(0.02, 7)
    for _ in range(7):
        each.count(0.02)
    assert many == each == Durations({bin_of(0.02): 7})
