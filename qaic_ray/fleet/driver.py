"""The driver's loop: wait for the cards, hear the dispatcher, obey it. Knows no Ray.

The cards are behind a `Cards`: actors on Ray in `cluster.py`, simulated ones in tests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from qaic_ray.fleet.dispatch import Dispatcher
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
    WorkerFailedToOpen,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.fleet.outputs import InputOrder
from qaic_ray.fleet.result import FleetResult, Tally, WorkerResult
from qaic_ray.metrics import Measurement, Span
from qaic_ray.rows import Prompt, Row

if TYPE_CHECKING:
    from qaic_ray.fleet.worker import WorkerInfo


class Cards(Protocol):
    """What the loop needs of the cards; opening them has begun."""

    @property
    def names(self) -> Sequence[str]:
        """Every worker that is being opened."""

    def wait(self) -> Event:
        """Block until a worker has something to say, and return it.

        Raises:
            UsageError: a worker found that the request itself is wrong.
        """

    def run(self, shard: RunShard) -> None:
        """Begin a shard; what comes of it is heard from `wait`."""

    def retire(self, worker: str) -> None:
        """End a worker at once; nothing more is heard of it."""

    def info(self, worker: str) -> WorkerInfo:
        """What a worker that is ready has."""

    def measurements(self) -> Mapping[str, Measurement]:
        """The work of every worker that still lives."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. `rows_read` is the whole input once `input_exhausted` is true."""

    rows_read: int = 0
    rows_done: int = 0
    rows_failed: int = 0
    generated_tokens: int = 0
    input_exhausted: bool = False


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class Audience:
    """Who is told what, while the run goes.

    Attributes:
        on_row: each row of the input once, in input order, as soon as the order allows.
        on_worker_ready: each worker that has opened.
        on_progress: after each change of the counts.
    """

    on_row: Callable[[Row], None] = _ignore
    on_worker_ready: Callable[[WorkerInfo], None] = _ignore
    on_progress: Callable[[Progress], None] = _ignore


class Driver:
    """One run of prompts over cards."""

    def __init__(
        self,
        cards: Cards,
        prompts: Iterable[Prompt | Row],
        audience: Audience,
        *,
        dispatcher: Dispatcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cards = cards
        self._prompts: Iterator[Prompt | Row] = iter(prompts)
        self._audience = audience
        self._dispatcher = dispatcher or Dispatcher()
        self._clock = clock

        self._order = InputOrder()
        self._tally = Tally()
        self._infos: dict[str, WorkerInfo] = {}
        self._errors: dict[str, str] = {}
        self._span: Span | None = None
        self._progress = Progress()

    def run(self) -> FleetResult:
        """Answer every prompt, or say why not, and return what came of it."""
        events: deque[Event] = deque([RunStarted(tuple(self._cards.names))])
        while not self._dispatcher.finished:
            event = events.popleft() if events else self._cards.wait()
            self._hear(event)
            for command in self._dispatcher.handle(event):
                events.extend(self._obey(command))
        return self._result()

    def _hear(self, event: Event) -> None:
        match event:
            case RowsFinished():
                self._worked()
            case WorkerReady(worker):
                self._infos[worker] = self._cards.info(worker)
                self._audience.on_worker_ready(self._infos[worker])
            case WorkerLost(worker, error) | WorkerFailedToOpen(worker, error):
                self._errors[worker] = error
            case ShardFailed(worker, _, error, retryable=True):
                self._errors[worker] = error

    def _obey(self, command: Command) -> list[Event]:
        match command:
            case ReadPrompts(num_prompts):
                return [self._read(num_prompts)]
            case RunShard():
                self._worked()
                self._cards.run(command)
            case DeliverRows(rows):
                self._deliver(rows)
            case RetireWorker(worker):
                self._cards.retire(worker)
        return []

    def _read(self, num_items: int) -> PromptsRead:
        items = list(islice(self._prompts, num_items))
        exhausted = len(items) < num_items
        self._progress = replace(
            self._progress,
            rows_read=self._progress.rows_read + len(items),
            input_exhausted=exhausted,
        )
        self._deliver([item for item in items if isinstance(item, Row)])
        return PromptsRead(
            tuple(item for item in items if isinstance(item, Prompt)), exhausted=exhausted
        )

    def _deliver(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._tally.add(row)
            for ready in self._order.push(row):
                self._audience.on_row(ready)
        before = self._progress
        self._progress = replace(
            before,
            rows_done=before.rows_done + len(rows),
            rows_failed=before.rows_failed + sum(not row.ok for row in rows),
            generated_tokens=before.generated_tokens + sum(row.generated_tokens for row in rows),
        )
        self._audience.on_progress(self._progress)

    def _worked(self) -> None:
        now_s = self._clock()
        now = Span(now_s, now_s)
        self._span = now if self._span is None else self._span + now

    def _result(self) -> FleetResult:
        engines = self._cards.measurements()
        workers = tuple(
            WorkerResult(
                name=name,
                info=self._infos.get(name),
                measurement=self._tally.measurement(name, engines.get(name)),
                error=self._errors.get(name),
            )
            for name in self._cards.names
        )
        error = "Every card was lost; the prompts that were left have no answer."
        return FleetResult(
            workers=workers,
            unassigned=self._tally.measurement(""),
            span=self._span,
            length_counts=dict(self._tally.length_counts),
            error=error if self._dispatcher.abandoned else None,
        )
