"""The driver's loop: wait for an event of a card or the input, ask the dispatcher, obey it.

The cards are behind a `Cards`: actors on Ray in `cluster/actors.py`, simulated ones in tests.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaic_ray.dispatch.dispatcher import (
    CancelRows,
    Command,
    DeliverRows,
    Dispatcher,
    Event,
    PromptsCancelled,
    PromptsRead,
    QuarantineWorker,
    ReadPrompts,
    ReplaceWorker,
    RetireWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    TimePassed,
    TokensGenerated,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.errors import QaicRayError
from qaic_ray.metrics import Span, Tally
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.delivery import Delivery
from qaic_ray.runs.fleet import Cards
from qaic_ray.runs.intake import Batch, Intake, ThreadedReader
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.open_input import OpenInput
from qaic_ray.runs.result import BrokenOff, Cause, FleetResult, WorkerResult
from qaic_ray.runs.token_streams import RowStream, TokenDelta

if TYPE_CHECKING:
    from qaic_ray.worker.worker import WorkerInfo


@dataclass(frozen=True)
class Progress:
    """How far a run is. `rows_read` is the whole input once `input_exhausted` is true.

    `prompts_waiting` were read, and no worker has them.
    """

    rows_read: int = 0
    rows_done: int = 0
    rows_failed: int = 0
    generated_tokens: int = 0
    input_exhausted: bool = False
    prompts_waiting: int = 0


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class Audience:
    """Callbacks of a run.

    Attributes:
        on_row: each row of the input once, in input order, as soon as the order allows and, where
            there is a journal, it is on the disk.
        on_earlier_row: in place of `on_row`, and before it is called at all, for each row whose
            turn had come when an earlier session of the run ended.
        on_worker_ready: each worker that has opened.
        on_progress: after each change of the counts.
        on_wait: once, in a sentence, where cards are held by others and are waited for.
        on_saved: each new row as soon as it is on the disk, in the order of the journal.
        on_tokens: what prompts with `stream` got; the last of a row comes before its `on_saved`.
        on_begin: once, with a function that cancels rows by their indexes. Any thread may call it;
            it takes effect with the next event, at once where the input is open, and each such row
            comes as one of finish_reason ABORT, if it is not done.
        on_event: whatever the dispatcher hears and orders, as it does; and rows of the input that
            are no prompts, as if it had ordered them.
    """

    on_row: Callable[[Row], None] = _ignore
    on_earlier_row: Callable[[Row], None] = _ignore
    on_worker_ready: Callable[[WorkerInfo], None] = _ignore
    on_progress: Callable[[Progress], None] = _ignore
    on_wait: Callable[[str], None] = _ignore
    on_saved: Callable[[Row], None] = _ignore
    on_tokens: Callable[[Sequence[TokenDelta]], None] = _ignore
    on_begin: Callable[[Callable[[Iterable[int]], None]], None] = _ignore
    on_event: Callable[[Event | Command], None] = _ignore


class Driver:
    """One run of prompts over cards.

    Args:
        prompts: the input, by rising index; a Row in it is an item that is no usable prompt. Of an
            open input rows are told by `on_saved` alone, in the order in which they end.
        dispatcher: None for one with the default policy.
        clock: seconds.
        journal: where rows are kept. Rows of earlier sessions in it are counted as they are, and
            only the other prompts are answered.
        reader: makes the reader of the input.
    """

    def __init__(
        self,
        cards: Cards,
        prompts: Iterable[Prompt | Row] | OpenInput,
        audience: Audience,
        *,
        dispatcher: Dispatcher | None = None,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
        reader: Callable[[Iterable[Prompt | Row]], ThreadedReader] = ThreadedReader,
    ) -> None:
        self._cards = cards
        self._intake = Intake()
        self._is_open = isinstance(prompts, OpenInput)
        self._reader: OpenInput | ThreadedReader
        if isinstance(prompts, OpenInput):
            self._reader = prompts
            prompts.read_by(self._intake, cards.wake)
        else:
            self._reader = reader(self._intake.unanswered(prompts))
        self._is_reading = False
        self._input_error: QaicRayError | None = None
        self._audience = audience
        self._dispatcher = dispatcher or Dispatcher()
        self._clock = clock
        self._delivery = Delivery(
            journal,
            audience.on_row,
            audience.on_earlier_row,
            on_saved=audience.on_saved,
            clock=clock,
            has_order=not self._is_open,
        )
        self._tally = Tally()
        self._streams: dict[int, RowStream] = {}
        self._to_cancel: deque[int] = deque()
        self._cancelled: set[int] = set()
        self._next_index = 0  # of the input; those below it are open or done
        self._infos: dict[str, WorkerInfo] = {}
        self._ready: set[str] = set()
        self._losses: Counter[str] = Counter()
        self._errors: dict[str, str] = {}
        self._first_s: float | None = None  # when this session's first shard began
        self._last_s = 0.0
        self._rows_read = 0
        self._is_exhausted = False

    def run(self) -> FleetResult:
        """Answer every prompt, or say why not, and return the result.

        Whatever ends it early, a KeyboardInterrupt too: the rows that came are on the disk then.

        Raises:
            QaicRayError: of the journal, or for an input that is not that of earlier sessions.
        """
        try:
            self._audience.on_begin(self._cancel)
            self._replay()
            event: Event = RunStarted(tuple(self._cards.names), self._is_open)
            with closing(self._reader):
                while True:
                    self._hear(event)
                    for command in self._dispatcher.handle(event, self._clock()):
                        self._obey(command)
                    if self._dispatcher.finished:
                        break
                    event = self._next_event()
            self._delivery.finish()
            return self._result()
        except (Exception, KeyboardInterrupt):
            with suppress(QaicRayError):  # of a disk that has said so already
                self._delivery.save()
            raise

    def _cancel(self, indexes: Iterable[int]) -> None:
        self._to_cancel.extend(indexes)
        self._cards.wake()

    def _replay(self) -> None:
        """Count the rows of earlier sessions of the run."""
        for entry in self._delivery.replay():
            self._intake.mark_done(entry.row.index, entry.digest)
            self._tally.add(entry.row)
        self._rows_read = self._tally.rows
        if self._rows_read:
            self._tell_progress()

    def _next_event(self) -> Event:
        """The next event of the input or the cards; rows are committed and shown while it waits."""
        while True:
            if self._to_cancel:
                num_wished = len(self._to_cancel)
                return PromptsCancelled(tuple(self._to_cancel.popleft() for _ in range(num_wished)))
            if self._is_reading and (batch := self._reader.poll()) is not None:
                return self._read(batch)
            due_in_s = self._delivery.flush_due()
            wake_in_s = max(0.0, self._dispatcher.wake_s - self._clock())
            look_in_s = self._reader.poll_s if self._is_reading else math.inf
            timeout_s = min(wake_in_s, look_in_s, math.inf if due_in_s is None else due_in_s)
            event = self._cards.wait(None if timeout_s == math.inf else timeout_s)
            if event is not None:
                return event
            if wake_in_s == timeout_s:
                return TimePassed()

    def _hear(self, event: Event) -> None:
        self._audience.on_event(event)
        match event:
            case RowsFinished():
                self._worked()
            case WorkerReady(worker):
                self._infos[worker] = self._cards.info(worker)
                self._ready.add(worker)
                self._audience.on_worker_ready(self._infos[worker])
            case WorkerLost(worker, error):
                self._lose(worker, error)
            case ShardFailed(worker, _, error, retryable=True):
                self._errors[worker] = error
            case TokensGenerated(worker, chunks):
                streams = self._streams
                told = [(streams[c.index].take(worker, c)) for c in chunks if c.index in streams]
                self._tell_tokens([delta for delta in told if delta is not None])
            case PromptsCancelled(indexes):
                is_open = self._intake.open
                done_below = self._next_index
                self._cancelled.update(i for i in indexes if i in is_open or i >= done_below)

    def _obey(self, command: Command) -> None:
        self._audience.on_event(command)
        match command:
            case ReadPrompts(num_prompts):
                self._reader.ask(num_prompts)
                self._is_reading = True
            case RunShard():
                self._worked()
                self._cards.run(command)
            case CancelRows(worker, indexes):
                self._cards.cancel(worker, indexes)
            case DeliverRows(rows):
                self._deliver(rows)
            case RetireWorker(worker, error):
                self._lose(worker, error)
                self._cards.retire(worker)
            case ReplaceWorker(worker, incarnation):
                self._cards.replace(worker, incarnation)
            case QuarantineWorker(worker, error):
                self._errors[worker] = error
                self._ready.discard(worker)
                self._cards.quarantine(worker, error)

    def _lose(self, worker: str, error: str) -> None:
        self._errors[worker] = error
        self._losses[worker] += 1
        self._ready.discard(worker)

    def _read(self, batch: Batch) -> PromptsRead:
        self._is_reading = False
        self._input_error = batch.error
        self._rows_read += len(batch.items)
        if batch.items:
            self._next_index = batch.items[-1].index + 1
        self._is_exhausted = batch.exhausted
        rows: list[Row] = []
        prompts: list[Prompt] = []
        for item in batch.items:
            if isinstance(item, Row):
                rows.append(item)
                continue
            if item.stream:
                self._streams[item.index] = RowStream(item.index)
            if item.index in self._cancelled:
                rows.append(Row.cancelled(item))
            else:
                prompts.append(item)
        if rows:
            self._audience.on_event(DeliverRows(tuple(rows)))
        self._deliver(rows)
        return PromptsRead(tuple(prompts), batch.exhausted, batch.is_dry)

    def _deliver(self, rows: Sequence[Row]) -> None:
        span_s = self._last_s - self._first_s if self._first_s is not None else 0.0
        for row in rows:
            digest = self._intake.open.pop(row.index)
            if row.index in self._streams:
                self._tell_tokens(self._streams.pop(row.index).end(row))
            self._delivery.add(row, digest, span_s)
            self._tally.add(row)
            self._cancelled.discard(row.index)
        self._tell_progress()

    def _tell_tokens(self, deltas: Sequence[TokenDelta]) -> None:
        if deltas:
            self._audience.on_tokens(deltas)

    def _tell_progress(self) -> None:
        tally = self._tally
        done = tally.rows, tally.failed_rows, tally.generated_tokens
        waiting = self._dispatcher.num_waiting
        self._audience.on_progress(Progress(self._rows_read, *done, self._is_exhausted, waiting))

    def _worked(self) -> None:
        self._last_s = self._clock()
        if self._first_s is None:
            self._first_s = self._last_s

    def _result(self) -> FleetResult:
        engines = self._cards.measurements()
        names = self._cards.names
        return FleetResult(
            workers=tuple(
                WorkerResult(
                    name=name,
                    info=self._infos.get(name),
                    measurement=self._tally.measurement(name, engines.get(name)),
                    error=self._errors.get(name),
                    losses=self._losses[name],
                    ready_at_end=name in self._ready,
                )
                for name in (*names, *self._tally.earlier_workers(names))
            ),
            unassigned=self._tally.measurement(""),
            span=self._whole_span(),
            length_counts=dict(self._tally.length_counts),
            broken_off=self._broken_off(),
            rows_in=self._intake.num_rows,
            inputs_sha256=self._intake.sha256.hexdigest(),
        )

    def _broken_off(self) -> BrokenOff | None:
        if self._dispatcher.abandoned:
            error = "Every card was lost; the prompts that were left have no answer."
            return BrokenOff(Cause.CARDS, error)
        if self._input_error is not None:
            return BrokenOff(Cause.INPUT, str(self._input_error))
        return None

    def _whole_span(self) -> Span | None:
        """This session's span, with the time that cards worked in earlier ones put before it."""
        earlier_s = self._delivery.earlier_s
        if self._first_s is None:
            return Span(-earlier_s, 0.0) if earlier_s else None
        return Span(self._first_s - earlier_s, self._last_s)
