"""Reads the input in a thread of its own, so that a slow input never keeps the driver waiting."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.rows import Prompt, Row
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts


@dataclass(frozen=True)
class Batch:
    """Items of the input in their order; `exhausted`: these are the last ones.

    `error` says why the input ends with them, where that is not its end.
    """

    items: tuple[Prompt | Row, ...]
    exhausted: bool
    error: QaicRayError | None = None


class PromptReader(Protocol):
    """Gives the input in batches."""

    @property
    def poll_s(self) -> float:
        """Seconds until `poll` is to be called again, while it gives nothing."""

    def ask(self, num_items: int) -> None:
        """Ask for so many items; what was asked for before has been given."""

    def poll(self) -> Batch | None:
        """All that was asked for, or what came of a slow input; None while there is nothing.

        Raises:
            UsageError: the input is not this run's; all that was read before has been given.
        """

    def close(self) -> None:
        """Read no more."""


class ThreadedReader:
    """Reads no more than it is asked for.

    Args:
        items: the input; it is read in another thread than the caller's.
        clock: seconds.
        timeouts: `read_poll_s`, `read_stall_s` and `read_gather_s` are used.
    """

    def __init__(
        self,
        items: Iterable[Prompt | Row],
        *,
        clock: Callable[[], float] = time.monotonic,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self.poll_s = timeouts.read_poll_s
        self._timeouts = timeouts
        self._items: Iterator[Prompt | Row] = iter(items)
        self._clock = clock
        self._changed = threading.Condition()
        self._ready: deque[Prompt | Row] = deque()
        self._num_read = self._num_wanted = self._num_given = 0
        self._asked_s = self._newest_s = 0.0
        self._ended = self._closed = False
        self._failure: BaseException | None = None
        # A daemon: it may wait for a line that nobody ever types.
        threading.Thread(target=self._run, name="input", daemon=True).start()

    def ask(self, num_items: int) -> None:
        """See `PromptReader.ask`."""
        with self._changed:
            self._num_wanted = self._num_given + num_items
            self._asked_s = self._clock()
            self._changed.notify()

    def poll(self) -> Batch | None:
        """See `PromptReader.poll`."""
        is_over = self._ended  # before what is ready is looked at: nothing follows then
        if not (is_over or self._num_read >= self._num_wanted or self._is_slow()):
            return None
        items = tuple(self._ready.popleft() for _ in range(len(self._ready)))
        self._num_given += len(items)
        failure = self._failure if is_over else None
        if failure is None or (
            isinstance(failure, QaicRayError) and not isinstance(failure, UsageError)
        ):
            return Batch(items, exhausted=is_over, error=failure)
        if not items:
            raise failure
        return Batch(items, exhausted=False)

    def close(self) -> None:
        """See `PromptReader.close`."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _is_slow(self) -> bool:
        now_s, timeouts = self._clock(), self._timeouts
        is_stalled = now_s - self._newest_s >= timeouts.read_stall_s
        return bool(self._ready) and (is_stalled or now_s - self._asked_s >= timeouts.read_gather_s)

    def _run(self) -> None:
        try:
            for item in self._wanted_items():
                self._newest_s = self._clock()
                self._ready.append(item)
                self._num_read += 1
        except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
            self._failure = error
        self._ended = True

    def _wanted_items(self) -> Iterator[Prompt | Row]:
        while self._may_read():
            for item in self._items:
                yield item
                if self._num_read >= self._num_wanted:
                    break
            else:
                return

    def _may_read(self) -> bool:
        """Wait until more is wanted; False when nothing ever will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._num_read < self._num_wanted)
            return not self._closed
