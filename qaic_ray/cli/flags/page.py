"""A help page: what it says, as values, and its lines for a width. No word is cut.

It does not go through rich, whose tables cut names, and which takes longer to load than all else.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MIN_WIDTH, MAX_WIDTH = 40, 100
"""Columns: a longer line is hard to read."""

_INDENT = 2
_NARROW = 76
_NAMES_COLUMNS = {True: 24, False: 30}  # on a narrow terminal, and else
_PIECES = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_UNBROKEN = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class HelpEntry:
    """One option, argument or command.

    `names` are what people learn, the last with the place of its value; `notes` stand in brackets
    behind the text; `group` is its panel.
    """

    names: tuple[str, ...]
    text: str
    notes: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class HelpPage:
    """The page of a command; `panels` are titles and what stands under them."""

    usage: str
    summary: str
    examples: tuple[str, ...]
    panels: tuple[tuple[str, tuple[HelpEntry, ...]], ...]


def terminal_width() -> int:
    """How wide a page is: as the terminal, or COLUMNS; 80 where there is none."""
    return max(MIN_WIDTH, min(shutil.get_terminal_size().columns, MAX_WIDTH))


def page_text(page: HelpPage, width: int) -> str:
    """The page, with the colours of a terminal, which the caller takes off where there is none."""
    paragraphs = [_head(page.usage, width), *_paragraphs(page.summary, width)]
    if page.examples:
        title = "Examples:" if len(page.examples) > 1 else "Example:"
        lines = [line for example in page.examples for line in _command(example, width)]
        paragraphs.append([_bold(title), *lines])
    names_columns = _names_columns(page, width)
    for title, entries in page.panels:
        lines = [line for entry in entries for line in _entry(entry, names_columns, width)]
        paragraphs.append([_bold(f"{title}:"), *lines])
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


def _head(usage: str, width: int) -> list[str]:
    lines = _wrapped(f"Usage: {usage}", width, indent=7)
    return [line.replace("Usage:", _bold("Usage:"), 1) for line in lines]


def _paragraphs(text: str, width: int) -> list[list[str]]:
    return [_wrapped(paragraph, width) for paragraph in text.split("\n\n")]


def _command(example: str, width: int) -> list[str]:
    """A command of the shell, broken as a shell takes it; quoted texts stay whole."""
    lines = [" " * _INDENT]
    for piece in _PIECES.findall(example):
        is_first = not lines[-1].strip()
        if not is_first and len(lines[-1]) + 1 + len(piece) + len(" \\") > width:
            lines[-1] += " \\"
            lines.append(" " * 3 * _INDENT)
            is_first = True
        lines[-1] += piece if is_first else f" {piece}"
    return lines


def _names_columns(page: HelpPage, width: int) -> int:
    lengths = [len(", ".join(entry.names)) for _, entries in page.panels for entry in entries]
    most = _NAMES_COLUMNS[width < _NARROW]
    return max((length for length in lengths if length <= most), default=most)


def _entry(entry: HelpEntry, names_columns: int, width: int) -> Iterator[str]:
    names = ", ".join(entry.names)
    column = _INDENT + names_columns + 2
    notes = [f"[{note}]".replace(" ", _UNBROKEN) for note in entry.notes]
    # A note that is longer than a line is broken after all, at its spaces.
    notes = [n if len(n) <= width - column else n.replace(_UNBROKEN, " ") for n in notes]
    lines = _wrapped(" ".join([entry.text, *notes]), width - column)
    head = " " * _INDENT + _cyan(names)
    if len(names) > names_columns or not lines:
        yield head
    else:
        yield head + " " * (names_columns - len(names) + 2) + _plain(lines.pop(0))
    yield from (" " * column + _plain(line) for line in lines)


def _wrapped(text: str, width: int, *, indent: int = 0) -> list[str]:
    """Lines of whole words."""
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _plain(line: str) -> str:
    return line.replace(_UNBROKEN, " ")


def _bold(text: str) -> str:
    return _styled(text, 1)


def _cyan(text: str) -> str:
    return _styled(text, 36)


def _styled(text: str, code: int) -> str:
    # https://no-color.org: any value but none.
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    return text if is_plain else f"\x1b[{code}m{text}\x1b[0m"


def in_panels(
    entries: Iterable[HelpEntry], order: Sequence[str], *, few: int = 8
) -> tuple[tuple[str, tuple[HelpEntry, ...]], ...]:
    """Entries under the titles of their groups, in an order of groups; one panel of a few.

    A group that the order does not name stands where the one without a name does.
    """
    found = list(entries)
    if len(found) <= few:
        return (("Options", tuple(found)),)
    titles = sorted(dict.fromkeys(entry.group for entry in found), key=lambda g: rank(g, order))
    panels = ((title, tuple(e for e in found if e.group == title)) for title in titles)
    return tuple((title or "Options", inside) for title, inside in panels)


def rank(group: str, order: Sequence[str]) -> int:
    """The place of a group."""
    return order.index(group if group in order else "")


def entry_of(param: Any) -> HelpEntry:
    """What the help says of a parameter that no section has."""
    default = param.show_default if isinstance(param.show_default, str) else ""
    notes = ("required",) if param.required else (f"default: {default}",) if default else ()
    if param.param_type_name == "argument":
        return HelpEntry((place_of(param).strip("[]"),), param.help or "", notes)
    if "--help" in param.opts:
        return HelpEntry(("-h", "--help"), "Show this page.")
    names = sorted(param.opts, key=len)
    names[-1] += f" {param.metavar or 'TEXT'}" if not param.is_flag else ""
    return HelpEntry(tuple(names), param.help or "", notes)


def place_of(param: Any) -> str:
    """An argument as the line of usage has it."""
    name = str(param.metavar or param.name.upper())
    return name if param.required or name.startswith("[") else f"[{name}]"
