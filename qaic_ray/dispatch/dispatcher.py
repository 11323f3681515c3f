"""Which worker answers which prompts next: events in, commands out. Knows no clock, card or Ray.

`handle` is the only door. What happened comes in as an event with the time at which it was heard,
what is to be done goes out as commands, and how that ended comes back as another event
(`messages.py`). A prompt that was read *waits* (`waiting.py`), *runs* (in a shard, on a worker) or
is done; of one that is done nothing is kept. What an event costs does not grow with the fleet.

The policy is guided self-scheduling. Long prompts go first, so that what is left for the end is
short. A shard is about a second of a worker's time by its own measured speed, and about as much is
queued behind it, so that a card never drains. When the input has been read to its end, shards
shrink with the work that is left; when nothing waits, what is queued in some cards is taken back
for those that are idle, and the last prompts of a straggler run a second time (`ending.py`).
Prompts come in bands, one for each read, and an older band goes first: a short prompt never waits
for the end of a long input, and the rows held back to restore the input's order stay few.

Retry is decided here and nowhere else. A worker that is lost, hangs or fails is opened again after
a rest, and given up when it cannot be opened, or gives no row in many more lives than it took
before (`roster.py`); the run goes on with the others, and ends `abandoned` when there are none. A
prompt that was unfinished on a dying worker goes again in a smaller group, then alone, and dying
alone twice makes it an error row, on two workers where there are two, and more often where workers
die of other things too (`suspicion.py`): never for its neighbour's sake. Nor is a worker given up
for its prompts: a death with a lone prompt counts for the prompt, and after a failure a worker
shows with fresh prompts whether it is well before it is given suspects.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from qaic_ray.dispatch import shard_size
from qaic_ray.dispatch.events import (
    Command,
    DeliverRows,
    Event,
    PromptsRead,
    QuarantineWorker,
    ReadPrompts,
    ReplaceWorker,
    RetireWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    ShardFinished,
    ShardTakenBack,
    TakeBackShard,
    TimePassed,
    WakeAt,
    WorkerFailedToOpen,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.dispatch.prompts import PromptTable, Shard
from qaic_ray.dispatch.tail import Tail
from qaic_ray.dispatch.waiting import ALONE_FROM, OpenPrompt
from qaic_ray.dispatch.worker_pool import WorkerPool
from qaic_ray.dispatch.workers import MAX_OPEN_S, MAX_TRANSIENTS, WorkerState, WorkerStatus
from qaic_ray.rows import Prompt, Row

LATE_S = 1.0
"""Woken so late, the driver did not listen in between: nobody was silent."""
_PASSED_OVER = 8  # so many workers in a row that nothing fits are enough for one event


class Dispatcher:
    """The state of one run; see the module's text for the policy.

    `abandoned` becomes true when every worker was given up while prompts were left: those stay
    undone, and nothing more is read.
    """

    def __init__(
        self,
        *,
        work_of: Callable[[Prompt], float] = shard_size.text_work,
        read_ahead: int = shard_size.READ_AHEAD,
    ) -> None:
        self.abandoned = False
        self._work_of = work_of
        self._read_ahead = read_ahead
        self._pool = WorkerPool()
        self._table = PromptTable()
        self._tail = Tail(self._table, self._pool)
        self._hungry: deque[WorkerState] = deque()
        self._out: list[Command] = []
        self._now_s = 0.0
        self._wake_s = math.inf
        self._started = False
        self._reading = False
        self._exhausted = False
        self._exact = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: every prompt is done, or there is no worker."""
        return self.abandoned or (self._exhausted and not self._table.open)

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take in what was heard at `now_s`, on a clock that never goes back; return what to do.

        Events of an incarnation or a shard that is gone change nothing but this: a row of a prompt
        that is still open is kept, whoever sends it. The first row of a prompt is the one kept.
        """
        if now_s > self._wake_s + LATE_S:
            self._pool.listening_s = now_s
        if now_s >= self._wake_s or isinstance(event, TimePassed):
            self._wake_s = math.inf
        self._now_s = now_s
        self._out = []
        self._absorb(event)
        for worker in self._pool.due(now_s):
            self._look_at(worker)
        if self._started and not self._pool.workers and self._table.open:
            self.abandoned = True
        if not self.finished:
            self._hand_out()
            self._read_on()
            self._ask_to_be_woken()
        return self._out

    def _absorb(self, event: Event) -> None:
        match event:
            case RowsFinished(shard_id=shard_id, rows=rows):
                self._hear_rows(shard_id, rows)
            case ShardFinished(name, shard_id):
                self._hear_end(shard_id, f"{name} gave no row for it")
            case WorkerProgress(name, num_steps, incarnation):
                worker = self._pool.alive(name, incarnation)
                if worker is not None:
                    self._pool.stepped(worker, self._now_s, num_steps)
            case PromptsRead(prompts, exhausted):
                self._hear_prompts(prompts, exhausted)
            case ShardTakenBack(shard_id=shard_id, indexes=indexes):
                self._hear_taken_back(shard_id, indexes)
            case ShardFailed():
                self._hear_failure(event)
            case WorkerReady(name, slots, incarnation):
                self._hear_ready(self._pool.alive(name, incarnation), slots)
            case WorkerFailedToOpen() | WorkerLost():
                worker = self._pool.alive(event.worker, event.incarnation)
                self._fail(worker, event.error, runs=False)
            case RunStarted(names):
                self._started = True
                self._pool.start(names, self._now_s)

    # -- what happened

    def _hear_prompts(self, prompts: Sequence[Prompt], exhausted: bool) -> None:
        self._table.read(prompts, self._work_of)
        self._reading = False
        self._exhausted = exhausted
        if exhausted:
            self._table.waiting.merge_bands()

    def _hear_ready(self, worker: WorkerState | None, slots: int) -> None:
        if worker is not None and worker.state is WorkerStatus.OPENING:
            self._pool.ready(worker, slots, self._now_s)
            self._look_after(worker)

    def _hear_rows(self, shard_id: int, rows: Sequence[Row]) -> None:
        shard = self._table.shards.get(shard_id)
        if shard is None:
            self._deliver(self._table.accept(rows))
            return
        worker = shard.worker
        self._table.measure_row(shard, rows, self._now_s)
        full, work = worker.num_unfinished >= worker.slots, worker.work
        self._deliver(self._table.accept(rows))
        self._pool.worked(worker, self._now_s, work - worker.work, full=full)
        if any(row.ok for row in rows):
            self._pool.answered(worker)
        self._look_after(worker)

    def _hear_end(self, shard_id: int, error: str) -> None:
        """A shard ended; what it gave no row for is to blame itself."""
        shard = self._table.shards.get(shard_id)
        if shard is None:
            return
        if shard.asked and not shard.answered and shard.unfinished:
            shard.ended = True  # they may have been taken back, which is heard next
            return
        self._deliver(self._table.fail(shard, error))
        self._look_after(shard.worker)

    def _hear_taken_back(self, shard_id: int, indexes: Sequence[int]) -> None:
        shard = self._table.shards.get(shard_id)
        if shard is None or not shard.asked or shard.answered:
            return
        self._table.give_back(shard, indexes)
        if shard.ended:
            self._hear_end(shard_id, f"{shard.worker.name} gave no row for it")
            return
        self._tail.note_queue(shard.worker, self._now_s)
        self._look_after(shard.worker)

    def _hear_failure(self, event: ShardFailed) -> None:
        shard = self._table.shards.get(event.shard_id)
        if shard is None:
            return
        worker = shard.worker
        if not event.retryable:
            self._deliver(self._table.fail(shard, f"{worker.name}: {event.error}"))
        elif worker.transients == MAX_TRANSIENTS:
            self._fail(worker, event.error, runs=True)
            return
        else:
            worker.transients += 1
            if self._table.hold(shard, self._now_s):
                worker.retry_s = self._now_s + worker.pause_s
        self._look_after(worker)

    def _fail(self, worker: WorkerState | None, error: str, *, runs: bool) -> None:
        """A worker is lost, or of no use; `runs`: its process may still be there."""
        if worker is None:
            return
        ran = [s for i in worker.shards if (s := self._table.shards[i]).unfinished and not s.held]
        # A worker begins prompts in the order they came, as many as it has slots: the others had
        # no part in its end. One that fails again and again may have another order (static rows).
        num_begun = worker.slots if not worker.failures else worker.num_unfinished
        # Where a lone prompt may be to blame, the worker is not.
        worker.failures += not any(shard.alone for shard in ran)
        was_ready = worker.state is WorkerStatus.READY
        worker.openings += not was_ready
        self._pool.rest(worker, self._now_s)
        if was_ready:
            self._deliver(
                self._table.on_worker_lost(
                    worker, error, self._now_s, num_begun=num_begun, up_s=self._pool.up_s
                )
            )
        if self._pool.is_hopeless(worker):
            del self._pool.workers[worker.name]
            self._out.append(QuarantineWorker(worker.name, error))
            return
        if runs:
            self._out.append(RetireWorker(worker.name, error))
        self._pool.set_timer(worker)

    def _deliver(self, rows: Sequence[Row]) -> None:
        if rows:
            self._out.append(DeliverRows(tuple(rows)))

    # -- what time brings

    def _look_after(self, worker: WorkerState) -> None:
        """Something changed for this worker: it may want work, and have another deadline."""
        if not worker.hungry and self._wants(worker):
            worker.hungry = True
            self._hungry.append(worker)
        if worker.timer_s == math.inf or worker.retry_s is not None or len(worker.shards) < 2:
            self._pool.set_timer(worker)  # else the one that is set can only be too early

    def _look_at(self, worker: WorkerState) -> None:
        """The time has come that was set for this worker; it may have moved since."""
        if self._now_s < worker.deadline_s(self._pool.listening_s):
            self._pool.set_timer(worker)
        elif worker.state is WorkerStatus.BACKOFF:
            worker.reopen(self._now_s)
            self._out.append(ReplaceWorker(worker.name, worker.incarnation))
            self._pool.set_timer(worker)
        elif worker.state is WorkerStatus.OPENING:
            self._fail(worker, f"it did not open within {MAX_OPEN_S:.0f} s", runs=True)
        elif self._now_s >= worker.stall_at_s(self._pool.listening_s):
            self._fail(worker, f"it made no step for {worker.stall_s:.0f} s", runs=True)
        else:
            worker.retry_s = None
            for shard in self._table.resume(worker):
                self._order(shard)
            self._look_after(worker)

    def _ask_to_be_woken(self) -> None:
        time_s = self._pool.next_s
        if self._hungry and self._is_ending:
            time_s = min(time_s, self._tail.next_s)
        if time_s < self._wake_s:
            self._wake_s = time_s
            self._out.append(WakeAt(time_s))

    # -- who gets what

    def _wants(self, worker: WorkerState) -> bool:
        return shard_size.wants_shard(worker, self._table, self._pool, exhausted=self._exhausted)

    def _much_remains(self) -> bool:
        return shard_size.much_remains(self._table.waiting, self._pool, exhausted=self._exhausted)

    def _hand_out(self) -> None:
        """Shards for those that want one, one each and then another, until none takes more."""
        waiting = self._table.waiting
        if not (self._exact or self._much_remains()):
            self._exact = True
            waiting.order_exactly()
        passed_over = 0
        while waiting and self._hungry and passed_over < _PASSED_OVER:
            worker = self._hungry.popleft()
            worker.hungry = False
            if not self._wants(worker):
                continue
            passed_over = 0 if self._give(worker) else passed_over + 1
            self._look_after(worker)
        if self._hungry and self._is_ending:
            self._move_work()

    def _give(self, worker: WorkerState) -> bool:
        """A shard, or the promise of one; False where nothing that waits fits this worker."""
        waiting = self._table.waiting
        if not worker.failures or not waiting.fresh:
            suspect = self._suspect_for(worker)
            if suspect is not None and not worker.shards:
                waiting.remove(suspect)
                self._run(worker, [suspect], alone=True)
                return True
            if suspect is not None and len(waiting.suspects) > self._pool.num_draining:
                self._pool.drain(worker, True)
                return True
        self._pool.drain(worker, False)
        taken, alone = shard_size.take_group(worker, waiting, self._pool, exhausted=self._exhausted)
        if taken:
            self._run(worker, taken, alone=alone)
        return bool(taken)

    def _suspect_for(self, worker: WorkerState) -> OpenPrompt | None:
        """One that did not die on this worker, if there is another worker for those that did."""
        others = len(self._pool.workers) > 1
        return self._table.waiting.suspect_for(worker.name if others else None)

    def _run(self, worker: WorkerState, entries: Sequence[OpenPrompt], *, alone: bool) -> None:
        self._pool.drain(worker, False)
        shard = self._table.begin(worker, entries, self._now_s, alone=alone)
        self._tail.note(shard, self._now_s)
        self._order(shard)

    def _order(self, shard: Shard) -> None:
        self._out.append(RunShard(shard.worker.name, shard.id, shard.prompts, shard.attempt))

    def _read_on(self) -> None:
        if not self._started or self._reading or self._exhausted:
            return
        num_prompts = shard_size.num_to_read(self._table.waiting, self._pool, self._read_ahead)
        if num_prompts:
            self._reading = True
            self._out.append(ReadPrompts(num_prompts))

    # -- the end of the run

    @property
    def _is_ending(self) -> bool:
        return self._exhausted and not self._table.waiting.num_grouped

    def _move_work(self) -> None:
        """Nothing waits, and somebody is idle."""
        if not self._tail.begun:
            self._tail.begin(self._now_s)
        while self._table.num_asked < len(self._hungry):
            shard = self._tail.next_to_ask()
            if shard is None:
                break
            self._table.ask(shard)
            self._out.append(TakeBackShard(shard.worker.name, shard.id))
        while self._hungry:
            entry = self._tail.next_to_run_again(self._now_s)
            if entry is None:
                break
            worker = self._idle_for(entry)
            if worker is None:
                self._tail.later(entry, self._now_s)
            else:
                self._run(worker, [entry], alone=entry.attempt >= ALONE_FROM)
                self._look_after(worker)

    def _idle_for(self, entry: OpenPrompt) -> WorkerState | None:
        """Of the first few that want work one that may run this prompt a second time."""
        shard = self._table.shards[entry.shard_ids[0]]
        for _ in range(min(_PASSED_OVER, len(self._hungry))):
            worker = self._hungry.popleft()
            worker.hungry = False
            fits = worker is not shard.worker and not (shard.alone and worker.shards)
            if self._wants(worker) and fits:
                return worker
            self._look_after(worker)
        return None

    # -- invariants

    def check(self) -> None:
        """Assert what always holds between two events; a failure is a bug of this package."""
        self._table.check()
        self._pool.check()
        waiting = self._table.waiting
        if self.finished:
            return
        for worker in self._pool.workers.values():
            assert worker.hungry == (worker in self._hungry)
            idle = worker.state is WorkerStatus.READY and not worker.shards
            assert worker.hungry or not idle, "nobody will think of an idle worker"
            assert not (idle and waiting.num_grouped), "an idle worker, and work"
            assert not (idle and self._suspect_for(worker)), "an idle worker, and a suspect"
