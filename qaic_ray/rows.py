"""Prompts and rows: the frozen data that crosses processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from qaic_ray.errors import DeviceError, QaicRayError, RowError
from qaic_ray.files.documents import shown
from qaic_ray.sampling_params import SamplingParams, TokenLogprob

Message = Mapping[str, str]
"""One turn of a conversation: `role` and `content`."""


class FinishReason(str, Enum):
    """Why a row ended."""

    STOP = "stop"
    """An EOS token of the model's list or a stop token, each of which counts as one generated
    token; or a stop string. `stop_reason` tells which."""
    LENGTH = "length"
    """`max_tokens` (`generation_len`) tokens were generated, or the context is full."""
    ERROR = "error"
    """The row could not be answered; `error` says why."""
    ABORT = "abort"
    """The row was cancelled; it has no answer."""


class ErrorClass(str, Enum):
    """Why a row has no answer, for programs; the row's `error` is the sentence."""

    MALFORMED = "malformed"
    """The input holds no prompt there."""
    REFUSED = "refused"
    """This model and QPC cannot answer it as asked."""
    DEVICE = "device"
    """A card failed at each attempt."""
    CANCELLED = "cancelled"
    """Whoever asked for it did not want it any more."""


_TIMES = ("queue_s", "started_at", "ended_at")
_LEFT_OUT = (
    *("messages", "stop_reason", "reused_tokens", *_TIMES, "logprobs", "prompt_logprobs"),
    *("choices", "error", "error_class"),
)
_log = logging.getLogger(__name__)

MAX_ERROR_CHARS = 900
"""The longest error of a row; a library may put the whole input into it."""

# What a library written in Rust raises over a fault of its own; it is no Exception.
_PANIC = "PanicException"


class _RowAlone:
    """A context for work on one row, which turns what is raised into that row's error.

    Raises:
        RowError: in place of any Exception; an unexpected one is called a fault of qaic-ray.
        DeviceError: unchanged, and so is what ends the process.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, (RowError, DeviceError)):
            return
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            return
        _log.debug("An error of one row:", exc_info=error)
        if isinstance(error, QaicRayError):
            raise RowError(str(error)) from error
        if isinstance(error, RecursionError):
            raise RowError("The row is nested too deep.") from error
        raise RowError(
            f"{type(error).__name__} came up over this row: {shown(str(error))}. That is a fault "
            "of qaic-ray's: please report it with the row."
        ) from error


ROW_ALONE = _RowAlone()
"""The only instance, since it has no state. Every step enters it for every row, so it must be
cheaper than a generator."""


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation goes through the model's chat template, in transformers' words.

    With `continue_final_message` the answer continues the last message, and the template begins no
    other one. `template_kwargs` are variables of the template, like `enable_thinking`.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """One user prompt and its place in the input; `index` counts from 0 over the whole input.

    Where there are `messages`, they are the prompt, and `text` is the user's last message, which
    the row shows. Where there are `token_ids`, the model is given them as they are. `sampling` None
    means the run's, and so does `chat`. Where the row draws tokens at random, its seed is made of
    `draw`, or of `index` where that is None. With `stream` its tokens are told while they come;
    `background` is work that nobody waits for, and gives way to the rest. Neither changes an
    answer.
    """

    index: int
    text: str
    id: str | None = None
    messages: tuple[Message, ...] | None = None
    sampling: SamplingParams | None = None
    chat: ChatOptions | None = None
    stream: bool = False
    token_ids: tuple[int, ...] | None = None
    background: bool = False
    draw: int | None = None


@dataclass(frozen=True)
class TokenChunk:
    """What one choice of a streamed row has got on a worker since the chunk before.

    `text` begins at the character `text_at` of the answer, `token_ids` at its token `tokens_at`;
    the first chunk of each attempt has both at 0. No later token changes the text, which may be
    behind the tokens. `logprobs` has an entry a token where the row asked for them.
    """

    index: int
    choice: int
    text_at: int
    text: str
    tokens_at: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One of the answers to a prompt with `n` over 1; fields as a row's."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_json(self, index: int) -> dict[str, Any]:
        """The sample as an entry of the row's `choices`."""
        document = {
            "index": index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason.value,
            "stop_reason": self.stop_reason,
            "logprobs": _logprobs_json(self.logprobs),
        }
        return {key: value for key, value in document.items() if value is not None}


@dataclass(frozen=True)
class Row:
    """One line of `outputs.jsonl`: a prompt and its answer or error.

    `token_ids` holds the generated tokens only, an EOS included. `ttft_s` is the time from the row
    entering the engine to its first token, `decode_s` from there to its last, in seconds. `worker`
    names the card; `attempts` counts how often the row was given to one.

    `started_at` is when the attempt that answered came to its worker, `ended_at` when its last
    token was there: Unix times (UTC), by the worker's clock; None where it was not answered, or by
    an earlier version. `queue_s` is from `started_at` to the row's first step.

    `reused_tokens` of the prompt's were in a slot's cache already (of a row with `n` over 1: for
    its first answer).

    `stop_reason` is the stop string that ended the row, or the stop token if that is not EOS;
    `logprobs` has an entry a token where they were asked for, and so has `prompt_logprobs` for the
    prompt, whose first token has None. With `n` over 1 `choices` holds all
    answers, and the row's text and tokens are those of the first one.
    """

    index: int
    prompt: str
    text: str
    finish_reason: FinishReason
    id: str | None = None
    messages: tuple[Message, ...] | None = None
    token_ids: tuple[int, ...] = ()
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    queue_s: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    worker: str = ""
    attempts: int = 1
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    choices: tuple[Sample, ...] = ()
    error: str | None = None
    error_class: ErrorClass | None = None

    @property
    def answer_lens(self) -> tuple[int, ...]:
        """Tokens kept in each answer; EOS counts once. One answer, unless `n` asked for more."""
        answers = [choice.token_ids for choice in self.choices] or [self.token_ids]
        return tuple(map(len, answers))

    @property
    def generated_tokens(self) -> int:
        """Tokens kept in all answers of the row."""
        return sum(self.answer_lens)

    @property
    def ok(self) -> bool:
        """Whether the row was answered."""
        return self.finish_reason not in (FinishReason.ERROR, FinishReason.ABORT)

    @property
    def is_cut(self) -> bool:
        """Whether an answer ended at its most tokens, or at the end of the context."""
        answers = self.choices or (self,)
        return any(answer.finish_reason is FinishReason.LENGTH for answer in answers)

    @classmethod
    def failed(
        cls,
        prompt: Prompt,
        error: str,
        *,
        worker: str = "",
        attempts: int = 1,
        error_class: ErrorClass = ErrorClass.REFUSED,
    ) -> Row:
        """The row of a prompt that could not be answered; a long error is cut."""
        if len(error) > MAX_ERROR_CHARS:
            error = f"{error[:MAX_ERROR_CHARS]}..."
        return cls(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            messages=prompt.messages,
            text="",
            finish_reason=FinishReason.ERROR,
            worker=worker,
            attempts=attempts,
            error=error,
            error_class=error_class,
        )

    @classmethod
    def cancelled(cls, prompt: Prompt, *, worker: str = "", attempts: int = 1) -> Row:
        """The row of a prompt that nobody wants an answer to any more."""
        row = cls.failed(
            prompt,
            "It was cancelled.",
            worker=worker,
            attempts=attempts,
            error_class=ErrorClass.CANCELLED,
        )
        return replace(row, finish_reason=FinishReason.ABORT)

    def to_json(self) -> dict[str, Any]:
        """The row as the documented JSON object, keys in the documented order.

        `messages`, `stop_reason`, `reused_tokens`, `queue_s`, `started_at`, `ended_at`, `logprobs`,
        `prompt_logprobs`, `choices`, `error` and `error_class` are left out where the row has none.
        """
        document: dict[str, Any] = {
            "index": self.index,
            "id": self.id,
            "prompt": self.prompt,
            "messages": None if self.messages is None else list(map(dict, self.messages)),
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason.value,
            "stop_reason": self.stop_reason,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens or None,
            "generated_tokens": self.generated_tokens,
            "ttft_s": round(self.ttft_s, 6),
            "decode_s": round(self.decode_s, 6),
            "queue_s": None if self.queue_s is None else round(self.queue_s, 6),
            "started_at": None if self.started_at is None else round(self.started_at, 3),
            "ended_at": None if self.ended_at is None else round(self.ended_at, 3),
            "worker": self.worker,
            "attempts": self.attempts,
            "logprobs": _logprobs_json(self.logprobs),
            "prompt_logprobs": _logprobs_json(self.prompt_logprobs),
            "choices": [c.to_json(index) for index, c in enumerate(self.choices)] or None,
            "error": self.error,
            "error_class": None if self.error_class is None else self.error_class.value,
        }
        for key in _LEFT_OUT:
            if document[key] is None:
                del document[key]
        return document


def _logprobs_json(
    logprobs: Sequence[TokenLogprob | None] | None,
) -> list[dict[str, Any] | None] | None:
    """One object a token, natural logs; null for a token without one."""
    if logprobs is None:
        return None
    return [None if token is None else _entry_json(token) for token in logprobs]


def _entry_json(token: TokenLogprob) -> dict[str, Any]:
    return {
        **_logprob_json(token.token_id, token.logprob),
        "top": [_logprob_json(*other) for other in token.top],
    }


def _logprob_json(token_id: int, logprob: float) -> dict[str, Any]:
    # JSON has no NaN and no infinity; -9999 stands for that in the OpenAI interface.
    finite = None if math.isnan(logprob) else max(round(logprob, 6), -9999.0)
    return {"token_id": token_id, "logprob": finite}
