"""The fields of a row of input, each checked. Knows neither files nor formats.

Whatever is wrong with one is a `RowError` with a sentence for the row's author.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from qaic_ray.errors import RowError
from qaic_ray.fleet.input_lines import MAX_LINE_BYTES
from qaic_ray.rows import ErrorClass, Message, Prompt, Row
from qaic_ray.sampling_params import FIELDS, SamplingParams

Document = Mapping[str, Any]
"""A row of input, as JSON has it."""

MAX_SHOWN_CHARS = 2**16
"""Of a row that cannot be read, in the error row's `prompt`."""

_NOT_OFFERED = {
    "best_of", "do_sample", "logit_bias", "max_new_tokens", "response_format", "sampling_params",
    "tools", "top_logprobs",
}  # fmt: skip
"""What other programs take beside a prompt, and answer otherwise for."""

_SAMPLING = frozenset(FIELDS)

_JSON_TYPES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Draft:
    """A row of input while it is read: what its error row shows, should it come to that.

    Args:
        index: its place in the input.
        raw: all of it, as it stands.
    """

    __slots__ = ("_index", "_raw", "id", "messages", "text")

    def __init__(self, index: int, raw: str | bytes) -> None:
        self._index = index
        self._raw = raw
        self.id: str | None = None
        self.text: str | None = None
        self.messages: tuple[Message, ...] | None = None

    def read_prompt(self, document: Document) -> None:
        """Take the prompt, a text or a conversation, from the fields of these names."""
        self.messages = _messages(document)
        self.text = _text(document) if self.messages is None else _last_said(self.messages)

    def prompt(self, sampling: SamplingParams | None = None) -> Prompt:
        """The row as a prompt.

        Raises:
            RowError: it is an empty text, or one that cannot be encoded.
        """
        text = self.text or ""
        if self.messages is None:
            if not text:
                raise RowError("The prompt is empty.")
            check_unicode("prompt", text)
        return Prompt(self._index, text, self.id, self.messages, sampling)

    def error_row(self, error: str) -> Row:
        """The row of input that no card gets to see."""
        shown = _writable(self._raw)[:MAX_SHOWN_CHARS] if self.text is None else self.text
        prompt = Prompt(self._index, _writable(shown), self.id, self.messages)
        return Row.failed(prompt, _writable(error), attempts=0, error_class=ErrorClass.MALFORMED)


def _writable(text: str | bytes) -> str:
    """What was there, as UTF-8 can have it: an error may quote half of a surrogate pair."""
    encoded = text.encode(errors="replace") if isinstance(text, str) else text
    return encoded.decode(errors="replace")


_MOST_KNOWN = 1024


class OwnSampling:
    """Sampling parameters of rows: a row's own fields over the run's.

    Args:
        defaults: the run's.
    """

    def __init__(self, defaults: SamplingParams) -> None:
        self._defaults = defaults
        self._known: dict[str, SamplingParams] = {}

    def __call__(self, fields: dict[str, Any]) -> SamplingParams | None:
        """The row's parameters, None where it has no fields.

        Raises:
            RowError: for a value that is not allowed.
        """
        if not fields:
            return None
        # The rows of a file often have the same. As text, because 1, 1.0 and True are equal.
        text = repr(fields)
        params = self._known.get(text)
        if params is None:
            params = self._defaults.updated(fields)
            if len(self._known) < _MOST_KNOWN:
                self._known[text] = params
        return params


def sampling_fields(document: Document) -> dict[str, Any]:
    """The sampling fields of a row that have a value."""
    return {key: value for key, value in document.items() if key in _SAMPLING and value is not None}


@lru_cache(maxsize=1024)  # the rows of a file have the same keys
def mistake(key: str) -> str | None:
    """What is wrong with a key that was meant for a sampling field."""
    if key in _SAMPLING:
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


def decoded(line: str | bytes) -> str:
    """A line of input as text."""
    if isinstance(line, str):
        return line
    if len(line) > MAX_LINE_BYTES:
        raise RowError(f"The line is longer than {MAX_LINE_BYTES >> 20} MiB.")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"Not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}."
        ) from error


def row_id(document: Document) -> str | None:
    """The field `id`, a string or a whole number."""
    id_ = document.get("id")
    if id_ is None:
        return None
    if type(id_) not in (str, int):
        raise RowError(f'"id" is {json_type(id_)}, not a string or a whole number.')
    check_unicode("id", str(id_))
    return str(id_)


def check_unicode(what: str, text: str) -> None:
    """Refuse what JSON can write and UTF-8 cannot."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"The {what} holds half of a surrogate pair, not a character.") from error


def json_type(value: object) -> str:
    """The type of a value, with its article."""
    if value is None:
        return "null"
    return _JSON_TYPES.get(type(value)) or f"a {type(value).__name__}"


def _text(document: Document) -> str:
    if "prompt" not in document:
        raise RowError('There is no "prompt" and no "messages" in it.')
    text = document["prompt"]
    if not isinstance(text, str):
        raise RowError(f'"prompt" is {json_type(text)}, not a string.')
    return text


def _messages(document: Document) -> tuple[Message, ...] | None:
    messages = document.get("messages")
    if messages is None:
        return None
    if document.get("prompt") is not None:
        raise RowError('It has both "prompt" and "messages": keep one of them.')
    if not isinstance(messages, list):
        raise RowError(f'"messages" is {json_type(messages)}, not a list.')
    if not messages:
        raise RowError('"messages" is an empty list.')
    return tuple(_message(i, message) for i, message in enumerate(messages, start=1))


def _message(number: int, message: object) -> Message:
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            content = "".join([_part(number, part) for part in content])
        is_known = len(message) == 2 or not _others(message)
        if is_known and isinstance(role, str) and isinstance(content, str):
            check_unicode(f"message {number}", role + content)
            return {"role": role, "content": content}
    raise RowError(f"Message {number}{_whats_wrong(message)}")


def _whats_wrong(message: object) -> str:
    """The rest of a sentence about a message that cannot be read."""
    if not isinstance(message, dict):
        return f' is {json_type(message)}, not an object with "role" and "content".'
    if others := _others(message):
        return f' has "{others[0]}": only "role" and "content" can be answered.'
    name = "content" if isinstance(message.get("role"), str) else "role"
    return f': "{name}" is {json_type(message.get(name))}, not a string.'


def _others(message: Document) -> list[str]:
    return [k for k, v in message.items() if k not in ("role", "content") and v is not None]


def _part(number: int, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RowError(
            f'Message {number}: a part of its "content" is not {{"type": "text", "text": "..."}}, '
            "and only text can be answered."
        )
    return text


def _last_said(messages: tuple[Message, ...]) -> str:
    """What the row of a conversation shows as its prompt."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else messages[-1]["content"]
