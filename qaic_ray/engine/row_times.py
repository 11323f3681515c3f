"""When rows came, were first scheduled, and had their tokens; first tokens and gaps are counted."""

from __future__ import annotations

from itertools import compress
from typing import NamedTuple

from qaic_ray.engine.step_io import StepInputs
from qaic_ray.engine.steps import Sequence, Step
from qaic_ray.metrics import Measurement


class TimesOfRow(NamedTuple):
    """Of a row with a token, on the engine's clock in seconds.

    `entered_s` is when it came, `scheduled_s` when its first step began, `first_s` when it had its
    first token.
    """

    entered_s: float
    scheduled_s: float
    first_s: float


class RowTimes:
    """The times of the rows of one engine.

    Args:
        meter: its `ttft` and `inter_token` are counted into.
    """

    def __init__(self, meter: Measurement) -> None:
        self._meter = meter
        self._awaiting: dict[Sequence, float] = {}
        self._first: dict[Sequence, tuple[float, float]] = {}
        self._scheduled: dict[Sequence, float] = {}
        self._step_before: Step | None = None
        # When running rows had their last tokens: all at the end of the last decode step, but those
        # that a prefill has answered since, and those that had to give their slot.
        self._decoded_s = 0.0
        self._prefilled_s: dict[Sequence, float] = {}
        self._preempted_s: dict[Sequence, float] = {}

    def enter(self, sequence: Sequence, now_s: float) -> None:
        """A row comes: its time to the first token starts."""
        self._awaiting[sequence] = now_s

    def begin(self, step: Step, start_s: float) -> None:
        """A step begins."""
        # A steady step is the same object again and again, with no row that is new.
        if self._awaiting and step is not self._step_before:
            for _, sequence in step.rows:
                self._scheduled.setdefault(sequence, start_s)
        self._step_before = step

    def end(self, step: Step, built: StepInputs, end_s: float) -> None:
        """A step has given its answered rows tokens."""
        num_first = self._note_first(step, built, end_s) if self._awaiting else 0
        gaps, prefilled_s = self._meter.inter_token, self._prefilled_s
        if step.is_prefill:
            for _, sequence in compress(step.rows, built.answers):
                if self._first[sequence][1] != end_s:
                    since_s = prefilled_s.get(sequence, self._decoded_s)
                    gaps.count(end_s - self._preempted_s.pop(sequence, since_s))
                prefilled_s[sequence] = end_s
            return
        # Every row that has a token already is in a decode step: most share one gap.
        num_steady = sum(built.answers) - num_first - len(prefilled_s)
        if self._preempted_s:
            num_steady -= self._note_resumed(step, built, end_s)
        if num_steady > 0:
            gaps.count(end_s - self._decoded_s, num_steady)
        if prefilled_s:
            for since_s in prefilled_s.values():
                gaps.count(end_s - since_s)
            prefilled_s.clear()
        self._decoded_s = end_s

    def preempt(self, sequence: Sequence) -> None:
        """A row gives its slot: its next gap is since its last token, whenever that was."""
        if sequence in self._first and sequence not in self._preempted_s:
            self._preempted_s[sequence] = self._prefilled_s.pop(sequence, self._decoded_s)

    def leave(self, sequence: Sequence) -> TimesOfRow:
        """A row that has a token ends."""
        entered_s, first_s = self._first[sequence]
        times = TimesOfRow(entered_s, self._scheduled[sequence], first_s)
        self.forget(sequence)
        return times

    def forget(self, sequence: Sequence) -> None:
        """A row is gone, with a token or not."""
        self._awaiting.pop(sequence, None)
        self._first.pop(sequence, None)
        self._scheduled.pop(sequence, None)
        self._prefilled_s.pop(sequence, None)
        self._preempted_s.pop(sequence, None)

    def _note_first(self, step: Step, built: StepInputs, end_s: float) -> int:
        """Note rows that have their first token now; how many."""
        num_before = len(self._awaiting)
        for _, sequence in compress(step.rows, built.answers):
            if sequence in self._awaiting:
                entered_s = self._awaiting.pop(sequence)
                self._first[sequence] = (entered_s, end_s)
                self._meter.ttft.count(end_s - entered_s)
        return num_before - len(self._awaiting)

    def _note_resumed(self, step: Step, built: StepInputs, end_s: float) -> int:
        """Count the gap of each row that goes on behind a pause; how many."""
        num_before = len(self._preempted_s)
        for _, sequence in compress(step.rows, built.answers):
            since_s = self._preempted_s.pop(sequence, None)
            if since_s is not None:
                self._meter.inter_token.count(end_s - since_s)
        return num_before - len(self._preempted_s)
