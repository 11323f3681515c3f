"""From a prompt to the sequences that answer it, and from finished sequences to the prompt's row.

This is the text work of a card, done in the thread that wants the answer. The engine's thread
decodes only rows that a stop string may end.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qaic_ray.engine import steps
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.limits.grammars import Grammars
from qaic_ray.errors import RowError, UsageError
from qaic_ray.files.documents import shown
from qaic_ray.model.chat import ChatTemplate
from qaic_ray.model.detokenizer import StopFinder
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import Generation
from qaic_ray.rows import FinishReason, Prompt, Row, Sample
from qaic_ray.sampling_params import MAX_SEED, SamplingParams, TokenLogprob
from qaic_ray.worker.feeds import StreamedSequence
from qaic_ray.worker.prompt_encoder import PromptEncoder, with_system

MAX_HELD = 2**23
"""Tokens and their log-probabilities in the answers to one prompt; 128 of 65,536 tokens each."""


BEGINNING_CHARS = 2**17
_MUCH_MORE = 8
_LAST_WORD = 64
"""Tokens that the end of a beginning may have more than the same characters amid the text."""


@dataclass(frozen=True)
class Arrival:
    """When prompts came to the worker: by the engine's clock, and the Unix time."""

    clock_s: float = field(default_factory=time.perf_counter)
    at: float = field(default_factory=time.time)


@dataclass(eq=False)
class Answer:
    """A prompt in flight: a sequence for each of its `n` samples, and those that are finished.

    `streamed` has the sequences again, where their tokens are told while they come.
    """

    prompt: Prompt
    params: SamplingParams
    sequences: tuple[steps.Sequence, ...]
    readers: tuple[StopFinder | None, ...]
    arrived: Arrival
    streamed: tuple[StreamedSequence, ...] = ()
    finished: list[Finished] = field(default_factory=list)


class Answerer:
    """Makes sequences of prompts, and rows of finished sequences.

    Args:
        tokenizer: the checkpoint's.
        generation: the run's.
        engine: says which prompts its program can answer.
        vocab_size: tokens of the model; no number if it is not known.
    """

    def __init__(
        self, tokenizer: Tokenizer, generation: Generation, *, engine: Engine, vocab_size: object
    ) -> None:
        self._prompts = PromptEncoder(tokenizer, generation)
        self._tokenizer = self._prompts.tokenizer
        self._eos_ids = frozenset(tokenizer.eos_ids)
        self._generation = generation
        self._defaults = generation.defaults
        self._engine = engine
        self._vocab_size = vocab_size if isinstance(vocab_size, int) else math.inf
        self._grammars = Grammars(
            lambda: tokenizer.json_text,
            tokenizer.eos_ids,
            vocab_size if isinstance(vocab_size, int) else None,
        )

    def begin(self, prompt: Prompt, arrived: Arrival | None = None) -> Answer:
        """Tokenize a prompt; it came just now, where nothing else is said.

        Raises:
            RowError: for a prompt that cannot be answered, or not so.
        """
        params = prompt.sampling or self._defaults
        self._engine.refuse_unanswerable(params)
        self._refuse_unknown("stop_token_ids", params.stop_token_ids)
        self._refuse_unknown("allowed_token_ids", params.allowed_token_ids or ())
        self._refuse_unknown("logit_bias", [token for token, _ in params.logit_bias])
        if prompt.chat and prompt.messages is None and not self._generation.chat:
            raise RowError(
                "Options of the chat template are for a conversation: give messages in place of "
                "the prompt, or let the run say --chat."
            )
        self._refuse_endless(prompt)
        prompt_ids = tuple(self._prompts.ids(prompt))
        self._refuse_unknown("The prompt", prompt_ids)
        limit = self._engine.new_token_limit(len(prompt_ids), params.max_tokens)
        _refuse_unholdable(params, len(prompt_ids), limit)
        stop_ids = frozenset(params.stop_token_ids) | self._ending_ids(params)
        form, bad_ids = params.structured_outputs, self._bad_ids(params)
        scores = params.prompt_logprobs is not None
        number = prompt.index if prompt.draw is None else prompt.draw
        sequences = [
            steps.Sequence(
                key=prompt.index,
                prompt_ids=prompt_ids,
                max_new_tokens=limit,
                stop_ids=stop_ids,
                params=params,
                seed=sample_seed(params, self._generation.seed or 0, number, sample),
                guide=None if form is None else self._grammars.guide(form),
                bad_ids=bad_ids,
                background=prompt.background,
                # The other samples' prompt is the same.
                prompt_logprobs=[] if scores and sample == 0 else None,
            )
            for sample in range(params.n)
        ]
        readers = [
            StopFinder(self._tokenizer, params) if params.stop else None for _ in range(params.n)
        ]
        streamed = tuple(
            StreamedSequence(sequence, choice, StopFinder(self._tokenizer, params))
            for choice, sequence in enumerate(sequences if prompt.stream else ())
        )
        return Answer(
            prompt, params, tuple(sequences), tuple(readers), arrived or Arrival(), streamed
        )

    def row(self, answer: Answer, *, worker: str, attempts: int) -> Row:
        """The row of a complete answer.

        Raises:
            RowError: where one of its samples ended with an error.
        """
        for done in answer.finished:
            if done.error is not None:
                raise done.error
        if any(s.finish_reason is FinishReason.ABORT for s in answer.sequences):
            return Row.cancelled(answer.prompt, worker=worker, attempts=attempts)
        samples = [
            self._sample(answer.params, sequence, reader)
            for sequence, reader in zip(answer.sequences, answer.readers, strict=True)
        ]
        first, prompt, arrived = samples[0], answer.prompt, answer.arrived
        ttft_s = min(done.ttft_s for done in answer.finished)
        end_s = max(done.entered_s + done.ttft_s + done.decode_s for done in answer.finished)
        return Row(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            messages=prompt.messages,
            text=first.text,
            finish_reason=first.finish_reason,
            token_ids=first.token_ids,
            stop_reason=first.stop_reason,
            prompt_tokens=len(answer.sequences[0].prompt_ids),
            reused_tokens=answer.sequences[0].num_reused,
            ttft_s=ttft_s,
            decode_s=max(done.ttft_s + done.decode_s for done in answer.finished) - ttft_s,
            queue_s=min(done.scheduled_s for done in answer.finished) - arrived.clock_s,
            started_at=arrived.at,
            ended_at=arrived.at + end_s - arrived.clock_s,
            worker=worker,
            attempts=attempts,
            logprobs=first.logprobs,
            prompt_logprobs=_prompt_logprobs(answer.sequences[0]),
            choices=tuple(samples) if len(samples) > 1 else (),
        )

    def _refuse_endless(self, prompt: Prompt) -> None:
        """Refuse a text of megabytes by its first characters; to tokenize it takes a minute."""
        text = prompt.text
        if prompt.messages is not None:
            text = "".join(message["content"] for message in prompt.messages)
        size = BEGINNING_CHARS
        while size * _MUCH_MORE <= len(text):
            num_tokens = len(self._tokenizer.encode(text[:size])) - _LAST_WORD
            try:
                self._engine.new_token_limit(max(1, num_tokens), None)
            except RowError as error:
                raise RowError(
                    f"Its first {size} characters alone are too many. {error}"
                ) from error
            size *= _MUCH_MORE

    def _refuse_unknown(self, what: str, token_ids: Sequence[int]) -> None:
        """Refuse tokens that are not in the model's vocabulary."""
        largest = max(token_ids, default=0)
        if largest >= self._vocab_size:
            text = self._tokenizer.piece(largest)
            raise RowError(
                f"{what} has the token {largest}{f' ({shown(text)})' if text else ''}, and the "
                f"model's last one is {self._vocab_size - 1}: leave it out."
            )

    def _bad_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The tokens of bad words, as they begin a text and as they go on with one."""
        texts = [text for word in params.bad_words for text in (word, f" {word.lstrip()}")]
        runs = [tuple(self._tokenizer.encode(text, adds_special=False)) for text in texts]
        # What the model has no token for cannot come.
        return tuple(dict.fromkeys(run for run in runs if run and max(run) < self._vocab_size))

    def _ending_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset() if params.ignore_eos else self._eos_ids

    def _sample(
        self, params: SamplingParams, sequence: steps.Sequence, reader: StopFinder | None
    ) -> Sample:
        assert sequence.finish_reason is not None
        token_ids = tuple(sequence.output_ids)
        stop_reason: str | int | None = None
        if reader is not None and reader.stop is not None:
            text, stop_reason = reader.text, reader.stop
        else:
            shown = token_ids
            last = token_ids[-1]
            # What ended it is else the end of its grammar, which all of the text belongs to.
            if sequence.finish_reason is FinishReason.STOP and last in sequence.stop_ids:
                stop_reason = None if last in self._ending_ids(params) else last
                # A stop token is for the text what a stop string is.
                shown = token_ids if params.include_stop_str_in_output else token_ids[:-1]
            text = self._tokenizer.decode(shown, skips_special=params.skip_special_tokens)
        logprobs = tuple(sequence.logprobs[: len(token_ids)])
        return Sample(
            text=text,
            token_ids=token_ids,
            finish_reason=sequence.finish_reason,
            stop_reason=stop_reason,
            logprobs=None if params.logprobs is None else logprobs,
        )


def check_chat(template: ChatTemplate, generation: Generation, model: str) -> None:
    """Find out whether prompts can be put into a chat template, where the run asks for it.

    Raises:
        UsageError: there is none, it does not compile, or takes too long.
    """
    if not generation.chat and generation.chat_template is None:
        return
    template = template.of_run(generation.chat_template, generation.date)
    if not template.templates:
        raise UsageError(
            f"{model} has no chat template: leave --chat (run.chat) out, give one "
            "(--chat-template FILE, run.chat_template), or use the chat version of the model."
        )
    example = with_system([{"role": "user", "content": "Hello"}], generation.system)
    template.try_out(example, generation.chat_options)


def _refuse_unholdable(params: SamplingParams, prompt_tokens: int, limit: int) -> None:
    if params.min_tokens > limit:
        raise RowError(
            f"min_tokens is {params.min_tokens}, and behind the {prompt_tokens} tokens of the "
            f"prompt the context has room for {limit}: ask for fewer, or compile with a larger "
            "ctx_len."
        )
    num_each = 1 if params.logprobs is None else 2 + params.logprobs
    num_scores = 0 if params.prompt_logprobs is None else 2 + params.prompt_logprobs
    if params.n * limit * num_each + prompt_tokens * num_scores > MAX_HELD:
        raise RowError(
            f"{params.n} answers of up to {limit} tokens, with what logprobs asks for, are more "
            f"than {MAX_HELD} numbers: ask for a smaller n, max_tokens or logprobs."
        )


def _prompt_logprobs(sequence: steps.Sequence) -> tuple[TokenLogprob | None, ...] | None:
    """One for each token of the prompt; nothing was before the first."""
    scores = sequence.prompt_logprobs
    return None if scores is None else (None, *scores)


def sample_seed(params: SamplingParams, run_seed: int, index: int, sample: int) -> int:
    """The seed of one sample of the row `index`: the same whatever card and attempt it is made by.

    A seed of the row's own is that of its first sample. All others are mixed from what names the
    sample.
    """
    if params.seed is None:
        return mixed_seed("run", run_seed, index, sample)
    return params.seed if sample == 0 else mixed_seed("row", params.seed, sample)


def mixed_seed(*parts: object) -> int:
    """A seed that is the same for parts of the same `repr`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED
