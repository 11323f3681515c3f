"""The command line: parse, call one function, print, exit. The only room of typer.

stdout carries results, stderr carries progress; exit codes are `qaic_ray.errors.ExitCode`. Commands
import what they need when they run, so that `--help` stays quick.

This file is how a command begins and ends: stdin, stdout and stderr as the caller left them, closed
or with nobody at the other end, and what is said on stderr last. A stderr that is gone changes
nothing: progress is for people. A stdout that is gone ends the command, as results have nowhere to
go.
"""

from __future__ import annotations

import io
import os
import secrets
import signal
import sys
import traceback
from contextlib import suppress
from datetime import datetime, timezone
from typing import NoReturn, TextIO

from qaic_ray import interruption
from qaic_ray.errors import ClusterLost, ExitCode, QaicRayError, Unfinished, UsageError
from qaic_ray.files.folders import cache_folder

NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Other libraries' progress bars would break the live line. They read these when they are imported,
here and in every process that this one starts; transformers' own bars follow the hub's."""


def main() -> None:
    """Entry point of `qaic-ray`: runs the app; whatever goes wrong is one sentence on stderr."""
    guard_streams()
    interruption.listen()
    os.environ.update(NO_BARS)
    debug = False
    try:
        from qaic_ray.cli.commands import Interrupted, app, switches

        try:
            app(prog_name=_program())
        except Interrupted as error:
            raise error.interruption from error.interruption.__cause__
        finally:
            debug = switches.debug
            sys.stdout.flush()
    except SystemExit:
        if interruption.received() is None:
            raise
        end(KeyboardInterrupt(), debug=debug)  # typer heard it, while it was parsing
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - here they all end
        end(error, debug=debug)


def _program() -> str:
    """The program as one calls it, for its help and its mistakes."""
    return "python -m qaic_ray" if sys.argv[0].endswith("__main__.py") else "qaic-ray"


def end(error: BaseException, *, debug: bool) -> NoReturn:
    """Say what went wrong in a sentence, and exit.

    Args:
        error: whatever ended the command.
        debug: whether tracebacks are wanted on stderr.
    """
    words, code = _verdict(error)
    if debug:
        traceback.print_exception(error)
    elif _is_fault(error):
        words = f"{words} {_kept(error)}"
    if words:
        sys.stderr.write(f"qaic-ray: {words}\n")
        sys.stderr.flush()
    interruption.clear_last_words()
    number = interruption.received()  # what else went wrong came of it
    sys.exit(code if number is None else 128 + number)


def _verdict(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        return _interruption(error)
    if _is_fault(error):
        words = str(error) if isinstance(error, Unfinished) else ""
        name = type(error.__cause__ if words else error).__name__
        return f"{words or _one_line(error)} A fault of qaic-ray ({name}).", ExitCode.FAULT
    if isinstance(error, UsageError):
        return str(error), ExitCode.USAGE
    if isinstance(error, ClusterLost):
        return f"{error} Give the command again: what is done is kept.", ExitCode.UNFINISHED
    return str(error), ExitCode.UNFINISHED if isinstance(error, Unfinished) else ExitCode.FAILED


def _interruption(error: KeyboardInterrupt) -> tuple[str, int]:
    words = str(error)
    if isinstance(error, StdoutGone):
        if error.broken:  # its reader has seen enough
            return words, 128 + signal.SIGPIPE
        return words or f"stdout cannot be written: {error.reason}.", ExitCode.FAILED
    number = interruption.received() or signal.SIGINT
    why = interruption.loss() or f"stopped by {signal.Signals(number).name}"
    code = ExitCode.UNFINISHED if interruption.loss() else 128 + number
    return words or f"{why}; what is done is kept.", code


def _is_fault(error: BaseException) -> bool:
    """Whether it is nothing that anybody thought of."""
    if isinstance(error, Unfinished) and error.__cause__ is not None:
        error = error.__cause__
    return not isinstance(error, QaicRayError | KeyboardInterrupt)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return f"{text or 'Something that nobody thought of'}."


def _kept(error: BaseException) -> str:
    """Write the traceback to a file of its own, and say where."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = cache_folder() / "tracebacks" / f"{stamp}-{secrets.token_hex(3)}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.writelines(traceback.format_exception(error))
    except OSError as refused:
        return f"Its traceback cannot be kept ({refused.strerror}); --debug shows it."
    return f"Its traceback is in {path}; --debug shows it."


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


def guard_streams() -> None:
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
        raw = io.FileIO(descriptor, "wb", closefd=False)
        made = _Guarded(io.BufferedWriter(raw), encoding="utf-8")
    elif type(stream) is not io.TextIOWrapper:
        return stream  # somebody else has seen to it
    else:
        how = {name: getattr(stream, name) for name in ("line_buffering", "write_through")}
        encoding, errors = stream.encoding, stream.errors
        made = _Guarded(stream.detach(), encoding, errors, **how)
    made.descriptor = descriptor
    return made
