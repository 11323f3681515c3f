"""The fenced blocks of a page, and what stands before each for the reader and for the tests.

A block of `sh` is typed as it stands; one of `console` has commands behind `$ ` and what they
print. One of any other kind behind a paragraph that ends with "Save this as `mine.yaml`:" is that
file. One of `python` without a file is a program.

A comment on the line above a fence says what is different:

    <!-- not run: a DL2q instance -->   it is only parsed; the paragraph above has these words
    <!-- exit code: 2 -->               its last command ends so
    <!-- stays -->                      its command goes on until the page ends
    <!-- part -->                       a part of a program, or of a file, that is only parsed
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "reference"

_FENCE = re.compile(r"^(`{3,})(\S*)[^`\n]*$")
_NOTE = re.compile(r"^<!-- ([a-z ]+?)(?:: (.*?))? -->$")
_SAVED = re.compile(r"\b[Ss]ave (?:this|it) as `([\w.-]+)`:$")
NOTES = {"not run", "exit code", "stays", "part"}
"""What a comment above a fence may begin with."""


class PageError(Exception):
    """A page is not written as the tests read it; says the line."""


@dataclass(frozen=True)
class Command:
    """One that is typed, and the lines that it prints."""

    text: str
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: its file.
        line: of its fence, from 1.
        kind: the word behind the fence.
        text: what is in it, each line ended.
        lead: the paragraph above, as one line.
        notes: of the comments above: name -> what stands behind the colon.
    """

    page: Path
    line: int
    kind: str
    text: str
    lead: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that it is to be saved as."""
        found = _SAVED.search(self.lead)
        return found.group(1) if found and self.kind not in ("sh", "console") else None

    @property
    def is_run(self) -> bool:
        """Whether it is typed, and not only parsed."""
        return not self.notes.keys() & {"not run", "part"}

    @property
    def commands(self) -> list[Command]:
        """What is typed in it."""
        if self.kind == "sh":
            return [Command(self.text, ())]
        if self.kind != "console":
            return []
        return list(self._console())

    def _console(self) -> Iterator[Command]:
        typed: list[str] = []
        shown: list[str] = []
        for line in self.text.splitlines():
            if typed and not shown and typed[-1].endswith("\\"):
                typed.append(line.removeprefix("> "))
            elif line.startswith("$ "):
                if typed:
                    yield Command("\n".join(typed), tuple(shown))
                typed, shown = [line[2:]], []
            elif typed:
                shown.append(line)
            else:
                raise PageError(f"{self.place}: a console block begins with `$ `")
        yield Command("\n".join(typed), tuple(shown))


def pages() -> list[Path]:
    """Every page with blocks that people type."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [*found, ROOT / "jobs" / "README.md", ROOT / "CONTRIBUTING.md"]


def name_of(page: Path) -> str:
    """For messages and the names of tests."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page.

    Raises:
        PageError: a fence that is not closed, or a comment that nobody knows.
    """
    return parse(page.read_text(encoding="utf-8"), page)


def parse(text: str, page: Path) -> list[Block]:
    """The same, of a page's text."""
    found: list[Block] = []
    above: list[str] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        begun = _FENCE.match(line)
        if not begun:
            above.append(line)
            continue
        fence, kind = begun.groups()
        inner: list[str] = []
        for _, within in lines:
            if within == fence:
                break
            inner.append(within)
        else:
            raise PageError(f"{page.name}:{number}: the block is not closed")
        notes, lead = _above(above, f"{page.name}:{number}")
        body = "".join(f"{part}\n" for part in inner)
        found.append(Block(page, number, kind, body, lead, notes))
        above = []
    return found


def _above(lines: list[str], place: str) -> tuple[dict[str, str], str]:
    """Comments on the lines above a fence, and the paragraph above these."""
    left, notes = list(lines), {}
    while left and (note := _NOTE.match(left[-1])):
        name, value = note.groups()
        if name not in NOTES:
            raise PageError(f"{place}: nobody knows a comment {name!r}")
        notes[name] = value or ""
        left.pop()
    while left and not left[-1].strip():
        left.pop()
    paragraph: list[str] = []
    while left and left[-1].strip():
        paragraph.insert(0, left.pop().strip())
    return notes, " ".join(paragraph)
