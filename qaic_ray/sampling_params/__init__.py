"""What a row may ask of token selection, in the field names of vLLM and of the OpenAI interface.

Plain frozen data, checked when it is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    InstanceOf,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from qaic_ray.errors import RowError
from qaic_ray.files.documents import shown
from qaic_ray.option_types import opt, options_of
from qaic_ray.sampling_params.structured_outputs import FIELD as STRUCTURED
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy (vLLM's threshold): dividing by them is meaningless."""

MAX_LOGPROBS = 20
"""Most alternatives a token's logprobs may list: the OpenAI limit, and vLLM's default."""

MAX_SEED = 2**63 - 1
MAX_SAMPLES = 128
"""Most answers to one prompt: the OpenAI limit."""
MAX_STOPS = 64
"""Each is looked for after every token, in the time that the card leaves."""
MAX_STOP_CHARS = 4096
"""Of all stop texts of a row together."""
MAX_STOP_IDS = 1024
MAX_BIASES = 1024
"""Tokens whose logits a row may move."""
MAX_BIAS = 100.0
MAX_BAD_WORDS = 1024
MAX_ALLOWED_IDS = 2**18

_INT32_MAX = 2**31 - 1

_Count = Annotated[int, Field(ge=1, le=_INT32_MAX)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
_StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]

ANSWER_END = "Where an answer ends"


@dataclass(
    frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", title="row")
)
class SamplingParams:
    """How the tokens of one row are chosen and where the row ends. The defaults are greedy.

    Order of application (vLLM's): `structured_outputs`, `allowed_token_ids` and `bad_words`,
    `logit_bias`, repetition, frequency and presence penalty, `min_tokens`, temperature, `min_p`,
    `top_k`, `top_p`, one draw.

    Raises:
        RowError: for a value that is of the wrong type or out of its range, naming the field.
    """

    GROUP: ClassVar[str] = "Sampling (a JSONL row's own fields go first)"

    n: int = opt(
        1,
        "Answers to each prompt; more than one needs a temperature.",
        ge=1,
        le=MAX_SAMPLES,
        sample=4,
    )
    max_tokens: _Count | None = opt(
        None,
        "Most tokens of an answer; until the context is full when absent.",
        flag=None,
        sample=64,
    )
    min_tokens: int = opt(
        0,
        "No answer is shorter: neither stop tokens nor stop texts end it.",
        ge=0,
        le=_INT32_MAX,
        group=ANSWER_END,
        sample=8,
    )
    temperature: float = opt(
        0.0,
        "Divides the logits; 0 is greedy.",
        ge=0,
        le=100,
        allowed="a number from 0 (greedy) to 100",
        sample=0.7,
    )
    top_k: int = opt(
        0,
        "Draw of the k likeliest tokens; 0 or -1: of all.",
        ge=-1,
        le=_INT32_MAX,
        allowed=f"a whole number from 1 to {_INT32_MAX}, or 0 or -1 for all tokens",
        sample=40,
    )
    top_p: float = opt(
        1.0,
        "Draw of the likeliest tokens that together are this probable.",
        gt=0,
        le=1,
        allowed="a number above 0 and up to 1",
        sample=0.9,
    )
    min_p: float = opt(
        0.0,
        "Draw of tokens at least this many times as likely as the likeliest.",
        ge=0,
        le=1,
        sample=0.05,
    )
    repetition_penalty: float = opt(
        1.0,
        "Over 1: shun tokens of prompt and answer, by division of their logits.",
        ge=0.01,
        le=100,
        sample=1.1,
    )
    presence_penalty: _Penalty = opt(
        0.0, "Over 0: shun tokens that the answer has, by subtraction.", sample=0.5
    )
    frequency_penalty: _Penalty = opt(
        0.0, "Over 0: the same, for each time that the answer has them.", sample=0.5
    )
    seed: int | None = opt(
        None,
        "One seed for every row: same seed, prompt and model, same text.",
        ge=0,
        le=MAX_SEED,
        shown="by --run-seed",
        sample=7,
    )
    stop: Annotated[tuple[_StopText, ...], FailFast()] = opt(
        (),
        "A text that ends an answer; may be repeated.",
        max_length=MAX_STOPS,
        group=ANSWER_END,
        repeated=True,
        allowed=f"a text, or a list of up to {MAX_STOPS} texts, none of them empty, of "
        f"{MAX_STOP_CHARS} characters together",
        sample=["User:", "###"],
    )
    stop_token_ids: Annotated[tuple[_TokenId, ...], FailFast()] = opt(
        (),
        "Tokens that end an answer, beside EOS.",
        example="13,198",
        max_length=MAX_STOP_IDS,
        group=ANSWER_END,
        allowed=f"a list of up to {MAX_STOP_IDS} token ids",
    )
    include_stop_str_in_output: bool = opt(
        False, "Keep the stop text that ended the answer.", flag=None
    )
    ignore_eos: bool = opt(False, "Go on after EOS.", group=ANSWER_END)
    logprobs: int | None = opt(
        None,
        "Give each token's logprob, and those of so many likeliest ones.",
        ge=0,
        le=MAX_LOGPROBS,
        sample=5,
    )
    prompt_logprobs: int | None = opt(
        None,
        "Give each prompt token's logprob, and those of so many likeliest ones; of a QPC that "
        "keeps a prompt's logits (export.logits: all).",
        flag=None,
        ge=0,
        le=MAX_LOGPROBS,
        sample=5,
    )
    structured_outputs: InstanceOf[StructuredOutputs] | None = opt(
        None,
        "The form of an answer: one of json (a schema), json_object, regex, choice, grammar.",
        flag=None,
        example='{"regex": "yes|no"}',
        allowed='an object like {"regex": "yes|no"}',
    )
    logit_bias: Annotated[tuple[tuple[_TokenId, _Bias], ...], FailFast()] = opt(
        (),
        "Added to the logits of tokens.",
        flag=None,
        example='{"198": -100}',
        max_length=MAX_BIASES,
        allowed=f"an object of up to {MAX_BIASES} token ids with a number from -100 to 100 each",
    )
    allowed_token_ids: Annotated[tuple[_TokenId, ...] | None, FailFast()] = opt(
        None,
        "No other token is chosen.",
        flag=None,
        min_length=1,
        max_length=MAX_ALLOWED_IDS,
        allowed=f"a list of 1 to {MAX_ALLOWED_IDS} token ids",
        sample=[13, 198],
    )
    bad_words: Annotated[tuple[_StopText, ...], FailFast()] = opt(
        (),
        "Texts that an answer must not have, as the tokenizer writes them.",
        flag=None,
        max_length=MAX_BAD_WORDS,
        allowed=f"a list of up to {MAX_BAD_WORDS} texts, none of them empty",
        sample=["maybe"],
    )
    skip_special_tokens: bool = opt(True, "Leave special tokens out of the text.", flag=None)

    @model_validator(mode="wrap")
    @classmethod
    def _or_row_error(
        cls, given: Any, check: ModelWrapValidatorHandler[SamplingParams]
    ) -> SamplingParams:
        try:
            return check(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            if name not in ALLOWED:
                raise
            # The whole list, not the one item of it that pydantic complains of.
            raise _refusal(name, (given.kwargs or {}).get(name, first["input"])) from error

    def __post_init__(self) -> None:
        if sum(map(len, self.stop)) > MAX_STOP_CHARS:
            raise _refusal("stop", self.stop)
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
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0)

    @property
    def has_limits(self) -> bool:
        """Whether some tokens may not be chosen, or have their logits moved, whatever came."""
        limits = self.structured_outputs, self.logit_bias, self.allowed_token_ids, self.bad_words
        return limits != (None, (), None, ())

    @property
    def is_plain(self) -> bool:
        """Whether the argmax of the raw logits, and nothing else, answers the row."""
        is_argmax = self.is_greedy and not self.has_penalties and not self.min_tokens
        return is_argmax and self.logprobs is None and not self.has_limits

    def updated(self, json_fields: Mapping[str, Any]) -> SamplingParams:
        """These parameters with the fields of a JSON object in place of its own.

        `stop` may be one string, `max_completion_tokens` is another name of `max_tokens`, and null
        is a value only where None is (and nothing for `stop`, `stop_token_ids`, `bad_words` and
        `logit_bias`). `structured_outputs` is an object as vLLM takes it, `logit_bias` one
        of token ids.

        Raises:
            RowError: for an unknown field, or as on construction.
        """
        unknown = [name for name in json_fields if name not in FIELDS]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0])[:MAX_NAME_CHARS], FIELDS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known are {', '.join(FIELDS)}."
            raise RowError(f"{shown(unknown[0])} is no sampling parameter: {remedy}")
        changes = dict(json_fields)
        if _OTHER_NAME in changes:
            other = changes.pop(_OTHER_NAME)
            if changes.setdefault("max_tokens", other) != other:
                raise RowError(f"max_tokens and {_OTHER_NAME} are the same: give one of them.")
        for name in ("stop", "stop_token_ids", "bad_words"):
            if name in changes:
                changes[name] = _as_tuple(changes[name])
        if isinstance(changes.get("allowed_token_ids"), list):
            changes["allowed_token_ids"] = tuple(changes["allowed_token_ids"])
        if "logit_bias" in changes:
            changes["logit_bias"] = _as_biases(changes["logit_bias"])
        if STRUCTURED in changes:
            changes[STRUCTURED] = StructuredOutputs.read(changes[STRUCTURED])
        return replace(self, **changes)


_OTHER_NAME = "max_completion_tokens"

FIELDS: tuple[str, ...] = (*(field.name for field in fields(SamplingParams)), _OTHER_NAME)
"""The names `SamplingParams.updated` knows."""

ALLOWED: dict[str, str] = {name: opt.allowed for name, opt in options_of(SamplingParams).items()}
"""What a field may be, as the end of a sentence."""

_MAX_REASON_CHARS = 500
MAX_NAME_CHARS = 64
"""Longer names are no misspelt ones."""


def _of_document(value: Any) -> Any:
    if not isinstance(value, dict):
        return SamplingParams() if value is None else value
    if {"max_tokens", "max_completion_tokens"} & value.keys():
        raise ValueError("max_tokens has another name in a job, run.generation_len: use that")
    try:
        return SamplingParams().updated(value)
    except RowError as error:
        raise ValueError(str(error)[:_MAX_REASON_CHARS].rstrip(".")) from error


def _document(params: SamplingParams) -> dict[str, Any]:
    fields = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(params).items()}
    del fields["max_tokens"]
    fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    if params.structured_outputs is not None:
        fields[STRUCTURED] = params.structured_outputs.document()
    return fields


Sampling = Annotated[
    InstanceOf[SamplingParams], BeforeValidator(_of_document), PlainSerializer(_document)
]
"""Parameters as a job has them: a mapping, whose `max_tokens` is the run's `generation_len`."""


@plain_dataclass(frozen=True)
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


def _as_biases(value: Any) -> Any:
    """Pairs of token and bias by rising id, of an object (of texts, in JSON) or a list."""
    if value is None:
        return ()
    if not isinstance(value, (Mapping, list)):
        return value
    try:
        pairs = {int(token): bias for token, bias in dict(value).items()}
    except (TypeError, ValueError) as error:
        raise _refusal("logit_bias", value) from error
    if len(pairs) < len(value):  # two keys of one token
        raise _refusal("logit_bias", value)
    return tuple(sorted(pairs.items()))


def _refusal(name: str, value: Any) -> RowError:
    return RowError(f"{name} is {shown(value)}; allowed is {ALLOWED[name]}.")
