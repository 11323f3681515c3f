"""What a prompts file holds: said, or known by its name, or by how it begins. Reads no prompts.

A damaged or blank first line decides nothing: of a file the first 64 KiB are looked at. Of a stream
no more is waited for than is needed: a line that is no JSON is text at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePath

from qaic_ray.errors import UsageError
from qaic_ray.formats.lines import STDIN, Input
from qaic_ray.option_types import PromptFormat

PARQUET_MAGIC = b"PAR1"

_PACKED = (".gz", ".zst", ".bz2", ".xz")

_FORMAT_OF_SUFFIX = {
    ".txt": PromptFormat.TEXT,
    ".json": PromptFormat.JSONL,
    ".jsonl": PromptFormat.JSONL,
    ".ndjson": PromptFormat.JSONL,
    ".csv": PromptFormat.CSV,
    ".tsv": PromptFormat.TSV,
    ".parquet": PromptFormat.PARQUET,
}
_JSON_LINES = (PromptFormat.JSONL, PromptFormat.OPENAI)
_OBJECT_KEYS = ("prompt", "messages", "custom_id")
_HEADER_CELL = re.compile(r"[\w .-]{1,64}")


@dataclass(frozen=True)
class Recognised:
    """What an input holds.

    Attributes:
        form: of its rows.
        is_array: they are the items of one JSON array.
        is_guess: neither the user nor the name has said so.
    """

    form: PromptFormat
    is_array: bool = False
    is_guess: bool = False


def input_name(path: str) -> str:
    """How error rows name an input."""
    return "stdin" if path == STDIN else PurePath(path).name


def named_format(path: str) -> PromptFormat | None:
    """What the name says."""
    return _FORMAT_OF_SUFFIX.get(_suffix(path))


def _suffix(path: str) -> str:
    """The last part of the name, a packing's left out."""
    name = PurePath(path)
    if name.suffix.lower() in _PACKED:
        name = name.with_suffix("")
    return name.suffix.lower()


def is_row(document: object) -> bool:
    """Whether a JSON value means to be a row with a prompt."""
    return isinstance(document, dict) and not document.keys().isdisjoint(_OBJECT_KEYS)


def recognise(source: Input, path: str, said: PromptFormat | None) -> Recognised:
    """What an input holds, by what is said, by its name, or by its beginning.

    Args:
        source: opened; it is looked at and nothing is taken.
        path: of it.
        said: by the user.

    Raises:
        UsageError: nothing is in it, or what can be no lines of prompts.
    """
    name = input_name(path)
    if not source.look_on() and not source.is_broken:
        raise UsageError(f"There is nothing in {name}: give prompts.")
    form = said or named_format(path)
    if form is PromptFormat.PARQUET or source.head.startswith(PARQUET_MAGIC):
        raise UsageError(
            f"The prompts from {name} are parquet in a stream, and parquet is read from a file: "
            "save it unpacked and give its name."
        )
    is_array, is_guess = False, form is None
    if form is None:
        form, is_array = _guessed(source, name)
    elif form in _JSON_LINES:
        any_line = said is None and _suffix(path) == ".json"
        is_array = _is_array(source, name, any_line=any_line)
    if form not in _JSON_LINES:
        _refuse_binary(source.head, name)
    if not is_array and _json(source.head.strip()) is None:
        _refuse_old_ends(source.head, name)
    return Recognised(form, is_array, is_guess)


def _is_array(source: Input, name: str, *, any_line: bool) -> bool:
    """Whether what is said to be JSON is one array; an object over several lines is refused.

    `any_line`: also where the whole array stands on the first line.
    """
    while not _lines(source.head) and source.look_on():
        pass
    lines = _lines(source.head)
    if not lines:
        return False
    if _begins_array(lines[0]):
        return any_line or _json(lines[0]) is None
    if lines[0].startswith(b"{") and _json(lines[0]) is None:
        _look_for_rows(source)
        _refuse_spread(source.head, name)
    return False


def _guessed(source: Input, name: str) -> tuple[PromptFormat, bool]:
    """What the lines read as; whether as one JSON array."""
    while not (lines := _lines(source.head)):
        if not source.look_on():
            return PromptFormat.TEXT, False
    if _begins_array(lines[0]):
        return PromptFormat.JSONL, True
    if lines[0].startswith(b"{") or source.is_all_there:
        _look_for_rows(source)
        lines = _lines(source.head)
        if any(isinstance(_json(line), dict) for line in lines[:2]):
            return PromptFormat.JSONL, False
        _refuse_spread(source.head, name)
        if re.match(rb'\{\s*("|$)', lines[0]):
            return PromptFormat.JSONL, False
    for delimiter, form in ((b",", PromptFormat.CSV), (b"\t", PromptFormat.TSV)):
        if _is_header(lines[0], delimiter):
            return form, False
    return PromptFormat.TEXT, False


def _look_for_rows(source: Input) -> None:
    """See more, until a line after the first tells: all that may be of a file, one of a stream."""
    while source.look_on():
        if not source.is_all_there and len(_lines(source.head)) > 1:
            return


def _refuse_spread(head: bytes, name: str) -> None:
    """One JSON object written over several lines is no rows."""
    lines = _lines(head)
    if len(lines) < 2 or any(isinstance(_json(line), dict) for line in lines):
        return
    if lines[0] == b"{" or _is_spread(head):
        raise UsageError(
            f"{name} holds a JSON object over several lines: write each row on one line "
            "(JSONL), or all of them in an array."
        )


def _is_spread(head: bytes) -> bool:
    try:
        value, _ = json.JSONDecoder().raw_decode(head.decode("utf-8", "replace").lstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)


def _begins_array(line: bytes) -> bool:
    return re.match(rb"\[\s*(\{|$|\]$)", line) is not None


def _is_header(line: bytes, delimiter: bytes) -> bool:
    """Whether a line is the header of a table of prompts."""
    cells = [cell.strip().strip(b'"').decode("utf-8", "replace") for cell in line.split(delimiter)]
    is_plain = len(cells) > 1 and all(map(_HEADER_CELL.fullmatch, cells))
    return is_plain and not {"prompt", "messages"}.isdisjoint(cells)


def _refuse_binary(head: bytes, name: str) -> None:
    if b"\0" in head.partition(b"\n")[0]:
        raise UsageError(
            f"{name} is no text: it holds NUL bytes. Text in UTF-16 without a mark does too: save "
            "it as UTF-8."
        )


def _refuse_old_ends(head: bytes, name: str) -> None:
    if b"\n" not in head and b"\r" in head.rstrip(b"\r"):
        raise UsageError(
            rf"The lines of {name} end in \r alone, as on old Macs: save it with \n line ends."
        )


def _lines(head: bytes) -> list[bytes]:
    """The lines that are not blank."""
    return [line for line in map(bytes.strip, head.split(b"\n")) if line]


def _json(line: bytes) -> object:
    """The value on a line; None where it is none."""
    try:
        return json.loads(line) if line[:1] in b"{[" else None
    except (ValueError, RecursionError):
        return None
