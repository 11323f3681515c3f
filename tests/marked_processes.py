"""Processes that a command started, known by a mark in their environment."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MARK_VARIABLE = "QAIC_RAY_TEST_MARK"


def marked(mark: str) -> dict[int, bytes]:
    """The command lines of the processes that live, by pid; what Ray starts for one inherits."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
    return found


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait until it is true.

    Raises:
        AssertionError: it did not come true in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.05)
