"""What is known of one worker: its life, its speed, its standing. Knows no prompts and no clock.

A worker opens, is ready, and rests after a failure until it is opened again as its next
incarnation. All that must be looked at in time without anything being heard (a rest that is over, a
pause that is over, an opening or a card that hangs) is one deadline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

MAX_OPENINGS = 3
"""A worker that cannot be opened so often in a row is given up."""
MAX_FAILURES = 6
"""Where no worker has finished a row yet, one is given up after so many failures."""
PATIENCE = 10
"""Elsewhere it is given up when it failed so many times as often, with no row finished, as a row
takes lives: chance makes one of 20,000 such series as long."""
MAX_TRANSIENTS = 2
"""So often in a row a failed shard is tried again on the same worker."""
MIN_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_OPEN_S = 900.0
"""Opening is loading: a QPC of a large model, from a shared disk, on a node that was asleep."""
MIN_STALL_S = 15.0
STALL_STEPS = 100
"""No step in the time of so many of its own is a stall, but never before MIN_STALL_S."""
FIRST_STALL_S = 300.0
"""The same while no step was seen: the first one may wait for a long prefill, or an emulator."""
FIRST_SPEED_S = 1.0
"""What a worker does in less than this tells nothing of its speed."""
SPEED_S = 60.0
"""What was measured so long ago counts a third of what is measured now."""


class WorkerStatus(Enum):
    """Where a worker is in its life."""

    OPENING = "opening"
    READY = "ready"
    BACKOFF = "resting"


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker that is not given up.

    Attributes:
        since_s: when the state began.
        slots: prompts it runs side by side; 0 while it is not ready.
        shards: ids of the shards it holds, oldest first.
        num_unfinished: prompts of these that have no row yet, and `work` their estimated work.
        failures: with no row finished since.
        openings: of these the last ones, in which it could not be opened.
        lives: times that it was opened.
        proven_lives: those up to the last that gave a row; `fruitful_lives` of them did.
        transients: failed shards with no row finished since.
        retry_s: when shards that failed are begun again; None when there are none.
        alone: whether it runs a prompt that must have no company.
        draining: whether it takes nothing more until it may run such a prompt.
        hungry: whether it stands in the queue for work.
        timer_s: the earliest time at which it will be looked at.
        awaited: whether it was neither ready nor failed yet.
        work_per_s: measured while all its slots were taken; 0 while unknown.
        step_s: mean time of its engine's last steps; None while unknown.
    """

    name: str
    since_s: float
    state: WorkerStatus = WorkerStatus.OPENING
    incarnation: int = 0
    slots: int = 0

    shards: list[int] = field(default_factory=list)
    num_unfinished: int = 0
    work: float = 0.0

    failures: int = 0
    openings: int = 0
    lives: int = 0
    proven_lives: int = 0
    fruitful_lives: int = 0
    transients: int = 0
    retry_s: float | None = None
    alone: bool = False
    draining: bool = False
    hungry: bool = False
    awaited: bool = True
    timer_s: float = math.inf

    work_per_s: float = 0.0
    step_s: float | None = None
    _measured_work: float = 0.0
    _measured_s: float = 0.0
    _mark_s: float = 0.0

    _num_steps: int | None = None
    _alive_s: float = 0.0
    _steps_mark_s: float = 0.0

    # -- its life

    def ready(self, slots: int, now_s: float) -> None:
        """It is open."""
        self.state, self.since_s, self.slots = WorkerStatus.READY, now_s, slots
        self.openings = 0
        self.lives += 1
        self.timer_s = math.inf
        self.awaited = False

    def rest(self, now_s: float) -> None:
        """It failed, and comes again after a while."""
        self.state, self.since_s, self.slots = WorkerStatus.BACKOFF, now_s, 0
        self.retry_s, self._num_steps = None, None
        self.transients = 0
        self.timer_s = math.inf
        self.awaited = False

    def reopen(self, now_s: float) -> None:
        """It is opened again."""
        self.state, self.since_s = WorkerStatus.OPENING, now_s
        self.incarnation += 1

    # -- what it does

    def begins(self, now_s: float) -> None:
        """It gets work, and had none."""
        self._mark_s = self._alive_s = self._steps_mark_s = now_s

    def finished_work(self, now_s: float, work: float, *, full: bool) -> None:
        """So much work is done; `full`: with all its slots taken, so that it tells the speed."""
        seconds = now_s - self._mark_s
        self._mark_s = self._alive_s = now_s
        if not full:
            return
        kept = math.exp(-seconds / SPEED_S)
        self._measured_work = self._measured_work * kept + work
        self._measured_s = self._measured_s * kept + seconds
        if self._measured_s >= FIRST_SPEED_S:
            self.work_per_s = self._measured_work / self._measured_s

    def answered(self) -> None:
        """A row came: whatever went wrong before did not last."""
        self.failures = self.openings = self.transients = 0
        self.fruitful_lives += self.proven_lives < self.lives
        self.proven_lives = self.lives

    def stepped(self, now_s: float, num_steps: int) -> None:
        """Its engine has made so many steps in this life."""
        if self._num_steps is None:
            self._alive_s = self._steps_mark_s = now_s
        elif num_steps > self._num_steps:
            step_s = (now_s - self._steps_mark_s) / (num_steps - self._num_steps)
            self.step_s = step_s if self.step_s is None else 0.8 * self.step_s + 0.2 * step_s
            self._alive_s = self._steps_mark_s = now_s
        self._num_steps = num_steps

    def quiet_s(self, now_s: float) -> float:
        """How long ago it last showed that it lives, by a row or by a step."""
        return now_s - self._alive_s

    # -- what follows

    @property
    def backoff_s(self) -> float:
        """How long it rests after its last failure."""
        return _backoff_s(self.failures)

    @property
    def pause_s(self) -> float:
        """How long it pauses after its last failed shard."""
        return _backoff_s(self.transients)

    @property
    def stall_s(self) -> float:
        """How long it may make no step."""
        if self.step_s is None:
            return FIRST_STALL_S
        return max(MIN_STALL_S, STALL_STEPS * self.step_s)

    @property
    def queued_work(self) -> float:
        """Estimated work of the prompts that wait in it for a slot."""
        queued = self.num_unfinished - self.slots
        return self.work * queued / self.num_unfinished if queued > 0 else 0.0

    def stall_at_s(self, listening_s: float) -> float:
        """When it is stalled if nothing is heard; `listening_s`: since when it could be heard."""
        if self._num_steps is None or not self.shards or self.state is not WorkerStatus.READY:
            return math.inf
        return max(self._alive_s, listening_s) + self.stall_s

    def deadline_s(self, listening_s: float) -> float:
        """When it must be looked at if nothing is heard; infinity for never."""
        if self.state is WorkerStatus.BACKOFF:
            return self.since_s + self.backoff_s
        if self.state is WorkerStatus.OPENING:
            return max(self.since_s, listening_s) + MAX_OPEN_S
        stall_s = self.stall_at_s(listening_s)
        return stall_s if self.retry_s is None else min(self.retry_s, stall_s)


def _backoff_s(failures: int) -> float:
    return min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2.0 ** (max(1, failures) - 1))
