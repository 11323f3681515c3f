"""Threads that work on a step together; they sleep when there is none.

There is one team a process. A step is handed to it with memory of its own, so a thread that wakes
late finds nothing left to do, and disturbs nobody.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Callable, List

import numpy as np

ALIGN = 64


class Scratch:
    """A thread's own memory; grows when a step needs more."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def address(self, size: int) -> int:
        """Of at least `size` bytes, aligned."""
        if self._memory.size < size + ALIGN:
            self._memory = np.empty(size + ALIGN, np.uint8)
        address: int = self._memory.ctypes.data
        return address + -address % ALIGN


class _Helper:
    def __init__(self, number: int) -> None:
        self._work: Any = None
        self._lock = threading.Lock()
        self._called = threading.Semaphore(0)
        name = f"qaic-emulator-{number}"
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def call(self, work: Callable[[Scratch], None]) -> None:
        """Do this next; what waits is not begun any more."""
        with self._lock:
            self._work = work
        self._called.release()

    def _serve(self) -> None:
        scratch = Scratch()
        while True:
            self._called.acquire()
            with self._lock:
                work, self._work = self._work, None
            if work is not None:
                work(scratch)


class Team:
    """The caller and its helpers."""

    def __init__(self) -> None:
        self._helpers: List[_Helper] = []
        self._lock = threading.Lock()
        self._own = threading.local()

    def run(self, work: Callable[[Scratch], None], num_threads: int) -> None:
        """Run `work` here, and offer it to `num_threads` - 1 helpers; back when it is done here."""
        with self._lock:
            while len(self._helpers) < num_threads - 1:
                self._helpers.append(_Helper(len(self._helpers)))
            helpers = self._helpers[: num_threads - 1]
        for helper in helpers:
            helper.call(work)
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        work(self._own.scratch)

    def forget(self) -> None:
        """Begin anew: a forked child has no helpers, and locks as they were in its parent."""
        self._helpers = []
        self._lock = threading.Lock()


TEAM = Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TEAM.forget)
