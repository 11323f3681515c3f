"""An open fleet as the cards of a run, so that a batch is driven, journaled and resumed like one.

The fleet is one worker. It heals its cards by itself, so that worker is never lost: a row that
comes is final, and a fleet that ends stops the run, which goes on with the next fleet.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from qaic_ray.dispatch.dispatcher import Event, RowsFinished, RunShard, ShardFinished, WorkerReady
from qaic_ray.errors import FleetBusy, FleetClosed, QaicRayError
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.metrics import Measurement
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.worker.worker import WorkerInfo

WORKER = "fleet"
PROMPTS_AHEAD = 256
"""Prompts that a run has ready, beside those that the fleet has."""
PLACES_A_SLOT = 2
"""Prompts of batches that the fleet has for each slot: one runs, and one waits behind it."""
NO_PLACE_S = 1.0
"""A batch that waits for a place is woken; after so long it looks by itself, for new workers."""
BUSY_S = 0.1
"""A fleet that is full is asked again after so long."""


class BackgroundFleet(Protocol):
    """What batches ask of an open fleet."""

    @property
    def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are ready."""

    def submit(self, prompt: Prompt, *, wait: bool) -> PendingRow:
        """Give it a prompt; it raises FleetBusy or FleetClosed."""


class RunStopped(QaicRayError):
    """A batch's run was stopped, and can go on; the message says why."""


class Places:
    """Places in the fleet for prompts of batches: the oldest batch takes what it wants, the next
    one what is left.

    Args:
        fleet: two places for each slot that it has.
    """

    def __init__(self, fleet: BackgroundFleet) -> None:
        self._fleet = fleet
        self._lock = threading.Lock()
        self._num_taken = 0
        self._lanes: list[BatchLane] = []

    def lane(self, batch_id: str, wake: Callable[[], None]) -> BatchLane:
        """A batch's own way to places.

        Args:
            batch_id: by its order; the least is the oldest.
            wake: called, by any thread, when it may take places again.
        """
        lane = BatchLane(self, batch_id, wake)
        with self._lock:
            self._lanes = sorted([*self._lanes, lane], key=lambda each: each.batch_id)
        return lane

    @property
    def limit(self) -> int:
        """Places there are now."""
        return PLACES_A_SLOT * sum(worker.slots for worker in self._fleet.workers)

    def take(self, lane: BatchLane) -> bool:
        """Take a place for a lane; False where it must wait."""
        with self._lock:
            if lane.is_closed:
                return False
            older = self._lanes[: self._lanes.index(lane)]
            if self._num_taken >= self.limit or any(each.is_waiting for each in older):
                lane.is_waiting = True
                return False
            self._num_taken += 1
            lane.num_taken += 1
            return True

    def give_back(self, lane: BatchLane, num_places: int) -> None:
        """These places of a lane are free."""
        with self._lock:
            self._num_taken -= num_places
            lane.num_taken -= num_places

    def rest(self, lane: BatchLane) -> None:
        """A lane wants nothing now."""
        with self._lock:
            lane.is_waiting = False

    def close(self, lane: BatchLane) -> None:
        """A lane is over."""
        with self._lock:
            self._num_taken -= lane.num_taken
            lane.num_taken, lane.is_waiting, lane.is_closed = 0, False, True
            self._lanes.remove(lane)
        self.wake_next()

    def wake_next(self) -> None:
        """Wake the oldest lane that waits."""
        with self._lock:
            waiting = next((lane for lane in self._lanes if lane.is_waiting), None)
        if waiting is not None:
            waiting.wake()


class BatchLane:
    """One batch's way to places of the fleet; see `Places`. One thread's, but for `wake`."""

    def __init__(self, places: Places, batch_id: str, wake: Callable[[], None]) -> None:
        self.batch_id = batch_id
        self.wake = wake
        self.num_taken = 0
        self.is_waiting = self.is_closed = False
        self._places = places

    def take(self) -> bool:
        """Take a place; False where `wake` will be called."""
        return self._places.take(self)

    def undo(self) -> None:
        """Give the last place back, since the fleet had no room for it."""
        self._places.give_back(self, 1)

    def give_back(self, num_places: int) -> None:
        """So many rows are done."""
        self._places.give_back(self, num_places)
        self._places.wake_next()

    def rest(self) -> None:
        """Nothing is wanted now; the next batch may take what is left."""
        self._places.rest(self)
        self._places.wake_next()

    def close(self) -> None:
        """Give every place back."""
        self._places.close(self)


class FleetAsCards:
    """The `Cards` of a batch's run.

    Args:
        fleet: answers prompts; other work is in it too, and goes first.
        places: those that batches share.
        batch_id: of this batch.
    """

    def __init__(self, fleet: BackgroundFleet, places: Places, batch_id: str) -> None:
        self.names: Sequence[str] = (WORKER,)
        self._fleet = fleet
        self._heard: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._lane = places.lane(batch_id, self.wake)
        self._events: deque[Event] = deque([WorkerReady(WORKER, PROMPTS_AHEAD)])
        self._waiting: deque[tuple[int, Prompt]] = deque()
        self._given: dict[int, tuple[int, PendingRow]] = {}
        self._left: Counter[int] = Counter()
        self._stopped: str | None = None

    def close(self) -> None:
        """Cancel what the fleet has, and give its places back."""
        self._drop()
        self._lane.close()

    def stop(self, why: str) -> None:
        """Have `wait` raise RunStopped; any thread may call it."""
        self._stopped = why
        self.wake()

    def wake(self) -> None:
        """Have `wait` return soon; any thread may call it."""
        self._heard.put(None)

    def wait(self, timeout_s: float | None) -> Event | None:
        """Block until there is an event, and return it; None after `timeout_s`, or woken.

        Raises:
            RunStopped: by `stop`, or because the fleet has ended.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._events:
            if self._stopped is not None:
                raise RunStopped(self._stopped)
            again_s = self._submit()
            left_s = min(again_s, deadline_s - time.monotonic())
            try:
                heard = self._heard.get(timeout=None if left_s == math.inf else max(0.0, left_s))
            except queue.Empty:
                if time.monotonic() >= deadline_s:
                    return None
                continue
            self._collect(heard)
        return self._events.popleft()

    def _submit(self) -> float:
        """Give the fleet what there are places for; when to try again, in seconds."""
        while self._waiting:
            if not self._lane.take():
                return NO_PLACE_S
            shard_id, prompt = self._waiting[0]
            try:
                pending = self._fleet.submit(replace(prompt, background=True), wait=False)
            except FleetBusy:
                self._lane.undo()
                return BUSY_S
            except FleetClosed as error:
                self._lane.undo()
                raise RunStopped(str(error)) from error
            self._waiting.popleft()
            self._given[prompt.index] = shard_id, pending
            pending.listen(partial(self._changed, prompt.index, pending))
        self._lane.rest()
        return math.inf

    def _changed(self, index: int, pending: PendingRow) -> None:
        if pending.done:
            self._heard.put(index)

    def _collect(self, heard: int | None) -> None:
        """Make events of the row that was heard of, and of all that are done beside it."""
        indexes = {heard}
        while True:
            try:
                indexes.add(self._heard.get_nowait())
            except queue.Empty:
                break
        rows: dict[int, list[Row]] = {}
        for index in sorted(index for index in indexes if index is not None):
            if index not in self._given:
                continue  # it was told twice, or cancelled
            shard_id, pending = self._given.pop(index)
            rows.setdefault(shard_id, []).append(_row_of(index, pending))
        for shard_id, its in rows.items():
            self._finished(shard_id, its)
        if rows:
            self._lane.give_back(sum(map(len, rows.values())))

    def _finished(self, shard_id: int, rows: Sequence[Row]) -> None:
        self._events.append(RowsFinished(WORKER, shard_id, tuple(rows)))
        self._left[shard_id] -= len(rows)
        if self._left[shard_id] <= 0:
            del self._left[shard_id]
            self._events.append(ShardFinished(WORKER, shard_id))

    def run(self, shard: RunShard) -> None:
        """Take prompts; they go to the fleet as places get free."""
        self._left[shard.shard_id] = len(shard.prompts)
        self._waiting.extend((shard.shard_id, prompt) for prompt in shard.prompts)

    def cancel(self, worker: str, indexes: Sequence[int]) -> None:
        """End these rows."""
        unwanted = set(indexes)
        self._waiting = deque(each for each in self._waiting if each[1].index not in unwanted)
        self._forget([index for index in unwanted if index in self._given])

    def _forget(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            self._given.pop(index)[1].cancel()
        self._lane.give_back(len(indexes))

    def _drop(self) -> None:
        self._waiting.clear()
        self._left.clear()
        self._forget(list(self._given))

    def retire(self, worker: str) -> None:
        """Take back all that the fleet has."""
        self._drop()

    def replace(self, worker: str, incarnation: int) -> None:
        """Begin with the same fleet again."""
        self._drop()
        self._events.append(WorkerReady(WORKER, PROMPTS_AHEAD, incarnation))

    def quarantine(self, worker: str, error: str) -> None:
        """Take back all that the fleet has, for good."""
        self._drop()

    def info(self, worker: str) -> WorkerInfo:
        """The slots of all workers together, and the shapes of the first."""
        workers = self._fleet.workers
        if not workers:
            return WorkerInfo(WORKER, (), "", PROMPTS_AHEAD, 0, 0, 0.0)
        devices = tuple(device for worker_ in workers for device in worker_.device_ids)
        slots = sum(worker_.slots for worker_ in workers)
        return replace(workers[0], name=WORKER, device_ids=devices, slots=slots)

    def measurements(self) -> Mapping[str, Measurement]:
        """None of its own: the engines' steps are other requests' too."""
        return {}


def _row_of(index: int, pending: PendingRow) -> Row:
    """The row of a prompt that is done, under its index in the batch.

    Raises:
        RunStopped: the fleet ended, or ends, before it was answered.
    """
    try:
        row = pending.row(0.0)
    except FleetClosed as error:
        raise RunStopped(str(error)) from error
    if row.finish_reason is FinishReason.ABORT:
        raise RunStopped("The server's fleet was closed.")
    return replace(row, index=index)
