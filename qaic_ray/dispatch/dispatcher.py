"""Which worker answers which prompts next: events in, commands out.

`docs/explanation/dispatch.md` describes the policy, `policy.py` has its numbers. Retry is decided
here and nowhere else. What an event costs does not grow with the fleet.

Events and commands are plain frozen data that pickles. Each command that something must come of has
its events:

    ReadPrompts   -> PromptsRead
    RunShard      -> RowsFinished (any number), then ShardFinished, ShardFailed or WorkerLost;
                     TokensGenerated where prompts have `stream`
    ReplaceWorker -> WorkerReady or WorkerLost

What is said of a worker carries its `incarnation`, counted from 0: how often it was opened before.
Late words of one that was replaced are not taken for the new one's. A shard's id is given once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qaic_ray.dispatch.assignment import Assignment
from qaic_ray.dispatch.policy import DEFAULT_POLICY, Policy
from qaic_ray.dispatch.prompts import PromptTable, Shard
from qaic_ray.dispatch.workers import WorkerPool, WorkerState, WorkerStatus
from qaic_ray.metrics import NO_ENGINE, EngineState
from qaic_ray.rows import Prompt, Row, TokenChunk


class Event:
    """What the dispatcher hears."""


class Command:
    """What it orders."""


@dataclass(frozen=True)
class RunStarted(Event):
    """These workers are being opened, each for the first time; `is_open`: see `PromptsRead`."""

    workers: tuple[str, ...]
    is_open: bool = False


@dataclass(frozen=True)
class PromptsRead(Event):
    """The next prompts of the input, by rising index; `exhausted` when there are no more.
    `is_dry`: an open input, to which prompts come at any time, has no more now."""

    prompts: tuple[Prompt, ...]
    exhausted: bool
    is_dry: bool = False


@dataclass(frozen=True)
class WorkerReady(Event):
    """A worker is open and runs `slots` prompts side by side."""

    worker: str
    slots: int
    incarnation: int = 0


@dataclass(frozen=True)
class WorkerLost(Event):
    """A worker is gone, with everything it held, or never got ready; `error` is a sentence."""

    worker: str
    error: str
    incarnation: int = 0


@dataclass(frozen=True)
class WorkerProgress(Event):
    """A worker's engine has made `num_steps` steps since it was opened.

    These gave `generated_tokens`, and `engine` is how it stands. From its first one on a worker is
    watched: while it has prompts and makes no step for a limit that follows from its own speed, it
    is stalled.
    """

    worker: str
    num_steps: int
    incarnation: int = 0
    generated_tokens: int = 0
    engine: EngineState = NO_ENGINE


@dataclass(frozen=True)
class RowsFinished(Event):
    """Some rows of a running shard."""

    worker: str
    shard_id: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class ShardFinished(Event):
    """A shard has given all its rows."""

    worker: str
    shard_id: int


@dataclass(frozen=True)
class ShardFailed(Event):
    """A shard ended with an error. `retryable`: the worker is to blame, and it may be passing."""

    worker: str
    shard_id: int
    error: str
    retryable: bool


@dataclass(frozen=True)
class TokensGenerated(Event):
    """Rows of prompts with `stream` got tokens in steps of a worker; nothing is done about it."""

    worker: str
    chunks: tuple[TokenChunk, ...]


@dataclass(frozen=True)
class PromptsCancelled(Event):
    """Nobody wants answers to these any more; those that are not open are passed over."""

    indexes: tuple[int, ...]


@dataclass(frozen=True)
class TimePassed(Event):
    """Nothing happened until the dispatcher's `wake_s`."""


@dataclass(frozen=True)
class ReadPrompts(Command):
    """Read up to `num_prompts` more from the input."""

    num_prompts: int


@dataclass(frozen=True)
class RunShard(Command):
    """Let a worker answer these; `attempt` counts from 1 and is the same for all of them."""

    worker: str
    shard_id: int
    prompts: tuple[Prompt, ...]
    attempt: int


@dataclass(frozen=True)
class CancelRows(Command):
    """End these rows on a worker, if it has them still; it goes on with its others."""

    worker: str
    indexes: tuple[int, ...]


@dataclass(frozen=True)
class DeliverRows(Command):
    """These rows are final, each the only one of its prompt."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class RetireWorker(Command):
    """End a worker that may still run. Its prompts wait again; it will be replaced."""

    worker: str
    error: str


@dataclass(frozen=True)
class ReplaceWorker(Command):
    """End whatever is left of a worker, and open it again as this incarnation."""

    worker: str
    incarnation: int


@dataclass(frozen=True)
class QuarantineWorker(Command):
    """End whatever is left of a worker, for the rest of this run; `error` is its last failure."""

    worker: str
    error: str


class Dispatcher:
    """The state of one run.

    Attributes:
        finished: whether there is nothing left to do: every prompt is done, or it is abandoned.
        abandoned: whether every worker was given up while prompts were left, or could come. They
            stay undone, and nothing more is read.
        wake_s: when to say `TimePassed` if nothing is heard before; infinity for never.

    Args:
        policy: the numbers to decide by.
        work_of: the estimated work of a prompt, in any unit; None: by `text_work`.
    """

    def __init__(
        self, *, policy: Policy = DEFAULT_POLICY, work_of: Callable[[Prompt], float] | None = None
    ) -> None:
        self.finished = False
        self.abandoned = False
        self.wake_s = math.inf
        self._policy = policy
        self._pool = WorkerPool(policy)
        self._table = PromptTable(policy, work_of)
        self._assignment = Assignment(self._table, self._pool, policy)
        self._out: list[Command] = []
        self._now_s = 0.0
        self._is_started = False
        self._is_reading = False

    @property
    def num_waiting(self) -> int:
        """Prompts that were read and that no worker has."""
        both = self._table.foreground, self._table.background
        return sum(waiting.num_grouped + len(waiting.suspects) for waiting in both)

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take in what was heard at `now_s`, on a clock that never goes back; return what to do.

        Events of an incarnation or a shard that is gone change nothing but this: a row of a prompt
        that is still open is kept, whoever sends it. The first row of a prompt is the one kept.
        """
        if now_s > self.wake_s + self._policy.late_s:
            self._pool.listening_s = now_s
        self._now_s = now_s
        self._out = []
        self._apply(event)
        if now_s >= self._pool.next_s:
            for worker in self._pool.due(now_s):
                self._on_deadline(worker)
        is_wanted = self._table.is_dry or bool(self._table.open)
        self.abandoned = self._is_started and not self._pool.workers and is_wanted
        self.finished = self.abandoned or (self._table.exhausted and not self._table.open)
        self.wake_s = math.inf
        if not self.finished:
            if self._assignment.requesting:
                for shard in self._assignment.next_shards(now_s):
                    self._order(shard)
            self.wake_s = min(self._pool.next_s, self._assignment.next_s)
            self._read_on()
        return self._out

    def _apply(self, event: Event) -> None:
        match event:
            case RowsFinished(shard_id=shard_id, rows=rows):
                self._on_rows(self._table.shards.get(shard_id), rows)
            case ShardFinished(name, shard_id):
                shard = self._table.shards.get(shard_id)
                if shard is not None:
                    self._fail_shard(shard, f"{name} gave no row for it")
            case PromptsRead(prompts, exhausted, is_dry):
                self._is_reading = False
                self._table.read(prompts, exhausted=exhausted, is_dry=is_dry)
            case ShardFailed():
                self._on_shard_failed(event)
            case WorkerReady() | WorkerProgress() | WorkerLost():
                worker = self._pool.alive(event.worker, event.incarnation)
                if worker is not None:
                    self._on_worker_event(worker, event)
            case RunStarted(names, is_open):
                self._is_started = True
                self._table.is_open = self._table.is_dry = is_open
                self._pool.start(names, self._now_s, is_open=is_open)
            case PromptsCancelled(indexes):
                self._cancel(indexes)
            case TokensGenerated() | TimePassed():
                pass  # workers that are due are looked at after every event

    def _on_worker_event(self, worker: WorkerState, event: Event) -> None:
        match event:
            case WorkerProgress():
                self._pool.stepped(worker, self._now_s, event.num_steps)
            case WorkerReady():
                if worker.status is WorkerStatus.OPENING:
                    self._pool.open(worker, event.slots, self._now_s)
                    self._assignment.consider(worker)
            case WorkerLost(error=error):
                self._on_worker_failed(worker, error, runs=False)

    def _on_rows(self, shard: Shard | None, rows: Sequence[Row]) -> None:
        if shard is None:
            self._deliver(self._table.accept(rows, self._now_s))
            return
        worker = shard.worker
        full, work = worker.num_unfinished >= worker.slots, worker.work
        self._deliver(self._table.accept(rows, self._now_s, shard))
        done, answered = work - worker.work, any(row.ok for row in rows)
        self._pool.worked(worker, self._now_s, done, full=full, answered=answered)
        self._assignment.consider(worker)

    def _cancel(self, indexes: Sequence[int]) -> None:
        """Close these prompts wherever they are; a row that comes of one later is not its first."""
        entries = [entry for index in indexes if (entry := self._table.open.get(index))]
        running: dict[str, list[int]] = {}
        for entry in entries:
            for shard_id in entry.shard_ids:
                name = self._table.shards[shard_id].worker.name
                running.setdefault(name, []).append(entry.prompt.index)
        rows = [Row.cancelled(entry.prompt, attempts=entry.attempt) for entry in entries]
        self._deliver(self._table.accept(rows, self._now_s))
        for name, its in running.items():
            self._out.append(CancelRows(name, tuple(its)))
            self._assignment.consider(self._pool.workers[name])

    def _fail_shard(self, shard: Shard, error: str) -> None:
        """End a shard; the prompts that it gave no row for are to blame themselves."""
        self._deliver(self._table.fail(shard, error))
        self._assignment.consider(shard.worker)

    def _on_shard_failed(self, event: ShardFailed) -> None:
        shard = self._table.shards.get(event.shard_id)
        if shard is None:
            return
        worker = shard.worker
        if not event.retryable:
            self._fail_shard(shard, f"{worker.name}: {event.error}")
        elif worker.transients == self._policy.max_transients:
            self._on_worker_failed(worker, event.error, runs=True)
        else:
            worker.transients += 1
            worker.lose_state()
            if self._table.hold(shard, self._now_s):
                worker.retry_s = self._now_s + worker.pause_s(worker.transients)
                self._pool.set_timer(worker)
            self._assignment.consider(worker)

    def _on_worker_failed(self, worker: WorkerState, error: str, *, runs: bool) -> None:
        """Let a worker that is lost or of no use rest, or give it up; `runs`: its process may."""
        ran = [s for i in worker.shards if (s := self._table.shards[i]).unfinished and not s.held]
        # A worker begins prompts in the order they came, as many as it has slots and have lent
        # theirs: the others had no part in its end. One that fails again and again may have
        # another order (static rows).
        most = worker.slots + worker.lent
        num_begun = most if not worker.failures else worker.num_unfinished
        # Where a lone prompt may be to blame, the worker is not.
        worker.failures += not any(shard.alone for shard in ran)
        worker.openings += worker.status is WorkerStatus.OPENING
        self._pool.rest(worker, self._now_s)
        self._deliver(self._table.on_worker_lost(worker, error, num_begun=num_begun))
        if self._pool.is_hopeless(worker):
            del self._pool.workers[worker.name]
            self._out.append(QuarantineWorker(worker.name, error))
            return
        if runs:
            self._out.append(RetireWorker(worker.name, error))
        self._pool.set_timer(worker)

    def _on_deadline(self, worker: WorkerState) -> None:
        """The time has come that was set for this worker; it may have moved since."""
        pool = self._pool
        if self._now_s < worker.deadline_s(pool.listening_s):
            pool.set_timer(worker)
        elif worker.status is WorkerStatus.BACKOFF:
            pool.reopen(worker, self._now_s)
            self._out.append(ReplaceWorker(worker.name, worker.incarnation))
        elif worker.status is WorkerStatus.OPENING:
            limit_s = self._policy.max_open_s
            self._on_worker_failed(worker, f"it did not open within {limit_s:.0f} s", runs=True)
        elif self._now_s >= worker.stall_at_s(pool.listening_s):
            self._on_worker_failed(worker, f"it made no step for {worker.stall_s:.0f} s", runs=True)
        else:
            worker.retry_s = None
            for shard in self._table.resume(worker):
                self._order(shard)
            pool.set_timer(worker)
            self._assignment.consider(worker)

    # -- what is ordered

    def _deliver(self, rows: Sequence[Row]) -> None:
        if rows:
            self._out.append(DeliverRows(tuple(rows)))

    def _order(self, shard: Shard) -> None:
        prompts = tuple(entry.prompt for entry in shard.unfinished.values())
        self._out.append(RunShard(shard.worker.name, shard.id, prompts, shard.attempt))

    def _read_on(self) -> None:
        """Read the next prompts unless enough of them wait."""
        if not self._is_started or self._is_reading or self._table.exhausted:
            return
        policy, num_slots = self._policy, self._pool.num_slots
        enough = max(policy.read_ahead // 2, policy.ahead_rounds * num_slots)
        if self._assignment.num_read_ahead <= enough:
            self._is_reading = True
            num_prompts = max(policy.read_ahead, policy.read_rounds * num_slots)
            self._out.append(ReadPrompts(num_prompts))
