"""Runs the SDK's compiler: its own process group, a log, a time limit, and the result checked.

A Ray task that is cancelled interrupts Python code but not a wait for a child, and never a
grandchild; hence the poll loop, and the group that is killed whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from qaic_ray.errors import CompileError

POLL_S = 0.05
TIMEOUT_S = 6 * 3600.0
"""A 70B model takes hours on the real compiler."""

QPC_FILE = "programqpc.bin"
QPC_MAGIC = bytes.fromhex("7ccda100")
"""First bytes of a QPC: 0x00A1CD7C, little-endian."""


def run_compiler(argv: list[str], log: Path, *, timeout_s: float = TIMEOUT_S) -> None:
    """Run a compiler to its end; stdout and stderr go to `log`.

    Raises:
        CompileError: when it cannot be started, fails, or outlives `timeout_s`; the message ends
            with the compiler's own last words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        output.write((" ".join(argv) + "\n").encode())
        output.flush()
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CompileError(f"Cannot start the compiler {argv[0]}: {error.strerror}.") from error
        try:
            code = _wait(process, time.monotonic() + timeout_s)
        finally:
            _kill_group(process)
    text = log.read_text(encoding="utf-8", errors="replace")
    if code is None:
        raise CompileError(f"The compiler was stopped after {timeout_s:.0f} s.", log=text)
    if code != 0:
        raise CompileError(
            f"The compiler ended with exit code {code}: {_last_words(text)}",
            exit_code=code,
            log=text,
        )


def check_qpc(directory: Path, log: Path) -> None:
    """The compiler may exit 0 and leave nothing: look at what it made.

    Raises:
        CompileError: when there is no QPC, or its first bytes are not a QPC's.
    """
    binary = directory / QPC_FILE
    try:
        with binary.open("rb") as file:
            magic = file.read(len(QPC_MAGIC))
    except OSError as error:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise CompileError(
            f"The compiler said it was done but left no {QPC_FILE}: {_last_words(text)}", log=text
        ) from error
    if magic != QPC_MAGIC:
        raise CompileError(f"{QPC_FILE} of the compiler is not a QPC: it begins {magic.hex()}.")


def _wait(process: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    while time.monotonic() < deadline_s:
        code = process.poll()
        if code is not None:
            return code
        time.sleep(POLL_S)
    return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The group outlives its leader where the compiler left children behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: str, lines: int = 3) -> str:
    words = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    return " / ".join(words[-lines:]) or "it printed nothing."
