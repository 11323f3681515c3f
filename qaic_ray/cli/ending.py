"""How the command ends: what is said on stderr, and the exit code; the codes are `ExitCode`."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

from qaic_ray import interruption
from qaic_ray.cli.streams import StdoutGone
from qaic_ray.errors import ClusterLost, ExitCode, QaicRayError, Unfinished, UsageError
from qaic_ray.files.folders import cache_folder


class Interrupted(Exception):
    """A KeyboardInterrupt, in a form that typer leaves alone; the cause is it."""


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
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return _interruption(error)
    if _is_fault(error):
        words = str(error) if isinstance(error, Unfinished) else ""
        name = type(error.__cause__ if words else error).__name__
        return f"{words or _one_line(error)} A fault of qaic-ray ({name}).", ExitCode.FAULT
    if isinstance(error, UsageError):
        return str(error), ExitCode.USAGE
    if isinstance(error, ClusterLost):
        return f"{error} Give the command again: what is done is kept.", ExitCode.UNFINISHED
    if isinstance(error, Unfinished):
        return str(error), ExitCode.UNFINISHED
    return str(error), ExitCode.FAILED


def _interruption(error: BaseException) -> tuple[str, int]:
    cause = error.__cause__ if isinstance(error, Interrupted) else error
    words = str(error)
    if isinstance(cause, StdoutGone):
        if cause.broken:  # its reader has seen enough
            return words, 128 + signal.SIGPIPE
        return words or f"stdout cannot be written: {cause.reason}.", ExitCode.FAILED
    number = interruption.received()
    why = interruption.loss() or f"stopped by {signal.Signals(number or signal.SIGINT).name}"
    code = ExitCode.UNFINISHED if interruption.loss() else 128 + (number or signal.SIGINT)
    return words or f"{why}; what is done is kept.", code


def _is_fault(error: BaseException) -> bool:
    """Whether it is nothing that anybody thought of."""
    if isinstance(error, Unfinished) and error.__cause__ is not None:
        error = error.__cause__
    return not isinstance(error, QaicRayError | Interrupted | KeyboardInterrupt)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return f"{text or 'Something that nobody thought of'}."


def _kept(error: BaseException) -> str:
    """Write the traceback to a file of its own, and say where."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = cache_folder() / "tracebacks" / f"{stamp}-{secrets.token_hex(3)}.txt"
    text = "".join(traceback.format_exception(error))
    try:
        return f"Its traceback is in {_written(path, text)}; --debug shows it."
    except OSError as refused:
        return f"Its traceback cannot be kept ({refused.strerror}); --debug shows it."


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
    return path
