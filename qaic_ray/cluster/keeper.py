"""Kills what is left of a Ray that we started, when its driver has ended; a program of its own.

    python keeper.py FOLDER DRIVER TIMEOUT_S

Waits until stdin ends or the process DRIVER does, by whatever signal; then kills every process
that was started with QAIC_RAY_SESSION=FOLDER in its environment, with all that these started, and
removes FOLDER, each for up to TIMEOUT_S. It is run by its path and imports the standard library
alone, as it takes memory as long as the driver runs.
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

_PAUSE_S = 0.1


def marked(folder: str, driver: int = 0) -> list[int]:
    """The living processes that belong to the session in `folder`, but for its driver.

    Some of Ray's processes overwrite their environment with a title. They are known by their
    parents, or by the files of the folder that they have open.
    """
    mark = f"{SESSION_VARIABLE}={folder}".encode()
    found = set()
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) not in (os.getpid(), driver):
            with suppress(OSError):
                parents[int(name)] = _parent(f"/proc/{name}")
                if _is_marked(f"/proc/{name}", mark) or _writes_into(f"/proc/{name}", folder):
                    found.add(int(name))
    children = found
    while children:
        children = {pid for pid, parent in parents.items() if parent in children} - found
        found |= children
    return sorted(found)


def _parent(process: str) -> int:
    with open(f"{process}/stat", "rb") as stream:
        return int(stream.read().rpartition(b")")[2].split()[1])


def _is_marked(process: str, mark: bytes) -> bool:
    with open(f"{process}/environ", "rb") as stream:
        return mark in stream.read().split(b"\0")  # that of a zombie is empty


def _writes_into(process: str, folder: str) -> bool:
    """Whether it has a file of the folder open for writing; others may read the logs."""
    for fd in os.listdir(f"{process}/fd"):
        with suppress(OSError):  # it was closed just now
            if os.readlink(f"{process}/fd/{fd}").startswith(f"{folder}/"):
                with open(f"{process}/fdinfo/{fd}", encoding="ascii") as stream:
                    flags = dict(line.split(":", 1) for line in stream)["flags"]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


def kill_marked(folder: str, timeout_s: float, driver: int = 0) -> None:
    """Kill them until two looks in a row have found none: a process may be starting another."""
    deadline_s = time.monotonic() + timeout_s
    num_empty = 0
    while num_empty < 2 and time.monotonic() < deadline_s:
        pids = marked(folder, driver)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        num_empty = 0 if pids else num_empty + 1
        time.sleep(_PAUSE_S)


def main() -> None:
    """Wait, kill, remove."""
    folder, driver, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the driver must not end this before it
    waiting = [sys.stdin.fileno()]
    with suppress(ProcessLookupError):
        waiting.append(os.pidfd_open(driver))
        # Nothing is ever written to stdin: it is ready when it is at its end.
        select.select(waiting, [], [])
    kill_marked(folder, timeout_s, driver)
    deadline_s = time.monotonic() + timeout_s
    while os.path.exists(folder) and time.monotonic() < deadline_s:
        shutil.rmtree(folder, ignore_errors=True)  # what is being written there meanwhile
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
