"""Which worker gets which prompts next: who wants a shard, how large it is, and second runs.

The assignment gives no orders: the dispatcher asks it for shards after each event.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from qaic_ray.dispatch.beginnings import beginning_of
from qaic_ray.dispatch.policy import Policy
from qaic_ray.dispatch.prompts import OpenPrompt, PromptTable, Shard, WaitingPrompts
from qaic_ray.dispatch.workers import WorkerPool, WorkerState, WorkerStatus


class Assignment:
    """The workers that want a shard, and the decision what each of them gets.

    Attributes:
        requesting: the workers that want a shard, in the order in which they get one.
    """

    def __init__(self, table: PromptTable, pool: WorkerPool, policy: Policy) -> None:
        self._table = table
        self._pool = pool
        self._policy = policy
        self.requesting: deque[WorkerState] = deque()
        self._is_late = False
        # When a running prompt must be looked at, and its index; None before the tail begins.
        self._second_runs: list[tuple[float, int]] | None = None

    @property
    def next_s(self) -> float:
        """When a prompt may run a second time; infinity for never."""
        if not (self._second_runs and self.requesting) or self._num_grouped:
            return math.inf
        return self._second_runs[0][0]

    @property
    def num_read_ahead(self) -> int:
        """Waiting prompts by which the input is read on.

        Where they come at any time, one that somebody waits for is read however many of the
        background wait.
        """
        table = self._table
        return table.foreground.num_grouped if table.is_open else self._num_grouped

    @property
    def _num_grouped(self) -> int:
        return self._table.foreground.num_grouped + self._table.background.num_grouped

    def consider(self, worker: WorkerState) -> None:
        """Something changed for this worker: let it stand in the queue if it wants a shard."""
        if not worker.requesting and self._wants(worker):
            worker.requesting = True
            self.requesting.append(worker)

    def next_shards(self, now_s: float) -> list[Shard]:
        """Begin shards on those that want one, one each and then another, until none takes more."""
        table = self._table
        if table.exhausted and not self._is_late:
            self._is_late = self._is_nearly_done
            if self._is_late:
                table.sort_waiting(exactly=True)
        begun = self._share_out(table.foreground, now_s)
        late = table.background
        if not table.foreground.num_grouped and (late.num_grouped or late.suspects):
            begun += self._share_out(late, now_s)
        if table.exhausted and self.requesting and not self._num_grouped:
            begun += self._run_again(now_s)
        return begun

    def _share_out(self, waiting: WaitingPrompts, now_s: float) -> list[Shard]:
        begun: list[Shard] = []
        passed_over: set[WorkerState] = set()
        num_passed_over = 0
        while (waiting.num_grouped or waiting.suspects) and self.requesting:
            worker = self._next_requesting(waiting, passed_over)
            if worker is None:
                break
            entries, alone = self._share_of(worker, waiting)
            if entries:
                begun.append(self._begin(worker, entries, now_s, alone=alone))
            num_passed_over = 0 if entries or worker.draining else num_passed_over + 1
            if not entries:
                passed_over.add(worker)
            self.consider(worker)
            if num_passed_over == self._policy.look_ahead:
                break  # nothing fits these; for one event that is enough
        return begun

    def _next_requesting(
        self, waiting: WaitingPrompts, passed_over: set[WorkerState]
    ) -> WorkerState | None:
        """Take the worker out of the queue that gets the next shard of these."""
        if self._table.is_open or waiting is self._table.background:
            worker = self._best_for(waiting, passed_over)
            if worker is not None:
                self.requesting.remove(worker)
                worker.requesting = False
            return worker
        while self.requesting:
            worker = self.requesting.popleft()
            worker.requesting = False
            if self._wants(worker):
                return worker
        return None

    def _best_for(
        self, waiting: WaitingPrompts, passed_over: set[WorkerState]
    ) -> WorkerState | None:
        """Of those that want a shard the one for the next prompt; None where none has room for it.

        One with a slot that is free, or lent to the background, goes before one that only has room
        in its queue. Of these it is the one whose slots hold the longest beginning of the prompt,
        else the one with the least taken.
        """
        for worker in tuple(self.requesting):
            if not self._wants(worker):
                self.requesting.remove(worker)
                worker.requesting = False
        entry = waiting.next
        workers = [worker for worker in self.requesting if worker not in passed_over]
        if waiting is self._table.background:
            num_slots = 1 if entry is None else entry.num_slots
            workers = [worker for worker in workers if self._has_spare(worker, num_slots)]
        if entry is None:
            return (
                workers[0] if workers else None
            )  # each in turn is asked whether it takes a suspect
        free = [worker for worker in workers if worker.engaged < worker.slots]
        if self._pool.holds_beginnings and len(free) > 1 and not entry.prompt.background:
            beginning = beginning_of(entry.prompt, self._policy)
            held = [0 if w.held is None else w.held.num_held(beginning) for w in free]
            most = max(held)
            free = [w for w, number in zip(free, held, strict=True) if number == most]
        return min(free or workers, key=_load, default=None)

    def _begin(
        self, worker: WorkerState, entries: list[OpenPrompt], now_s: float, *, alone: bool
    ) -> Shard:
        if worker.draining:
            self._pool.drain(worker, False)
        shard = self._table.begin(worker, entries, now_s, alone=alone)
        if len(worker.shards) == 1:
            self._pool.set_timer(worker)
        self._watch(shard)
        return shard

    # -- sizes

    def _has_spare(self, worker: WorkerState, num_slots: int) -> bool:
        """Whether a prompt of the background that takes so many slots leaves those that are kept.

        One that takes more than there are has all that are not kept; the worker sees to that.
        """
        most = worker.slots - min(self._policy.kept_slots, worker.slots - 1)
        return worker.taken + min(num_slots, most) <= most

    def _wants(self, worker: WorkerState) -> bool:
        """Whether a worker would take a shard.

        It fills its slots and its queue. Where little waits, late in the run or because little
        comes, it fills its slots; of an input that ends up to its share of all open prompts, where
        others still open, who will want theirs.
        """
        if worker.status is not WorkerStatus.READY or worker.alone or worker.retry_s is not None:
            return False
        if not worker.shards:
            return True
        if worker.draining or len(worker.shards) == self._policy.max_shards:
            return False
        num_held = worker.engaged if self._table.is_open else worker.num_unfinished
        if self._is_late or (self._table.is_dry and self._is_nearly_done):
            share = math.inf
            if self._pool.num_awaited and not self._table.is_open:
                share = math.ceil(len(self._table.open) / self._num_sharing)
            return num_held < min(worker.slots, share)
        num_queued = num_held - worker.slots
        if num_queued < 0:
            return True
        # Nothing is queued in a worker of unknown speed: it may be there for long.
        queued_work = worker.work * num_queued / num_held
        return queued_work < self._policy.shard_s * worker.work_per_s

    def _share_of(
        self, worker: WorkerState, waiting: WaitingPrompts
    ) -> tuple[list[OpenPrompt], bool]:
        """The prompts of a worker's next shard, none where none fits; whether they must be alone.

        After a failure fresh prompts tell whether the worker is well. Where there are none, those
        that were on a dying worker go alone: what happens then is told of one prompt.
        """
        has_fresh = bool(waiting.fresh.entries)
        if not (worker.failures and has_fresh) and waiting.suspects:
            others = len(self._pool.workers) > 1
            suspect = waiting.suspect_for(worker, has_others=others)
            if suspect is not None and not worker.shards:
                return [suspect], True
            if suspect is not None and self._pool.num_draining < self._most_draining(waiting):
                self._pool.drain(worker, True)
                return [], False
        if worker.draining:
            self._pool.drain(worker, False)
        retried = bool(waiting.retried.entries) and not (worker.failures and has_fresh)
        alone = retried and worker.failures > 0
        if not waiting.num_grouped or (alone and worker.shards):
            return [], alone
        of_one = alone or self._goes_singly(worker, waiting)
        size = (1, 1, 0.0) if of_one else self._shard_size(worker, waiting, retried=retried)
        chosen = waiting.retried if retried else waiting.fresh
        shortest = self._pool.is_slow(worker) and not of_one
        return waiting.take(chosen, size, shortest=shortest), alone

    def _most_draining(self, waiting: WaitingPrompts) -> int:
        """Workers that may be cleared for suspects; for those of the background one at a time."""
        return 1 if waiting is self._table.background else len(waiting.suspects)

    def _goes_singly(self, worker: WorkerState, waiting: WaitingPrompts) -> bool:
        """Whether each prompt looks for a worker of its own, and its row waits for no other one."""
        if waiting is self._table.background:
            return True
        return self._table.is_open and worker.engaged < worker.slots

    @property
    def _is_nearly_done(self) -> bool:
        return self._table.foreground.num_grouped <= 2 * self._pool.num_slots

    @property
    def _num_sharing(self) -> int:
        """Workers that share what is left: those that are ready or open for the first time."""
        return max(1, self._pool.num_ready + self._pool.num_awaited)

    def _shard_size(
        self, worker: WorkerState, waiting: WaitingPrompts, *, retried: bool
    ) -> tuple[int, int, float]:
        """Least and most prompts of a worker's next shard, and the work after which it is enough.

        Where the worker's speed is not known yet, it is one round of its slots.
        """
        table, policy = self._table, self._policy
        least = max(1, worker.slots - worker.num_unfinished)
        most = policy.max_shard_prompts if worker.work_per_s else least
        work = policy.shard_s * worker.work_per_s or math.inf
        if retried:
            most = max(1, worker.slots // policy.retry_shrink)
        if table.exhausted or table.is_dry:
            # Where more may come, each gets so few that they have about as many in the end.
            even = math.ceil(waiting.num_grouped / self._num_sharing)
            least = min(least, even) if table.exhausted else 1
            share = waiting.work * self._pool.speed(worker) / self._num_sharing
            work = min(work, share / policy.guide)
        return least, most, work

    # -- second runs

    def _watch(self, shard: Shard) -> None:
        """See that the prompts of a shard in flight are looked at, if the tail has begun."""
        if self._second_runs is None:
            return
        policy = self._policy
        for entry in shard.unfinished.values():
            wait_s = policy.second_run_factor * self._table.row_s(entry)
            look_s = shard.started_s + max(policy.second_run_again_s, wait_s)
            heapq.heappush(self._second_runs, (look_s, entry.prompt.index))

    def _run_again(self, now_s: float) -> list[Shard]:
        """Nothing waits and workers are idle: run prompts of stragglers on them a second time.

        The first row of a prompt is the one kept. Rows do not depend on where they are made.
        """
        if self._second_runs is None:
            self._second_runs = []
            for shard in self._table.shards.values():
                self._watch(shard)
        begun: list[Shard] = []
        while self.requesting and self._second_runs and self._second_runs[0][0] <= now_s:
            entry = self._table.open.get(heapq.heappop(self._second_runs)[1])
            if entry is None or len(entry.shard_ids) != 1:
                continue
            first = self._table.shards[entry.shard_ids[0]]
            worker = None
            if self._straggles(first.worker, entry, now_s):
                worker = self._idle_for(first)
            if worker is None:
                wait_s = max(self._policy.second_run_again_s, self._table.row_s(entry))
                heapq.heappush(self._second_runs, (now_s + wait_s, entry.prompt.index))
            else:
                alone = entry.attempt >= self._policy.alone_from
                begun.append(self._begin(worker, [entry], now_s, alone=alone))
                self.consider(worker)
        return begun

    def _straggles(self, worker: WorkerState, entry: OpenPrompt, now_s: float) -> bool:
        """On a worker that is well and quick a long row is only long: elsewhere it ends later."""
        if self._pool.is_slow(worker):
            return True
        limit_s = max(self._policy.second_run_again_s, self._table.row_s(entry))
        return worker.quiet_s(now_s) >= limit_s

    def _idle_for(self, first: Shard) -> WorkerState | None:
        """Of the first few that want work one that may run a prompt of this shard a second time."""
        for _ in range(min(self._policy.look_ahead, len(self.requesting))):
            worker = self.requesting.popleft()
            worker.requesting = False
            fits = worker is not first.worker and not (first.alone and worker.shards)
            if self._wants(worker) and fits:
                return worker
            self.consider(worker)
        return None


def _load(worker: WorkerState) -> tuple[float, float]:
    return worker.load
