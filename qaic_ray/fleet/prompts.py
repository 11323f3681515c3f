"""Prompt sources: the user's text, a file or stdin, as prompts with their place in the input.

Every piece of input becomes exactly one item, in order: a `Prompt`, or, where it cannot be one, the
error `Row` that stands in its place. Sources are read lazily, a line when it is asked for, and are
never held in memory. Knows no tokenizer and no Ray.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from qaic_ray.errors import QaicRayError, RowError, UsageError
from qaic_ray.rows import Prompt, Row

STDIN = "-"

_PIPE = re.compile(r"(?<!\\)(\\*)\|")
_BOM = b"\xef\xbb\xbf"


class PromptFormat(str, Enum):
    """What a prompts file holds on each line."""

    TEXT = "text"
    """A prompt, as it stands."""
    JSONL = "jsonl"
    """A JSON object with `prompt`, and `id` if wanted; other keys are not looked at."""


def split_prompts(text: str) -> list[str]:
    r"""Split a `--prompt` argument at its pipes.

    A backslash means something only in a run of backslashes that stands directly before a pipe:
    there `\\` is one backslash and `\|` is a pipe that does not split. Anywhere else backslashes
    are themselves, and so is everything else: spaces, newlines and quotes stay, and two pipes in a
    row have an empty prompt between them.

        a|b       ->  a    b
        a\|b      ->  a|b
        a\\|b     ->  a\   b
        C:\x|\n   ->  C:\x  \n
    """
    pieces = [""]
    end = 0
    for match in _PIPE.finditer(text):
        backslashes = len(match[1])
        pieces[-1] += text[end : match.start()] + "\\" * (backslashes // 2)
        end = match.end()
        if backslashes % 2:
            pieces[-1] += "|"
        else:
            pieces.append("")
    pieces[-1] += text[end:]
    return pieces


def prompts_from_text(text: str) -> Iterator[Prompt | Row]:
    """The prompts of a `--prompt` argument; an empty piece is an error row."""
    return _numbered(split_prompts(text))


def prompts_from_file(
    path: str | Path, prompt_format: PromptFormat | None = None
) -> Iterator[Prompt | Row]:
    r"""The prompts of a file, or of stdin for `-`; one item a line, so that index = line - 1.

    Lines end at `\n` or `\r\n`, and nothing else is stripped. An empty line is an error row; the
    newline at the very end begins no line. Bytes are UTF-8, with or without a byte order mark.

    Args:
        path: what to read.
        prompt_format: None means JSONL for a name ending in `.jsonl`, text for all else and stdin.

    Raises:
        UsageError: at once, when there is no such file, or none that may be read.
        QaicRayError: while reading, when that fails.
    """
    if prompt_format is None:
        is_jsonl = Path(path).suffix.lower() == ".jsonl"
        prompt_format = PromptFormat.JSONL if is_jsonl else PromptFormat.TEXT
    path = os.fspath(path)
    if path != STDIN:
        _check_readable(path)
    lines = _lines(path)
    if prompt_format is PromptFormat.TEXT:
        return _numbered(lines)
    name = "stdin" if path == STDIN else Path(path).name
    return (_from_json_line(name, index, line) for index, line in enumerate(lines))


def _check_readable(path: str) -> None:
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder: give a file with one prompt per line.")
    if not os.path.exists(path):
        raise UsageError(f"There is no prompts file {path}.")
    if not os.access(path, os.R_OK):
        raise UsageError(f"The prompts file {path} may not be read: check its permissions.")


def _lines(path: str) -> Iterator[bytes]:
    """The lines without their ends. Bytes: Python's text lines also end at a lone carriage return,
    and one undecodable line must not stop the others."""
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream):
                start = len(_BOM) if number == 0 and line.startswith(_BOM) else 0
                yield line[start:].removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise QaicRayError(f"The prompts in {path} cannot be read: {error.strerror}.") from error


def _open(path: str) -> nullcontext[BinaryIO] | BinaryIO:
    return nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb")


def _numbered(texts: Iterable[str | bytes]) -> Iterator[Prompt | Row]:
    for index, text in enumerate(texts):
        try:
            yield _prompt(index, _decoded(text))
        except RowError as error:
            yield _error_row(index, text, str(error))


def _from_json_line(name: str, index: int, line: bytes) -> Prompt | Row:
    where = f"{name} line {index + 1}"
    try:
        text, id_ = _prompt_and_id(_decoded(line))
    except RowError as error:
        return _error_row(index, line, f"{where}: {error}")
    try:
        return _prompt(index, text, id_)
    except RowError as error:
        return _error_row(index, text, f"{where}: {error}", id_)


def _prompt_and_id(line: str) -> tuple[str, str | None]:
    """Read one JSON line.

    Raises:
        RowError: saying what is wrong with it.
    """
    if not line.strip():
        raise RowError("The line is empty.")
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"Not JSON: {error.msg} at character {error.pos + 1}.") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise RowError(f"Not JSON that can be read: {error}.") from error
    if not isinstance(document, dict):
        raise RowError('Not a JSON object: write {"prompt": "..."}.')
    if "prompt" not in document:
        raise RowError('There is no "prompt" in it.')
    text, id_ = document["prompt"], document.get("id")
    if not isinstance(text, str):
        raise RowError(f'"prompt" is {_json_type(text)}, not a string.')
    if id_ is None:
        return text, None
    if type(id_) not in (str, int):
        raise RowError(f'"id" is {_json_type(id_)}, not a string or a whole number.')
    _check_unicode("id", str(id_))
    return text, str(id_)


def _prompt(index: int, text: str, id_: str | None = None) -> Prompt:
    if not text:
        raise RowError("The prompt is empty.")
    _check_unicode("prompt", text)
    return Prompt(index, text, id_)


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"The {what} holds half of a surrogate pair, not a character.") from error


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"Not UTF-8: byte {error.start + 1} is 0x{text[error.start]:02x}."
        ) from error


def _error_row(index: int, raw: str | bytes, error: str, id_: str | None = None) -> Row:
    """The row of input that no card gets to see; its `prompt` is what was there, made writable."""
    if isinstance(raw, str):
        raw = raw.encode(errors="replace")
    prompt = Prompt(index, raw.decode(errors="replace"), id_)
    return Row.failed(prompt, error, attempts=0)


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
