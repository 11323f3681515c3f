"""A program whose every answer follows from a formula, in either contract: in place of a card.

It keeps each slot's tokens where a card keeps keys and values, and refuses what a card could not
answer rightly: a position that was skipped, two rows of one slot, a shape that was not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray import contract
from qaic_ray.contract import IoContract, Specialization, Specializations
from qaic_ray.engine.engine import Engine, Finished, StopReader
from qaic_ray.engine.steps import Sequence

VOCAB = 61
EOS = 5
Array = npt.NDArray[Any]


@lru_cache(maxsize=100_000)
def logits_of(ids: tuple[int, ...], vocab: int = VOCAB) -> Array:
    """Depends on every token and its place, as a language model's answer does."""
    value = 1
    for token in ids:
        value = (value * 31 + token + 7) % 1_000_003
    logits = np.random.default_rng(value).normal(size=vocab).astype(np.float32) * 2
    logits.setflags(write=False)
    return logits


def answer(prompt: tuple[int, ...], limit: int, memory: int | None = None) -> list[int]:
    """What a greedy row must get, whatever else runs beside it."""
    ids, output = list(prompt), []
    while len(output) < limit and EOS not in output:
        output.append(int(logits_of(tuple(ids[-(memory or len(ids)) :])).argmax()))
        ids.append(output[-1])
    return output


class FormulaProgram:
    """Runs any specializations of either contract.

    Args:
        specializations: the shapes that may be called.
        io_contract: which inputs there are.
        every_token: logits of all tokens of a row, as `--logits all` gives.
        emits_tokens: ids in place of logits.
        memory: how many of the last tokens the formula sees; few make the answers repeat
            themselves. None: all.
        vocab: width of the logits.
    """

    def __init__(
        self,
        specializations: Specializations,
        *,
        io_contract: IoContract = IoContract.POSITION_IDS,
        every_token: bool = False,
        emits_tokens: bool = False,
        memory: int | None = None,
        vocab: int = VOCAB,
    ) -> None:
        self.specializations = specializations
        self.contract = io_contract
        self.emits_tokens = emits_tokens
        self.calls: list[tuple[Specialization, list[int]]] = []
        self._every_token = every_token
        self._memory = memory
        self._vocab = vocab
        rows = specializations.batch_size
        self._cache = np.full((rows, specializations.ctx_len), -1)
        self._place = np.zeros((rows, specializations.ctx_len), int)
        self._mask = np.zeros((rows, specializations.ctx_len), bool)

    @property
    def keeps_prompt_logits(self) -> bool:
        prefills = self.specializations.prefills
        return not self.emits_tokens and (self._every_token or not prefills)

    def input_dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.int8 if name == contract.ATTENTION_MASK else np.int64)

    def run(
        self,
        shape: Specialization,
        inputs: Mapping[str, Array],
        meanwhile: Callable[[], None] | None = None,
    ) -> Array:
        assert shape in self.specializations.entries
        dims = (shape.batch_size, shape.seq_len)
        assert inputs[contract.INPUT_IDS].shape == inputs[contract.POSITION_IDS].shape == dims
        if meanwhile is not None:
            meanwhile()
        lockstep = self.contract is IoContract.CACHE_INDEX
        run = self._run_lockstep if lockstep else self._run_slots
        logits = run(shape, inputs)
        return logits.argmax(axis=-1) if self.emits_tokens else logits

    def _run_slots(self, shape: Specialization, inputs: Mapping[str, Array]) -> Array:
        ids, positions = inputs[contract.INPUT_IDS], inputs[contract.POSITION_IDS]
        slots = inputs.get(contract.BATCH_INDEX, np.arange(len(ids))[:, None])[:, 0].tolist()
        assert len(set(slots)) == len(slots)
        assert (contract.BATCH_INDEX in inputs) == (shape.full_batch_size is not None)
        num_columns = shape.seq_len if self._every_token else (shape.num_logits_to_keep or 1)
        logits = np.zeros((len(ids), num_columns, self._vocab), np.float32)
        live = []
        for row, slot in enumerate(slots):
            used = int((positions[row] >= 0).sum())
            assert (positions[row, used:] == contract.PADDING_POSITION).all()
            if used == 0:
                continue
            live.append(slot)
            first = int(positions[row, 0])
            assert positions[row, :used].tolist() == list(range(first, first + used))
            assert first + used <= shape.reach
            self._cache[slot, first : first + used] = ids[row, :used]
            kept = max(used - num_columns, 0)
            for column in range(kept, used):
                seen = self._cache[slot, : first + column + 1]
                assert (seen >= 0).all(), "a position was skipped"
                logits[row, column - kept] = self._logits(seen)
        self.calls.append((shape, live))
        return logits

    def _run_lockstep(self, shape: Specialization, inputs: Mapping[str, Array]) -> Array:
        ids, positions = inputs[contract.INPUT_IDS], inputs[contract.POSITION_IDS]
        start = int(inputs[contract.CACHE_INDEX][0])
        if contract.ATTENTION_MASK in inputs:
            self._mask = inputs[contract.ATTENTION_MASK].astype(bool)
        end = start + shape.seq_len
        assert end <= shape.ctx_len
        self._mask[:, end - 1] = True
        columns = range(shape.seq_len if self._every_token else 1)
        logits = np.zeros((len(ids), len(columns), self._vocab), np.float32)
        for row in range(len(ids)):
            self._cache[row, start:end] = ids[row]
            self._place[row, start:end] = positions[row]
            for column in columns:
                last = end - len(columns) + column
                if not self._mask[row, last]:
                    continue  # padding
                there = np.flatnonzero(self._mask[row, : last + 1])
                # A token stands where its position says: a wrong position is a wrong answer.
                seen = np.full(shape.ctx_len, -1)
                seen[self._place[row, there]] = self._cache[row, there]
                logits[row, column] = self._logits(seen[: int(self._place[row, last]) + 1])
        self.calls.append((shape, list(range(len(ids)))))
        return logits

    def _logits(self, seen: Array) -> Array:
        ids = tuple(seen.tolist())
        return logits_of(ids[-(self._memory or len(ids)) :], self._vocab)


def run_all(
    engine: Engine,
    arrivals: list[tuple[int, Sequence]],
    readers: Mapping[int, StopReader] | None = None,
) -> dict[int, Finished]:
    """Feed each sequence at its step, and go on to the end."""
    arrivals = sorted(arrivals, key=lambda arrival: arrival[0])
    done: dict[int, Finished] = {}
    step = 0
    while arrivals or engine.busy:
        while arrivals and arrivals[0][0] <= step:
            sequence = arrivals.pop(0)[1]
            engine.add(sequence, (readers or {}).get(sequence.key))
        for finished in engine.step():
            assert finished.sequence.key not in done
            done[finished.sequence.key] = finished
        engine.batcher.check()
        step += 1
    return done
