"""stdin, stdout and stderr as the caller left them: closed, or with nobody at the other end.

A stderr that is gone changes nothing: progress is for people. A stdout that is gone ends the
command, as results have nowhere to go.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


class StdoutGone(KeyboardInterrupt):
    """stdout takes nothing more: an interruption like a signal, so that what was done is kept.

    `broken` says whether its reader went, as `head` does; else there is another reason.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.broken = isinstance(error, BrokenPipeError)
        self.reason = error.strerror or type(error).__name__


class _Guarded(io.TextIOWrapper):
    """A stream of a descriptor; what is written goes nowhere once nobody takes it."""

    descriptor = 2

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._gone(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        # What is still in buffers, and what native code writes, goes nowhere.
        nothing = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):
            os.dup2(nothing, self.descriptor)
        os.close(nothing)
        if self.descriptor == 1:
            raise StdoutGone(error) from error


def guard() -> None:
    """See to this process's streams, before anything is opened or written."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would be taken for it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # as Python has it for a closed one
        made = _Guarded(
            io.BufferedWriter(io.FileIO(descriptor, "wb", closefd=False)), encoding="utf-8"
        )
    elif type(stream) is not io.TextIOWrapper:
        return stream  # somebody else has seen to it
    else:
        encoding, errors, line_buffering = stream.encoding, stream.errors, stream.line_buffering
        through = stream.write_through
        made = _Guarded(
            stream.detach(), encoding, errors, line_buffering=line_buffering, write_through=through
        )
    made.descriptor = descriptor
    return made
