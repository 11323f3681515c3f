"""Runs one command; it and all that it started end with the caller at the latest.

A killed caller can end nothing, so `guarded` starts this file as a script of its own, `python -I -S
guard.py`, that imports nothing of the package. stdin has the argv as a line of JSON and stays open
as long as the caller wants the command; the kernel closes it when the caller dies of any signal.
Then all processes below the command are killed, also stopped ones and those in other sessions. It
ends with the command's exit code or signal.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

NOT_STARTED = 127
CANNOT_START = "guard: cannot start: "
"""Start of the last line of output where the command cannot be started; the code is 127."""

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02


@contextmanager
def guarded(
    argv: list[str], output: IO[bytes], *, end_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command under a guard; all of it is ended with the block.

    Args:
        argv: the command.
        output: takes stdout and stderr.
        end_s: so long the guard may take to end the command.

    Yields:
        The guard's process, whose exit code is the command's.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):  # its exit code tells
            process.stdin.write(json.dumps(argv).encode() + b"\n")
            process.stdin.flush()
        yield process
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()  # the guard ends what it has begun, and then itself
        with suppress(subprocess.TimeoutExpired):
            process.wait(end_s)
        # Also where the guard was killed: its group outlives it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    """Run the command that stdin names; its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    # A process below this one that loses its parent becomes a child of this one, and is found.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return NOT_STARTED  # the caller is gone already
    argv = json.loads(line)
    child = _start(argv, libc)
    code = _follow(child)
    _kill_all()
    if code < 0:
        libc.prctl(_PR_SET_DUMPABLE, 0)  # the core file is the command's, not this one's
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _start(argv: list[str], libc: ctypes.CDLL) -> int:
    here = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        # Should even this process be killed: it has one thread, so its end is that thread's.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != here:
            os._exit(NOT_STARTED)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and so by the command
            signal.signal(ignored, signal.SIG_DFL)
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{CANNOT_START}{error.strerror}\n".encode())
    finally:
        os._exit(NOT_STARTED)


def _follow(child: int) -> int:
    """Wait until the command ends or the caller has gone; its exit code, or -signal."""
    wanted = [sys.stdin.fileno()]
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            return os.waitstatus_to_exitcode(status)
        if ended:
            continue  # a grandchild
        if select.select(wanted, [], [], _POLL_S)[0] and not os.read(wanted[0], 1):
            return -signal.SIGKILL


def _kill_all() -> None:
    """Kill and reap every process below this one."""
    while True:
        for pid in _below(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        select.select([], [], [], _POLL_S)


def _below(root: int) -> list[int]:
    """The processes that a process began, and those that they began."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found, pending = [], [root]
    while pending:
        own = children.get(pending.pop(), [])
        found += own
        pending += own
    return found


if __name__ == "__main__":
    sys.exit(main())
