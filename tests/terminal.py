"""A terminal of some columns: what a command writes to it, and what is seen of that."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)|(\x1b)")


@dataclass
class Screenful:
    """The lines of a terminal, as they are after what was written; it never scrolls."""

    columns: int
    lines: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0
    widest: int = 0

    def write(self, text: str) -> None:
        for found in _CONTROL.finditer(text):
            number, letter, home, new_line, plain, _ = found.groups()
            if letter == "A":
                self.row -= int(number or 1)
                assert self.row >= 0, "it went above what it had drawn"
            elif letter == "K":
                self.lines[self.row] = ""
            elif home:
                self.column = 0
            elif new_line:
                self.row, self.column = self.row + 1, 0  # as a terminal's driver has it
                if self.row == len(self.lines):
                    self.lines.append("")
            elif plain:
                self._put(plain)

    def _put(self, text: str) -> None:
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + text + line[self.column + len(text) :]
        self.column += len(text)
        self.widest = max(self.widest, self.column)


@dataclass(frozen=True)
class Recording:
    """What a command wrote, piece by piece, each with its second; and its exit code."""

    pieces: Sequence[tuple[float, str]]
    code: int

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    def frames(self, columns: int) -> list[list[str]]:
        """The lines seen after each piece."""
        screen, frames = Screenful(columns), []
        for _, text in self.pieces:
            screen.write(text)
            frames.append([line.rstrip() for line in screen.lines])
        return frames


def record(
    words: Sequence[str],
    *,
    columns: int,
    cwd: str,
    env: Mapping[str, str],
    timeout_s: float = 300.0,
) -> Recording:
    """Run a command of ours with stdin, stdout and stderr on a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        time.sleep(0.2)  # until the size is set
        code = "from qaic_ray.cli import main; main()"
        os.execve(sys.executable, [sys.executable, "-c", code, *words], dict(env))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    begun_s = time.monotonic()
    pieces: list[tuple[float, str]] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while time.monotonic() < begun_s + timeout_s:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        if not ready:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        pieces.append((time.monotonic() - begun_s, decoder.decode(data)))
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return Recording(pieces, os.waitstatus_to_exitcode(status))
