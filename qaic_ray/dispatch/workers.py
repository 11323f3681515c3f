"""The workers of a run: status, failures, measured speed and next deadline of each, and sums.

A worker opens, is ready, and rests after a failure until it is opened again, as its next
incarnation. Sums over the fleet are kept up as workers change, because the fleet is too large to
be walked for each event.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from qaic_ray.dispatch.beginnings import HeldBeginnings
from qaic_ray.dispatch.policy import Policy


class WorkerStatus(Enum):
    """What a worker is doing."""

    OPENING = "opening"
    READY = "ready"
    BACKOFF = "resting"


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker that is not given up.

    Attributes:
        policy: the limits and weights.
        since_s: when the present status began.
        slots: prompts it runs side by side; 0 while it is not ready.
        shards: ids of the shards it holds, oldest first.
        num_unfinished: prompts of these that have no row yet; `work` is their estimated work, and
            `taken` how many slots they take, more than there are where some are queued, and
            `lent` how many of these are the background's, which gives them to others.
        failures: failures since its last row.
        openings: failures to open since it was last ready.
        lives: how many times it was ready.
        proven_lives: the lives up to the last one that gave a row; `fruitful_lives` of them did.
        transients: failed shards since its last row.
        retry_s: when shards that failed are begun again; None when there are none.
        alone: whether it runs a prompt that must be alone.
        draining: whether it takes nothing more until it may run such a prompt.
        requesting: whether it stands in the queue for shards.
        timer_s: the earliest time at which it will be looked at.
        awaited: whether it was neither ready nor failed yet.
        work_per_s: speed, measured while all its slots were taken; 0 while unknown.
        step_s: mean time of its engine's last steps; None while unknown.
        held: what its slots hold; None where nobody asks, and while it is not ready.
    """

    name: str
    since_s: float
    policy: Policy
    status: WorkerStatus = WorkerStatus.OPENING
    incarnation: int = 0
    slots: int = 0

    shards: list[int] = field(default_factory=list)
    num_unfinished: int = 0
    work: float = 0.0
    taken: int = 0
    lent: int = 0

    failures: int = 0
    openings: int = 0
    lives: int = 0
    proven_lives: int = 0
    fruitful_lives: int = 0
    transients: int = 0
    retry_s: float | None = None
    alone: bool = False
    draining: bool = False
    requesting: bool = False
    awaited: bool = True
    timer_s: float = math.inf

    work_per_s: float = 0.0
    step_s: float | None = None
    held: HeldBeginnings | None = None
    _measured_work: float = 0.0
    _measured_s: float = 0.0
    _mark_s: float = 0.0

    _num_steps: int | None = None
    _alive_s: float = 0.0
    _steps_mark_s: float = 0.0

    def enter(self, status: WorkerStatus, now_s: float, *, slots: int = 0) -> None:
        """Begin another status."""
        self.status, self.since_s, self.slots = status, now_s, slots
        self.held = None
        self.retry_s, self._num_steps = None, None
        self.timer_s = math.inf

    @property
    def engaged(self) -> int:
        """Slots that prompts of the foreground take: no other one finds room there."""
        return self.taken - self.lent

    @property
    def load(self) -> tuple[float, float]:
        """The share of its slots that is taken, above 1 where prompts are queued; then engaged."""
        return self.taken / self.slots, self.engaged / self.slots

    def lose_state(self) -> None:
        """Its engine was made anew: its slots hold nothing any more."""
        if self.held is not None:
            self.held.forget()

    def on_first_work(self, now_s: float) -> None:
        """It gets work, and had none."""
        self._mark_s = self._alive_s = self._steps_mark_s = now_s

    def measure_work(self, now_s: float, work: float, *, full: bool) -> None:
        """Learn from finished work; it tells the speed only if all slots were taken (`full`)."""
        seconds = now_s - self._mark_s
        self._mark_s = self._alive_s = now_s
        if not full:
            return
        kept = math.exp(-seconds / self.policy.speed_s)
        self._measured_work = self._measured_work * kept + work
        self._measured_s = self._measured_s * kept + seconds
        if self._measured_s >= self.policy.first_speed_s:
            self.work_per_s = self._measured_work / self._measured_s

    def measure_steps(self, now_s: float, num_steps: int) -> None:
        """Learn that its engine has made so many steps since it was opened."""
        if self._num_steps is None:
            self._alive_s = self._steps_mark_s = now_s
        elif num_steps > self._num_steps:
            newest_s = (now_s - self._steps_mark_s) / (num_steps - self._num_steps)
            before_s = newest_s if self.step_s is None else self.step_s
            self.step_s = before_s + self.policy.new_step * (newest_s - before_s)
            self._alive_s = self._steps_mark_s = now_s
        self._num_steps = num_steps

    def quiet_s(self, now_s: float) -> float:
        """Seconds since its last row or step."""
        return now_s - self._alive_s

    @property
    def stall_s(self) -> float:
        """How long it may make no step."""
        if self.step_s is None:
            return self.policy.first_stall_s
        return max(self.policy.min_stall_s, self.policy.stall_steps * self.step_s)

    def pause_s(self, failures: int) -> float:
        """How long it rests after so many failures in a row."""
        doubled_s = self.policy.min_backoff_s * 2.0 ** (max(1, failures) - 1)
        return min(self.policy.max_backoff_s, doubled_s)

    def stall_at_s(self, listening_s: float) -> float:
        """When it is stalled if nothing is heard; `listening_s`: since when it could be heard."""
        if self._num_steps is None or not self.shards or self.status is not WorkerStatus.READY:
            return math.inf
        return max(self._alive_s, listening_s) + self.stall_s

    def deadline_s(self, listening_s: float) -> float:
        """When it must be looked at if nothing is heard; infinity for never."""
        if self.status is WorkerStatus.BACKOFF:
            return self.since_s + self.pause_s(self.failures)
        if self.status is WorkerStatus.OPENING:
            return max(self.since_s, listening_s) + self.policy.max_open_s
        stall_at_s = self.stall_at_s(listening_s)
        return stall_at_s if self.retry_s is None else min(self.retry_s, stall_at_s)


class WorkerPool:
    """The workers that are not given up.

    Attributes:
        workers: by name.
        listening_s: since when the driver has heard what workers say, without a gap.
        next_s: when a worker must be looked at, or earlier; infinity for never.
        num_ready: workers that are ready.
        num_awaited: workers that were neither ready nor failed yet.
        num_draining: workers that are being cleared for a prompt that must be alone.
        holds_beginnings: whether it is kept what the slots of each worker hold.
    """

    def __init__(self, policy: Policy) -> None:
        self.workers: dict[str, WorkerState] = {}
        self.listening_s = -math.inf
        self.next_s = math.inf
        self.num_ready = 0
        self.num_awaited = 0
        self.num_draining = 0
        self.holds_beginnings = False
        self._policy = policy
        self._timers: list[tuple[float, str]] = []
        self._most_slots = 0
        self._proven_lives = 0
        self._fruitful_lives = 0
        self._ready_slots = 0
        # Of the ready workers whose speed is known: how many, their slots, and their speeds' sum.
        self._num_measured = 0
        self._measured_slots = 0
        self._work_per_s = 0.0
        # Of the ready workers whose steps are known: how many, and the sum of a step's times.
        self._num_stepping = 0
        self._step_s = 0.0

    def start(self, names: Sequence[str], now_s: float, *, is_open: bool) -> None:
        """Take these as opening; `is_open`: for prompts that come at any time."""
        self.holds_beginnings = is_open and len(names) > 1 and self._policy.block_tokens > 0
        self.workers = {name: WorkerState(name, now_s, self._policy) for name in names}
        self.num_awaited = len(names)
        for worker in self.workers.values():
            self.set_timer(worker)

    def alive(self, name: str, incarnation: int) -> WorkerState | None:
        """The worker, unless this incarnation of it is over."""
        worker = self.workers.get(name)
        if worker is None or worker.incarnation != incarnation:
            return None
        return None if worker.status is WorkerStatus.BACKOFF else worker

    def open(self, worker: WorkerState, slots: int, now_s: float) -> None:
        """Take a worker as ready."""
        self._expect_no_more(worker)
        worker.enter(WorkerStatus.READY, now_s, slots=slots)
        if self.holds_beginnings:
            worker.held = HeldBeginnings(slots, self._policy)
        worker.openings = 0
        worker.lives += 1
        self._most_slots = max(self._most_slots, slots)
        self._count(worker, 1)

    def rest(self, worker: WorkerState, now_s: float) -> None:
        """Let a worker that failed rest."""
        self._count(worker, -1)
        self._expect_no_more(worker)
        self.drain(worker, False)
        worker.enter(WorkerStatus.BACKOFF, now_s)
        worker.transients = 0

    def reopen(self, worker: WorkerState, now_s: float) -> None:
        """Let a worker that has rested open as its next incarnation."""
        worker.enter(WorkerStatus.OPENING, now_s)
        worker.incarnation += 1
        self.set_timer(worker)

    def worked(
        self, worker: WorkerState, now_s: float, work: float, *, full: bool, answered: bool
    ) -> None:
        """Learn that so much work is done; for `full` see `WorkerState.measure_work`.

        Args:
            answered: whether a prompt was answered: what went wrong before did not last.
        """
        self._count(worker, -1)
        worker.measure_work(now_s, work, full=full)
        self._count(worker, 1)
        if not answered:
            return
        worker.failures = worker.transients = 0
        if worker.proven_lives < worker.lives:
            self._proven_lives += worker.lives - worker.proven_lives
            self._fruitful_lives += 1
            worker.fruitful_lives += 1
            worker.proven_lives = worker.lives

    def stepped(self, worker: WorkerState, now_s: float, num_steps: int) -> None:
        """Learn that its engine has made so many steps since it was opened."""
        self._count(worker, -1)
        worker.measure_steps(now_s, num_steps)
        self._count(worker, 1)
        self.set_timer(worker)

    def drain(self, worker: WorkerState, draining: bool) -> None:
        """Say whether it takes nothing more until it may run a prompt alone."""
        self.num_draining += draining - worker.draining
        worker.draining = draining

    def is_hopeless(self, worker: WorkerState) -> bool:
        """Whether a worker that failed is given up.

        What counts is whether rows come between failures, not how many failures there are. Until
        its own first row it is measured by the others: a fleet where all die often is no reason.
        """
        lives, fruitful = worker.proven_lives, worker.fruitful_lives
        if not fruitful:
            lives, fruitful = self._proven_lives, self._fruitful_lives
        limit: float = self._policy.max_failures
        if fruitful:
            limit = self._policy.patience * lives / fruitful
        return worker.openings >= self._policy.max_openings or worker.failures >= limit

    # -- sums over the fleet

    @property
    def num_slots(self) -> int:
        """Slots of all workers; one that is not ready will have as many as the largest one."""
        return self._ready_slots + (len(self.workers) - self.num_ready) * self._most_slots

    def speed(self, worker: WorkerState) -> float:
        """A ready worker's speed in parts of the fleet's mean; 1 while it is not known."""
        if not worker.work_per_s:
            return 1.0
        mean = self._work_per_s / self._num_measured
        return min(worker.work_per_s / mean, self._policy.max_speed)

    def is_slow(self, worker: WorkerState) -> bool:
        """Whether a worker is known to be slower than the fleet by much: its steps, or its rows."""
        if worker.step_s is not None:
            return self._policy.slow_share * worker.step_s > self._step_s / self._num_stepping
        if not worker.work_per_s:
            return False
        mean = worker.slots * self._work_per_s / self._measured_slots
        return worker.work_per_s < self._policy.slow_share * mean

    def _expect_no_more(self, worker: WorkerState) -> None:
        self.num_awaited -= worker.awaited
        worker.awaited = False

    def _count(self, worker: WorkerState, sign: int) -> None:
        """Count a ready worker into the sums, or out of them before it changes."""
        if worker.status is not WorkerStatus.READY:
            return
        self.num_ready += sign
        self._ready_slots += sign * worker.slots
        if worker.work_per_s:
            self._num_measured += sign
            self._measured_slots += sign * worker.slots
            self._work_per_s += sign * worker.work_per_s
        if worker.step_s is not None:
            self._num_stepping += sign
            self._step_s += sign * worker.step_s

    # -- time

    def set_timer(self, worker: WorkerState) -> None:
        """See that it is looked at in time. Too early does no harm: the timer is set again."""
        time_s = worker.deadline_s(self.listening_s)
        if time_s < worker.timer_s:
            worker.timer_s = time_s
            heapq.heappush(self._timers, (time_s, worker.name))
            self.next_s = self._timers[0][0]

    def due(self, now_s: float) -> Iterator[WorkerState]:
        """The workers to be looked at now; the caller sets their timers again."""
        while now_s >= self.next_s:
            time_s, name = heapq.heappop(self._timers)
            self.next_s = self._timers[0][0] if self._timers else math.inf
            worker = self.workers.get(name)
            if worker is not None and worker.timer_s == time_s:
                worker.timer_s = math.inf
                yield worker
