"""The fields of a row beside its prompt, read in one place for every format.

- A field of ours (`SamplingParams`, `ChatOptions`), by our name or another program's: done.
- A field of another program's that would change the answer: refused by its name, unless its value
  changes nothing (`num_beams: 1`).
- A misspelt field of ours (`temprature`, `topK`): an error; ignoring it would give other answers
  than were asked for.
- Any other key is the user's own, and is ignored.

What is wrong with a field is a `RowError`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from qaic_ray.errors import RowError, UsageError
from qaic_ray.files.documents import shown
from qaic_ray.formats.foreign_fields import (
    ALIASES,
    CHAT,
    MAYBE_NESTED,
    NESTED,
    NO_EFFECT,
    NOT_OFFERED,
    UNLIMITED,
    NotOffered,
)
from qaic_ray.formats.prompt_fields import Document, Draft, check_unicode, json_type, row_id
from qaic_ray.rows import ChatOptions, Prompt
from qaic_ray.sampling_params import FIELDS, MAX_NAME_CHARS, SamplingParams

DEFAULT_CHAT = ChatOptions()
"""What holds where neither the run nor the row says anything."""

_MAX_DEPTH = 32
_MOST_KNOWN = 1024

_SAMPLING = frozenset(FIELDS)
_SPECIAL = frozenset({"add_special_tokens", "best_of", "do_sample", "top_logprobs"})
_PROMPT = frozenset({"prompt", "messages"})
_ONCE = ("prompt", "messages", "id")
_NAMES = (*FIELDS, *ALIASES, *CHAT)
_KNOWN = frozenset({*_NAMES, *_SPECIAL, *NESTED, *MAYBE_NESTED, *NOT_OFFERED})


@dataclass
class Asked:
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

    def take(self, name: str, value: Any, said: str) -> None:
        """Take a sampling field, which may stand under two names if they agree."""
        if name in self.sampling and self.sampling[name] != value:
            raise RowError(f"{self.names[name]} and {said} are the same: give one of them.")
        self.sampling[name], self.names[name] = value, said


def is_known(key: str) -> bool:
    """Whether a key is a field of ours or of another program's."""
    return key in _KNOWN


def read_fields(document: Document, *, is_chat: bool, only_ours: bool = False) -> Asked:
    """The fields of a row.

    Args:
        document: the row, or the object in it that has the fields.
        is_chat: the row is a conversation.
        only_ours: an unknown key is an error, and not the user's own.

    Raises:
        RowError: naming the field that is wrong, or not offered.
    """
    asked = Asked()
    _collect(document, asked, within="", only_ours=only_ours)
    if asked.others:
        _settle_others(asked, is_chat=is_chat)
    if "logprobs" in asked.sampling or "top_logprobs" in asked.others:
        _settle_logprobs(asked)
    return asked


def _collect(document: Document, asked: Asked, *, within: str, only_ours: bool) -> None:
    for key, value in document.items():
        if value is None or key in _PROMPT or key in NO_EFFECT:
            continue
        said = within + key
        if key in _SAMPLING or key in ALIASES:
            _take_sampling(asked, key, value, said)
        elif key in CHAT:
            asked.chat[key] = _chat_value(said, key, value)
        elif key in _SPECIAL:
            asked.others[key] = value
        elif key in NOT_OFFERED:
            if not _is_neutral(NOT_OFFERED[key], value, only_ours=only_ours):
                raise _not_offered(key, said, value)
        elif key in NESTED or (key in MAYBE_NESTED and _is_of_fields(value)):
            if not isinstance(value, dict):
                raise RowError(f'"{said}" is {json_type(value)}, not an object.')
            _collect(value, asked, within=f"{said}.", only_ours=True)
        elif error := mistake(key):
            raise RowError(error)
        elif only_ours:
            raise RowError(
                f"{_quoted(said)} is not offered, and the answer would be another: leave it out."
            )


def _take_sampling(asked: Asked, key: str, value: Any, said: str) -> None:
    name = ALIASES.get(key, "max_tokens" if key == "max_completion_tokens" else key)
    if key in UNLIMITED and value in (-1, -2):
        value = None
    if key == "n_probs" and value == 0:
        return
    asked.take(name, value, said)


def _is_of_fields(value: Any) -> bool:
    """Whether an object holds fields; `{"n": "north", "s": "south"}` does not."""
    return isinstance(value, dict) and any(
        is_known(key) and not (key == "n" and isinstance(item, str)) for key, item in value.items()
    )


def _is_neutral(rule: NotOffered, value: Any, *, only_ours: bool) -> bool:
    """Whether a value changes nothing, or is the user's own."""
    if isinstance(value, str):
        value = _as_number(value)
    return value in rule.neutral or not (only_ours or rule.is_meant(value))


def _as_number(text: str) -> Any:
    """A text that is a number or true or false, as that; any other text as it is."""
    try:
        value = json.loads(text.lower()) if len(text) <= MAX_NAME_CHARS else text
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _not_offered(key: str, said: str, value: Any) -> RowError:
    return RowError(f'"{said}" is not offered (given: {shown(value)}): {NOT_OFFERED[key].instead}.')


def _settle_others(asked: Asked, *, is_chat: bool) -> None:
    """Check `best_of`, `add_special_tokens` and `do_sample`, which depend on other fields."""
    best_of = asked.others.get("best_of", 1)
    if best_of not in (1, asked.sampling.get("n")):
        raise RowError(
            f'"best_of" is not offered (given: {shown(best_of)}): "n" says how many answers there '
            "are; leave it out."
        )
    adds_special = asked.others.get("add_special_tokens")
    if adds_special is not None and adds_special is is_chat:
        raise RowError(
            f'"add_special_tokens" is not offered (given: {shown(adds_special)}): a prompt begins '
            "as the model's tokenizer begins one, and a conversation as its template does; leave "
            "it out."
        )
    draws = asked.others.get("do_sample")
    if draws is not None and not isinstance(draws, bool):
        raise RowError(f'"do_sample" is {json_type(draws)}, not true or false.')
    if draws is False:
        asked.sampling["temperature"] = 0.0


def _settle_logprobs(asked: Asked) -> None:
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


def _chat_value(said: str, key: str, value: Any) -> Any:
    if key != "chat_template_kwargs":
        if not isinstance(value, bool):
            raise RowError(f'"{said}" is {json_type(value)}, not true or false.')
        return value
    if not isinstance(value, dict):
        raise RowError(f'"{said}" is {json_type(value)}, not an object.')
    if _is_deeper(value, _MAX_DEPTH):
        raise RowError(f'"{said}" is nested more than {_MAX_DEPTH} levels deep.')
    try:
        check_unicode(said, json.dumps(value, ensure_ascii=False))
    except TypeError as error:
        raise RowError(f'"{said}" holds what JSON has not: {error}.') from error
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return False
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inner)


@lru_cache(maxsize=1024)  # the rows of a file have the same keys
def mistake(key: str) -> str | None:
    """The error of a key that was probably meant for a field of ours; None for any other."""
    if is_known(key) or key in NO_EFFECT or len(key) > MAX_NAME_CHARS:
        return None
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, _NAMES, n=1, cutoff=0.88)
    if not near:
        return None
    name = ALIASES.get(near[0], near[0])
    return f'Unknown sampling field "{key}": write "{name}", or give a key of yours another name.'


def check_columns(name: str, columns: Sequence[str]) -> None:
    """Check that a table's columns name prompts, and no field of ours wrongly or twice.

    Raises:
        UsageError: naming the column.
    """
    for column in columns:
        if column.isprintable() and (error := mistake(column)):
            raise UsageError(f"{name}: {error}")
        if (column in _ONCE or is_known(column)) and columns.count(column) > 1:
            raise UsageError(f'{name} has several columns "{column}": keep one of them.')
    if _PROMPT.isdisjoint(columns):
        some = ", ".join(c[:40] if c.isprintable() else repr(c[:40]) for c in columns[:20])
        raise UsageError(
            f'{name} has no column "prompt" and no "messages": its columns are {some}.'
        )


def _quoted(key: str) -> str:
    return f'"{key}"' if len(key) <= MAX_NAME_CHARS else f'"{key[:MAX_NAME_CHARS]}..."'


def read_columns(columns: Sequence[str]) -> list[str]:
    """Those of a table's columns that are read; the others are the user's own."""
    return [name for name in columns if name in _ONCE or is_known(name)]


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

    def sampling(self, asked: Asked) -> SamplingParams | None:
        """The row's sampling parameters; None where they are the run's.

        Raises:
            RowError: for a value that is not allowed.
        """
        params = self._params(asked) if asked.sampling else None
        if asked.others.get("do_sample") and (params or self._sampling).is_greedy:
            raise RowError('"do_sample" is true: say with which "temperature", it is 0 here.')
        return params

    def chat(self, asked: Asked) -> ChatOptions | None:
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

    def _params(self, asked: Asked) -> SamplingParams:
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
