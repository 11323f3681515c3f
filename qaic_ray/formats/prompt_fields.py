"""A row of input while it is read: its prompt and its id, checked, in whatever format it came.

What is wrong with one is a `RowError` with a sentence for the row's author.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from qaic_ray.errors import RowError
from qaic_ray.formats.lines import LIMITS
from qaic_ray.rows import ROW_ALONE, ChatOptions, ErrorClass, Message, Prompt, Row
from qaic_ray.sampling_params import SamplingParams

Document = Mapping[str, Any]
"""A row of input as a JSON object."""

T = TypeVar("T")

_MAX_SHOWN_CHARS = 2**16  # of a row that cannot be read, in the error row's `prompt`
_MAX_EXACT = 2**53  # up to here every whole number is a float

_JSON_TYPES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Draft:
    """A row of input while it is read; it holds what an error row would show.

    Args:
        index: its place in the input.
        raw: all of it, as it stands.
        max_bytes: the longest line or prompt.
    """

    __slots__ = ("_index", "_max_bytes", "_raw", "id", "messages", "text")

    def __init__(self, index: int, raw: str | bytes, max_bytes: int = LIMITS.num_bytes) -> None:
        self._index = index
        self._raw = raw
        self._max_bytes = max_bytes
        self.id: str | None = None
        self.text: str | None = None
        self.messages: tuple[Message, ...] | None = None

    def decoded(self) -> str:
        """The raw line as text.

        Raises:
            RowError: it is too long, or not UTF-8.
        """
        line = self._raw
        if isinstance(line, str):
            return line
        if len(line) > self._max_bytes:
            raise RowError(f"The line is longer than {self._max_bytes >> 20} MiB.")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(
                f"Not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}."
            ) from error

    def read_prompt(self, document: Document) -> None:
        """Take the prompt from the fields `prompt` or `messages`."""
        self.messages = _messages(document)
        self.text = _text(document) if self.messages is None else _last_said(self.messages)

    def prompt(
        self, sampling: SamplingParams | None = None, chat: ChatOptions | None = None
    ) -> Prompt:
        """The row as a prompt.

        Raises:
            RowError: it is empty, cannot be encoded, or is longer than a line may be.
        """
        text = self.text or ""
        if self.messages is None:
            if not text:
                raise RowError("The prompt is empty.")
            check_unicode("prompt", text)
        num_chars = sum(len(m["content"]) for m in self.messages or ()) or len(text)
        if num_chars > self._max_bytes:
            raise RowError(f"The prompt is longer than {self._max_bytes >> 20} MiB.")
        return Prompt(self._index, text, self.id, self.messages, sampling, chat)

    def read(self, read: Callable[[Draft, T], Prompt], given: T, place: str = "") -> Prompt | Row:
        """What a reader makes of the row; what it raises becomes the error row.

        Args:
            read: makes the prompt of this draft.
            given: what it reads.
            place: of the row in its input; it stands before the error.
        """
        try:
            with ROW_ALONE:
                return read(self, given)
        except RowError as error:
            return self.error_row(f"{place}{error}")

    def error_row(self, error: str) -> Row:
        """The row with an error, which goes to no card."""
        shown = self.text
        if shown is None or len(shown) > self._max_bytes:
            start = (self._raw if shown is None else shown)[: 4 * _MAX_SHOWN_CHARS]
            shown = _writable(start)[:_MAX_SHOWN_CHARS]
        prompt = Prompt(self._index, _writable(shown), self.id, self.messages)
        return Row.failed(prompt, _writable(error), attempts=0, error_class=ErrorClass.MALFORMED)


def _writable(text: str | bytes) -> str:
    """A text that UTF-8 can hold: an error may quote half of a surrogate pair."""
    encoded = text.encode(errors="replace") if isinstance(text, str) else text
    return encoded.decode(errors="replace")


def row_id(document: Document) -> str | None:
    """The field `id`, a string or a whole number; 1.0 counts as 1, for tables with gaps."""
    id_ = document.get("id")
    if id_ is None:
        return None
    if isinstance(id_, float) and id_.is_integer() and abs(id_) <= _MAX_EXACT:
        id_ = int(id_)
    if type(id_) not in (str, int):
        raise RowError(f'"id" is {json_type(id_)}, not a string or a whole number.')
    check_unicode("id", str(id_))
    return str(id_)


def check_unicode(what: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and UTF-8 cannot."""
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
    if isinstance(text, list):
        if len(text) != 1 or not isinstance(text[0], str):
            raise RowError('"prompt" is a list: give each of its texts a row of its own.')
        (text,) = text
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


_TURN = ("role", "content")
_NOTHING: tuple[object, ...] = (None, "", [], {}, False)
"""Values of a message's other keys that change nothing."""


def _message(number: int, message: object) -> Message:
    if not isinstance(message, dict):
        raise RowError(
            f'Message {number} is {json_type(message)}, not an object with "role" and "content".'
        )
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = "".join([_part(number, part) for part in content])
    for key, value in message.items():
        if key not in _TURN and value not in _NOTHING:
            raise RowError(
                f'Message {number} has "{key[:80]}": only "role" and "content" can be answered.'
            )
    if not isinstance(role, str) or not isinstance(content, str):
        name = "content" if isinstance(role, str) else "role"
        raise RowError(
            f'Message {number}: "{name}" is {json_type(message.get(name))}, not a string.'
        )
    check_unicode(f"message {number}", role + content)
    return {"role": role, "content": content}


def _part(number: int, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RowError(
            f'Message {number}: a part of its "content" is not {{"type": "text", "text": "..."}}, '
            "and only text can be answered."
        )
    return text


def _last_said(messages: tuple[Message, ...]) -> str:
    """The user's last message, which the row of a conversation shows as its prompt."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else messages[-1]["content"]
