"""What a row may ask of token selection, in the field names of vLLM and of the OpenAI interface.

Plain frozen data, checked when it is made. Knows nothing of logits, tokenizers or engines.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qaic_ray.errors import RowError

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy (vLLM's threshold): dividing by them is meaningless."""

MAX_LOGPROBS = 20
"""Most alternatives a token's logprobs may list: the OpenAI limit, and vLLM's default."""

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one row are chosen and where the row ends. The defaults are greedy.

    Order of application (vLLM's): repetition, frequency and presence penalty, `min_tokens`,
    temperature, `min_p`, `top_k`, `top_p`, one draw.

    Raises:
        RowError: for a value that is of the wrong type or out of its range, naming the field.
    """

    n: int = 1
    """Answers per prompt; more than one needs a temperature."""
    max_tokens: int | None = None
    """Most generated tokens; None: as many as the context holds."""
    min_tokens: int = 0
    """Neither stop tokens nor stop strings end a row that has fewer generated tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Only the k most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt and the answer."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer already has."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time the answer already has it."""
    seed: int | None = None
    """Same seed, prompt and model: same text. None: drawn for the run."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside EOS."""
    include_stop_str_in_output: bool = False
    """Keep the stop string that ended the answer."""
    ignore_eos: bool = False
    """Go on after EOS."""
    logprobs: int | None = None
    """Give each token's logprob, and those of so many most likely ones."""

    def __post_init__(self) -> None:
        for name, (allows, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if not allows(value):
                raise RowError(f"{name} is {value!r}; allowed is {allowed}.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RowError(
                f"min_tokens is {self.min_tokens}; allowed is at most max_tokens, which is "
                f"{self.max_tokens}."
            )
        if self.n > 1 and self.is_greedy:
            raise RowError(
                f"n is {self.n}; allowed is 1 with temperature 0, which would give {self.n} equal "
                "answers: set a temperature."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken instead of drawing one."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that occurred before get other logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def is_plain(self) -> bool:
        """Whether the argmax of the raw logits, and nothing else, answers the row."""
        return (
            self.is_greedy
            and not self.has_penalties
            and self.min_tokens == 0
            and self.logprobs is None
        )

    def updated(self, json_fields: Mapping[str, Any]) -> SamplingParams:
        """These parameters with the fields of a JSON object in place of its own.

        `stop` may be one string, `max_completion_tokens` is another name of `max_tokens`, and null
        is a value only where None is (and an empty list for `stop` and `stop_token_ids`).

        Raises:
            RowError: for an unknown field, or as on construction.
        """
        unknown = next((name for name in json_fields if name not in FIELDS), None)
        if unknown is not None:
            close = difflib.get_close_matches(unknown, FIELDS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(FIELDS)}."
            raise RowError(f"{unknown!r} is no sampling parameter: {remedy}")
        changes = dict(json_fields)
        if _OTHER_NAME in changes:
            if "max_tokens" in changes:
                raise RowError(f"max_tokens and {_OTHER_NAME} are the same: give one of them.")
            changes["max_tokens"] = changes.pop(_OTHER_NAME)
        for name in ("stop", "stop_token_ids"):
            if name in changes:
                changes[name] = _as_tuple(changes[name])
        return replace(self, **changes)


_OTHER_NAME = "max_completion_tokens"

FIELDS: tuple[str, ...] = (*(field.name for field in fields(SamplingParams)), _OTHER_NAME)
"""The names `SamplingParams.updated` knows."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of the chosen token's probability, and the most likely tokens with theirs.

    `top` falls from the most likely one on; equal ones are in order of their ids. The chosen token
    need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _whole(low: int, high: int | None = None) -> Callable[[Any], bool]:
    def allows(value: Any) -> bool:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and low <= value and (high is None or value <= high)

    return allows


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], bool]:
    """Numbers from `low` (or, with `above`, greater than it) to `high`; never NaN or infinity."""

    def allows(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and low <= value <= high and not (above and value == low)

    return allows


def _or_none(allows: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or allows(value)


def _tuple_of(allows: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and all(allows(item) for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (_whole(1), "a whole number from 1"),
    "max_tokens": (_or_none(_whole(1)), "a whole number from 1, or nothing"),
    "min_tokens": (_whole(0), "a whole number from 0"),
    "temperature": (_number(0.0, sys.float_info.max), "a number from 0 (greedy)"),
    "top_k": (_whole(-1), "a whole number from 1, or 0 or -1 for all tokens"),
    "top_p": (_number(0.0, 1.0, above=True), "a number above 0 and up to 1"),
    "min_p": (_number(0.0, 1.0), "a number from 0 to 1"),
    "repetition_penalty": (_number(0.0, sys.float_info.max, above=True), "a number above 0"),
    "presence_penalty": (_number(-2.0, 2.0), "a number from -2 to 2"),
    "frequency_penalty": (_number(-2.0, 2.0), "a number from -2 to 2"),
    "seed": (_or_none(_whole(0, MAX_SEED)), f"a whole number from 0 to {MAX_SEED}, or nothing"),
    "stop": (_tuple_of(_is_text), "a text, or a list of texts, none of them empty"),
    "stop_token_ids": (_tuple_of(_whole(0)), "a list of token ids"),
    "include_stop_str_in_output": (_is_bool, "true or false"),
    "ignore_eos": (_is_bool, "true or false"),
    "logprobs": (_or_none(_whole(0, MAX_LOGPROBS)), f"a whole number from 0 to {MAX_LOGPROBS}"),
}
