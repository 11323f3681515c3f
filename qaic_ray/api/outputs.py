"""What `qaic_ray.LLM` returns, in vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import QaicRayError
from qaic_ray.rows import FinishReason, Prompt, Row, Sample
from qaic_ray.sampling_params import TokenLogprob

if TYPE_CHECKING:
    from qaic_ray.fleet.pending_row import PendingRow
    from qaic_ray.runs.token_streams import TokenDelta
    from qaic_ray.worker.prompt_encoder import PromptEncoder


@dataclass(frozen=True)
class Logprob:
    """The natural log of a token's probability, its rank from 1 where that is known, its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
        index: which of the prompt's `n` answers.
        text: of the answer; empty with `detokenize=False`.
        token_ids: of the answer, a stop token or EOS included.
        cumulative_logprob: of all its tokens, where `logprobs` were asked for.
        logprobs: for each token the token's own and the likeliest ones', by token id.
        finish_reason: stop, length, abort or error; None while it goes on.
        stop_reason: the stop string or token that ended it, if it was not EOS.
        restarted: a stream began anew, since another card took over and gave another answer; what
            came before is void.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    lora_request: None = None
    restarted: bool = False

    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened: Unix times in seconds by the clock of the card's machine.

    `worker` names the card, `attempts` counts how often the prompt was given to one.
    """

    arrival_time: float | None
    first_scheduled_time: float | None
    first_token_time: float | None
    last_token_time: float | None
    time_in_queue: float | None
    worker: str
    attempts: int

    @property
    def finished_time(self) -> float | None:
        """When the last token was there."""
        return self.last_token_time


class RequestOutput:
    """A prompt and its answers.

    Attributes:
        request_id: a number as text, or what `AsyncLLM.generate` was given.
        outputs: one answer for each of `n`.
        finished: whether nothing more comes.
        metrics: of a finished one.
        error: why there is no answer, a sentence; None where there is one.
        prompt_logprobs: of a finished one, where they were asked for: as an answer's, for each
            token of the prompt; None for the first.
        lora_request, encoder_prompt, encoder_prompt_token_ids, num_cached_tokens:
            always None.
    """

    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    num_cached_tokens: None = None

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        encoder: PromptEncoder | None,
        outputs: list[CompletionOutput],
        *,
        row: Row | None = None,
        error: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.outputs = outputs
        self.finished = row is not None or error is not None
        self.metrics = None if row is None else _metrics(row)
        self.error = error if row is None else row.error
        self.prompt_logprobs = None if encoder is None or row is None else _of_prompt(row, encoder)
        self._prompt = prompt
        self._encoder = encoder
        self._text: str | None = None
        self._token_ids: list[int] | None = None

    @property
    def prompt(self) -> str | None:
        """The text that was answered; a conversation as the chat template makes it; None where the
        prompt was given as tokens alone."""
        if self._text is None and self._encoder is not None:
            asked = self._prompt
            if asked.token_ids is not None:
                return asked.text or None
            self._text = self._encoder.text(asked)
        return self._text

    @property
    def prompt_token_ids(self) -> list[int]:
        """The tokens that the model was given, made of the text when they are first asked for."""
        if self._token_ids is None:
            assert self._encoder is not None
            self._token_ids = self._encoder.ids(self._prompt)
        return self._token_ids

    def __getstate__(self) -> dict[str, Any]:
        """As another process gets it: with its tokens, and without a tokenizer."""
        made = dict(vars(self))
        if self.error is None:
            made["_text"], made["_token_ids"] = self.prompt, self.prompt_token_ids
        else:
            made["_text"], made["_token_ids"] = self._prompt.text, []  # nobody could make them
        return {**made, "_encoder": None}

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={self.prompt!r}, "
            f"outputs={self.outputs!r}, finished={self.finished!r}, error={self.error!r})"
        )


class GenerationError(QaicRayError, ValueError):
    """Some prompts have no answer; `outputs` has all of them in order, `error` in those."""

    def __init__(self, outputs: Sequence[RequestOutput]) -> None:
        failed = [(number, output) for number, output in enumerate(outputs) if output.error]
        number, first = failed[0]
        others = f" So have {len(failed) - 1} others." if len(failed) > 1 else ""
        super().__init__(
            f"Prompt {number} (counted from 0) of {len(outputs)} has no answer: {first.error}"
            f"{others} The answers of the rest are in this error's outputs."
        )
        self.outputs = list(outputs)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.outputs,)


def output_of(
    request_id: str, prompt: Prompt, encoder: PromptEncoder, row: Row, *, has_text: bool = True
) -> RequestOutput:
    """The finished output of a row."""
    answers: Sequence[Sample | Row] = row.choices or (row,)
    outputs = [
        CompletionOutput(
            index=index,
            text=answer.text if has_text else "",
            token_ids=list(answer.token_ids),
            cumulative_logprob=_sum(answer.logprobs),
            logprobs=_by_id(answer.logprobs, encoder),
            finish_reason=answer.finish_reason.value,
            stop_reason=answer.stop_reason,
        )
        for index, answer in enumerate(answers)
    ]
    return RequestOutput(request_id, prompt, encoder, outputs, row=row)


class StreamedOutput:
    """Makes outputs of what a streamed row tells.

    Args:
        request_id: of the outputs.
        prompt: what is answered.
        encoder: makes its tokens.
        is_delta: each output has only what is new.
        has_text: False for no texts.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        encoder: PromptEncoder,
        *,
        is_delta: bool = False,
        has_text: bool = True,
    ) -> None:
        self._about = request_id, prompt, encoder
        self._encoder = encoder
        self._is_delta = is_delta
        self._has_text = has_text
        self._choices: dict[int, CompletionOutput] = {}

    def take(self, delta: TokenDelta) -> RequestOutput:
        """The output after this; the last one is finished."""
        old = self._choices.get(delta.choice)
        if old is None or delta.restarted or self._is_delta:
            begun = CompletionOutput(delta.choice, "", [])
            begun.restarted = delta.restarted and old is not None
        else:
            begun = old
        logprobs = delta.logprobs or None
        new = CompletionOutput(
            index=delta.choice,
            text=begun.text + (delta.text if self._has_text else ""),
            token_ids=[*begun.token_ids, *delta.token_ids],
            cumulative_logprob=_added(begun.cumulative_logprob, _sum(logprobs)),
            logprobs=_joined(begun.logprobs, _by_id(logprobs, self._encoder)),
            finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason=_stop_reason(delta),
            restarted=begun.restarted,
        )
        self._choices[delta.choice] = new
        row = delta.row
        is_last = row is not None and all(c.finished() for c in self._choices.values())
        num_choices = 1 if row is None else max(1, len(row.choices))
        is_last = is_last and len(self._choices) >= num_choices
        outputs = [new] if self._is_delta else [self._choices[i] for i in sorted(self._choices)]
        return RequestOutput(*self._about, outputs, row=row if is_last else None)


class BegunAnswer:
    """A prompt that is being streamed.

    Attributes:
        pending: its row, and its tokens as they come.
    """

    def __init__(self, pending: PendingRow, made: StreamedOutput, *, is_last_only: bool) -> None:
        self.pending = pending
        self._made = made
        self._is_last_only = is_last_only

    def take(self, delta: TokenDelta) -> RequestOutput | None:
        """The output after this; None where it is not to be shown.

        Raises:
            GenerationError: it is the last one, and there is no answer.
        """
        output = self._made.take(delta)
        if output.error is not None and delta.finish_reason is FinishReason.ERROR:
            raise GenerationError([output])
        return output if output.finished or not self._is_last_only else None

    def close(self) -> None:
        """Cancel what is left of it."""
        self.pending.cancel()


def _stop_reason(delta: TokenDelta) -> str | int | None:
    if delta.row is None or delta.finish_reason is FinishReason.ABORT:
        return None
    choices = delta.row.choices
    return (choices[delta.choice] if choices else delta.row).stop_reason


def _added(old: float | None, new: float | None) -> float | None:
    return old if new is None else (old or 0.0) + new


def _joined(
    old: list[dict[int, Logprob]] | None, new: list[dict[int, Logprob]] | None
) -> list[dict[int, Logprob]] | None:
    return old if new is None else [*(old or ()), *new]


def _sum(logprobs: Sequence[TokenLogprob] | None) -> float | None:
    return None if logprobs is None else sum(token.logprob for token in logprobs)


def _by_id(
    logprobs: Sequence[TokenLogprob] | None, encoder: PromptEncoder
) -> list[dict[int, Logprob]] | None:
    if logprobs is None:
        return None
    return [_of_token(token, encoder) for token in logprobs]


def _of_prompt(row: Row, encoder: PromptEncoder) -> list[dict[int, Logprob] | None] | None:
    if row.prompt_logprobs is None:
        return None
    return [None if token is None else _of_token(token, encoder) for token in row.prompt_logprobs]


def _of_token(token: TokenLogprob, encoder: PromptEncoder) -> dict[int, Logprob]:
    """A token's logprob and the likeliest ones', by token id."""
    decode = encoder.tokenizer.decode
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, start=1)}
    whole = {token.token_id: token.logprob, **dict(token.top)}
    return {
        token_id: Logprob(logprob, ranks.get(token_id), decode((token_id,)))
        for token_id, logprob in whole.items()
    }


def _metrics(row: Row) -> RequestMetrics:
    began, ended, queued = row.started_at, row.ended_at, row.queue_s
    return RequestMetrics(
        arrival_time=began,
        first_scheduled_time=None if began is None or queued is None else began + queued,
        first_token_time=None if ended is None else ended - row.decode_s,
        last_token_time=ended,
        time_in_queue=queued,
        worker=row.worker,
        attempts=row.attempts,
    )
