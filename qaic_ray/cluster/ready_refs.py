"""Waits for calls of actors, and can be woken by any thread, which `ray.wait` cannot.

Ray calls back when a call has returned something; so a wait costs nothing while nothing happens,
and no more with many calls than with one.
"""

from __future__ import annotations

import ctypes
import queue
import time
from typing import TypeAlias

from ray import ObjectRef, ObjectRefGenerator

_Call: TypeAlias = ObjectRef | ObjectRefGenerator


TRIM_S = 5.0
"""Interval at which memory is given back, while calls return."""


class ReadyRefs:
    """Calls that have returned something, in the order in which they did."""

    def __init__(self) -> None:
        self._ready: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._trim_at_s = time.monotonic() + TRIM_S
        # glibc's; a C library without it has no such need.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def watch(self, call: _Call) -> None:
        """Have `next` return a call once, when it, or the next item of a stream, is there."""
        ref = call._get_next_ref_n(1)[0] if isinstance(call, ObjectRefGenerator) else call
        # The value is fetched with it, so that `ray.get` finds it here.
        ref._on_completed(lambda _: self._ready.put(call))

    def wake(self) -> None:
        """End the wait that goes on, or else the next one."""
        self._ready.put(None)

    def next(self, timeout_s: float | None) -> _Call | None:
        """Wait for a call that has returned something; None when it was woken.

        Raises:
            queue.Empty: after the time.
        """
        call = self._ready.get(timeout=timeout_s)
        if self._trim is not None and time.monotonic() >= self._trim_at_s:
            # What Ray's threads read is freed by this one; glibc would keep it for those threads,
            # 100 MB after a quarter of a million rows.
            self._trim(0)
            self._trim_at_s = time.monotonic() + TRIM_S
        return call
