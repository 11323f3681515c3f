"""Interrupts a command: at a signal, or when a watcher finds that what it waits for is gone.

Both raise KeyboardInterrupt in the main thread, except while a row is being written
(`uninterrupted`). If the command has not ended after a grace time, as in a call into a dead Ray,
the process prints its last words and exits. Only the command calls `listen`: a program that imports
this package keeps its own signal handlers.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from qaic_ray.errors import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A thread has Python run its handler (`interrupt_main`); nobody sends the signal.
_NUDGE = signal.Signals.SIGRTMAX
_SIGACTION_BYTES = 1024  # more than a struct sigaction has anywhere
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LOST = 0  # stands for a loss among the signal numbers that the watcher reads


class _State:
    """One for the process, like its signals."""

    signal: int | None = None
    loss: str | None = None
    depth = 0
    is_pending = False
    last_words: Callable[[], str] | None = None
    wake: int | None = None


_state = _State()


def listen(
    *, first_grace_s: float = 40.0, again_grace_s: float = 3.0, lost_grace_s: float = 25.0
) -> None:
    """Let signals interrupt this process, except those that its parent ignores (`nohup`, `&`).

    Call it in the main thread; a second call does nothing. A process that SIGINT interrupted dies
    of SIGINT in the end: only then does a shell's loop end too.

    Args:
        first_grace_s: time to clean up after the first signal.
        again_grace_s: time left after a further signal.
        lost_grace_s: time to clean up after a loss.
    """
    if _state.wake is not None:
        return
    atexit.register(_die_of_sigint)  # first in, last out
    _listen_for_nudges()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _heard)
    reader, _state.wake = os.pipe()
    os.set_blocking(_state.wake, False)
    # The watcher reads it even while the main thread is in a call that runs no Python.
    signal.set_wakeup_fd(_state.wake, warn_on_full_buffer=False)
    graces_s = (first_grace_s, again_grace_s, lost_grace_s)
    threading.Thread(target=_watch, args=(reader, *graces_s), name="signals", daemon=True).start()


def received() -> int | None:
    """The first signal that interrupted this process."""
    return _state.signal


def loss() -> str | None:
    """What a watcher has found gone, as a sentence; None for nothing."""
    return _state.loss


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent: the process id of that thread.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the call
        os._exit(ExitCode.FAILED)


def report_loss(what: str) -> None:
    """Interrupt the main thread from another one, because what it waits for is gone.

    Args:
        what: a sentence that says what is gone.
    """
    _state.loss = what
    if _state.wake is not None:
        os.write(_state.wake, bytes([_LOST]))
    _thread.interrupt_main(_NUDGE)


def clear_loss() -> None:
    """Forget a loss that has been reported."""
    _state.loss = None


def can_interrupt() -> bool:
    """Whether `report_loss` can interrupt the caller, which it can in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return False
    _listen_for_nudges()
    return True


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Put the process's handler of SIGTERM back after the block, whatever native code set there.

    For threads that are not the main one, where Python sets no handler; Python's own stays what it
    was meanwhile.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.create_string_buffer(_SIGACTION_BYTES)
    libc.sigaction(int(signal.SIGTERM), None, before)
    try:
        yield
    finally:
        libc.sigaction(int(signal.SIGTERM), before, None)


class uninterrupted:  # noqa: N801 - used like a function
    """A context that delays an interruption to its end; it does nothing outside the main thread."""

    def __enter__(self) -> None:
        if threading.get_ident() == threading.main_thread().ident:
            _state.depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        _state.depth -= 1
        if _state.is_pending and not _state.depth:
            _state.is_pending = False
            raise KeyboardInterrupt


@contextmanager
def last_words(words: Callable[[], str]) -> Iterator[None]:
    """Set the sentence that goes to stderr when the process is given up.

    `words` is called in a thread. When the context ends with an error the sentence stays, until
    `clear_last_words` is called.
    """
    _state.last_words = words
    yield
    _state.last_words = None


def clear_last_words() -> None:
    """Clear the last words: they have been printed."""
    _state.last_words = None


def _listen_for_nudges() -> None:
    if signal.getsignal(_NUDGE) is not _heard:
        signal.signal(_NUDGE, _heard)


def _heard(number: int, _: FrameType | None) -> None:
    if _state.signal is not None or (number != _NUDGE and _state.loss is not None):
        return  # one is being handled, and `_watch` ends the process if that takes too long
    if number != _NUDGE:
        _state.signal = number
    if _state.depth:
        _state.is_pending = True
        return
    raise KeyboardInterrupt


def _watch(reader: int, first_grace_s: float, again_grace_s: float, lost_grace_s: float) -> None:
    """Give the process up when its grace time has passed."""
    deadline_s: float | None = None
    while True:
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        if not select.select([reader], [], [], left_s)[0]:
            _give_up()
        for number in os.read(reader, 64):
            if number == _LOST:
                grace_s = lost_grace_s
            elif number in SIGNALS:
                grace_s = first_grace_s if deadline_s is None else again_grace_s
            else:
                continue
            until_s = time.monotonic() + grace_s
            deadline_s = until_s if deadline_s is None else min(deadline_s, until_s)


def _die_of_sigint() -> None:
    if _state.signal == signal.SIGINT:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # it is closed at the other end
                stream.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _give_up() -> None:
    words = _state.last_words
    if words is not None:
        with suppress(OSError):  # stderr is closed
            os.write(2, f"qaic-ray: {words()}\n".encode())
    os._exit(ExitCode.UNFINISHED if _state.signal is None else 128 + _state.signal)
