"""Runs the SDK's compiler: under a guard, with a log and a time limit, and the result checked.

Cancelling a Ray task interrupts Python code, but neither a wait for a child nor a grandchild, and a
killed process interrupts nothing. Hence the poll loop, and `guard.py`, which ends the compiler and
all that it started when the caller ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from qaic_ray.compile import guard
from qaic_ray.errors import CompileError
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts

QPC_FILE = "programqpc.bin"
QPC_MAGIC = bytes.fromhex("7ccda100")
"""First bytes of a QPC: 0x00A1CD7C, little-endian."""

_HEADER = struct.Struct("<4s4xQ")
"""Of a QPC: the magic, version and compression, the size of the whole file."""
_MAX_WORDS = 1000


def run_compiler(argv: list[str], log: Path, *, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> None:
    """Run a compiler to its end; stdout and stderr go to `log`.

    Raises:
        CompileError: when it cannot be started, fails, or outlives `compile_s`; the message ends
            with the compiler's own last words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        output.write((" ".join(argv) + "\n").encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _tell(process, argv)
            code = _wait(process, timeouts)
        finally:
            _end(process, timeouts)
    text = log.read_text(encoding="utf-8", errors="replace")
    why = _last_words(text, 1)
    if code == guard.NOT_STARTED and why.startswith(guard.CANNOT_START):
        raise CompileError(
            f"Cannot start the compiler {argv[0]}: {why.removeprefix(guard.CANNOT_START)}."
        )
    if code is None:
        raise CompileError(f"The compiler was stopped after {timeouts.compile_s:.0f} s.", log=text)
    if code != 0:
        raise CompileError(
            f"The compiler ended with exit code {code}: {_last_words(text)}",
            exit_code=code,
            log=text,
        )


def check_qpc(directory: Path, log: Path) -> None:
    """Check what a compiler left, which may exit 0 and leave nothing.

    Raises:
        CompileError: when there is no QPC, or it is not a whole one.
    """
    fault = program_fault(directory)
    if not fault:
        return
    text = log.read_text(encoding="utf-8", errors="replace")
    if not (directory / QPC_FILE).is_file():
        fault = f"The compiler said it was done but left no {QPC_FILE}"
    raise CompileError(f"{fault}: {_last_words(text)}", log=text)


def program_fault(directory: Path) -> str:
    """What is wrong with a folder's QPC by its header, as the start of a sentence, or empty.

    The header's size is what the vendor's loader compares with the file's.
    """
    binary = directory / QPC_FILE
    try:
        if binary.exists() and not binary.is_file():
            return f"{binary} is not a file"
        with binary.open("rb") as file:
            header = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{binary} cannot be read ({error.strerror})"
    if header[: len(QPC_MAGIC)] != QPC_MAGIC:
        return f"{binary} is not a QPC: it begins {header[: len(QPC_MAGIC)].hex() or 'nowhere'}"
    whole = _HEADER.unpack(header)[1] if len(header) == _HEADER.size else _HEADER.size
    if size < whole:
        return f"{binary} is cut short: it has {size} bytes of {whole}"
    return ""


def _tell(process: subprocess.Popen[bytes], argv: list[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its exit code tells
        process.stdin.write(json.dumps(argv).encode() + b"\n")
        process.stdin.flush()


def _wait(process: subprocess.Popen[bytes], timeouts: Timeouts) -> int | None:
    deadline_s = time.monotonic() + timeouts.compile_s
    while time.monotonic() < deadline_s:
        code = process.poll()
        if code is not None:
            return code
        time.sleep(timeouts.compile_poll_s)
    return None


def _end(process: subprocess.Popen[bytes], timeouts: Timeouts) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # the guard ends what it has begun, and then itself
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeouts.guard_s)
    # Also where the guard was killed: its group outlives it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: str, lines: int = 3) -> str:
    words = [line.strip()[:_MAX_WORDS] for line in log.splitlines()[1:] if line.strip()]
    return " / ".join(words[-lines:]) or "it printed nothing."
