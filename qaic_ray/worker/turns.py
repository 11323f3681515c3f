"""Turns of threads at one card: many at once, or one that must have it alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Gives turns; whoever wants the card alone waits for those that began, and goes first then."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_running = 0
        self._num_alone = 0  # those that wait, and the one that has it

    @contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        """Wait for a turn, and have it for the block."""
        with self._changed:
            self._num_alone += alone
            self._changed.wait_for(lambda: not self._num_running if alone else not self._num_alone)
            self._num_running += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_alone -= alone
                self._num_running -= 1
                self._changed.notify_all()
