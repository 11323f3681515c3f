"""Prompt sources: the user's text, a file or stdin, as prompts with their place in the input.

Every piece of input becomes exactly one item, in order: a `Prompt`, or, where it cannot be one, the
error `Row` that stands in its place. Sources are read lazily, a line when it is asked for, and are
never held in memory. Knows no tokenizer and no Ray.

A line of JSONL is an object:

- `prompt`, a text, or `messages`, a conversation as the OpenAI interface has it: objects with
  `role` and `content`, both strings; content may be a list of parts of type `text`, which are
  joined as they stand. A conversation goes through the model's chat template.
- `id`, a string or a whole number, if wanted.
- Sampling fields (`SamplingParams`: `temperature`, `max_tokens`, `seed`, `stop`, ...), in place of
  the run's; null leaves the run's value.
- Fields of the chat template, and fields of other programs; see `row_fields.py`.
- Any other key is the user's own.

Or it is a request of the OpenAI batch format; see `openai_requests.py`. The columns of a CSV, TSV
or parquet file are the fields of such an object; see `csv_prompts.py` and `parquet_prompts.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from qaic_ray.errors import RowError, UsageError
from qaic_ray.formats.csv import prompts_from_csv
from qaic_ray.formats.detect import (
    PARQUET_MAGIC,
    Recognised,
    input_name,
    is_row,
    named_format,
    recognise,
)
from qaic_ray.formats.frozen_file import FrozenFile
from qaic_ray.formats.json_array import array_items
from qaic_ray.formats.jsonl import json_object, prompts_from_json
from qaic_ray.formats.lines import STDIN, Input, check_readable
from qaic_ray.formats.parquet_prompts import prompts_from_parquet
from qaic_ray.formats.prompt_fields import Draft, decoded
from qaic_ray.formats.row_fields import DEFAULT_CHAT, OwnFields
from qaic_ray.option_types import PromptFormat
from qaic_ray.rows import ChatOptions, Prompt, Row
from qaic_ray.sampling_params import SamplingParams

GREEDY = SamplingParams()

_PIPE = re.compile(r"(?<!\\)(\\*)\|")


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
    path: str | Path,
    prompt_format: PromptFormat | None = None,
    sampling: SamplingParams = GREEDY,
    chat: ChatOptions = DEFAULT_CHAT,
    *,
    frozen: FrozenFile | None = None,
) -> Iterator[Prompt | Row]:
    r"""The prompts of a file, or of stdin for `-`; one item a line, so that index = line - 1.

    Lines end at `\n` or `\r\n`, and nothing else is stripped. An empty line is an error row; the
    newline at the very end begins no line. Bytes are UTF-8, with or without a byte order mark, or
    UTF-16 or UTF-32 with one. A JSON array has an item in place of a line, a table a row.

    Args:
        path: what to read.
        prompt_format: None means: the name says it (`.txt`, `.jsonl`, `.csv`, `.parquet`, with
            `.gz`, `.zst`, `.bz2` or `.xz` behind it or not); where it does not, the beginning does.
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
    if path == STDIN:
        return _from_stream(path, prompt_format, own)
    check_readable(path)
    if not os.path.isfile(path):  # what is read from a pipe to look at it is gone
        return _from_stream(path, prompt_format, own)
    if (prompt_format or _kind_of_file(path)) is PromptFormat.PARQUET:
        return prompts_from_parquet(path, own, frozen)
    with Input(path, frozen) as source:
        known = recognise(source, path, prompt_format)
    return _from_file(path, known, own, frozen)


def _kind_of_file(path: str) -> PromptFormat | None:
    """PARQUET, or None for what only its lines can tell."""
    try:
        with open(path, "rb") as stream:
            has_magic = stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    return PromptFormat.PARQUET if has_magic else named_format(path)


def _from_file(
    path: str, known: Recognised, own: OwnFields, frozen: FrozenFile | None
) -> Iterator[Prompt | Row]:
    with Input(path, frozen) as source:
        yield from _items(source, path, known, own)


def _from_stream(
    path: str, prompt_format: PromptFormat | None, own: OwnFields
) -> Iterator[Prompt | Row]:
    with Input(path) as source:
        yield from _items(source, path, recognise(source, path, prompt_format), own)


def _items(source: Input, path: str, known: Recognised, own: OwnFields) -> Iterator[Prompt | Row]:
    """The rows of an input.

    Raises:
        UsageError: at the end, where there was none.
    """
    name = input_name(path)
    items: Iterator[Prompt | Row]
    if known.form is PromptFormat.TEXT:
        items = _numbered(source.lines(), name, is_guess=known.is_guess)
    elif known.form in (PromptFormat.CSV, PromptFormat.TSV):
        items = prompts_from_csv(name, source, known.form, own)
    else:
        only_requests = known.form is PromptFormat.OPENAI
        what = "item" if known.is_array else "line"
        texts = array_items(source) if known.is_array else source.lines()
        items = prompts_from_json(f"{name} {what}", texts, own, only_requests=only_requests)
    first = next(items, None)
    if first is None:
        raise UsageError(f"There are no prompts in {name}: give some.")
    yield first
    yield from items


def _numbered(
    texts: Iterable[str | bytes], name: str | None = None, *, is_guess: bool = False
) -> Iterator[Prompt | Row]:
    def prompt(draft: Draft, text: str | bytes) -> Prompt:
        draft.text = decoded(text)
        if is_guess and draft.text.startswith("{") and is_row(_object_or_none(draft.text)):
            raise RowError(
                "A JSON object among lines of text: say which of both the input is, by "
                "--prompts-format jsonl or text."
            )
        return draft.prompt()

    for index, text in enumerate(texts):
        draft = Draft(index, text)
        place = f"{name} line {index + 1}: " if name else ""
        yield draft.read(prompt, text, place)


def _object_or_none(text: str) -> object:
    try:
        return json_object(text)
    except RowError:
        return None
