"""`qaic_ray.SamplingParams`: vLLM's names and defaults, which are not those of a run.

A run is greedy and answers until the context is full, vLLM draws and ends after 16 tokens. So the
two are two classes; `to_run` makes one of the other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral, Real
from typing import Any

from qaic_ray.errors import ParameterError, RowError
from qaic_ray.files.documents import shown
from qaic_ray.formats.row_fields import NOT_OFFERED
from qaic_ray.sampling_params import SamplingParams as RunParams


class RequestOutputKind(Enum):
    """What a stream gives: all so far each time, only what is new, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


_REFUSED = ("guided_decoding", "logits_processors", "truncate_prompt_tokens")
_NEUTRAL_ELSEWHERE: dict[str, tuple[object, ...]] = {
    "flat_logprobs": (False,),
    "logprob_token_ids": (),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "extra_args": ({},),
}
"""Parameters of vLLM alone that change the answer, and their values that do not."""


@dataclass
class StructuredOutputsParams:
    """The form of an answer, in vLLM's names: exactly one of the first five is given.

    Attributes:
        json: a JSON schema, as an object or its text.
        regex: of the whole answer.
        choice: texts, one of which is the answer.
        grammar: in Lark or GBNF.
        json_object: any JSON object.
        disable_any_whitespace: no white space between the tokens of JSON.
        whitespace_pattern: a regex of the white space that may be there.
        disable_fallback: changes nothing.
        disable_additional_properties, structural_tag: refused, unless they change nothing.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None


@dataclass(kw_only=True)
class VllmSampling:
    """How one prompt is answered, in vLLM's names and with vLLM's defaults.

    `temperature` 1.0 draws; 0 is greedy. An answer ends after `max_tokens` tokens, and with None
    when the context is full. Without a `seed` the one of `LLM(seed=...)` counts, if there is one.
    Names of vLLM that change the answer and that cards do not offer are refused by their names.

    Raises:
        ParameterError: for a value that is not allowed, or not offered; it is a ValueError too.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool = True

    # They change nothing here.
    spaces_between_special_tokens: bool = True
    stream_interval: int | None = None
    skip_reading_prefix_cache: bool | None = None

    # They are refused, unless they change nothing.
    guided_decoding: Any = None
    logits_processors: list[Any] | None = None
    truncate_prompt_tokens: int | None = None
    flat_logprobs: bool = False
    logprob_token_ids: list[int] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.to_run()

    def __repr__(self) -> str:
        said = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if self._says(f.name))
        return f"SamplingParams({', '.join(said)})"

    @classmethod
    def from_optional(cls, **given: Any) -> VllmSampling:
        """Parameters of which None means the default, but for `max_tokens`."""
        return cls(**{k: v for k, v in given.items() if v is not None or k == "max_tokens"})

    def clone(self) -> VllmSampling:
        """A copy that can be changed."""
        return copy.deepcopy(self)

    def to_run(self) -> RunParams:
        """The same as a run has it; checked again, as fields can be set.

        Raises:
            ParameterError: for a value that is not allowed, or not offered.
        """
        try:
            self._refuse()
            return RunParams(
                n=_whole(self.n),
                max_tokens=_whole(self.max_tokens),
                min_tokens=_whole(self.min_tokens),
                temperature=_real(self.temperature),
                top_k=_whole(self.top_k),
                top_p=_real(self.top_p),
                min_p=_real(self.min_p),
                repetition_penalty=_real(self.repetition_penalty),
                presence_penalty=_real(self.presence_penalty),
                frequency_penalty=_real(self.frequency_penalty),
                seed=None if self.seed == -1 else _whole(self.seed),
                stop=_texts(self.stop),
                stop_token_ids=tuple(_whole(token) for token in self.stop_token_ids or ()),
                include_stop_str_in_output=self.include_stop_str_in_output,
                ignore_eos=self.ignore_eos,
                logprobs=_whole(self.logprobs),
                prompt_logprobs=_whole(self.prompt_logprobs),
                allowed_token_ids=_ids(self.allowed_token_ids),
                bad_words=_texts(self.bad_words),
                skip_special_tokens=self.skip_special_tokens,
            ).updated(self._documents())
        except RowError as error:
            raise ParameterError(str(error)) from error

    def _documents(self) -> dict[str, Any]:
        """What a run reads as a JSON object has it."""
        form = self.structured_outputs
        if isinstance(form, StructuredOutputsParams):
            form = {**vars(form)}
        biases = {_whole(token): _real(bias) for token, bias in (self.logit_bias or {}).items()}
        return {"structured_outputs": form, "logit_bias": biases}

    def _says(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(type(self), name))

    def _refuse(self) -> None:
        for name in _REFUSED:
            if (value := getattr(self, name)) is not None:
                NOT_OFFERED[name].check(name, value, only_ours=True)
        for name, neutral in _NEUTRAL_ELSEWHERE.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise RowError(f'"{name}" is not offered (given: {shown(value)}): leave it out.')
        if self.best_of not in (None, self.n):
            raise RowError('"best_of" is not offered: "n" says how many answers there are.')


def _whole(value: Any) -> Any:
    """A whole number of any library as Python's."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _real(value: Any) -> Any:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _ids(value: Any) -> Any:
    return None if value is None else tuple(_whole(token) for token in value)


def _texts(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


VllmSampling.__name__ = VllmSampling.__qualname__ = "SamplingParams"
SamplingParams = VllmSampling
"""What the package calls it; a run has a class of that name too."""
