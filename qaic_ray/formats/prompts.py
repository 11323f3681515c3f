"""The prompts of a text, a file or stdin, in the format that is said or recognised.

Every piece of input becomes exactly one item, in order: a `Prompt`, or, where it cannot be one, an
error `Row` in its place. Sources are read lazily and never held in memory.

A format is recognised by the name, or by the beginning: the first 64 KiB of a file, since a damaged
or blank first line decides nothing. Of a stream no more is waited for than is needed: a first line
that is not JSON makes it text at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from qaic_ray.errors import RowError, UsageError
from qaic_ray.formats.frozen_file import FrozenFile
from qaic_ray.formats.json_rows import array_items, json_object, prompts_from_json
from qaic_ray.formats.lines import STDIN, PromptInput, check_readable
from qaic_ray.formats.row_reader import DEFAULT_CHAT, Draft, OwnFields
from qaic_ray.formats.tables import prompts_from_csv, prompts_from_parquet
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import ChatOptions, Prompt, Row
from qaic_ray.sampling_params import SamplingParams

GREEDY = SamplingParams()

_PARQUET_MAGIC = b"PAR1"
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_PIPE = re.compile(r"(?<!\\)(\\*)\|")
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
class _Recognised:
    """The format of an input; `is_guess` where neither the user nor the name has said it.

    With `is_array` its rows are the items of one JSON array.
    """

    form: PromptFormat
    is_array: bool = False
    is_guess: bool = False


def split_prompts(text: str) -> list[str]:
    r"""Split a `--prompt` argument at its pipes.

    Only in a run of backslashes directly before a pipe is a backslash special: `\\` is one
    backslash, and `\|` a pipe that does not split. Everything else stays as it is, spaces, newlines
    and quotes too. Two pipes in a row have an empty prompt between them.

        a|b       ->  a    b
        a\|b      ->  a|b
        a\\|b     ->  a\   b
        C:\x|\n   ->  C:\x  \n
    """
    first, *others = _PIPE.split(text)  # a text, the backslashes before its pipe, a text, ...
    pieces = [first]
    for backslashes, piece in zip(others[::2], others[1::2], strict=True):
        pieces[-1] += "\\" * (len(backslashes) // 2)
        if len(backslashes) % 2:
            pieces[-1] += f"|{piece}"
        else:
            pieces.append(piece)
    return pieces


def prompts_from_text(text: str) -> Iterator[Prompt | Row]:
    """The prompts of a `--prompt` argument; an empty piece is an error row."""
    return _numbered(split_prompts(text))


def prompts_from_file(
    path: str | Path,
    prompt_format: PromptFormat | None = None,
    sampling: SamplingParams = GREEDY,
    chat: ChatOptions = DEFAULT_CHAT,
    *,
    frozen: FrozenFile | None = None,
) -> Iterator[Prompt | Row]:
    r"""The prompts of a file, or of stdin for `-`; one item a line, so that index = line - 1.

    Lines end at `\n` or `\r\n`, and nothing else is stripped. An empty line is an error row. Bytes
    are UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. A JSON array has an
    item in place of a line, a table a row.

    Args:
        path: what to read.
        prompt_format: None: by the name (`.txt`, `.jsonl`, `.csv`, `.parquet`, with `.gz`, `.zst`,
            `.bz2` or `.xz` behind it or not), else by the beginning.
        sampling: the run's, for what a row's own fields leave open.
        chat: the run's, likewise.
        frozen: the file as it was when the run began; without it, it is read as it is.

    Raises:
        UsageError: at once, when there is no such file, or none that may be read, or one without
            prompts; of a stream while reading.
        QaicRayError: while reading, when that fails.
    """
    path = os.fspath(path)
    own = OwnFields(sampling, chat)
    if path != STDIN:
        check_readable(path)
    opened = partial(PromptInput, path)
    if path == STDIN or not os.path.isfile(path):
        # A stream is opened once: what is read to look at it is gone.
        return _items(opened, path, prompt_format, own)
    if (prompt_format or _kind_of_file(path)) is PromptFormat.PARQUET:
        return prompts_from_parquet(path, own, frozen)
    opened = partial(opened, frozen=frozen)
    with opened() as source:
        known = _recognise(source, path, prompt_format)
    return _items(opened, path, known, own)


def _kind_of_file(path: str) -> PromptFormat | None:
    """PARQUET, or what the name says."""
    try:
        with open(path, "rb") as stream:
            has_magic = stream.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    return PromptFormat.PARQUET if has_magic else _FORMAT_OF_SUFFIX.get(_suffix(path))


def _items(
    opened: Callable[[], PromptInput],
    path: str,
    known: _Recognised | PromptFormat | None,
    own: OwnFields,
) -> Iterator[Prompt | Row]:
    """The rows of an input, which is recognised first where `known` is what the user says of it.

    Raises:
        UsageError: at the end, where there was none.
    """
    name = _input_name(path)
    with opened() as source:
        if not isinstance(known, _Recognised):
            known = _recognise(source, path, known)
        items: Iterator[Prompt | Row]
        if known.form is PromptFormat.TEXT:
            items = _numbered(source.lines(), name, known)
        elif known.form in (PromptFormat.CSV, PromptFormat.TSV):
            items = prompts_from_csv(name, source, own, known.form)
        else:
            items = prompts_from_json(
                f"{name} {'item' if known.is_array else 'line'}",
                array_items(source) if known.is_array else source.lines(),
                own,
                only_requests=known.form is PromptFormat.OPENAI,
            )
        first = next(items, None)
        if first is None:
            raise UsageError(f"There are no prompts in {name}: give some.")
        yield first
        yield from items


def _numbered(
    texts: Iterable[str | bytes],
    name: str = "",
    known: _Recognised | None = None,
) -> Iterator[Prompt | Row]:
    is_guess = known is not None and known.is_guess

    def prompt(draft: Draft, _: None) -> Prompt:
        draft.text = draft.decoded()
        if is_guess and draft.text.startswith("{") and _is_row(draft.text):
            raise RowError(
                "A JSON object among lines of text: say which of both the input is, by "
                "--prompts-format jsonl or text."
            )
        return draft.prompt()

    for index, text in enumerate(texts):
        place = f"{name} line {index + 1}: " if name else ""
        yield Draft(index, text).read(prompt, None, place)


def _is_row(text: str) -> bool:
    """Whether a text is a JSON object with a prompt."""
    try:
        return not json_object(text).keys().isdisjoint(_OBJECT_KEYS)
    except RowError:
        return False


# -- what an input holds


def _input_name(path: str) -> str:
    """How error rows name an input."""
    return "stdin" if path == STDIN else PurePath(path).name


def _suffix(path: str) -> str:
    """The last suffix of the name, without that of a packing."""
    name = PurePath(path)
    if name.suffix.lower() in _PACKED:
        name = name.with_suffix("")
    return name.suffix.lower()


def _recognise(source: PromptInput, path: str, said: PromptFormat | None) -> _Recognised:
    """What an input holds, by what is said, by its name, or by its beginning.

    Args:
        source: opened; nothing is taken from it.
        path: of it.
        said: by the user.

    Raises:
        UsageError: it is empty, or cannot be lines of prompts.
    """
    name = _input_name(path)
    if not source.look_on() and not source.is_broken:
        raise UsageError(f"There is nothing in {name}: give prompts.")
    form = said or _FORMAT_OF_SUFFIX.get(_suffix(path))
    if form is PromptFormat.PARQUET or source.head.startswith(_PARQUET_MAGIC):
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
    if form not in _JSON_LINES and b"\0" in source.head.partition(b"\n")[0]:
        raise UsageError(
            f"{name} is no text: it holds NUL bytes. Text in UTF-16 without a mark does too: save "
            "it as UTF-8."
        )
    has_old_ends = b"\n" not in source.head and b"\r" in source.head.rstrip(b"\r")
    if has_old_ends and not is_array and _json(source.head.strip()) is None:
        raise UsageError(
            rf"The lines of {name} end in \r alone, as on old Macs: save it with \n line ends."
        )
    return _Recognised(form, is_array, is_guess)


def _is_array(source: PromptInput, name: str, *, any_line: bool) -> bool:
    """Whether an input that is said to be JSON is one array; refuses an object over several lines.

    With `any_line` also where the whole array is on the first line.
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


def _guessed(source: PromptInput, name: str) -> tuple[PromptFormat, bool]:
    """The format that the lines have, and whether they are one JSON array."""
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


def _look_for_rows(source: PromptInput) -> None:
    """Look on: of a file as far as allowed, of a stream until there is a second line."""
    while source.look_on():
        if not source.is_all_there and len(_lines(source.head)) > 1:
            return


def _refuse_spread(head: bytes, name: str) -> None:
    """Refuse one JSON object that is written over several lines."""
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


def _lines(head: bytes) -> list[bytes]:
    """The lines that are not blank."""
    return [line for line in map(bytes.strip, head.split(b"\n")) if line]


def _json(line: bytes) -> object:
    """The object or array on a line; None where there is none."""
    try:
        return json.loads(line) if line[:1] in b"{[" else None
    except (ValueError, RecursionError):
        return None
