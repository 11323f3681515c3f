"""Which worker answers which prompts next: events in, commands out. Knows no clock, card or Ray.

`handle` is the only door. What happened comes in as an event, what is to be done goes out as
commands, and how that ended comes back as another event (`messages.py`). A prompt that was read is
*waiting* (in the heap), *running* (in one shard, on one worker) or done.

The policy is guided self-scheduling. Long prompts go first, so that what is left for the end is
short; by powers of two while much remains, so that prompts of about the same length go in input
order and answers can be shown early, and exactly by length at the end. While much remains a shard
is a few times the worker's slots and the next one is queued behind it, so that a card never drains
between two; when the input has been read to its end, shards shrink with the work that is left, so
that no card is left alone with a large one. Prompts come in bands, one for each read, and an older
band goes first: a short prompt never waits for the end of a long input, and the rows held back to
restore the input's order stay few.

Retry is decided here and nowhere else. When a worker dies, the prompts it had not answered go to
the others in smaller and smaller shards; the last attempt of a prompt runs alone on its worker, so
that a prompt is given up only for what happened to itself, never for its neighbour.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from qaic_ray.fleet.messages import (
    Command,
    DeliverRows,
    Event,
    PromptsRead,
    ReadPrompts,
    RetireWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    ShardFinished,
    WorkerFailedToOpen,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.rows import Prompt, Row

MAX_ATTEMPTS = 3
SHARDS_IN_FLIGHT = 2
SHARD_ROUNDS = 4
"""A full shard holds this many prompts for each of the worker's slots."""
RETRY_SHRINK = 4
"""A full shard is this many times smaller with each further attempt."""
GUIDE = 3
"""Near the end a shard is a worker's share of what is left, divided by this: two in flight leave
a third of the share to whoever turns out to be quick."""
READ_AHEAD = 8192
"""Prompts read at once, and how many there are in a band."""
ANSWER_WORK = 1024.0
"""Work of one answer, in characters of prompt: decoding costs about what reading these does."""


def text_work(prompt: Prompt) -> float:
    """Estimated work of a prompt where nothing better is known, in characters."""
    return len(prompt.text) + ANSWER_WORK


@dataclass
class _Open:
    """A prompt that was read and is not done; `shard_id` None while it waits."""

    prompt: Prompt
    work: float
    band: int
    attempt: int = 1
    shard_id: int | None = None


@dataclass
class _Shard:
    """Prompts on a worker; `unfinished` are the indexes that have no row yet."""

    worker: str
    attempt: int
    unfinished: set[int]


@dataclass
class _Worker:
    """A worker that is not lost; `slots` 0 while it opens."""

    slots: int = 0
    shards: list[int] = field(default_factory=list)


class Dispatcher:
    """The state of one run; see the module's text for the policy.

    `abandoned` becomes true when prompts were given up because no worker was left.
    """

    def __init__(
        self,
        *,
        work_of: Callable[[Prompt], float] = text_work,
        max_attempts: int = MAX_ATTEMPTS,
        read_ahead: int = READ_AHEAD,
    ) -> None:
        self.abandoned = False
        self._work_of = work_of
        self._max_attempts = max_attempts
        self._read_ahead = read_ahead

        self._workers: dict[str, _Worker] = {}
        self._last_loss = ""
        self._started = False

        self._open: dict[int, _Open] = {}
        self._shards: dict[int, _Shard] = {}
        self._num_shards = 0
        # Least first: (band, -attempt, -length, index). An entry whose prompt is done is stale.
        self._heap: list[tuple[int, int, float, int]] = []
        self._num_waiting = 0
        self._waiting_work = 0.0

        self._num_read = 0
        self._num_done = 0
        self._num_bands = 0
        self._reading = False
        self._exhausted = False
        self._ending = False

    @property
    def finished(self) -> bool:
        """Whether the input has been read to its end and every prompt is done."""
        return self._exhausted and not self._open

    def handle(self, event: Event) -> list[Command]:
        """Take in what happened; return what is to be done now.

        Events of a worker or shard that is gone already change nothing but this: a row of a prompt
        that is still open is kept, whoever sends it. The first row of a prompt is the one kept.
        """
        num_waiting = self._num_waiting
        commands = self._absorb(event)
        if self._started and not self._workers:
            commands += _deliver(self._abandon())
        if not (self._ending or self._much_remains()):
            self._begin_ending()
        concerned: Iterable[str] = self._workers
        if isinstance(event, WorkerReady | RowsFinished | ShardFinished):
            # Nothing changed for the others, unless there is more to hand out than before.
            concerned = (event.worker,) if self._num_waiting <= num_waiting else self._workers
        return [*commands, *self._hand_out(list(concerned)), *self._read_on()]

    def _absorb(self, event: Event) -> list[Command]:
        match event:
            case RunStarted(workers):
                self._workers = {name: _Worker() for name in workers}
                self._started = True
            case PromptsRead(prompts, exhausted):
                self._take_in(prompts)
                self._reading = False
                self._exhausted = exhausted
            case WorkerReady(worker, slots):
                if worker in self._workers:
                    self._workers[worker].slots = slots
            case RowsFinished(rows=rows):
                return _deliver(self._accept(rows))
            case ShardFinished(worker, shard_id):
                return _deliver(self._end_shard(shard_id, f"{worker} gave no row for it"))
            case ShardFailed(worker, shard_id, error, retryable):
                if retryable and worker in self._workers:
                    return [*_deliver(self._lose(worker, error)), RetireWorker(worker)]
                return _deliver(self._end_shard(shard_id, f"{worker}: {error}"))
            case WorkerFailedToOpen(worker, error) | WorkerLost(worker, error):
                return _deliver(self._lose(worker, error))
        return []

    # -- what happened

    def _take_in(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            entry = _Open(prompt, self._work_of(prompt), self._num_bands)
            self._open[prompt.index] = entry
            self._wait(entry)
        self._num_read += len(prompts)
        self._num_bands += 1

    def _accept(self, rows: Iterable[Row]) -> list[Row]:
        kept = []
        for row in rows:
            entry = self._open.get(row.index)
            if entry is None:
                continue
            if entry.shard_id is None:
                self._leave_waiting(entry)
            else:
                self._shards[entry.shard_id].unfinished.discard(row.index)
            self._close(entry)
            kept.append(row)
        return kept

    def _end_shard(self, shard_id: int, error: str) -> list[Row]:
        """Take a shard off its worker; return the rows of prompts that had their last attempt."""
        shard = self._shards.pop(shard_id, None)
        if shard is None:
            return []
        self._workers[shard.worker].shards.remove(shard_id)
        given_up = []
        for index in sorted(shard.unfinished):
            entry = self._open[index]
            if entry.attempt < self._max_attempts:
                entry.attempt += 1
                self._wait(entry)
                continue
            self._close(entry)
            given_up.append(
                Row.failed(
                    entry.prompt,
                    f"Given up after {entry.attempt} attempts; the last one: {error}",
                    worker=shard.worker,
                    attempts=entry.attempt,
                )
            )
        return given_up

    def _lose(self, name: str, error: str) -> list[Row]:
        worker = self._workers.get(name)
        if worker is None:
            return []
        error = f"{name}: {error}"
        rows = [row for id_ in list(worker.shards) for row in self._end_shard(id_, error)]
        del self._workers[name]
        self._last_loss = error
        return rows

    def _abandon(self) -> list[Row]:
        """Give up every open prompt: there is no worker left, and none on its way."""
        if not self._open:
            return []
        error = f"No card is left to answer it; the last one to go was {self._last_loss}"
        entries = [self._open[index] for index in sorted(self._open)]
        self._heap.clear()
        for entry in entries:
            self._leave_waiting(entry)
            self._close(entry)
        self.abandoned = True
        return [Row.failed(entry.prompt, error, attempts=entry.attempt - 1) for entry in entries]

    # -- what is to be done

    def _hand_out(self, names: Sequence[str]) -> list[Command]:
        """Shards for these workers, one each and then another, until none takes more."""
        commands: list[Command] = []
        while hungry := [name for name in names if self._wants_shard(name)]:
            commands += [self._new_shard(name) for name in hungry if self._wants_shard(name)]
        return commands

    def _wants_shard(self, name: str) -> bool:
        worker = self._workers.get(name)
        if worker is None or not worker.slots or not self._num_waiting:
            return False
        if not worker.shards:
            return True
        attempts = [self._next().attempt, *(self._shards[id_].attempt for id_ in worker.shards)]
        if len(worker.shards) == SHARDS_IN_FLIGHT or any(map(self._is_last, attempts)):
            return False
        return self._num_unfinished(worker) < worker.slots or self._much_remains()

    def _new_shard(self, name: str) -> RunShard:
        worker = self._workers[name]
        attempt = self._next().attempt
        least, most, share = self._shard_size(worker, attempt)
        entries: list[_Open] = []
        work = 0.0
        while self._num_waiting and len(entries) < most and self._next().attempt == attempt:
            if len(entries) >= least and work >= share:
                break
            entry = self._next()
            heapq.heappop(self._heap)
            self._leave_waiting(entry)
            entries.append(entry)
            work += entry.work
        shard_id = self._num_shards
        self._num_shards += 1
        for entry in entries:
            entry.shard_id = shard_id
        self._shards[shard_id] = _Shard(name, attempt, {entry.prompt.index for entry in entries})
        worker.shards.append(shard_id)
        return RunShard(name, shard_id, tuple(entry.prompt for entry in entries), attempt)

    def _shard_size(self, worker: _Worker, attempt: int) -> tuple[int, int, float]:
        """Least and most prompts of the next shard, and the work after which it is full."""
        if self._is_last(attempt):
            return 1, 1, 0.0
        most = max(1, SHARD_ROUNDS * worker.slots // RETRY_SHRINK ** (attempt - 1))
        if not self._exhausted:
            return most, most, math.inf
        num_workers = len(self._workers)  # those that still open will want their share
        fair = math.ceil(self._num_waiting / num_workers)
        idle_slots = max(1, worker.slots - self._num_unfinished(worker))
        return min(idle_slots, fair, most), most, self._waiting_work / (GUIDE * num_workers)

    def _is_last(self, attempt: int) -> bool:
        return 1 < attempt == self._max_attempts

    def _much_remains(self) -> bool:
        return not self._exhausted or self._num_waiting > SHARDS_IN_FLIGHT * self._num_slots()

    def _num_slots(self) -> int:
        """Slots of all workers; one that still opens will have as many as the largest open one."""
        slots = [worker.slots for worker in self._workers.values()]
        return sum(slots) + slots.count(0) * max(slots, default=0)

    def _num_unfinished(self, worker: _Worker) -> int:
        return sum(len(self._shards[shard_id].unfinished) for shard_id in worker.shards)

    def _read_on(self) -> list[Command]:
        if not self._started or self._reading or self._exhausted:
            return []
        # Enough for two full shards on every worker, twice.
        num_prompts = max(self._read_ahead, 2 * SHARDS_IN_FLIGHT * SHARD_ROUNDS * self._num_slots())
        if self._num_waiting > num_prompts // 2:
            return []
        self._reading = True
        return [ReadPrompts(num_prompts)]

    # -- waiting prompts

    def _wait(self, entry: _Open) -> None:
        entry.shard_id = None
        heapq.heappush(self._heap, self._key(entry))
        self._num_waiting += 1
        self._waiting_work += entry.work

    def _key(self, entry: _Open) -> tuple[int, int, float, int]:
        length = entry.work if self._ending else math.frexp(entry.work)[1]
        return entry.band, -entry.attempt, -length, entry.prompt.index

    def _begin_ending(self) -> None:
        self._ending = True
        waiting = (entry for entry in self._open.values() if entry.shard_id is None)
        self._heap = [self._key(entry) for entry in waiting]
        heapq.heapify(self._heap)

    def _leave_waiting(self, entry: _Open) -> None:
        self._num_waiting -= 1
        self._waiting_work -= entry.work

    def _next(self) -> _Open:
        """The waiting prompt whose turn it is; there must be one."""
        while self._heap[0][-1] not in self._open:
            heapq.heappop(self._heap)
        return self._open[self._heap[0][-1]]

    def _close(self, entry: _Open) -> None:
        del self._open[entry.prompt.index]
        self._num_done += 1

    # -- invariants

    def check(self) -> None:
        """Assert what always holds between two events; a failure is a bug of this module."""
        assert self._num_read == len(self._open) + self._num_done
        waiting = {index for index, entry in self._open.items() if entry.shard_id is None}
        running = [index for shard in self._shards.values() for index in shard.unfinished]
        assert len(running) == len(set(running)), "a prompt runs in two shards"
        assert waiting.isdisjoint(running)
        assert waiting | set(running) == set(self._open)
        assert len(waiting) == self._num_waiting
        assert waiting <= {key[-1] for key in self._heap}
        assert math.isclose(
            self._waiting_work, sum(self._open[i].work for i in waiting), abs_tol=1e-3
        )
        held = [shard_id for worker in self._workers.values() for shard_id in worker.shards]
        assert sorted(held) == sorted(self._shards), "a shard is held by no worker, or by two"
        for shard_id, shard in self._shards.items():
            assert shard_id in self._workers[shard.worker].shards
            assert 1 <= shard.attempt <= self._max_attempts
            for index in shard.unfinished:
                assert self._open[index].shard_id == shard_id
                assert self._open[index].attempt == shard.attempt
        for worker in self._workers.values():
            assert len(worker.shards) <= SHARDS_IN_FLIGHT
            assert worker.shards or not worker.slots or not waiting, "an idle worker, and work"
            assert len(worker.shards) <= 1 or not any(
                self._is_last(self._shards[shard_id].attempt) for shard_id in worker.shards
            ), "a last attempt has company"
        assert self._workers or not self._started or not self._open


def _deliver(rows: Sequence[Row]) -> list[Command]:
    return [DeliverRows(tuple(rows))] if rows else []
