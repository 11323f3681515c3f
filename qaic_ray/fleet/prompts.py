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
- Any other key is the user's own and is not looked at, but one that reads like a sampling field
  (`temprature`, `topk`, `max_new_tokens`) is an error: left out in silence, it would give other
  answers than were asked for.

Or it is a request of the OpenAI batch format; see `openai_requests.py`. The columns of a parquet
file are the fields of such an object; see `parquet_prompts.py`. Lines may be gzipped or in zstd.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import chain
from pathlib import Path, PurePath

from qaic_ray.errors import RowError, UsageError
from qaic_ray.fleet.frozen_file import FrozenFile
from qaic_ray.fleet.input_lines import STDIN, check_readable, input_lines
from qaic_ray.fleet.jsonl import json_object, prompts_from_json_lines
from qaic_ray.fleet.parquet_prompts import PARQUET_MAGIC, prompts_from_parquet
from qaic_ray.fleet.prompt_fields import Draft, decoded
from qaic_ray.rows import Prompt, Row
from qaic_ray.sampling_params import SamplingParams

GREEDY = SamplingParams()

_PIPE = re.compile(r"(?<!\\)(\\*)\|")
_COMPRESSED = (".gz", ".zst")


class PromptFormat(str, Enum):
    """What a prompts file holds."""

    TEXT = "text"
    """A prompt on each line, as it stands."""
    JSONL = "jsonl"
    """A JSON object on each line, as the text of this module says."""
    OPENAI = "openai"
    """A request of the OpenAI batch format on each line, and nothing else."""
    PARQUET = "parquet"
    """A table with a column for each field."""


_FORMAT_OF_SUFFIX = {
    ".txt": PromptFormat.TEXT,
    ".json": PromptFormat.JSONL,
    ".jsonl": PromptFormat.JSONL,
    ".ndjson": PromptFormat.JSONL,
    ".parquet": PromptFormat.PARQUET,
}


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
    frozen: FrozenFile | None = None,
) -> Iterator[Prompt | Row]:
    r"""The prompts of a file, or of stdin for `-`; one item a line, so that index = line - 1.

    Lines end at `\n` or `\r\n`, and nothing else is stripped. An empty line is an error row; the
    newline at the very end begins no line. Bytes are UTF-8, with or without a byte order mark.

    Args:
        path: what to read.
        prompt_format: None means: the name says it (`.txt`, `.jsonl`, `.parquet`, with `.gz` or
            `.zst` behind it or not); where it does not, the first line does: a JSON object of one
            of the known kinds means JSONL, anything else text.
        sampling: the run's, for what a row's own fields leave open.
        frozen: the file as it was when the run began; without it, it is read as it is.

    Raises:
        UsageError: at once, when there is no such file, or none that may be read, or a parquet file
            without prompts; while reading, for parquet that is not a file.
        QaicRayError: while reading, when that fails.
    """
    path = os.fspath(path)
    if path != STDIN:
        check_readable(path)
        # What is read from a pipe to look at it is gone.
        if os.path.isfile(path) and (prompt_format or _kind_of_file(path)) is PromptFormat.PARQUET:
            return prompts_from_parquet(path, sampling, frozen)
    return _from_lines(path, prompt_format, sampling, frozen)


def _kind_of_file(path: str) -> PromptFormat | None:
    """PARQUET, or None for what only its lines can tell."""
    with open(path, "rb") as stream:
        has_magic = stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    is_named = PurePath(path).suffix.lower() == ".parquet"
    return PromptFormat.PARQUET if has_magic or is_named else None


def _from_lines(
    path: str,
    prompt_format: PromptFormat | None,
    sampling: SamplingParams,
    frozen: FrozenFile | None,
) -> Iterator[Prompt | Row]:
    lines = input_lines(path, frozen)
    first = next(lines, None)
    if first is None:
        return
    name = "stdin" if path == STDIN else PurePath(path).name
    known = prompt_format or _recognised(path, first)
    lines = chain([first], lines)
    if known is PromptFormat.PARQUET:
        raise UsageError(
            f"The prompts from {name} are parquet in a stream, and parquet is read from a file: "
            "save it unpacked and give its name."
        )
    if known is PromptFormat.TEXT:
        yield from _numbered(lines, name)
    else:
        only_requests = known is PromptFormat.OPENAI
        yield from prompts_from_json_lines(name, lines, sampling, only_requests=only_requests)


def _recognised(path: str, first_line: bytes) -> PromptFormat:
    if first_line.startswith(PARQUET_MAGIC):
        return PromptFormat.PARQUET
    name = PurePath(path)
    if name.suffix.lower() in _COMPRESSED:
        name = name.with_suffix("")
    named = _FORMAT_OF_SUFFIX.get(name.suffix.lower())
    if named is not None:
        return named
    try:
        fields = json_object(decoded(first_line))
    except RowError:
        return PromptFormat.TEXT
    is_known = not fields.keys().isdisjoint(("prompt", "messages", "custom_id"))
    return PromptFormat.JSONL if is_known else PromptFormat.TEXT


def _numbered(texts: Iterable[str | bytes], name: str | None = None) -> Iterator[Prompt | Row]:
    for index, text in enumerate(texts):
        draft = Draft(index, text)
        item: Prompt | Row
        try:
            draft.text = decoded(text)
            item = draft.prompt()
        except RowError as error:
            item = draft.error_row(f"{name} line {index + 1}: {error}" if name else str(error))
        yield item
