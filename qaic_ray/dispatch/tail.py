"""The end of a run, when nothing waits and workers are idle: what can be moved to them, and when.

Two things can. Prompts that are queued in a worker are taken back, first from the one that would be
the last to get to them. And a prompt that takes a straggler twice as long as its like takes the
fleet runs a second time: the first row is the one kept, and rows do not depend on where they are
made. Knows no clock and gives no orders: the dispatcher asks.
"""

from __future__ import annotations

import heapq
import math

from qaic_ray.dispatch.prompts import PromptTable, Shard
from qaic_ray.dispatch.shard_size import is_slow
from qaic_ray.dispatch.waiting import OpenPrompt
from qaic_ray.dispatch.worker_pool import WorkerPool
from qaic_ray.dispatch.workers import WorkerState

SECOND_RUN_FACTOR = 2.0
"""A prompt may run again when it has taken so many times what it should."""
SECOND_RUN_AGAIN_S = 1.0
"""When it may not, it is looked at again after so long, and never earlier than this."""


class Tail:
    """Which shards to take back from, and which prompts to run again.

    Nothing is kept here before `begin`; from then on every new shard has to be told to `note`.
    """

    def __init__(self, table: PromptTable, pool: WorkerPool) -> None:
        self.begun = False
        self._table = table
        self._pool = pool
        # (-when its worker's queue is worked off, shard id): last first
        self._queues: list[tuple[float, int]] = []
        # (when it may run again, index)
        self._again: list[tuple[float, int]] = []

    @property
    def next_s(self) -> float:
        """When the next prompt must be looked at; infinity for never."""
        return self._again[0][0] if self._again else math.inf

    def begin(self, now_s: float) -> None:
        """Look at all that runs, once."""
        self.begun = True
        for shard in self._table.shards.values():
            self.note(shard, now_s)

    def note(self, shard: Shard, now_s: float) -> None:
        """A shard is in flight."""
        if not self.begun:
            return
        self.note_queue(shard.worker, now_s)
        for entry in shard.unfinished.values():
            wait_s = max(SECOND_RUN_AGAIN_S, SECOND_RUN_FACTOR * self._table.row_s(entry))
            heapq.heappush(self._again, (shard.started_s + wait_s, entry.prompt.index))

    def note_queue(self, worker: WorkerState, now_s: float) -> None:
        """A worker may have prompts queued that it can be asked for."""
        if self.begun and worker.num_unfinished > worker.slots and worker.shards:
            seconds = worker.queued_work / worker.work_per_s if worker.work_per_s else 0.0
            heapq.heappush(self._queues, (-(now_s + seconds), worker.shards[-1]))

    def next_to_ask(self) -> Shard | None:
        """A shard that should give back what it has not begun; each is asked once."""
        while self._queues:
            noted = self._table.shards.get(heapq.heappop(self._queues)[1])
            if noted is None or noted.worker.num_unfinished <= noted.worker.slots:
                continue
            for shard_id in reversed(noted.worker.shards):
                shard = self._table.shards[shard_id]
                if shard.unfinished and not shard.asked and not shard.held:
                    return shard
        return None

    def next_to_run_again(self, now_s: float) -> OpenPrompt | None:
        """A prompt that runs once, on a straggler, and for too long."""
        while self._again and self._again[0][0] <= now_s:
            _, index = heapq.heappop(self._again)
            entry = self._table.open.get(index)
            if entry is None or len(entry.shard_ids) != 1:
                continue
            shard = self._table.shards[entry.shard_ids[0]]
            if self._straggles(shard.worker, entry, now_s):
                return entry
            self.later(entry, now_s)
        return None

    def later(self, entry: OpenPrompt, now_s: float) -> None:
        """It cannot run again now."""
        wait_s = max(SECOND_RUN_AGAIN_S, self._table.row_s(entry))
        heapq.heappush(self._again, (now_s + wait_s, entry.prompt.index))

    def _straggles(self, worker: WorkerState, entry: OpenPrompt, now_s: float) -> bool:
        """On a worker that is well and quick a long row is only long: elsewhere it ends later."""
        if is_slow(worker, self._pool):
            return True
        return worker.quiet_s(now_s) >= max(SECOND_RUN_AGAIN_S, self._table.row_s(entry))
