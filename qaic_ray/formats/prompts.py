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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from qaic_ray.errors import RowError, UsageError
from qaic_ray.formats.delimited import csv_records, prompts_from_csv
from qaic_ray.formats.frozen_file import KnownFile
from qaic_ray.formats.json_rows import array_items, json_object, prompts_from_json
from qaic_ray.formats.lines import STDIN, EmptyInput, PromptInput, check_readable
from qaic_ray.formats.row_range import ALL_ROWS, RowRange
from qaic_ray.formats.row_reader import DEFAULT_CHAT, Draft, OwnFields
from qaic_ray.formats.tables import check_parquet, open_parquet, prompts_from_parquet
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import ChatOptions, Prompt, Row
from qaic_ray.sampling_params import SamplingParams

GREEDY = SamplingParams()

_PARQUET_MAGIC = b"PAR1"
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_PIPE = re.compile(r"(?<!\\)(\\*)\|")
_PIPE_OF_TEXT = re.compile(r"(\\*)\|")
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


def one_prompt(text: str) -> str:
    """The `--prompt` argument that is this one prompt, with whatever pipes it has."""
    return _PIPE_OF_TEXT.sub(lambda found: f"{found[1] * 2}\\|", text)


def prompts_from_text(text: str) -> Iterator[Prompt | Row]:
    """The prompts of a `--prompt` argument; an empty piece is an error row."""
    return _numbered(enumerate(split_prompts(text)))


def prompts_from_file(
    path: str | Path,
    prompt_format: PromptFormat | None = None,
    sampling: SamplingParams = GREEDY,
    chat: ChatOptions = DEFAULT_CHAT,
    *,
    frozen: KnownFile | None = None,
    name: str = "",
    rows: RowRange = ALL_ROWS,
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
        name: how error rows name it; empty for the file's own name.
        rows: which of the rows are read; their indexes are those of the file.

    Raises:
        UsageError: at once, when there is no such file, or none that may be read, or one without
            prompts; of a stream while reading.
        QaicRayError: while reading, when that fails.
    """
    path = os.fspath(path)
    own = OwnFields(sampling, chat)
    source = PromptInput(path, frozen, name)
    if frozen is None:
        if path != STDIN:
            check_readable(path)
        if path == STDIN or not os.path.isfile(path):
            # A stream is opened once: what is read to look at it is gone.
            return _items(source, own, prompt_format, rows=rows)
    if _kind_of_file(path, prompt_format, frozen) is PromptFormat.PARQUET:
        return prompts_from_parquet(path, own, frozen, name=source.name, rows=rows)
    with source:
        known = _recognise(source, prompt_format)
    return _items(PromptInput(path, frozen, name), own, prompt_format, known, rows=rows)


def check_prompts_file(path: str, prompt_format: PromptFormat | None, frozen: KnownFile) -> None:
    """See what a look at the beginning of a file tells.

    Raises:
        UsageError: as `prompts_from_file` at once.
    """
    if _kind_of_file(path, prompt_format, frozen) is PromptFormat.PARQUET:
        check_parquet(path, frozen)
        return
    with PromptInput(path, frozen) as source:
        _recognise(source, prompt_format)


def count_rows(
    path: str, prompt_format: PromptFormat | None = None, frozen: KnownFile | None = None
) -> int:
    """How many items `prompts_from_file` gives of a regular file, without what they hold.

    Raises:
        QaicRayError: as reading them does.
    """
    if _kind_of_file(path, prompt_format, frozen) is PromptFormat.PARQUET:
        with open_parquet(path, frozen) as table:
            return int(table.metadata.num_rows)
    with PromptInput(path, frozen) as source:
        known = _recognise(source, prompt_format)
        rows: Iterable[object] = source.lines()
        if known.is_array:
            rows = array_items(source)
        elif known.form in (PromptFormat.CSV, PromptFormat.TSV):
            _, _, rows = csv_records(source, known.form)
        return sum(1 for _ in rows)


def has_known_name(name: str) -> bool:
    """Whether a file's name says that it holds prompts: it ends as one of the formats, or bare."""
    suffix = _suffix(name)
    return not suffix or suffix in _FORMAT_OF_SUFFIX


def has_lines(name: str) -> bool:
    """Whether a file's name says that each of its lines, unpacked, is about a row."""
    return PurePath(name).suffix.lower() in (".txt", ".jsonl", ".ndjson", ".csv", ".tsv")


def _kind_of_file(
    path: str, said: PromptFormat | None, frozen: KnownFile | None
) -> PromptFormat | None:
    """What is said, or PARQUET, or what the name says."""
    if said is not None:
        return said
    try:
        with open(path, "rb") if frozen is None else frozen.open() as stream:
            has_magic = stream.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise UsageError(f"{path} cannot be read: {reason}.") from error
    return PromptFormat.PARQUET if has_magic else _FORMAT_OF_SUFFIX.get(_suffix(path))


def _items(
    source: PromptInput,
    own: OwnFields,
    said: PromptFormat | None,
    known: _Recognised | None = None,
    *,
    rows: RowRange,
) -> Iterator[Prompt | Row]:
    """The rows of an input, which is recognised first where it is not `known`.

    Raises:
        UsageError: at the end, where all were to be read and there was none.
    """
    with source:
        known = known or _recognise(source, said)
        items: Iterator[Prompt | Row]
        if known.form is PromptFormat.TEXT:
            texts = rows.of(source.lines())
            items = _numbered(texts, f"{source.name} line ", is_guess=known.is_guess)
        elif known.form in (PromptFormat.CSV, PromptFormat.TSV):
            items = prompts_from_csv(source, own, known.form, rows)
        else:
            items = prompts_from_json(
                f"{source.name} {'item' if known.is_array else 'line'}",
                array_items(source) if known.is_array else source.lines(),
                own,
                only_requests=known.form is PromptFormat.OPENAI,
                rows=rows,
            )
        first = next(items, None)
        if first is not None:
            yield first
            yield from items
        elif rows.is_whole:
            raise EmptyInput(f"There are no prompts in {source.name}: give some.")


def _numbered(
    texts: Iterable[tuple[int, str | bytes]], place: str = "", *, is_guess: bool = False
) -> Iterator[Prompt | Row]:
    def prompt(draft: Draft, _: None) -> Prompt:
        draft.text = draft.decoded()
        if is_guess and draft.text.startswith("{") and _is_row(draft.text):
            raise RowError(
                "A JSON object among lines of text: say which of both the input is, by "
                "--prompts-format jsonl or text."
            )
        return draft.prompt()

    for index, text in texts:
        yield Draft(index, text).read(prompt, None, place and f"{place}{index + 1}: ")


def _is_row(text: str) -> bool:
    """Whether a text is a JSON object with a prompt."""
    try:
        return not json_object(text).keys().isdisjoint(_OBJECT_KEYS)
    except RowError:
        return False


# -- what an input holds


def _suffix(path: str) -> str:
    """The last suffix of the name, without that of a packing."""
    name = PurePath(path)
    if name.suffix.lower() in _PACKED:
        name = name.with_suffix("")
    return name.suffix.lower()


def _recognise(source: PromptInput, said: PromptFormat | None) -> _Recognised:
    """What an input holds, by what is said, its name, or its beginning; takes nothing from it.

    Raises:
        UsageError: it is empty, or cannot be lines of prompts.
    """
    if not source.look_on() and source.damage is None:
        raise EmptyInput(f"There is nothing in {source.name}: give prompts.")
    form = said or _FORMAT_OF_SUFFIX.get(_suffix(source.path))
    if form is PromptFormat.PARQUET or source.head.startswith(_PARQUET_MAGIC):
        raise UsageError(
            f"The prompts from {source.name} are parquet in a stream, and parquet is read from a "
            "file: save it unpacked and give its name."
        )
    is_array, is_guess = False, form is None
    if form is None or form in _JSON_LINES:
        while not _lines(source.head) and source.look_on():
            pass
        first = next(iter(_lines(source.head)), b"")
        # In a file that is only called JSON, an array may be all on the first line.
        any_line = said is None and (form is None or _suffix(source.path) == ".json")
        begins_array = re.match(rb"\[\s*(\{|$|\]$)", first) is not None
        is_array = begins_array and (any_line or _json(first) is None)
        if form is None:
            form = PromptFormat.JSONL if is_array else _guessed(source, first)
        elif first.startswith(b"{") and _json(first) is None:
            _look_for_rows(source)
            _refuse_spread(source)
    if form not in _JSON_LINES and b"\0" in source.head.partition(b"\n")[0]:
        raise UsageError(
            f"{source.name} is no text: it holds NUL bytes. Text in UTF-16 without a mark does "
            "too: save it as UTF-8."
        )
    has_old_ends = b"\n" not in source.head and b"\r" in source.head.rstrip(b"\r")
    if has_old_ends and not is_array and _json(source.head.strip()) is None:
        raise UsageError(
            rf"The lines of {source.name} end in \r alone, as on old Macs: save it with \n line "
            "ends."
        )
    return _Recognised(form, is_array, is_guess)


def _guessed(source: PromptInput, first: bytes) -> PromptFormat:
    """The format that the lines have, of which `first` is the first that is not blank, if any."""
    if first.startswith(b"{") or (first and source.is_all_there):
        _look_for_rows(source)
        if any(isinstance(_json(line), dict) for line in _lines(source.head)[:2]):
            return PromptFormat.JSONL
        _refuse_spread(source)
        if re.match(rb'\{\s*("|$)', first):
            return PromptFormat.JSONL
    for delimiter, form in ((b",", PromptFormat.CSV), (b"\t", PromptFormat.TSV)):
        if _is_header(first, delimiter):
            return form
    return PromptFormat.TEXT


def _look_for_rows(source: PromptInput) -> None:
    """Look on: of a file as far as allowed, of a stream until there is a second line."""
    while source.look_on():
        if not source.is_all_there and len(_lines(source.head)) > 1:
            return


def _refuse_spread(source: PromptInput) -> None:
    """Refuse one JSON object that is written over several lines."""
    lines = _lines(source.head)
    if len(lines) < 2 or any(isinstance(_json(line), dict) for line in lines):
        return
    with suppress(ValueError, RecursionError):
        text = source.head.decode("utf-8", "replace").lstrip()
        if lines[0] == b"{" or isinstance(json.JSONDecoder().raw_decode(text)[0], dict):
            raise UsageError(
                f"{source.name} holds a JSON object over several lines: write each row on one line "
                "(JSONL), or all of them in an array."
            )


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
