"""A prompt that was given to an open fleet: its tokens as they come, and its row."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress

from qaic_ray.errors import FleetClosed
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.token_streams import TokenDelta

OnChange = Callable[[], None]


class PendingRow:
    """A prompt on its way; any thread, or any coroutine, may wait for it.

    `deltas` and `async_deltas` take what they tell: one reader gets it.

    Attributes:
        prompt: as it runs, with the index that the fleet gave it.

    Args:
        prompt: what was submitted.
        cancel: cancels it, by its index.
    """

    __slots__ = ("_cancel", "_deltas", "_ending", "_error", "_listeners", "_row", "prompt")

    def __init__(self, prompt: Prompt, cancel: Callable[[int], None]) -> None:
        self.prompt = prompt
        self._cancel = cancel
        self._row: Row | None = None
        self._error: FleetClosed | None = None
        self._deltas: deque[TokenDelta] = deque()
        self._ending: list[TokenDelta] = []
        self._listeners: list[OnChange] = []

    @property
    def done(self) -> bool:
        """Whether it has its row, or never will."""
        return self._row is not None or self._error is not None

    def cancel(self) -> None:
        """Nobody wants the answer any more: its row will be of finish_reason ABORT, if it is not
        done."""
        if not self.done:
            self._cancel(self.prompt.index)

    def listen(self, on_change: OnChange) -> None:
        """Have a function called, in the fleet's thread, whenever there is something new.

        It must return at once. It is called now where the row is done already.
        """
        self._listeners.append(on_change)
        if self.done:
            on_change()

    def take_deltas(self) -> list[TokenDelta]:
        """All that came since the last call, without waiting; for a reader that listens."""
        return list(self._taken())

    @property
    def ended(self) -> Row | FleetClosed | None:
        """Its row, or why it never gets one; None while it is not done."""
        return self._error or self._row

    # -- for threads

    def row(self, timeout_s: float | None = None) -> Row:
        """Wait for the row; it may be one of an error, or cancelled.

        Raises:
            FleetClosed: the fleet ended before the row was done.
            TimeoutError: after `timeout_s`.
        """
        bell = threading.Event()
        with self._heard(bell.set):
            while (row := self._done_row()) is None:
                if not bell.wait(timeout_s):
                    raise TimeoutError(f"Row {self.prompt.index} is not done.")
                bell.clear()
        return row

    def deltas(self) -> Iterator[TokenDelta]:
        """What its choices get, of a prompt with `stream`; it ends after the last of each choice.

        Raises:
            FleetClosed: the fleet ended before the row was done.
        """
        bell = threading.Event()
        with self._heard(bell.set):
            while True:
                bell.clear()
                is_over = self._done_row() is not None  # before what is there is taken
                yield from self._taken()
                if is_over:
                    return
                bell.wait()

    # -- for coroutines

    async def async_row(self) -> Row:
        """As `row`, for asyncio."""
        bell = asyncio.Event()
        with self._heard(_ringing(bell)):
            while (row := self._done_row()) is None:
                await bell.wait()
                bell.clear()
        return row

    async def async_deltas(self) -> AsyncGenerator[TokenDelta, None]:
        """As `deltas`, for asyncio."""
        bell = asyncio.Event()
        with self._heard(_ringing(bell)):
            while True:
                bell.clear()
                is_over = self._done_row() is not None
                for delta in self._taken():
                    yield delta
                if is_over:
                    return
                await bell.wait()

    # -- the fleet's side, one thread's

    def told(self, delta: TokenDelta) -> None:
        """It got tokens. The last ones of a choice are kept until the row is on the disk."""
        if delta.row is not None:
            self._ending.append(delta)
            return
        self._deltas.append(delta)
        self._ring()

    def finish(self, row: Row) -> None:
        """It has its row."""
        self._deltas.extend(self._ending)
        self._row = row
        self._ring()

    def fail(self, error: FleetClosed) -> None:
        """It never gets one."""
        self._error = error
        self._ring()

    # -- both

    def _done_row(self) -> Row | None:
        if self._error is not None:
            raise FleetClosed(str(self._error)) from self._error
        return self._row

    def _taken(self) -> Iterator[TokenDelta]:
        while self._deltas:
            yield self._deltas.popleft()

    @contextmanager
    def _heard(self, on_change: OnChange) -> Iterator[None]:
        """Have a function called whenever there is something new."""
        self._listeners.append(on_change)
        try:
            yield
        finally:
            self._listeners.remove(on_change)

    def _ring(self) -> None:
        for on_change in tuple(self._listeners):
            on_change()


def _ringing(bell: asyncio.Event) -> OnChange:
    """Sets the event in its loop, from any thread."""
    loop = asyncio.get_running_loop()

    def ring() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(bell.set)

    return ring
