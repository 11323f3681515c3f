"""A step on the states of one activation: which tokens there are, and what comes out for whom."""

from __future__ import annotations

import math
from typing import Any, Callable, ContextManager, Dict, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from ..kernels import operations as op
from ..kernels.native import step_function
from ..lowering.attention import (
    BATCH_INDEX,
    COMP_CTX_LENGTHS,
    INPUT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
)
from .errors import TokenError
from .program import StepProgram
from .tables import Tables, address_of
from .team import ALIGN, TEAM, Scratch

_FLOAT_BYTES = 4
_LANES = 16
_MAX_SHAPES = 256


class Tokens(NamedTuple):
    """The tokens of an inference, without its padding.

    `lengths` has the tokens of each of its rows, `kept` those of them whose results are wanted; the
    others are row after row.
    """

    lengths: Any
    kept: Any
    ids: Any
    positions: Any
    slots: Any

    @property
    def num_kept(self) -> int:
        """Tokens whose results are wanted."""
        return int(self.kept.sum())


class StepState:
    """The states of one activation, and the step that writes them.

    Args:
        program: the step.
        states: retained input -> array [slots, heads, ctx_len, dim], float16 or float32; written in
            place.
        threads: a context that gives the threads of a step that begins now.
    """

    def __init__(
        self,
        program: StepProgram,
        states: Mapping[str, Any],
        threads: Callable[[], ContextManager[int]],
    ) -> None:
        self._program = program
        self._states = states
        self._threads = threads
        first = next(iter(states.values()))
        self._num_slots, self._ctx_len = first.shape[0], first.shape[2]
        self._tables: Optional[Tables] = None
        self._phases: Dict[Tuple[int, int, int], Any] = {}
        scores = program.group * (self._ctx_len + 3 * _LANES) * _FLOAT_BYTES
        self._scratch_bytes = max(op.SCRATCH_BYTES, scores)

    def run(self, inputs: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
        """Run one inference; None where its positions need the reference graph.

        A row that is all padding gets zeros.

        Raises:
            TokenError: for a token beyond the vocabulary.
        """
        ids, positions = inputs[INPUT_IDS], inputs[POSITION_IDS]
        slots = inputs.get(BATCH_INDEX)
        slots = np.arange(len(positions)) if slots is None else slots.reshape(-1)
        ctx_len = self._ctx_len
        if COMP_CTX_LENGTHS in inputs:
            ctx_len = min(ctx_len, len(inputs[COMP_CTX_LENGTHS]))
        lengths = _lengths(positions, slots, self._num_slots, ctx_len)
        if lengths is None:
            return None
        most = {"last": 1, "all": ids.shape[1]}.get(self._program.fused.kept)
        if most is None:
            most = len(inputs[NUM_LOGITS_TO_KEEP])
        shapes = {n: (len(ids), most, w) for n, (w, _) in self._program.results.items()}
        if not lengths.any():
            return {n: np.zeros(s, self._program.results[n][1]) for n, s in shapes.items()}
        is_token = np.arange(ids.shape[1]) < lengths[:, None]
        kept = np.minimum(lengths, most)
        flat = self._known(ids[is_token])
        tokens = Tokens(lengths, kept, flat, positions[is_token], np.repeat(slots, lengths))
        return self._results(self._computed(tokens), kept, shapes)

    def _known(self, ids: Any) -> Any:
        limit = self._program.num_embeddings
        if ids.min() < -limit or ids.max() >= limit:
            worst = int(ids.max() if ids.max() >= limit else ids.min())
            raise TokenError(f"token {worst} is not among the {limit} of the embeddings")
        return np.where(ids < 0, ids + limit, ids)

    def _results(
        self, made: Dict[str, Any], kept: Any, shapes: Mapping[str, Tuple[int, ...]]
    ) -> Dict[str, Any]:
        """By row: zeros where a row has fewer tokens than results are wanted of."""
        results = {}
        for name, shape in shapes.items():
            if len(made[name]) == shape[0] * shape[1]:
                results[name] = made[name].reshape(shape)
                continue
            results[name] = np.zeros(shape, made[name].dtype)
            results[name][np.arange(shape[1]) < kept[:, None]] = made[name]
        return results

    def _computed(self, tokens: Tokens) -> Dict[str, Any]:
        """Run the step; its results, a row a kept token."""
        num_tokens, num_kept = len(tokens.ids), tokens.num_kept
        if self._tables is None or num_tokens > self._tables.capacity:
            capacity = max(16, 1 << (num_tokens - 1).bit_length())
            self._tables = Tables(self._program, self._states, self._ctx_len, capacity)
        tables = self._tables
        _place(tokens, tables.tokens)
        made = {}
        for name, (width, kind) in self._program.results.items():
            made[name] = np.empty((num_kept, width), kind)
            tables.bind(name, made[name])
        with self._threads() as threads:
            self._compute(tables, num_tokens, num_kept, threads=threads)
        return {name: tables.collect(name, array) for name, array in made.items()}

    def _compute(self, tables: Tables, num_tokens: int, num_kept: int, *, threads: int) -> None:
        key = (num_tokens, num_kept, threads)
        if key not in self._phases:
            if len(self._phases) >= _MAX_SHAPES:
                self._phases.clear()
            self._phases[key] = self._phase_table(*key)
        phases = self._phases[key]
        counters = np.zeros(len(phases) * op.COUNTER_BYTES + ALIGN, np.uint8)
        start = address_of(counters)
        places = address_of(tables.operations), address_of(phases), len(phases)
        shared = address_of(tables.token_addresses), start + -start % ALIGN
        run_step, size = step_function(), self._scratch_bytes

        def work(scratch: Scratch) -> None:
            # What the addresses point into lives as long as this does: a thread may come late.
            _ = counters, phases, tables
            run_step(*places, *shared, scratch.address(size))

        TEAM.run(work, threads)

    def _phase_table(self, num_tokens: int, num_kept: int, threads: int) -> Any:
        """The phases for so many tokens; never written to again."""
        plan, rows_of = self._program.schedule, (num_tokens, num_kept)
        table = []
        for phase in plan.phases:
            rows = rows_of[phase.domain]
            operations = [p.operation for p in plan.placed[phase.first : phase.last]]
            if phase.kind == op.ROWWISE:
                block = max(1, math.ceil(rows / (threads * 4)))
                tasks = math.ceil(rows / block)
            elif phase.kind == op.PRODUCTS:
                weights = [self._program.weights[o.constants[0]] for o in operations]
                panels = sum(len(weight.panels) for weight in weights)
                block = _row_block(rows, panels, threads)
                tasks = panels * math.ceil(rows / block)
            else:
                kv_heads = int(operations[0].numbers[1])
                block = max(1, math.ceil(rows * kv_heads / (threads * 32)))
                tasks = math.ceil(rows / block) * kv_heads
            table.append([phase.kind, phase.first, phase.last, tasks, block, rows])
        return np.array(table, np.int64)


def _place(tokens: Tokens, table: Any) -> None:
    """Tell the step which token is where; `table` is [2, 4, capacity], by domain."""
    everywhere, some = table
    count, num_kept = len(tokens.ids), tokens.num_kept
    everywhere[op.IDS, :count] = tokens.ids
    everywhere[op.POSITIONS, :count] = tokens.positions
    everywhere[op.SLOTS, :count] = tokens.slots
    kept = tokens.kept
    ends = np.repeat(np.cumsum(tokens.lengths), kept)
    before_end = np.repeat(np.cumsum(kept), kept) - np.arange(num_kept)
    sources = ends - before_end
    some[op.SOURCES, :num_kept] = sources
    some[op.IDS : op.SLOTS + 1, :num_kept] = everywhere[op.IDS : op.SLOTS + 1, sources]


def _row_block(rows: int, panels: int, threads: int) -> int:
    """Rows of one task: all, or fewer where there would be less than a few tasks a thread."""
    parts = max(1, min(rows // 48, math.ceil(8 * threads / panels)))
    return math.ceil(rows / parts / 6) * 6 if parts > 1 else rows


def _lengths(positions: Any, slots: Any, num_slots: int, ctx_len: int) -> Optional[Any]:
    """Tokens of each row; None where a row is not consecutive positions and then padding."""
    valid = positions >= 0
    lengths = valid.sum(axis=1)
    if positions.shape[1] > 1:
        steps = np.arange(positions.shape[1])
        expected = np.where(steps < lengths[:, None], positions[:, :1] + steps, -1)
        if not np.array_equal(np.where(valid, positions, -1), expected):
            return None
    active = lengths > 0
    taken = slots[active]
    if (positions[active, 0] + lengths[active] > ctx_len).any():
        return None
    # A set: rows are few, and a step of one row is to be quick.
    distinct = set(taken.tolist())
    if len(distinct) < len(taken) or not all(0 <= slot < num_slots for slot in distinct):
        return None
    return lengths
