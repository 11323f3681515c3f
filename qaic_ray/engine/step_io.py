"""A batcher's step as the program's inputs, and where in the program's output its rows are.

There is one builder of inputs a contract; its arrays are made once for each shape and filled again
for every step.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qaic_ray import contract
from qaic_ray.contract import Specialization
from qaic_ray.engine.batching.batcher import Batcher
from qaic_ray.engine.bindings import Array, Logits, TokenIds
from qaic_ray.engine.steps import ProgramShapes, Step

Drafts = Listed[Listed[int]]
OutputT = TypeVar("OutputT", Logits, TokenIds)
Dtypes = Callable[[str], np.dtype[np.generic]]


@dataclass(frozen=True)
class StepInputs:
    """The inputs of one step.

    Row i of the step is in row `rows[i]` of the program; `lasts[i]` is the column of its last own
    token, behind which are its drafted ones. A row with `answers[i]` false is computed and not
    answered.
    """

    shape: Specialization
    inputs: dict[str, Array]
    rows: Listed[int]
    lasts: Listed[int]
    answers: Listed[bool]

    def column(self, row: int, num_columns: int, num_drafted: int) -> int:
        """Where the answer to a row's last own token is, among `num_columns` of output.

        A program keeps the outputs of the last tokens of a row, or of the first where there are
        not so many.
        """
        last = self.lasts[row]
        return last - max(last + num_drafted + 1 - num_columns, 0)

    def piece(self, row: int, output: OutputT, num_drafted: int) -> OutputT:
        """The output for a row's last own token and its drafted ones."""
        first = self.column(row, output.shape[1], num_drafted)
        return output[self.rows[row], first : first + num_drafted + 1]


class PositionIdsInputs:
    """Rows of any length, each at positions of its own; padding has position -1.

    Args:
        shapes: what the program can run.
        input_dtype: dtype of an input.
        batcher: its free slots are given to rows of the shape that the step has no sequence for.
    """

    def __init__(self, shapes: ProgramShapes, input_dtype: Dtypes, batcher: Batcher) -> None:
        self._shapes = shapes
        self._batcher = batcher
        # In a continuous prefill, and where there are more slots than rows, a row of the program
        # says which slot it means; everywhere else row r is slot r.
        self._indexed = shapes.num_rows < shapes.num_slots
        self._inputs = {
            shape: self._new_inputs(shape, input_dtype)
            for shape in (*shapes.prefills, *shapes.decodes)
        }

    def build(self, step: Step, drafts: Drafts | None) -> StepInputs:
        """Fill the inputs for a step; `drafts` are tokens to try behind each row's own."""
        if step.is_prefill or drafts is not None or max(step.counts) > 1:
            return self._build_many(step, drafts)
        return self._build_newest(step)

    def _build_newest(self, step: Step) -> StepInputs:
        """One token a row, as in nearly every step."""
        positions = [sequence.num_computed for _, sequence in step.rows]
        shape = self._shapes.decode_shape(1, max(positions) + 1)
        inputs = self._inputs[shape]
        ids, at = inputs[contract.INPUT_IDS], inputs[contract.POSITION_IDS]
        num_rows = len(positions)
        if self._indexed:
            rows = list(range(num_rows))
            self._index(inputs, step)
        else:
            rows = [slot for slot, _ in step.rows]
        # Rows are in the order of their slots.
        where: slice | list[int] = slice(None) if num_rows == len(ids) else rows
        at.fill(contract.PADDING_POSITION)
        answers = [
            len(sequence.prompt_ids) + len(sequence.output_ids) == position + 1
            for (_, sequence), position in zip(step.rows, positions, strict=True)
        ]
        # Most rows feed the last token of their answer.
        ids[where, 0] = [
            sequence.output_ids[-1] if answered and sequence.output_ids else sequence.newest
            for (_, sequence), answered in zip(step.rows, answers, strict=True)
        ]
        at[where, 0] = positions
        return StepInputs(shape, inputs, rows, [0] * num_rows, answers)

    def _build_many(self, step: Step, drafts: Drafts | None) -> StepInputs:
        counts = step.counts
        tails: Drafts = drafts or [()] * len(counts)
        ends = [
            sequence.num_computed + count + len(tail)
            for (_, sequence), count, tail in zip(step.rows, counts, tails, strict=True)
        ]
        if step.is_prefill:
            shape = self._shapes.prefill_shape(step.seq_len, max(ends))
        else:
            longest = max(n + len(tail) for n, tail in zip(counts, tails, strict=True))
            shape = self._shapes.decode_shape(longest, max(ends))
        inputs = self._inputs[shape]
        ids, at = inputs[contract.INPUT_IDS], inputs[contract.POSITION_IDS]
        at.fill(contract.PADDING_POSITION)
        indexed = self._indexed or (self._shapes.continuous and step.is_prefill)
        if indexed:
            self._index(inputs, step)
        rows, answers = [], []
        for i, (slot, sequence) in enumerate(step.rows):
            row = i if indexed else slot
            own, tail, end = counts[i], tails[i], ends[i]
            ids[row, :own] = sequence.next_ids(own)
            ids[row, own : own + len(tail)] = tail
            at[row, : own + len(tail)] = range(sequence.num_computed, end)
            rows.append(row)
            answers.append(sequence.num_computed + own == sequence.num_tokens)
        return StepInputs(shape, inputs, rows, [own - 1 for own in counts], answers)

    def _index(self, inputs: dict[str, Array], step: Step) -> None:
        """Write the slot of every row of the shape.

        Rows of no sequence get slots that are not in the step. Nothing is written there, because
        all of such a row is padding, so they may be of rows that run, where too few are free.
        """
        index = inputs[contract.BATCH_INDEX]
        slots = [slot for slot, _ in step.rows]
        spare = len(index) - len(slots)
        if spare:
            others = (*self._batcher.free_slots, *self._batcher.running)
            slots += [slot for slot in others if slot not in slots][:spare]
        index[:, 0] = slots

    def _new_inputs(self, shape: Specialization, input_dtype: Dtypes) -> dict[str, Array]:
        dims = (shape.batch_size, shape.seq_len)
        inputs: dict[str, Array] = {
            name: np.zeros(dims, input_dtype(name))
            for name in (contract.INPUT_IDS, contract.POSITION_IDS)
        }
        if self._shapes.continuous:
            index = np.arange(shape.batch_size, dtype=input_dtype(contract.BATCH_INDEX))
            inputs[contract.BATCH_INDEX] = index[:, np.newaxis].copy()
        return inputs


class CacheIndexInputs:
    """Rows in lockstep, padded on the left; the attention mask says which places are tokens.

    The mask goes to the card with a prefill and stays there: a decode sets its own token's place
    itself.

    Args:
        shapes: what the program can run.
        input_dtype: dtype of an input.
    """

    def __init__(self, shapes: ProgramShapes, input_dtype: Dtypes) -> None:
        batch_size = shapes.num_slots
        self._mask = np.zeros((batch_size, shapes.ctx_len), input_dtype(contract.ATTENTION_MASK))
        self._index = np.zeros(1, input_dtype(contract.CACHE_INDEX))
        # A decode-only program computes prompts in its decode shape, one token at a time.
        self._shapes = {shape.seq_len: shape for shape in (*shapes.prefills, *shapes.decodes)[::-1]}
        self._inputs: dict[int, dict[str, Array]] = {
            seq_len: {
                name: np.zeros((batch_size, seq_len), input_dtype(name))
                for name in (contract.INPUT_IDS, contract.POSITION_IDS)
            }
            | {contract.CACHE_INDEX: self._index}
            for seq_len in self._shapes
        }

    def build(self, step: Step, drafts: Drafts | None) -> StepInputs:
        """Fill the inputs for a step; nothing is ever drafted here."""
        inputs = self._inputs[step.seq_len]
        ids, at = inputs[contract.INPUT_IDS], inputs[contract.POSITION_IDS]
        self._index[0] = step.cache_index
        if step.is_prefill:
            self._fill_prefill(step, ids, at)
            inputs = inputs | {contract.ATTENTION_MASK: self._mask}
        else:
            for slot, sequence in step.rows:
                ids[slot, 0] = sequence.output_ids[-1]
                at[slot, 0] = sequence.num_tokens - 1
        rows = [slot for slot, _ in step.rows]
        lasts, answers = [step.seq_len - 1] * len(rows), [step.ends_padded] * len(rows)
        return StepInputs(self._shapes[step.seq_len], inputs, rows, lasts, answers)

    def _fill_prefill(self, step: Step, ids: Array, at: Array) -> None:
        start, stop = step.cache_index, step.cache_index + step.seq_len
        # A place without a row is a prompt of one padding token: a softmax needs something.
        prompts: list[tuple[int, ...]] = [(0,)] * len(ids)
        for slot, sequence in step.rows:
            prompts[slot] = sequence.prompt_ids
        self._mask.fill(0)
        for place, prompt_ids in enumerate(prompts):
            pad = step.padded_len - len(prompt_ids)
            ids[place] = ((0,) * pad + prompt_ids)[start:stop]
            at[place] = np.maximum(np.arange(start, stop) - pad, 0)
            self._mask[place, pad:stop] = 1
