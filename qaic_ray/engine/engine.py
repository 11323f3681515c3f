"""The token loop of one card: plan, run, commit. Token ids only, never text.

`Engine.step` asks the batcher for a step, builds its inputs, runs it on the session, chooses tokens
for the rows that are answered, and commits them to the batcher. It keeps the counts and times of
`metrics.py`. A card has no second queue, so reading new tokens for stop strings is done while it
works, and everything else is kept short.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Protocol, cast

from qaic_ray.contract import IoContract
from qaic_ray.engine.batching.batcher import Batcher
from qaic_ray.engine.batching.lockstep import LockstepBatcher
from qaic_ray.engine.batching.stalls import MAX_STALL_S, Stalls
from qaic_ray.engine.bindings import Logits
from qaic_ray.engine.picking.prompt_scores import score_prompts
from qaic_ray.engine.picking.token_picker import TokenPicker
from qaic_ray.engine.row_times import RowTimes
from qaic_ray.engine.sampler import Selector
from qaic_ray.engine.session import Session
from qaic_ray.engine.step_io import (
    CacheIndexInputs,
    Drafts,
    PositionIdsInputs,
    StepInputs,
)
from qaic_ray.engine.steps import ProgramShapes, Sequence, Step
from qaic_ray.errors import RowError
from qaic_ray.metrics import EngineState, Measurement
from qaic_ray.rows import ROW_ALONE
from qaic_ray.sampling_params import SamplingParams


class StopReader(Protocol):
    """Reads a row's tokens as they come, and may end it (stop strings)."""

    def read(self, token_ids: Listed[int]) -> int | None:
        """Take the row's next tokens; a number ends the row with that many of its tokens."""


class Proposer(Protocol):
    """Drafts tokens, for a program that checks several a row in one step."""

    def propose(self, rows: Listed[Sequence], room: Listed[int], known: Drafts) -> Drafts:
        """At most `room[i]` tokens for row i, each list as long as it is likely to be right.

        `known[i]` are tokens that row i goes on with for certain: what is proposed comes behind
        them.
        """

    def release(self, sequence: Sequence) -> None:
        """Forget a row that has ended."""


@dataclass(frozen=True)
class Finished:
    """A row that ended: `ttft_s` from entering the engine, `decode_s` from there to its end.

    `entered_s` is when that was, and `scheduled_s` when its first step began, on the engine's
    clock.
    With an `error`, which its own sampling or reading raised, it has no answer.
    """

    sequence: Sequence
    ttft_s: float
    decode_s: float
    error: RowError | None = None
    entered_s: float = 0.0
    scheduled_s: float = 0.0


class Engine:
    """Runs sequences on a program, several at once, each in a slot of its own.

    Args:
        program: an opened session (or its stand-in in tests).
        clock: monotonic seconds.
        max_stall_s: how long rows that decode may wait for the prefill of others; one step of
            prefill is done even where it takes longer, and with 0 never two.
        prefix_reuse: whether a prompt may start from what a slot's cache holds already.
        proposer: drafts tokens, for a program whose decode shape takes several a row.
        ride_len: see `Batcher`.
        selector: chooses tokens by a row's parameters, where not a `Selector` of this program.
    """

    def __init__(
        self,
        program: Session,
        clock: Callable[[], float] = time.perf_counter,
        *,
        max_stall_s: float = MAX_STALL_S,
        prefix_reuse: bool = True,
        proposer: Proposer | None = None,
        ride_len: int | None = None,
        selector: Selector | None = None,
    ) -> None:
        shapes = self._shapes = ProgramShapes.of(program.specializations)
        self.batcher: Batcher | LockstepBatcher
        self._inputs: PositionIdsInputs | CacheIndexInputs
        if program.contract is IoContract.CACHE_INDEX:
            self.batcher = LockstepBatcher(shapes)
            self._inputs = CacheIndexInputs(shapes, program.input_dtype)
        else:
            batcher = Batcher(shapes, prefix_reuse=prefix_reuse, ride_len=ride_len)
            self.batcher = batcher
            self._inputs = PositionIdsInputs(shapes, program.input_dtype, batcher)
        self._program = program
        self._clock = clock
        self._stalls = Stalls(max_stall_s)
        self._proposer = proposer if shapes.decode_len > 1 else None
        self._picker = TokenPicker(
            selector or Selector(shapes.num_slots),
            emits_tokens=program.emits_tokens,
            fail=self._end_with,
        )
        self._readers: dict[Sequence, StopReader] = {}
        self._unread: list[Sequence] = []
        self._stops: dict[Sequence, int] = {}
        self._errors: dict[Sequence, RowError] = {}
        self._scored: set[Sequence] = set()
        self._meter = Measurement()
        self._times = RowTimes(self._meter)

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return self.batcher.busy

    @property
    def measurement(self) -> Measurement:
        """All work so far."""
        return self._meter + Measurement()

    def state(self) -> EngineState:
        """How it stands; may be asked for from another thread, while a step is made."""
        meter = self._meter
        num_generated = meter.generated_tokens  # before the rows: none that ends now counts twice
        running = list(self.batcher.running.values())
        # A row that takes or gives its slot meanwhile is in one of the three.
        rows = {*running, *self.batcher.waiting, *self.batcher.running.values()}
        positions = self._shapes.num_slots * self._shapes.ctx_len
        return EngineState(
            running=len(running),
            waiting=len(self.batcher.waiting),
            kv_usage=sum(row.num_computed for row in running) / positions,
            prompt_tokens=meter.prompt_tokens,
            reused_tokens=meter.reused_tokens,
            generated_tokens=num_generated + sum(len(row.output_ids) for row in rows),
        )

    def new_token_limit(self, prompt_tokens: int, wanted: int | None) -> int:
        """How many tokens a prompt may generate; see the batcher's."""
        return self.batcher.new_token_limit(prompt_tokens, wanted)

    def refuse_unanswerable(self, params: SamplingParams) -> None:
        """Raise RowError for what this program's output cannot answer."""
        if self._program.emits_tokens and not params.is_plain:
            raise RowError(
                "This QPC was exported with --next-tokens: it gives the most likely token only, "
                "so there is no temperature, penalty, min_tokens, logprobs, grammar, bias or other "
                "limit; leave them out, or export without it."
            )
        if params.prompt_logprobs is not None and not self._program.keeps_prompt_logits:
            raise RowError(
                "prompt_logprobs needs the logits of all tokens of a prompt, and this QPC keeps "
                "the last one's: make another with `qaic-ray export MODEL --logits all` and "
                "`qaic-ray compile`."
            )

    def add(self, sequence: Sequence, reader: StopReader | None = None) -> None:
        """Queue a sequence; its time to first token starts now."""
        self._times.enter(sequence, self._clock())
        if reader is not None:
            self._readers[sequence] = reader
            sequence.num_read = len(sequence.output_ids)
        if sequence.prompt_logprobs is not None:
            self._scored.add(sequence)
        self._picker.add(sequence)
        self.batcher.add(sequence)

    def step(self) -> list[Finished]:
        """Advance: one prefill step, or one decode step for every row that can decode.

        Returns:
            The sequences that finished.

        Raises:
            DeviceError: from the session; the engine's rows are then lost with the card's state.
        """
        start_s = self._clock()
        for sequence in self.batcher.make_room():
            self._picker.preempt(sequence)
            self._times.preempt(sequence)
        could_decode = self.batcher.num_decoding > 0
        self.batcher.admit()
        step = self.batcher.plan(decode_first=self._stalls.must_decode(start_s, self.batcher))
        if step is None:
            return []
        self._times.begin(step, start_s)
        drafts = None if self._proposer is None or step.is_prefill else self._draft(step)
        built = self._inputs.build(step, drafts)
        meanwhile = self._read if self._unread else None
        if self._picker.has_guided:
            meanwhile = partial(self._prepare, step, built, drafts)
        output = self._program.run(built.shape, built.inputs, meanwhile)
        if self._scored:
            score_prompts(step, built, cast("Logits", output))
        chosen = self._picker.choose(step, built, drafts, output)
        num_before = 0 if drafts is None else _num_output(step)
        ended = self.batcher.commit(step, chosen)
        end_s = self._clock()
        self._measure(step, built, end_s - start_s)
        self._times.end(step, built, end_s)
        if drafts is not None:
            num_kept = _num_output(step) - num_before - sum(built.answers)
            self._meter.drafted_tokens += sum(map(len, drafts))
            self._meter.accepted_tokens += num_kept
            self._meter.decode_tokens += num_kept
        self._stalls.made(step, end_s, could_decode=could_decode)
        if self._readers:
            answered = compress(step.rows, built.answers)
            self._unread = [row for _, row in answered if row in self._readers]
        if self._stops or ended:
            ended = self._end(ended)
        return [self._finish(sequence, end_s) for sequence in ended]

    def abort(self, sequence: Sequence) -> None:
        """End a row that waits or runs, between two steps; no step returns it."""
        self.batcher.abort(sequence)
        self._times.forget(sequence)
        self._unread = [row for row in self._unread if row is not sequence]
        self._forget(sequence)

    def _draft(self, step: Step) -> Drafts:
        assert self._proposer is not None
        longest = self._shapes.decode_len
        room = [
            min(longest - count, sequence.max_new_tokens - len(sequence.output_ids) - 1)
            if count == sequence.num_uncomputed
            else 0
            for (_, sequence), count in zip(step.rows, step.counts, strict=True)
        ]
        rows = [sequence for _, sequence in step.rows]
        known = [self._forced(row, most) for row, most in zip(rows, room, strict=True)]
        left = [most - len(some) for most, some in zip(room, known, strict=True)]
        drafted = self._proposer.propose(rows, left, known)
        return [[*some, *more] for some, more in zip(known, drafted, strict=True)]

    def _forced(self, row: Sequence, most: int) -> Listed[int]:
        """Tokens that a row's grammar makes it go on with."""
        if row.guide is None or most <= 0:
            return ()
        try:
            with ROW_ALONE:
                return row.guide.forced()[:most]
        except RowError:  # which is raised again where a token is chosen
            return ()

    def _end_with(self, error: RowError, sequence: Sequence) -> None:
        """End a row without an answer, when this step is done."""
        self._errors[sequence] = error
        self._stops[sequence] = len(sequence.output_ids)

    def _prepare(self, step: Step, built: StepInputs, drafts: Drafts | None) -> None:
        """What `_read` does, and what may come next in rows that follow a grammar."""
        self._read()
        self._picker.prepare(step, built, drafts)

    def _read(self) -> None:
        """Have new tokens read; called while the card works."""
        for sequence in self._unread:
            self._read_new(sequence)
        self._unread.clear()

    def _read_new(self, sequence: Sequence) -> None:
        start, sequence.num_read = sequence.num_read, len(sequence.output_ids)
        try:
            with ROW_ALONE:
                kept = self._readers[sequence].read(sequence.output_ids[start:])
        except RowError as error:
            self._end_with(error, sequence)
            return
        if kept is not None:
            self._stops[sequence] = kept

    def _end(self, ended: list[Sequence]) -> list[Sequence]:
        """Rows that ended by themselves, and rows that their readers end."""
        for sequence in ended:
            # What a reader has ended in earlier tokens is not read on.
            if sequence in self._readers and sequence not in self._stops:
                self._read_new(sequence)
        every = [*ended, *(sequence for sequence in self._stops if sequence not in ended)]
        for sequence, kept in self._stops.items():
            self._meter.decode_tokens -= self.batcher.stop(sequence, kept)
        self._stops.clear()
        self._unread = [sequence for sequence in self._unread if sequence not in every]
        return every

    def _measure(self, step: Step, built: StepInputs, seconds: float) -> None:
        meter = self._meter
        if step.is_prefill:
            meter.prefill_steps += 1
            meter.prefill_s += seconds
            self.batcher.costs.measured(step.seq_len, seconds)
            return
        num_answered = sum(built.answers)
        meter.decode_steps += 1
        meter.decode_s += seconds
        meter.decode_slots += self._shapes.num_rows
        meter.decode_rows += num_answered
        meter.decode_tokens += num_answered

    def _finish(self, sequence: Sequence, end_s: float) -> Finished:
        times = self._times.leave(sequence)
        self._forget(sequence)
        error = self._errors.pop(sequence, None)
        if error is None:
            del sequence.logprobs[len(sequence.output_ids) :]
            meter = self._meter
            meter.rows += 1
            meter.prompt_tokens += len(sequence.prompt_ids)
            meter.reused_tokens += sequence.num_reused
            meter.generated_tokens += len(sequence.output_ids)
        ttft_s, decode_s = times.first_s - times.entered_s, end_s - times.first_s
        return Finished(sequence, ttft_s, decode_s, error, times.entered_s, times.scheduled_s)

    def _forget(self, sequence: Sequence) -> None:
        self._picker.leave(sequence)
        self._readers.pop(sequence, None)
        self._scored.discard(sequence)
        if self._proposer is not None:
            self._proposer.release(sequence)


def _num_output(step: Step) -> int:
    return sum(len(sequence.output_ids) for _, sequence in step.rows)
