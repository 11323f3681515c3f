"""A row of input while it is read, in whatever format it came: its prompt, its id, its fields.

What is wrong with one is a `RowError` with a sentence for the row's author.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qaic_ray.errors import RowError
from qaic_ray.formats import lines, row_fields
from qaic_ray.formats.row_fields import Document, as_type, check_unicode, json_type, not_offered
from qaic_ray.rows import ROW_ALONE, ChatOptions, ErrorClass, Message, Prompt, Row
from qaic_ray.sampling_params import FIELDS, MAX_NAME_CHARS, SamplingParams
from qaic_ray.sampling_params.structured_outputs import FIELD as STRUCTURED
from qaic_ray.sampling_params.structured_outputs import document_of_response_format

DEFAULT_CHAT = ChatOptions()
"""What holds where neither the run nor the row says anything."""

T = TypeVar("T")

_MAX_SHOWN_CHARS = 2**16  # of a row that cannot be read, in the error row's `prompt`
_MAX_EXACT = 2**53  # up to here every whole number is a float
_MOST_KNOWN = 1024


class Draft:
    """A row of input while it is read; it holds what an error row would show.

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

    def decoded(self) -> str:
        """The raw line as text.

        Raises:
            RowError: it is too long, or not UTF-8.
        """
        line = self._raw
        if isinstance(line, str):
            return line
        if len(line) > lines.MAX_LINE_BYTES:
            raise RowError(f"The line is longer than {lines.MAX_LINE_BYTES >> 20} MiB.")
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
        if num_chars > lines.MAX_LINE_BYTES:
            raise RowError(f"The prompt is longer than {lines.MAX_LINE_BYTES >> 20} MiB.")
        return Prompt(self._index, text, self.id, self.messages, sampling, chat)

    def read(self, read: Callable[[Draft, T], Prompt], given: T, place: str = "") -> Prompt | Row:
        """What a reader makes of the row; what it raises becomes an error row, for no card.

        Args:
            read: makes the prompt of this draft.
            given: what it reads.
            place: of the row in its input; it stands before the error.
        """
        try:
            with ROW_ALONE:
                return read(self, given)
        except RowError as error:
            said = _writable(f"{place}{error}")
        shown = self.text
        if shown is None or len(shown) > lines.MAX_LINE_BYTES:
            start = (self._raw if shown is None else shown)[: 4 * _MAX_SHOWN_CHARS]
            shown = _writable(start)[:_MAX_SHOWN_CHARS]
        prompt = Prompt(self._index, _writable(shown), self.id, self.messages)
        return Row.failed(prompt, said, attempts=0, error_class=ErrorClass.MALFORMED)


@dataclass
class AskedFields:
    """The fields that a row has.

    Attributes:
        sampling: fields of `SamplingParams`, by our names.
        chat: fields of `ChatOptions`, by transformers' names.
        others: fields whose meaning depends on other ones.
        names: a sampling field's name in the row.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    chat: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class OwnFields:
    """Reads rows, whose fields go before the run's.

    Args:
        sampling: the run's.
        chat: the run's.
    """

    def __init__(self, sampling: SamplingParams, chat: ChatOptions = DEFAULT_CHAT) -> None:
        self._sampling = sampling
        self._chat = chat
        self._known: dict[str, SamplingParams] = {}

    def read_row(self, draft: Draft, document: Document) -> Prompt:
        """The prompt of a row that has `prompt` or `messages`, perhaps an `id`, and fields.

        Raises:
            RowError: saying what is wrong with it.
        """
        draft.id = row_id(document)
        draft.read_prompt(document)
        return self.prompt(draft, document)

    def prompt(self, draft: Draft, fields: Document, *, only_ours: bool = False) -> Prompt:
        """The prompt of a draft that has read its text or messages.

        Args:
            draft: of the row.
            fields: the object that holds its fields.
            only_ours: an unknown key is an error.
        """
        is_chat = draft.messages is not None
        asked = read_fields(fields, is_chat=is_chat, only_ours=only_ours)
        return draft.prompt(self.sampling(asked), self.chat(asked))

    def sampling(self, asked: AskedFields) -> SamplingParams | None:
        """The row's sampling parameters; None where they are the run's.

        Raises:
            RowError: for a value that is not allowed.
        """
        params = self._params(asked) if asked.sampling else None
        if asked.others.get("do_sample") and (params or self._sampling).is_greedy:
            raise RowError('"do_sample" is true: say with which "temperature", it is 0 here.')
        return params

    def chat(self, asked: AskedFields) -> ChatOptions | None:
        """The row's options of the chat template; None where they are the run's.

        Raises:
            RowError: it both continues the last message and begins another one.
        """
        if not asked.chat:
            return None
        goes_on = asked.chat.get("continue_final_message", self._chat.continue_final_message)
        begins = asked.chat.get("add_generation_prompt")
        if goes_on and begins:
            raise RowError(
                '"continue_final_message" and "add_generation_prompt" are both true: keep one.'
            )
        if begins is None:
            begins = not goes_on and self._chat.add_generation_prompt
        kwargs = asked.chat.get("chat_template_kwargs", {})
        options = ChatOptions(
            add_generation_prompt=begins,
            continue_final_message=goes_on,
            template_kwargs={**self._chat.template_kwargs, **kwargs},
        )
        return None if options == self._chat else options

    def _params(self, asked: AskedFields) -> SamplingParams:
        # The rows of a file often have the same. As text, because 1, 1.0 and True are equal.
        text = repr(asked.sampling)
        if text in self._known:
            return self._known[text]
        try:
            params = self._sampling.updated(asked.sampling)
        except RowError as error:
            sentence = str(error)
            said = asked.names.get(sentence.partition(" ")[0])
            if said is None or sentence.startswith(said):
                raise
            raise RowError(f'"{said}" is wrong: {sentence}') from error
        if len(self._known) < _MOST_KNOWN:
            self._known[text] = params
        return params


def read_fields(document: Document, *, is_chat: bool, only_ours: bool = False) -> AskedFields:
    """The fields of a row.

    Args:
        document: the row, or the object in it that has the fields.
        is_chat: the row is a conversation.
        only_ours: an unknown key is an error, and not the user's own.

    Raises:
        RowError: naming the field that is wrong, or not offered.
    """
    asked = AskedFields()
    _collect(document, asked, within="", only_ours=only_ours)
    if asked.others:
        _settle_others(asked, is_chat=is_chat)
    if "logprobs" in asked.sampling or "top_logprobs" in asked.others:
        _settle_logprobs(asked)
    return asked


def _collect(document: Document, asked: AskedFields, *, within: str, only_ours: bool) -> None:
    for key, value in document.items():
        if value is None or key in row_fields.PROMPT or key in row_fields.NO_EFFECT:
            continue
        said = within + key
        if key in FIELDS or key in row_fields.ALIASES:
            _take_sampling(asked, key, value, said)
        elif key in row_fields.CHAT:
            asked.chat[key] = row_fields.chat_value(said, key, value)
        elif key in row_fields.SPECIAL:
            asked.others[key] = value
        elif key in row_fields.NOT_OFFERED:
            row_fields.NOT_OFFERED[key].check(said, value, only_ours=only_ours)
        elif row_fields.holds_fields(key, value):
            _collect(as_type(dict, f'"{said}"', value), asked, within=f"{said}.", only_ours=True)
        elif error := row_fields.mistake(key):
            raise RowError(error)
        elif only_ours:
            name = said if len(said) <= MAX_NAME_CHARS else f"{said[:MAX_NAME_CHARS]}..."
            raise RowError(
                f'"{name}" is not offered, and the answer would be another: leave it out.'
            )


def _take_sampling(asked: AskedFields, key: str, value: Any, said: str) -> None:
    """Take a sampling field, which may stand under two names if they agree."""
    name = row_fields.ALIASES.get(key, "max_tokens" if key == "max_completion_tokens" else key)
    if key in row_fields.UNLIMITED and value in (-1, -2):
        value = None
    if key == "n_probs" and value == 0:
        return
    if name in asked.sampling and asked.sampling[name] != value:
        raise RowError(f"{asked.names[name]} and {said} are the same: give one of them.")
    asked.sampling[name], asked.names[name] = value, said


def _settle_others(asked: AskedFields, *, is_chat: bool) -> None:
    """Check `best_of`, `add_special_tokens` and `do_sample`, which depend on other fields."""
    best_of = asked.others.get("best_of", 1)
    if best_of not in (1, asked.sampling.get("n")):
        raise not_offered("best_of", best_of, '"n" says how many answers there are; leave it out')
    adds_special = asked.others.get("add_special_tokens")
    if adds_special is not None and adds_special is is_chat:
        instead = (
            "a prompt begins as the model's tokenizer begins one, and a conversation as its "
            "template does; leave it out"
        )
        raise not_offered("add_special_tokens", adds_special, instead)
    if as_type(bool, '"do_sample"', asked.others.get("do_sample", True)) is False:
        asked.sampling["temperature"] = 0.0
    _settle_form(asked)


def _settle_form(asked: AskedFields) -> None:
    """Make `structured_outputs` of other programs' names for the form of an answer."""
    documents: dict[str, Any] = {
        name: {kind: asked.others[name]}
        for name, kind in row_fields.STRUCTURED.items()
        if asked.others.get(name) not in (None, "", False, [])
    }
    name = row_fields.RESPONSE_FORMAT
    if (document := document_of_response_format(asked.others.get(name))) is not None:
        documents[name] = document
    said = [*documents, *([STRUCTURED] if STRUCTURED in asked.sampling else [])]
    if len(said) > 1:
        raise RowError(f"{' and '.join(said)} all say the form of the answer: give one of them.")
    for name, document in documents.items():
        asked.sampling[STRUCTURED], asked.names[STRUCTURED] = document, name


def _settle_logprobs(asked: AskedFields) -> None:
    """Make a number of `logprobs`, which the OpenAI interface splits: true, with `top_logprobs`."""
    wanted, num_top = asked.sampling.get("logprobs"), asked.others.get("top_logprobs")
    if wanted is True:
        asked.sampling["logprobs"] = 0 if num_top is None else num_top
    elif wanted is None or wanted is False:
        if num_top is not None and num_top != 0:
            raise RowError('"top_logprobs" needs "logprobs": true.')
        asked.sampling["logprobs"] = None
    elif num_top not in (None, wanted):
        raise RowError('"logprobs" and "top_logprobs" say different numbers: give one of them.')


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


def _text(document: Document) -> str:
    if "prompt" not in document:
        raise RowError('There is no "prompt" and no "messages" in it.')
    text = document["prompt"]
    if isinstance(text, list):
        if len(text) != 1 or not isinstance(text[0], str):
            raise RowError('"prompt" is a list: give each of its texts a row of its own.')
        (text,) = text
    return as_type(str, '"prompt"', text)


def _messages(document: Document) -> tuple[Message, ...] | None:
    messages = document.get("messages")
    if messages is None:
        return None
    if document.get("prompt") is not None:
        raise RowError('It has both "prompt" and "messages": keep one of them.')
    if not as_type(list, '"messages"', messages):
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
    content = message.get("content")
    if isinstance(content, list):
        content = "".join([_part(number, part) for part in content])
    for key, value in message.items():
        if key not in _TURN and value not in _NOTHING:
            raise RowError(
                f'Message {number} has "{key[:80]}": only "role" and "content" can be answered.'
            )
    role = as_type(str, f'Message {number}: "role"', message.get("role"))
    content = as_type(str, f'Message {number}: "content"', content)
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
