"""Ends what is left of a Ray that we started, when its driver is gone; a program of its own.

    python keeper.py FOLDER DRIVER

Waits until stdin ends or the process DRIVER does, by whatever signal; then kills every process
that was started with QAIC_RAY_SESSION=FOLDER in its environment, and removes FOLDER. Run by its
path, with the standard library and nothing else: it lives as long as the driver does.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress

SESSION_VARIABLE = "QAIC_RAY_SESSION"

_TIMEOUT_S = 30.0
_PAUSE_S = 0.1


def marked(folder: str) -> list[int]:
    """The living processes of this user that belong to the session in `folder`.

    Some of Ray's write their title over their environment: they write into the folder too.
    """
    mark = f"{SESSION_VARIABLE}={folder}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with suppress(OSError):
                if _is_marked(f"/proc/{name}", mark) or _writes_into(f"/proc/{name}", folder):
                    found.append(int(name))
    return found


def _is_marked(process: str, mark: bytes) -> bool:
    with open(f"{process}/environ", "rb") as stream:
        return mark in stream.read().split(b"\0")  # that of a zombie is empty


def _writes_into(process: str, folder: str) -> bool:
    return any(os.readlink(f"{process}/fd/{fd}").startswith(f"{folder}/") for fd in (1, 2))


def kill_marked(folder: str) -> None:
    """Kill them, until two looks have found none: a process may be just starting another."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    num_empty = 0
    while num_empty < 2 and time.monotonic() < deadline_s:
        pids = marked(folder)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        num_empty = 0 if pids else num_empty + 1
        time.sleep(_PAUSE_S)


def main() -> None:
    """Wait, kill, remove."""
    folder, driver = sys.argv[1], int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the driver must not end this before it
    waiting = [sys.stdin.fileno()]
    with suppress(ProcessLookupError):
        waiting.append(os.pidfd_open(driver))
        # Nothing is ever written to stdin: it is ready when it is at its end.
        select.select(waiting, [], [])
    kill_marked(folder)
    deadline_s = time.monotonic() + _TIMEOUT_S
    while os.path.exists(folder) and time.monotonic() < deadline_s:
        shutil.rmtree(folder, ignore_errors=True)  # what is being written there meanwhile
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
