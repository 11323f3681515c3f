"""The cores of this machine, shared by its emulated cards by the work that they have.

Processes tell each other through a small file in the state folder how many inferences they compute
now. An inference takes its share of the cores when it begins: alone it has all of them, and four
cards on two cores have one thread each. What a dead process left there does not count.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Iterator, Optional

FILE_NAME = "cores"

_SLOTS = 64
_SLOT = struct.Struct("=qq")


def usable_cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Cores:
    """This process's place among those that compute.

    Args:
        state_dir: the folder that the processes share; None where nothing is shared.
        num_cores: what there is to share.
    """

    def __init__(self, state_dir: Optional[Path], num_cores: Optional[int] = None) -> None:
        self._num_cores = num_cores or usable_cores()
        self._lock = threading.Lock()
        self._num_running = 0
        self._pid = 0
        self._slot = 0
        self._path = None if state_dir is None else state_dir / FILE_NAME
        self._board: Optional[mmap.mmap] = None

    @contextlib.contextmanager
    def share(self, most: int) -> Iterator[int]:
        """Threads for an inference that begins now, `most` at most; at least one."""
        with self._lock:
            self._num_running += 1
            self._tell()
            computing = self._num_computing()
        try:
            yield max(1, min(most, self._num_cores // computing))
        finally:
            with self._lock:
                self._num_running -= 1
                self._tell()

    def _tell(self) -> None:
        if self._pid != os.getpid():
            self._enter()
        if self._board is not None:
            _SLOT.pack_into(self._board, self._slot, self._pid, self._num_running)

    def _enter(self) -> None:
        """Take a slot: also in a forked child, which has its parent's as a copy."""
        self._pid, self._board = os.getpid(), None
        if self._path is None:
            return
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, _SLOTS * _SLOT.size)
                board = mmap.mmap(descriptor, _SLOTS * _SLOT.size)
            finally:
                os.close(descriptor)
        except OSError:
            return  # Without a board a card takes all cores, as one alone does.
        # Two that begin at once may take the same slot; then one of them is not counted, no more.
        pids = [pid for pid, _ in _SLOT.iter_unpack(board[:])]
        free = [at * _SLOT.size for at, pid in enumerate(pids) if not _lives(pid)]
        if free:
            self._slot, self._board = free[self._pid % min(8, len(free))], board

    def _num_computing(self) -> int:
        """Inferences that run on this machine now, this one too."""
        if self._board is None:
            return self._num_running
        total = self._num_running
        for pid, running in _SLOT.iter_unpack(self._board[:]):
            if running > 0 and pid != self._pid and _lives(pid):
                total += running
        return max(1, total)


def _lives(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@functools.lru_cache(maxsize=None)
def cores_of(state_dir: Path) -> Cores:
    """This process's place on the board of a state folder."""
    return Cores(state_dir)
