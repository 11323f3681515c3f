"""Which process works on a run: the one that holds the lock of its folder.

The kernel frees that lock with the process, so a run is going on exactly as long as it is held. The
process is known by the kernel's list of locks, and by the lock file being open in it: never by a
number that was written down, which may be another process's by now.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.runs.journal import LOCK_NAME

_PROC = Path("/proc")


@dataclass(frozen=True)
class RunHolder:
    """A run's driver; `pid` is None for one of another user, container or machine."""

    pid: int | None


def holder_of(run_folder: Path) -> RunHolder | None:
    """The process that works on a run now; None if there is none.

    Raises:
        QaicRayError: the folder cannot be looked at.
    """
    path = run_folder / LOCK_NAME
    try:
        status = path.stat()
        for pid in _lockers(status.st_ino):
            if _has_open(pid, status):
                return RunHolder(pid)
        return RunHolder(None) if _is_locked(path) else None
    except FileNotFoundError:
        return None  # no session has begun
    except OSError as error:
        raise QaicRayError(f"{run_folder} cannot be looked at: {error.strerror}.") from error


def stop_driver(run_folder: Path, wait_s: float) -> bool:
    """Interrupt the process that works on a run, as Ctrl-C would, and wait for its end.

    Returns:
        Whether it ended within `wait_s`; it goes on ending itself otherwise.

    Raises:
        UsageError: nobody works on the run, or a process that this user cannot stop.
    """
    holder = holder_of(run_folder)
    if holder is None:
        raise UsageError(f"No process works on {run_folder}: there is nothing to stop.")
    if holder.pid is None:
        raise UsageError(
            f"What works on {run_folder} is of another user, container or machine: stop it there."
        )
    try:
        process = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return True  # it ended by itself just now
    try:
        if not _has_open(holder.pid, (run_folder / LOCK_NAME).stat()):
            return True  # likewise, and its number may be another's
        signal.pidfd_send_signal(process, signal.SIGTERM)
        return bool(select.select([process], [], [], wait_s)[0])
    except ProcessLookupError:
        return True
    except OSError as error:
        raise QaicRayError(f"Process {holder.pid} cannot be stopped: {error.strerror}.") from error
    finally:
        os.close(process)


def _lockers(inode: int) -> Iterator[int]:
    """Processes that hold a lock on a file of this inode, of whatever file system."""
    with suppress(OSError):
        for line in (_PROC / "locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            # 1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF; `->` marks one who waits for it.
            if "->" not in words and len(words) > 5 and words[5].rpartition(":")[2] == str(inode):
                yield int(words[4])


def _has_open(pid: int, file: os.stat_result) -> bool:
    with suppress(OSError):
        for descriptor in (_PROC / str(pid) / "fd").iterdir():
            with suppress(OSError):
                status = descriptor.stat()
                if (status.st_dev, status.st_ino) == (file.st_dev, file.st_ino):
                    return True
    return False


def _is_locked(path: Path) -> bool:
    """Whether anybody holds it, who is not in the list; a driver that begins now waits for this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise
        return True
    finally:
        os.close(descriptor)
    return False
