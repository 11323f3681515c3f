"""Waits of tests that end: where what is awaited does not come, an error names it."""

from __future__ import annotations

import shlex
import subprocess
import threading
from typing import Any

LIMIT_S = 300.0
"""Of what hangs: no test means a machine's speed by it."""


def ended(process: subprocess.Popen[Any], limit_s: float = LIMIT_S) -> int:
    """The exit code of a process, once it has ended; one that does not is killed."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{_named(process)} did not end in {limit_s:.0f} s") from None


def said(process: subprocess.Popen[Any], limit_s: float = LIMIT_S) -> tuple[Any, Any]:
    """What a process has written to stdout and stderr when it has ended; see `ended`."""
    try:
        return process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{_named(process)} did not end in {limit_s:.0f} s") from None


def joined(thread: threading.Thread, limit_s: float = LIMIT_S) -> None:
    """Wait for a thread's end."""
    thread.join(limit_s)
    assert not thread.is_alive(), f"the thread {thread.name} did not end in {limit_s:.0f} s"


def _named(process: subprocess.Popen[Any]) -> str:
    words = process.args if isinstance(process.args, list | tuple) else [process.args]
    return f"process {process.pid} ({shlex.join(map(str, words))[:200]})"
