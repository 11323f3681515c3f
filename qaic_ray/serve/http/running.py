"""A request's prompts in the fleet, for the coroutine that waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Protocol

from qaic_ray.errors import FleetBusy, FleetClosed
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.serve import api_errors

Told = list[tuple[int, TokenDelta]]
"""Deltas, each with the number of its prompt in the request."""


class TakesPrompts(Protocol):
    """What answers prompts: an open fleet of this process, or one that is elsewhere."""

    def submit(self, prompt: Prompt, *, wait: bool = True) -> PendingRow:
        """See `OpenFleet.submit`."""


class LoopBells:
    """Wakes coroutines of one loop from the fleet's thread: all of a step in one call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung: deque[asyncio.Event] = deque()
        self._is_scheduled = False

    def ring(self, bell: asyncio.Event) -> None:
        """Set an event, soon; any thread may call this."""
        self._rung.append(bell)
        if not self._is_scheduled:
            self._is_scheduled = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._is_scheduled = False  # before the first is taken: none is left behind
        while self._rung:
            self._rung.popleft().set()


class Running:
    """The prompts of one request, all of them given to the fleet.

    Args:
        prompts: of the request.
        fleet: answers them.
        bells: of the caller's loop.
        on_close: is called once, at the end.

    Raises:
        ApiError: the fleet takes none.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        fleet: TakesPrompts,
        bells: LoopBells,
        *,
        on_close: Callable[[], None],
    ) -> None:
        self._bell = asyncio.Event()
        self._on_close: Callable[[], None] | None = on_close
        self._pending: list[PendingRow] = []
        try:
            for prompt in prompts:
                self._pending.append(fleet.submit(prompt, wait=False))
        except (FleetBusy, FleetClosed) as error:
            self.close()
            raise api_errors.of_fleet(error) from error
        for one in self._pending:
            one.listen(lambda: bells.ring(self._bell))

    def close(self) -> None:
        """Nobody waits for the answer any more; what is not done is cancelled. Any number of
        calls."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
            for one in self._pending:
                one.cancel()

    async def rows(self) -> list[Row]:
        """Wait for all rows.

        Raises:
            ApiError: the fleet ended before.
        """
        while True:
            self._bell.clear()
            rows = [self._row(one) for one in self._pending]
            found = [row for row in rows if row is not None]
            if len(found) == len(rows):
                return found
            await self._bell.wait()

    async def deltas(self) -> AsyncIterator[Told]:
        """What came since the last time; it ends behind the last delta.

        Raises:
            ApiError: the fleet ended before.
        """
        while True:
            self._bell.clear()
            is_over = all(self._row(one) is not None for one in self._pending)
            told = [
                (number, delta)
                for number, one in enumerate(self._pending)
                for delta in one.take_deltas()
            ]
            if told:
                yield told
            if is_over:
                return
            await self._bell.wait()

    @staticmethod
    def _row(pending: PendingRow) -> Row | None:
        ended = pending.ended
        if isinstance(ended, FleetClosed):
            raise api_errors.of_fleet(ended)
        return ended
