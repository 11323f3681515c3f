"""How a run stands, as one value: what a live line, a log or a page draws.

`RunFollower` hears what the driver hears and orders, and decides nothing. Another thread may ask it
for the view.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qaic_ray.dispatch.dispatcher import (
    Command,
    DeliverRows,
    Event,
    QuarantineWorker,
    ReplaceWorker,
    RetireWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    ShardFinished,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.metrics import NO_ENGINE, EngineState, EngineTotals
from qaic_ray.rows import FinishReason, Row

WARN_AFTER = 20
"""Rows after which it can be said how a run is going."""
RATE_S = 30.0
"""Tokens/s and rows/s are those of the last so many seconds."""
MARK_S = 0.5

OPENING, READY, BUSY, BACKOFF, LOST = "opening", "ready", "busy", "backoff", "lost"


@dataclass(frozen=True)
class CardView:
    """One worker. `running` rows are in the engine's slots, `tokens_per_s` is its engine's own.

    `engine` is how it stood when it was asked last, which is about every second; engines of its
    earlier lives are counted too.
    """

    name: str
    state: str = OPENING
    slots: int = 0
    running: int = 0
    tokens_per_s: float = 0.0
    restarts: int = 0
    error: str = ""
    engine: EngineState = NO_ENGINE


@dataclass(frozen=True)
class RunView:
    """How a run stands.

    Attributes:
        rows_total: of the whole input; None while it is not known. `is_exact` says whether it was
            counted, or is an estimate from the file.
        rows_done: of all sessions, failed ones included.
        tokens_per_s: of all cards in the last seconds; of rows that run, too.
        eta_s: seconds until the end; None while it cannot be told.
        seconds: since this session began.
        by_reason: finish reason -> rows of this session.
        by_error: error class -> rows of this session.
        sample: a row that was answered.
    """

    rows_total: int | None = None
    is_exact: bool = True
    rows_done: int = 0
    rows_failed: int = 0
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    seconds: float = 0.0
    cards: tuple[CardView, ...] = ()
    by_reason: Mapping[str, int] = field(default_factory=dict)
    by_error: Mapping[str, int] = field(default_factory=dict)
    sample: Row | None = None

    @property
    def num_busy(self) -> int:
        """Cards that have rows."""
        return sum(card.state == BUSY for card in self.cards)

    @property
    def num_ended(self) -> int:
        """Rows that ended in this session."""
        return sum(self.by_reason.values())

    @property
    def share_failed(self) -> float:
        """Of the rows that ended in this session, those without an answer; 0 for none."""
        return sum(self.by_error.values()) / self.num_ended if self.num_ended else 0.0


class _Rate:
    """A count that grows, and by how much a second lately."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque()

    def mark(self, now_s: float, count: float) -> None:
        if len(self._marks) > 1 and now_s - self._marks[-2][0] < MARK_S:
            self._marks.pop()  # however often it is told, no more than some hundreds are kept
        self._marks.append((now_s, count))
        while len(self._marks) > 2 and now_s - self._marks[1][0] >= RATE_S:
            self._marks.popleft()

    def per_s(self) -> float:
        if len(self._marks) < 2:
            return 0.0
        (start_s, start), (end_s, end) = self._marks[0], self._marks[-1]
        return (end - start) / (end_s - start_s) if end_s > start_s else 0.0


class _WatchedCard:
    def __init__(self, name: str) -> None:
        self.name = name
        self.state = OPENING
        self.slots = 0
        self.running = 0
        self.restarts = 0
        self.error = ""
        self.shards: dict[int, int] = {}
        self.rate = _Rate()
        self.tokens = 0
        self.engine = NO_ENGINE
        self.num_past = 0  # engines of its earlier lives

    def begin(self) -> None:
        """It is opened, for the first time or again."""
        self.state, self.running, self.shards, self.rate = OPENING, 0, {}, _Rate()
        if self.engine is not NO_ENGINE:
            self.num_past = self.engine.engine + 1
        self.tokens, self.engine = 0, NO_ENGINE

    def end(self, state: str, error: str) -> None:
        self.begin()
        self.state, self.error = state, error

    def view(self) -> CardView:
        has_rows = self.state == READY and any(self.shards.values())
        return CardView(
            self.name,
            BUSY if has_rows else self.state,
            self.slots,
            self.running if has_rows else 0,
            self.rate.per_s() if has_rows else 0.0,
            self.restarts,
            self.error,
            self.engine,
        )


class RunFollower:
    """Keeps up how a run stands.

    Attributes:
        engine_totals: tokens of all engines that the run has had.

    Args:
        rows_guess: of the input, where it can be told from its file.
        clock: seconds.
    """

    def __init__(
        self, rows_guess: int | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rows_guess = rows_guess
        self._clock = clock
        self._lock = threading.Lock()
        self.engine_totals = EngineTotals()
        self._began_s = clock()
        self._cards: dict[str, _WatchedCard] = {}
        self._rows_read = self._rows_done = self._rows_failed = 0
        self._num_ended = self._num_failed = 0
        self._is_exhausted = False
        self._engine_tokens = self._row_tokens = 0
        self._has_work = False
        self._rows_rate, self._tokens_rate = _Rate(), _Rate()
        self._by_reason: Counter[str] = Counter()
        self._by_error: Counter[str] = Counter()
        self._sample: Row | None = None

    @property
    def ended(self) -> tuple[int, int]:
        """Rows that ended in this session, and those of them that failed."""
        return self._num_ended, self._num_failed

    @property
    def num_given(self) -> int:
        """Rows that workers have."""
        with self._lock:
            return sum(sum(card.shards.values()) for card in self._cards.values())

    def counted(self, *, rows_read: int, rows_done: int, rows_failed: int, exhausted: bool) -> None:
        """How many rows of the input were read and are done, those of earlier sessions too."""
        with self._lock:
            self._rows_read, self._is_exhausted = rows_read, exhausted
            self._rows_done, self._rows_failed = rows_done, rows_failed

    def change(self, change: Event | Command) -> None:
        """Take in what the driver heard or ordered."""
        with self._lock:
            match change:
                case RunStarted(workers):
                    self._cards = {name: _WatchedCard(name) for name in workers}
                case DeliverRows(rows):
                    self._ended(rows)
                case RunShard(name, shard_id, prompts):
                    if not self._has_work:
                        self._has_work = True
                        self._rows_rate.mark(self._clock(), 0)
                        self._mark_tokens()
                    self._card(name).shards[shard_id] = len(prompts)
                case (
                    WorkerReady()
                    | WorkerProgress()
                    | WorkerLost()
                    | RowsFinished()
                    | ShardFinished()
                    | ShardFailed()
                ):
                    self._of_card(self._card(change.worker), change)
                case RetireWorker(name, error):
                    self._card(name).end(BACKOFF, error)
                case ReplaceWorker(name):
                    self._card(name).begin()
                    self._card(name).restarts += 1
                case QuarantineWorker(name, error):
                    self._card(name).end(LOST, error)

    def view(self) -> RunView:
        """How the run stands now."""
        with self._lock:
            now_s = self._clock()
            total = self._rows_read if self._is_exhausted else self._rows_guess
            return RunView(
                rows_total=total,
                is_exact=self._is_exhausted,
                rows_done=self._rows_done,
                rows_failed=self._rows_failed,
                tokens_per_s=self._tokens_rate.per_s(),
                eta_s=self._eta_s(total),
                seconds=now_s - self._began_s,
                cards=tuple(card.view() for card in self._cards.values()),
                by_reason=dict(self._by_reason),
                by_error=dict(self._by_error),
                sample=self._sample,
            )

    def _card(self, name: str) -> _WatchedCard:
        return self._cards.setdefault(name, _WatchedCard(name))

    def _of_card(self, card: _WatchedCard, event: Event) -> None:
        match event:
            case WorkerReady(slots=slots):
                card.state, card.slots, card.error = READY, slots, ""
            case WorkerProgress():
                self._engine_tokens += event.generated_tokens - card.tokens
                card.tokens, card.running = event.generated_tokens, event.engine.running
                number = card.num_past + event.engine.engine
                card.engine = replace(event.engine, engine=number)
                self.engine_totals.looked(event.worker, card.engine)
                card.rate.mark(self._clock(), card.tokens)
                self._mark_tokens()
            case WorkerLost(error=error):
                card.end(BACKOFF, error)
            case RowsFinished(shard_id=shard_id, rows=rows):
                left = card.shards.get(shard_id, 0) - len(rows)
                card.shards[shard_id] = max(0, left)
            case ShardFinished(shard_id=shard_id):
                card.shards.pop(shard_id, None)
            case ShardFailed(shard_id=shard_id, error=error):
                card.shards.pop(shard_id, None)
                card.error = error

    def _mark_tokens(self) -> None:
        """Engines tell their tokens now and then; rows that end before that have some too."""
        self._tokens_rate.mark(self._clock(), max(self._engine_tokens, self._row_tokens))

    def _ended(self, rows: Sequence[Row]) -> None:
        now_s = self._clock()
        for row in rows:
            self._by_reason[row.finish_reason.value] += 1
            if not row.ok:
                self._by_error["error" if row.error_class is None else row.error_class.value] += 1
            elif self._sample is None and row.text.strip():
                self._sample = row
        self._row_tokens += sum(row.generated_tokens for row in rows)
        self._mark_tokens()
        self._num_ended += len(rows)
        self._num_failed += sum(not row.ok for row in rows)
        self._rows_rate.mark(now_s, self._num_ended)

    def _eta_s(self, total: int | None) -> float | None:
        per_s = self._rows_rate.per_s()
        if total is None or per_s <= 0:
            return None
        return max(0, total - self._rows_done) / per_s


def share_by_length(view: RunView) -> float:
    """Of the rows that ended in this session, those that reached their limit of tokens."""
    return view.by_reason.get(FinishReason.LENGTH.value, 0) / max(1, view.num_ended)
