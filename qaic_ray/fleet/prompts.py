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
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from qaic_ray.errors import QaicRayError, RowError, UsageError
from qaic_ray.rows import Message, Prompt, Row
from qaic_ray.sampling_params import FIELDS, SamplingParams

STDIN = "-"
GREEDY = SamplingParams()

_PIPE = re.compile(r"(?<!\\)(\\*)\|")
_BOM = b"\xef\xbb\xbf"

_NOT_OFFERED = {
    "best_of", "do_sample", "logit_bias", "max_new_tokens", "response_format", "sampling_params",
    "tools", "top_logprobs",
}  # fmt: skip
"""What other programs take beside a prompt, and answer otherwise for."""


class PromptFormat(str, Enum):
    """What a prompts file holds on each line."""

    TEXT = "text"
    """A prompt, as it stands."""
    JSONL = "jsonl"
    """A JSON object, as the text of this module says."""


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
) -> Iterator[Prompt | Row]:
    r"""The prompts of a file, or of stdin for `-`; one item a line, so that index = line - 1.

    Lines end at `\n` or `\r\n`, and nothing else is stripped. An empty line is an error row; the
    newline at the very end begins no line. Bytes are UTF-8, with or without a byte order mark.

    Args:
        path: what to read.
        prompt_format: None means JSONL for a name ending in `.jsonl`, text for all else and stdin.
        sampling: the run's, for what a row's own fields leave open.

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
    return (_from_json_line(name, index, line, sampling) for index, line in enumerate(lines))


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


def _from_json_line(name: str, index: int, line: bytes, sampling: SamplingParams) -> Prompt | Row:
    where = f"{name} line {index + 1}"
    try:
        document = _object(_decoded(line))
        messages = _messages(document)
        text = _text(document) if messages is None else _last_said(messages)
        id_ = _id(document)
    except RowError as error:
        return _error_row(index, line, f"{where}: {error}")
    try:
        own = _sampling(document, sampling)
        if messages is None:
            return _prompt(index, text, id_, own)
        return Prompt(index, text, id_, messages, own)
    except RowError as error:
        row = _error_row(index, text, f"{where}: {error}")
        return replace(row, id=id_, messages=messages)


def _object(line: str) -> dict[str, Any]:
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
    return document


def _text(document: Mapping[str, Any]) -> str:
    if "prompt" not in document:
        raise RowError('There is no "prompt" and no "messages" in it.')
    text = document["prompt"]
    if not isinstance(text, str):
        raise RowError(f'"prompt" is {_json_type(text)}, not a string.')
    return text


def _id(document: Mapping[str, Any]) -> str | None:
    id_ = document.get("id")
    if id_ is None:
        return None
    if type(id_) not in (str, int):
        raise RowError(f'"id" is {_json_type(id_)}, not a string or a whole number.')
    _check_unicode("id", str(id_))
    return str(id_)


def _messages(document: Mapping[str, Any]) -> tuple[Message, ...] | None:
    messages = document.get("messages")
    if messages is None:
        return None
    if document.get("prompt") is not None:
        raise RowError('It has both "prompt" and "messages": keep one of them.')
    if not isinstance(messages, list):
        raise RowError(f'"messages" is {_json_type(messages)}, not a list.')
    if not messages:
        raise RowError('"messages" is an empty list.')
    return tuple(_message(f"Message {i}", message) for i, message in enumerate(messages, start=1))


def _message(name: str, message: object) -> Message:
    if not isinstance(message, dict):
        raise RowError(f'{name} is {_json_type(message)}, not an object with "role" and "content".')
    for key, value in message.items():
        if key not in ("role", "content") and value is not None:
            raise RowError(f'{name} has "{key}": only "role" and "content" can be answered.')
    role = message.get("role")
    if not isinstance(role, str):
        raise RowError(f'{name}: "role" is {_json_type(role)}, not a string.')
    content = message.get("content")
    if isinstance(content, list):
        content = "".join([_part(name, part) for part in content])
    if not isinstance(content, str):
        raise RowError(f'{name}: "content" is {_json_type(content)}, not a string.')
    _check_unicode(name.lower(), role + content)
    return {"role": role, "content": content}


def _part(name: str, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RowError(
            f'{name}: a part of its "content" is not {{"type": "text", "text": "..."}}, and only '
            "text can be answered."
        )
    return text


def _last_said(messages: tuple[Message, ...]) -> str:
    """What the row of a conversation shows as its prompt."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else messages[-1]["content"]


def _sampling(document: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams | None:
    """The row's own parameters, None where it says nothing about them."""
    for key in document:
        mistake = _mistake(key)
        if mistake is not None:
            raise RowError(mistake)
    own = {key: value for key, value in document.items() if key in FIELDS and value is not None}
    return defaults.updated(own) if own else None


@lru_cache(maxsize=1024)  # the rows of a file have the same keys
def _mistake(key: str) -> str | None:
    """What is wrong with a key that was meant for a sampling field."""
    if key in FIELDS:
        return None
    if key in _NOT_OFFERED:
        return f'"{key}" is not offered; the sampling fields are {", ".join(FIELDS)}.'
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, FIELDS, n=1, cutoff=0.88)
    if not near:
        return None
    return (
        f'Unknown sampling field "{key}": write "{near[0]}", or give a key of yours another name.'
    )


def _prompt(
    index: int, text: str, id_: str | None = None, sampling: SamplingParams | None = None
) -> Prompt:
    if not text:
        raise RowError("The prompt is empty.")
    _check_unicode("prompt", text)
    return Prompt(index, text, id_, sampling=sampling)


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


def _error_row(index: int, raw: str | bytes, error: str) -> Row:
    """The row of input that no card gets to see; its `prompt` is what was there, made writable."""
    if isinstance(raw, str):
        raw = raw.encode(errors="replace")
    return Row.failed(Prompt(index, raw.decode(errors="replace")), error, attempts=0)


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
