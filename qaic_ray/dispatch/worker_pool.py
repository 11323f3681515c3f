"""All workers of a run: who lives, how quick they are, when to look at whom. Decides nothing.

Sums over the fleet are kept up as its workers change, never walked for.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

from qaic_ray.dispatch.workers import (
    MAX_FAILURES,
    MAX_OPENINGS,
    PATIENCE,
    WorkerState,
    WorkerStatus,
)

_QUICKEST = 4.0


class WorkerPool:
    """The workers that are not given up.

    `listening_s`: since when the driver has heard what the workers say, without a gap;
    `num_awaited`: workers that were neither ready nor failed yet; `num_draining`: workers that are
    being cleared for a prompt that must be alone; `up_s`: how long workers were ready, all added,
    when one of them changed last.
    """

    def __init__(self) -> None:
        self.workers: dict[str, WorkerState] = {}
        self.num_draining = 0
        self.listening_s = -math.inf
        self.up_s = 0.0
        self._changed_s = 0.0
        self._timers: list[tuple[float, str]] = []
        self._num_ready = 0
        self._ready_slots = 0
        self._most_slots = 0
        self._proven_lives = 0
        self._fruitful_lives = 0
        # Of the ready workers whose speed is known: how many, their slots, and their speeds' sum.
        self._num_measured = 0
        self._measured_slots = 0
        self._work_per_s = 0.0
        # Of the ready workers whose steps are known: how many, and the sum of a step's times.
        self._num_stepping = 0
        self._step_s = 0.0
        self.num_awaited = 0

    def start(self, names: Sequence[str], now_s: float) -> None:
        """These are being opened."""
        self.workers = {name: WorkerState(name, now_s) for name in names}
        self.num_awaited = len(names)
        for worker in self.workers.values():
            self.set_timer(worker)

    def alive(self, name: str, incarnation: int) -> WorkerState | None:
        """The worker, unless this incarnation of it is over."""
        worker = self.workers.get(name)
        if (
            worker is None
            or worker.incarnation != incarnation
            or worker.state is WorkerStatus.BACKOFF
        ):
            return None
        return worker

    def ready(self, worker: WorkerState, slots: int, now_s: float) -> None:
        """It is open."""
        self.num_awaited -= worker.awaited
        self._let_pass(now_s)
        worker.ready(slots, now_s)
        self._num_ready += 1
        self._ready_slots += slots
        self._most_slots = max(self._most_slots, slots)
        self._measure(worker, 1)

    def worked(self, worker: WorkerState, now_s: float, work: float, *, full: bool) -> None:
        """It did so much work; `full`: with all its slots taken."""
        self._measure(worker, -1)
        worker.finished_work(now_s, work, full=full)
        self._measure(worker, 1)

    def answered(self, worker: WorkerState) -> None:
        """It finished a row."""
        if worker.proven_lives < worker.lives:
            self._proven_lives += worker.lives - worker.proven_lives
            self._fruitful_lives += 1
        worker.answered()

    def is_hopeless(self, worker: WorkerState) -> bool:
        """Whether a worker that failed is given up.

        What counts is whether rows come between failures, not how many failures there are. Until
        its own first row it is measured by the others: a fleet where all die often is no reason.
        """
        lives, fruitful = worker.proven_lives, worker.fruitful_lives
        if not fruitful:
            lives, fruitful = self._proven_lives, self._fruitful_lives
        patience = PATIENCE * lives / fruitful if fruitful else MAX_FAILURES
        return worker.openings >= MAX_OPENINGS or worker.failures >= patience

    def stepped(self, worker: WorkerState, now_s: float, num_steps: int) -> None:
        """Its engine has made so many steps in this life."""
        self._measure(worker, -1)
        worker.stepped(now_s, num_steps)
        self._measure(worker, 1)
        self.set_timer(worker)

    def rest(self, worker: WorkerState, now_s: float) -> None:
        """It failed, and comes again after a while."""
        if worker.state is WorkerStatus.READY:
            self._let_pass(now_s)
            self._num_ready -= 1
            self._ready_slots -= worker.slots
            self._measure(worker, -1)
        self.drain(worker, False)
        self.num_awaited -= worker.awaited
        worker.rest(now_s)

    def drain(self, worker: WorkerState, draining: bool) -> None:
        """Whether it takes nothing more until it may run a prompt alone."""
        self.num_draining += draining - worker.draining
        worker.draining = draining

    def _let_pass(self, now_s: float) -> None:
        """Until now as many workers were ready as there are."""
        self.up_s += self._num_ready * (now_s - self._changed_s)
        self._changed_s = now_s

    # -- the fleet

    @property
    def num_slots(self) -> int:
        """Slots of all workers; one that is not ready will have as many as the largest one."""
        return self._ready_slots + (len(self.workers) - self._num_ready) * self._most_slots

    @property
    def work_per_slot(self) -> float:
        """Mean speed of a slot of the workers whose speed is known; 0 where none is."""
        return self._work_per_s / self._measured_slots if self._num_measured else 0.0

    @property
    def mean_step_s(self) -> float:
        """Mean time of a step of the workers of which it is known; 0 where it is of none."""
        return self._step_s / self._num_stepping if self._num_stepping else 0.0

    @property
    def num_sharing(self) -> int:
        """Workers that share what is left: those that are ready or open for the first time."""
        return max(1, self._num_ready + self.num_awaited)

    def part(self, worker: WorkerState) -> float:
        """The part of the fleet's work that this worker does, by what is known of its speed."""
        speed = 1.0
        if worker.work_per_s:
            speed = worker.work_per_s * self._num_measured / self._work_per_s
        return min(speed, _QUICKEST) / self.num_sharing

    def _measure(self, worker: WorkerState, sign: int) -> None:
        """Count a ready worker's speed in, or out."""
        if worker.state is not WorkerStatus.READY:
            return
        if worker.work_per_s:
            self._num_measured += sign
            self._measured_slots += sign * worker.slots
            self._work_per_s += sign * worker.work_per_s
        if worker.step_s is not None:
            self._num_stepping += sign
            self._step_s += sign * worker.step_s

    # -- time

    @property
    def next_s(self) -> float:
        """When a worker must be looked at, or earlier; infinity for never."""
        return self._timers[0][0] if self._timers else math.inf

    def set_timer(self, worker: WorkerState) -> None:
        """See that it is looked at in time: too early does no harm, the timer is set again."""
        time_s = worker.deadline_s(self.listening_s)
        if time_s < worker.timer_s:
            worker.timer_s = time_s
            heapq.heappush(self._timers, (time_s, worker.name))

    def due(self, now_s: float) -> Iterator[WorkerState]:
        """The workers to be looked at now; the caller sets their timers again."""
        while self._timers and self._timers[0][0] <= now_s:
            time_s, name = heapq.heappop(self._timers)
            worker = self.workers.get(name)
            if worker is not None and worker.timer_s == time_s:
                worker.timer_s = math.inf
                yield worker

    def check(self) -> None:
        """Assert that the sums are true; a failure is a bug of this module."""
        ready = [worker for worker in self.workers.values() if worker.state is WorkerStatus.READY]
        measured = [worker for worker in ready if worker.work_per_s]
        assert self._num_ready == len(ready)
        assert self._ready_slots == sum(worker.slots for worker in ready)
        assert self._num_measured == len(measured)
        assert self._measured_slots == sum(worker.slots for worker in measured)
        total = sum(worker.work_per_s for worker in measured)
        assert math.isclose(self._work_per_s, total, rel_tol=1e-6, abs_tol=1e-3)
        stepping = [worker.step_s for worker in ready if worker.step_s is not None]
        assert self._num_stepping == len(stepping)
        assert math.isclose(self._step_s, sum(stepping), rel_tol=1e-6, abs_tol=1e-6)
        assert self.num_awaited == sum(worker.awaited for worker in self.workers.values())
        assert self.num_draining == sum(worker.draining for worker in self.workers.values())
        timed = {name for _, name in self._timers}
        for worker in self.workers.values():
            assert worker.timer_s <= worker.deadline_s(self.listening_s), "nobody looks at it"
            assert worker.timer_s == math.inf or worker.name in timed
            assert worker.state is WorkerStatus.READY or not worker.shards
