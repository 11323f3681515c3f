"""A shell in a terminal of its own, as a reader has one: what is typed, and what is seen of it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import awaited
from terminal import Screenful

COLUMNS = 100
_INTERRUPT = b"\x03"
# 141: who read the output of a pipe's beginning has enough, like `head`.
_PRELUDE = """set -o pipefail
trap 'code=$?; [ $code -eq 141 ] || [ "$failed" -ne 0 ] || failed=$code' ERR
trap : INT
"""


def _as_a_login_shell() -> None:
    """Own the terminal, and hear Ctrl-C also where the tests were started with `&`."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class ShellGone(Exception):
    """The shell ended, or a command did not end in time; says what was seen."""


class PageTerminal:
    """A bash whose commands come by a pipe, so that its terminal has their output alone.

    Args:
        folder: where it begins.
        environment: of its commands.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        script, self._script = os.pipe()
        self._codes, codes = os.pipe()
        self._terminal, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        modes = termios.tcgetattr(inner)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(inner, termios.TCSANOW, modes)
        self._report = codes
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc", f"/dev/fd/{script}"],
            cwd=folder,
            env=dict(environment),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            pass_fds=(script, codes),
            start_new_session=True,
            preexec_fn=_as_a_login_shell,
        )
        for end in (script, codes, inner):
            os.close(end)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._screen = Screenful(COLUMNS)
        self._answers = b""
        os.write(self._script, _PRELUDE.encode())

    def begin(self, command: str) -> None:
        """Type a command, on an empty screen."""
        self._screen = Screenful(COLUMNS)
        text = f"failed=0\n{{\n{command}\n}}\necho $failed >&{self._report}\n"
        os.write(self._script, text.encode())

    def lines(self) -> list[str]:
        """What is seen since the command began."""
        return [line.rstrip() for line in self._screen.lines]

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self._terminal, _INTERRUPT)

    def until(self, is_so: Callable[[], bool], timeout_s: float) -> int | None:
        """Watch until it is so, or the command ended.

        Returns:
            The exit code of the command, if it ended: 0, or that of the first one that failed.

        Raises:
            ShellGone: neither came.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            self._look(0.2)
            if b"\n" in self._answers:
                self._look(0.0)
                first, _, self._answers = self._answers.partition(b"\n")
                return int(first)
            if is_so():
                return None
            if self._shell.poll() is not None:
                raise ShellGone("the shell ended:\n" + "\n".join(self.lines()))
        raise ShellGone(f"nothing more in {timeout_s:.0f} s:\n" + "\n".join(self.lines()))

    def ended(self, timeout_s: float) -> int:
        """Wait for the command's end; its exit code.

        Raises:
            ShellGone: it did not come.
        """
        code = self.until(lambda: False, timeout_s)
        assert code is not None
        return code

    def close(self) -> None:
        """End the shell; what it has in the foreground gets a SIGHUP."""
        os.close(self._script)
        with suppress(subprocess.TimeoutExpired):
            self._shell.wait(1)
        if self._shell.poll() is None:
            self._shell.kill()
            awaited.ended(self._shell)
        os.close(self._terminal)
        os.close(self._codes)

    def _look(self, wait_s: float) -> None:
        """Take in what there is to read."""
        while True:
            ready, _, _ = select.select([self._terminal, self._codes], [], [], wait_s)
            if not ready:
                return
            wait_s = 0.0
            if self._codes in ready:
                self._answers += os.read(self._codes, 4096)
            if self._terminal in ready:
                try:
                    data = os.read(self._terminal, 65536)
                except OSError:  # nobody has its other end open
                    return
                self._screen.write(self._decoder.decode(data))
