"""Simulated cards for an open fleet, whose thread goes on only while a test lets it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

from simulated_cards import SimulatedCards

from qaic_ray.dispatch.dispatcher import (
    Dispatcher,
    Event,
    RowsFinished,
    RunShard,
    TokensGenerated,
    WorkerLost,
)
from qaic_ray.errors import UsageError
from qaic_ray.fleet.kept_rows import KeptRows
from qaic_ray.fleet.open_fleet import OpenFleet
from qaic_ray.rows import TokenChunk
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.open_input import OpenInput
from qaic_ray.runs.result import FleetResult

HANGS_S = 60.0
_WAKE = -1.0


@dataclass
class SteppedCards(SimulatedCards):
    """Waits for a test at each `wait`, until that wakes it or lets time pass.

    A streamed row tells half of its tokens when half of its time is over.
    """

    fails: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._turn = threading.Condition()
        self._is_idle = self.is_over = self._is_free = False
        self._num_woken = 0
        self._order: float | None = None
        self._streamed: set[int] = set()

    # -- the test's side

    def settle(self) -> None:
        """Let the fleet do all that it can do at this time."""
        with self._turn:
            self._await_idle()
            while self._num_woken and not self.is_over:
                self._num_woken = 0
                self._give(_WAKE)

    def pass_time(self, seconds: float) -> None:
        """Let so much time pass, or less where something happens before."""
        self.settle()
        with self._turn:
            if not self.is_over:
                self._give(seconds)
        self.settle()

    def let_run(self) -> None:
        """Wait for the test no more: time passes by itself."""
        with self._turn:
            self._is_free = True
            self._turn.notify_all()

    def lose(self, worker: str) -> bool:
        """A card dies now, if it is there; whether it was."""
        self.settle()
        if worker not in self._cards or self.is_over:
            return False
        incarnation = self._cards[worker].incarnation
        self._later(0.0, WorkerLost(worker, "ActorDiedError: killed", incarnation))
        self.pass_time(0.0)
        return True

    def _give(self, order: float) -> None:
        self._order, self._is_idle = order, False
        self._turn.notify_all()
        self._await_idle()

    def _await_idle(self) -> None:
        came = self._turn.wait_for(lambda: self._is_idle or self.is_over, HANGS_S)
        assert came, "the fleet's thread hangs"

    # -- the fleet's side

    def ended(self) -> None:
        with self._turn:
            self.is_over = True
            self._turn.notify_all()

    def wake(self) -> None:
        with self._turn:
            self._num_woken += 1
            self._turn.notify_all()

    def wait(self, timeout_s: float | None = None) -> Event | None:
        with self._turn:
            self._is_idle = True
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._is_free or self._order is not None)
            order, self._order, self._is_idle = self._order, None, False
            if order is None:
                if timeout_s is None and not self._heap:
                    self._turn.wait_for(lambda: self._num_woken > 0)
                order = _WAKE if self._num_woken else math.inf
                self._num_woken = 0
        if self.fails:
            raise UsageError("The QPC is for another model.")
        if order == _WAKE:
            return None
        limit_s = math.inf if timeout_s is None else timeout_s
        if order == limit_s == math.inf:
            return super().wait(None)
        return super().wait(min(order, limit_s))

    def run(self, shard: RunShard) -> None:
        self._streamed |= {prompt.index for prompt in shard.prompts if prompt.stream}
        super().run(shard)

    def _later(self, seconds: float, event: Event) -> None:
        if isinstance(event, RowsFinished) and event.rows[0].index in self._streamed:
            (row,) = event.rows
            half = (len(row.token_ids) + 1) // 2
            text = row.text[: len(row.text) // 2]
            chunk = TokenChunk(row.index, 0, 0, text, 0, row.token_ids[:half])
            super()._later(seconds / 2, TokensGenerated(event.worker, (chunk,)))
        super()._later(seconds, event)


@dataclass
class Stepped:
    """An open fleet over stepped cards, and what is inside of it."""

    cards: SteppedCards
    journal: Journal | None = None
    max_open: int | None = None
    audience: Audience | None = None
    on_drive: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.dispatcher = Dispatcher()
        self.driver: Driver | None = None
        kept = None if self.journal is None else KeptRows(self.journal)
        self.fleet = OpenFleet(
            self._drive, kept=kept, max_open=self.max_open, audience=self.audience
        )

    def _drive(self, prompts: OpenInput, audience: Audience) -> FleetResult:
        try:
            self.on_drive()
            self.driver = Driver(
                self.cards,
                prompts,
                audience,
                dispatcher=self.dispatcher,
                clock=self.cards.clock,
                journal=self.journal,
            )
            return self.driver.run()
        finally:
            self.cards.ended()
