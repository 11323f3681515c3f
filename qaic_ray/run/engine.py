"""The token loop of one card: plan, run, commit. Token ids only, never text.

`Engine.step` asks the batcher for a step, lays its tokens out as the program's inputs, runs it on
the session, picks a token for each row that asks for one, and tells the batcher. It keeps the
counts and times of section "words for speed": everything else is somebody else's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qaic_ray import contract
from qaic_ray.contract import IoContract, Specializations
from qaic_ray.errors import UsageError
from qaic_ray.metrics import Measurement
from qaic_ray.run.batch import Batcher, Sequence, Step
from qaic_ray.run.sampling import greedy

Array = npt.NDArray[Any]


class Program(Protocol):
    """What the engine needs of a session: shapes, and one call."""

    contract: IoContract
    specializations: Specializations

    @property
    def prefill_rows(self) -> int:
        """Rows of the prefill shape."""

    def input_dtype(self, name: str) -> np.dtype[Any]:
        """dtype of an input."""

    def run(self, seq_len: int, inputs: dict[str, Array], output: str) -> Array:
        """Execute once."""


class Engine:
    """Runs sequences on a program, several at once, each in a slot of its own.

    Args:
        program: an opened session (or its stand-in in tests).
        clock: monotonic seconds.

    Raises:
        UsageError: for a program of a contract that the engine does not drive.
    """

    def __init__(self, program: Program, clock: Callable[[], float] = time.perf_counter) -> None:
        if program.contract is not IoContract.POSITION_IDS:
            raise UsageError(
                f"The engine runs QPCs of the {IoContract.POSITION_IDS.value} contract, and this "
                f"one has {program.contract.value}: export with --io position-ids."
            )
        shapes = program.specializations
        self.batcher = Batcher(
            num_slots=shapes.batch_size,
            prompt_len=shapes.prompt_len,
            ctx_len=shapes.ctx_len,
            prefill_rows=program.prefill_rows,
            continuous=shapes.continuous,
        )
        self._program = program
        self._continuous = shapes.continuous
        self._clock = clock
        self._work = Measurement()
        self._ttft_s: list[float] = []
        self._entered: dict[Sequence, float] = {}
        self._first: dict[Sequence, float] = {}
        self._inputs = {
            s.seq_len: self._new_inputs(s.batch_size, s.seq_len) for s in shapes.entries
        }

    @property
    def busy(self) -> bool:
        """Whether any sequence waits or runs."""
        return self.batcher.busy

    @property
    def measurement(self) -> Measurement:
        """All work so far."""
        return self._work + Measurement(ttft_s=tuple(self._ttft_s))

    def new_token_limit(self, prompt_tokens: int, generation_len: int | None) -> int:
        """See `Batcher.new_token_limit`."""
        return self.batcher.new_token_limit(prompt_tokens, generation_len)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its time to first token starts now."""
        self._entered[sequence] = self._clock()
        self.batcher.add(sequence)

    def step(self) -> list[tuple[Sequence, float, float]]:
        """Advance: one prefill chunk, or one token for every running row.

        Returns:
            The sequences that finished, each with its `ttft_s` and `decode_s`.

        Raises:
            DeviceError: from the session; the engine's rows are then lost with the card's state.
        """
        step = self.batcher.plan()
        if step is None:
            return []
        start_s = self._clock()
        tokens = self._forward(step)
        end_s = self._clock()
        finished = self.batcher.commit(step, tokens)
        self._measure(step, start_s, end_s)
        return [self._finish(sequence, end_s) for sequence in finished]

    def _forward(self, step: Step) -> list[int]:
        """Run a step; one token a chunk, meaningful where the chunk samples."""
        inputs = self._inputs[step.seq_len]
        ids, positions = inputs[contract.INPUT_IDS], inputs[contract.POSITION_IDS]
        positions.fill(contract.PADDING_POSITION)
        # In a continuous prefill the rows are few and say which slot they mean; everywhere else
        # row r is slot r.
        indexed = self._continuous and not step.is_decode
        rows = []
        for position, chunk in enumerate(step.chunks):
            row = position if indexed else chunk.slot
            end = len(chunk.ids)
            ids[row, :end] = chunk.ids
            positions[row, :end] = range(chunk.start, chunk.start + end)
            if indexed:
                inputs[contract.BATCH_INDEX][row, 0] = chunk.slot
            rows.append(row)
        logits = self._program.run(step.seq_len, inputs, contract.LOGITS)
        if not any(chunk.samples for chunk in step.chunks):
            return [0] * len(rows)
        # A program gives logits of the last token of a row, or of all of them.
        every = logits.shape[1] > 1
        at = [len(chunk.ids) - 1 if every else 0 for chunk in step.chunks]
        tokens: list[int] = greedy(logits[rows, at]).tolist()
        return tokens

    def _new_inputs(self, batch_size: int, seq_len: int) -> dict[str, Array]:
        def empty(name: str, *dims: int) -> Array:
            return np.zeros(dims, self._program.input_dtype(name))

        inputs = {
            contract.INPUT_IDS: empty(contract.INPUT_IDS, batch_size, seq_len),
            contract.POSITION_IDS: empty(contract.POSITION_IDS, batch_size, seq_len),
        }
        if self._continuous:
            inputs[contract.BATCH_INDEX] = empty(contract.BATCH_INDEX, batch_size, 1)
            inputs[contract.BATCH_INDEX][:, 0] = range(batch_size)
        return inputs

    def _measure(self, step: Step, start_s: float, end_s: float) -> None:
        sampled = [chunk.sequence for chunk in step.chunks if chunk.samples]
        for sequence in sampled:
            if sequence not in self._first:
                self._first[sequence] = end_s
                self._ttft_s.append(end_s - self._entered[sequence])
        if step.is_decode:
            self._work += Measurement(
                decode_steps=1, decode_tokens=len(sampled), decode_s=end_s - start_s
            )
        else:
            self._work += Measurement(prefill_steps=1, prefill_s=end_s - start_s)

    def _finish(self, sequence: Sequence, end_s: float) -> tuple[Sequence, float, float]:
        first_s = self._first.pop(sequence)
        ttft_s = first_s - self._entered.pop(sequence)
        self._work += Measurement(
            rows=1,
            prompt_tokens=len(sequence.prompt_ids),
            generated_tokens=len(sequence.output_ids),
        )
        return sequence, ttft_s, end_s - first_s
