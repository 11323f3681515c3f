"""Runs a lowered graph over a retained state that stays where it is in memory.

One call is one run of onnxruntime over a view of some slots, past and present bound to the same
memory. Rows of many tokens run one by one (the attention kernel takes one row after the first
chunk). Rows of few tokens, often one, are put together even where idle slots lie between them: a
call reads every weight once, whatever its number of rows. What an idle slot's cache holds where
such a call writes is saved and restored.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import onnxruntime as ort

from .attention import (
    BATCH_INDEX,
    COMP_CTX_LENGTHS,
    INPUT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
    SEQLENS,
    TOTAL,
    token_name,
)

MAX_IDLE_RUN = 8
"""Idle slots in a row that are computed along; more, and a second call is cheaper."""

_MAX_BINDINGS = 64
_TOKENS = np.array([1, 2, 0, 2, 1, 0])
_PIECES = (3, 2, 1)
_PROBE_CTX_LEN = 16
_CHECK_TOLERANCE = 1e-3


class Call(NamedTuple):
    """Rows that run together in slots `first` to `first + num_slots - 1`.

    `rows[i]` is the row of the inference that slot `first + i` runs, -1 for an idle slot; `length`
    the tokens of the longest row.
    """

    first: int
    rows: Tuple[int, ...]
    length: int

    @property
    def num_slots(self) -> int:
        """How many slots the call covers."""
        return len(self.rows)

    @property
    def is_joint(self) -> bool:
        """Whether it takes several tokens of several rows."""
        return self.length > 1 and self.num_slots > 1


def plan(
    positions: Any, slots: Any, num_slots: int, ctx_len: int, *, joint_length: int = 1
) -> Optional[List[Call]]:
    """Split an inference into calls.

    Args:
        positions: [rows, tokens]; negative is padding.
        slots: [rows], the slot of each row.
        num_slots: slots that the cache has.
        ctx_len: positions that a slot has.
        joint_length: tokens of a row, at most, that may be put together with another.

    Returns:
        Calls that together write and read what the whole inference would; None where a row is
        not consecutive positions within the context and then padding, or two rows share a slot.
    """
    valid = positions >= 0
    lengths = valid.sum(axis=1)
    steps = np.arange(positions.shape[1])
    expected = np.where(steps < lengths[:, None], positions[:, :1] + steps, -1)
    if not np.array_equal(np.where(valid, positions, -1), expected):
        return None
    active = [int(row) for row in np.flatnonzero(lengths)]
    if any(positions[row, 0] + lengths[row] > ctx_len for row in active):
        return None
    taken = [int(slots[row]) for row in active]
    if len(set(taken)) < len(taken) or any(not 0 <= slot < num_slots for slot in taken):
        return None
    calls: List[Call] = []
    for slot, row in sorted(zip(taken, active)):
        call = Call(slot, (row,), int(lengths[row]))
        joined = _joined(calls[-1], call, joint_length) if calls else None
        if joined is None:
            calls.append(call)
        else:
            calls[-1] = joined
    return calls


def _joined(one: Call, other: Call, joint_length: int) -> Optional[Call]:
    """Both in one call, where they fit into one."""
    length = max(one.length, other.length)
    num_idle = other.first - one.first - one.num_slots
    if length > joint_length or num_idle > MAX_IDLE_RUN:
        return None
    return Call(one.first, one.rows + (-1,) * num_idle + other.rows, length)


class Runner:
    """A session over views of states that stay where they are.

    Args:
        session: onnxruntime's session of a lowered graph.
        states: retained input -> array [slots, heads, ctx_len, dim]; written in place.
        outputs: retained input -> output.
    """

    def __init__(self, session: Any, states: Mapping[str, Any], outputs: Mapping[str, str]) -> None:
        self._session = session
        self.states = states
        shapes = {i.name: i.shape for i in session.get_inputs()}
        self._length = shapes[INPUT_IDS][1]
        self._kept = shapes.get(NUM_LOGITS_TO_KEEP, (None,))[0]
        self.joint_length = sum(name.startswith(token_name(SEQLENS, "")) for name in shapes)
        tokens = range(self.joint_length - 1)
        self._written = {
            name: [output, *(token_name(output, token) for token in tokens)]
            for name, output in outputs.items()
        }
        kept = {name for names in self._written.values() for name in names}
        self.results = {
            o.name: (tuple(o.shape[1:]), _RESULT_TYPES[o.type])
            for o in session.get_outputs()
            if o.name not in kept
        }
        self._bindings: Dict[Tuple[int, int], Tuple[Any, List[Any]]] = {}

    def execute(self, first: int, tokens: Any, where: Any, num_kept: int = 1) -> Dict[str, Any]:
        """Run rows of equal length in slots from `first` on; `where` are their positions.

        A graph of joint rows takes `joint_length` tokens, and writes each token where it says; any
        other writes from each row's first position on. Where a row has fewer tokens than logits are
        to be kept of, there are so many less.
        """
        num, length = tokens.shape
        num_kept = min(num_kept, length)
        binding = self._binding(first, num)
        binding.bind_cpu_input(INPUT_IDS, tokens)
        binding.bind_cpu_input(POSITION_IDS, where)
        if self.joint_length:
            for token in range(length):
                seqlens = where[:, token].astype(np.int32)
                binding.bind_cpu_input(token_name(SEQLENS, token), seqlens)
            last = where.max()
        else:
            seqlens = (where[:, 0] + length - 1).astype(np.int32)
            binding.bind_cpu_input(SEQLENS, seqlens)
            last = seqlens.max()
        binding.bind_cpu_input(TOTAL, np.array(last + 1, np.int32))
        if self._kept is not None:
            binding.bind_cpu_input(NUM_LOGITS_TO_KEEP, np.zeros((num_kept, 1), np.int64))
        made: Dict[str, Any] = {}
        for name, shape in self.result_shapes(num, length, num_kept).items():
            made[name] = np.empty(shape, self.results[name][1])
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(made[name]))
        self._session.run_with_iobinding(binding)
        return made

    def result_shapes(self, num: int, length: int, num_kept: int) -> Dict[str, Tuple[int, ...]]:
        """Shapes of what a run of so many rows and tokens makes."""
        sizes = {self._length: length, self._kept: num_kept}
        return {
            name: (num, *(d if isinstance(d, int) else sizes[d] for d in dims))
            for name, (dims, _) in self.results.items()
        }

    def of_token(self, made: Mapping[str, Any], column: int) -> Dict[str, Any]:
        """Of results that there are for every token, those of one; the others as they are."""
        per_token = {n for n, (dims, _) in self.results.items() if dims[0] == self._length}
        return {n: a[:, column] if n in per_token else a for n, a in made.items()}

    def _binding(self, first: int, num: int) -> Any:
        key = (first, num)
        if key not in self._bindings:
            if len(self._bindings) >= _MAX_BINDINGS:
                self._bindings.clear()
            binding, values = self._session.io_binding(), []
            for name, array in self.states.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[first : first + num])
                binding.bind_ortvalue_input(name, value)
                for output in self._written[name]:
                    binding.bind_ortvalue_output(output, value)
                values.append(value)
            self._bindings[key] = (binding, values)
        return self._bindings[key][0]


class LoweredState:
    """The states of one activation, and the lowered graphs that write them.

    Args:
        runner: of the graph for any rows.
        joint: gives the runner of the graph of joint rows when it is first needed, or None.
        joint_length: tokens of a row that it takes, 0 where there is no such graph.
    """

    def __init__(
        self,
        runner: Runner,
        joint: Callable[[], Optional[Runner]],
        joint_length: int,
    ) -> None:
        self._runner = runner
        self._get_joint = joint
        self._joint: Optional[Runner] = None
        self._joint_length = max(1, joint_length)
        first = next(iter(runner.states.values()))
        self._num_slots, self._ctx_len = first.shape[0], first.shape[2]

    def run(self, inputs: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
        """Run one inference; None where its positions need the reference graph.

        A row that is all padding gets zeros.
        """
        ids, positions = inputs[INPUT_IDS], inputs[POSITION_IDS]
        calls = self._plan(inputs)
        if calls is None:
            return None
        num_kept = len(inputs.get(NUM_LOGITS_TO_KEEP, ()))
        shapes = self._runner.result_shapes(len(ids), ids.shape[1], num_kept)
        results: Dict[str, Any] = {}
        for call in calls:
            made = self._call(call, ids, positions, num_kept)
            whole = all(made[name].shape == shape for name, shape in shapes.items())
            if whole and call.rows == tuple(range(len(ids))):
                return made
            for name, array in made.items():
                if name not in results:
                    results[name] = np.zeros(shapes[name], array.dtype)
                width = min(array.shape[1], shapes[name][1])
                for index, row in enumerate(call.rows):
                    if row >= 0:
                        results[name][row, :width] = array[index, :width]
        for name, (_, dtype) in self._runner.results.items():
            results.setdefault(name, np.zeros(shapes[name], dtype))
        return results

    def _plan(self, inputs: Mapping[str, Any]) -> Optional[List[Call]]:
        positions, slots = inputs[POSITION_IDS], inputs.get(BATCH_INDEX)
        slots = np.arange(len(positions)) if slots is None else slots.reshape(-1)
        ctx_len = self._ctx_len
        if COMP_CTX_LENGTHS in inputs:
            ctx_len = min(ctx_len, len(inputs[COMP_CTX_LENGTHS]))

        def planned() -> Optional[List[Call]]:
            joint = self._joint_length
            return plan(positions, slots, self._num_slots, ctx_len, joint_length=joint)

        calls = planned()
        if self._joint is None and calls is not None and any(call.is_joint for call in calls):
            self._joint = self._get_joint()
            if self._joint is None:
                self._joint_length = 1
                return planned()
        return calls

    def _call(self, call: Call, ids: Any, positions: Any, num_kept: int) -> Dict[str, Any]:
        runner, length = self._runner, call.length
        if self._joint is not None and call.is_joint:
            runner, length = self._joint, self._joint_length
        tokens = np.zeros((call.num_slots, length), np.int64)
        where = np.zeros((call.num_slots, length), np.int64)
        idle = []
        for index, row in enumerate(call.rows):
            if row < 0:
                idle.append(call.first + index)
                continue
            # A row that has fewer tokens computes its last one again.
            columns = np.minimum(np.arange(length), np.count_nonzero(positions[row] >= 0) - 1)
            tokens[index], where[index] = ids[row, columns], positions[row, columns]
        # An idle row is computed as tokens at position 0, whose cache is put back afterwards.
        saved = [(array, slot, array[slot, :, 0].copy())
                 for slot in idle for array in runner.states.values()]  # fmt: skip
        try:
            return runner.execute(call.first, tokens, where, num_kept)
        finally:
            for array, slot, kept in saved:
                array[slot, :, 0] = kept


_RESULT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class Probe:
    """Small runs of a lowered session that have to agree with each other.

    Args:
        session: onnxruntime's session of the lowered graph.
        outputs: retained input -> output.
    """

    def __init__(self, session: Any, outputs: Mapping[str, str]) -> None:
        self._session = session
        self._outputs = outputs
        self._whole = self._pieces(len(_TOKENS))
        self._start = self._pieces(_PIECES[0])

    def holds(self) -> bool:
        """Whether the same row, in another form, still makes what it made at the beginning.

        In pieces, because onnxruntime's older kernels take no later chunk. With padding and another
        row beside it, because lowered rows rely on that changing nothing. It also shows that the
        weights were copied, or are read from where they are.
        """
        return _agree(self._whole, self._pieces(*_PIECES)) and _agree(self._start, self._padded())

    def _pieces(self, *lengths: int) -> Dict[str, Any]:
        state, start, made = self._state(1), 0, {}
        for length in lengths:
            where = np.arange(start, start + length)[None]
            made = state.execute(0, _TOKENS[where], where)
            start += length
        return state.of_token(made, length - 1)

    def _padded(self) -> Dict[str, Any]:
        length = _PIECES[0]
        where = np.tile(np.arange(length + 1), (2, 1))
        tokens = np.stack([_TOKENS[: length + 1], _TOKENS[::-1][: length + 1]])
        # The padding's position only has to be lower than the last token's.
        where[0, length] = 0
        state = self._state(2)
        made = state.of_token(state.execute(0, tokens, where), length - 1)
        return {name: array[:1] for name, array in made.items()}

    def joins(self, session: Any) -> bool:
        """Whether another session makes of joint rows what this one makes of each alone."""
        joint = Runner(session, _states(session, self._outputs, 2), self._outputs)
        length = joint.joint_length
        alone = self._state(2)
        short = length - 1
        tokens = np.resize(_TOKENS, (2, length))
        where = np.tile(np.arange(length), (2, 1))
        where[1, short:], tokens[1, short:] = short - 1, tokens[1, short - 1]
        together = joint.execute(0, tokens, where)
        for row, size in enumerate((length, short)):
            made = alone.execute(row, tokens[row : row + 1, :size], where[row : row + 1, :size])
            mine = {n: a[row : row + 1] for n, a in joint.of_token(together, size - 1).items()}
            if not _agree(alone.of_token(made, size - 1), mine):
                return False
        return _agree(alone.states, joint.states)

    def _state(self, num_slots: int) -> Runner:
        states = _states(self._session, self._outputs, num_slots)
        return Runner(self._session, states, self._outputs)


def _states(session: Any, outputs: Mapping[str, str], num_slots: int) -> Dict[str, Any]:
    return {
        i.name: np.zeros((num_slots, i.shape[1], _PROBE_CTX_LEN, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name in outputs
    }


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs made the same, up to the order of sums."""
    return all(_close(array, other[name]) for name, array in one.items())


def _close(array: Any, other: Any) -> bool:
    if array.dtype.kind != "f":
        return np.array_equal(array, other)
    absolute = _CHECK_TOLERANCE * float(np.abs(array).max(initial=0))
    return np.allclose(other, array, rtol=_CHECK_TOLERANCE, atol=absolute, equal_nan=True)
