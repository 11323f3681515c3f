"""Pieces of pages: fields that are told, tables, blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_CODE = re.compile(r"(`+[^`]*`+)")
HEAD = "<!-- Made by scripts/reference: change the code, then run it. -->"


class Note(NamedTuple):
    """What people read of a field: what it means, a value, and the unit where it has one."""

    meaning: str
    example: Any
    unit: str = ""


Fields = Mapping[str, Note]
"""By name; `a.b` is in an object `a`, `a[].b` in each object of a list."""


def page(title: str, *parts: str | Iterable[str]) -> str:
    """A whole page."""
    lines = [HEAD, "", f"# {title}"]
    for part in parts:
        lines += ["", *([part] if isinstance(part, str) else part)]
    return "\n".join(lines) + "\n"


def section(title: str, *parts: str | Iterable[str], level: int = 2) -> Iterator[str]:
    """A heading and what stands under it."""
    yield f"{'#' * level} {title}"
    for part in parts:
        yield ""
        yield from [part] if isinstance(part, str) else part


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """A table; cells are Markdown already."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    yield from (f"| {' | '.join(map(cell, row))} |" for row in rows)


def field_table(fields: Fields) -> Iterator[str]:
    """A table of fields, with their units where any has one."""
    has_units = any(told.unit for told in fields.values())
    rows = []
    for name, told in fields.items():
        unit = [told.unit] if has_units else []
        rows.append((code(name), told.meaning, *unit, value(told.example)))
    return table(("field", "meaning", *(["unit"] if has_units else []), "example"), rows)


def cell(text: object) -> str:
    """A text as a cell of a table has it; angle brackets outside of code are no HTML."""
    parts = _CODE.split(str(text).replace("\n", " ").strip())
    parts[::2] = [_prose(part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", "\\|") for part in parts[1::2]]
    return "".join(parts)


def _prose(text: str) -> str:
    text = text.replace("\\|", "&#92;|").replace("|", "&#124;")
    return re.sub(r"(?<!\\)<", "&lt;", text)


def code(text: object) -> str:
    """A text in the letters of code."""
    said = str(text)
    if not said:
        return ""
    return f"`` {said} ``" if "`" in said else f"`{said}`"


def value(example: object) -> str:
    """A value as JSON has it, in the letters of code."""
    return code(json.dumps(example, ensure_ascii=False))


def block(kind: str, text: str) -> Iterator[str]:
    """A block of code."""
    yield f"```{kind}"
    yield from text.rstrip("\n").split("\n")
    yield "```"
