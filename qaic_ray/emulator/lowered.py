"""Runs a lowered graph over a retained state that stays where it is in memory.

One call is one run of onnxruntime over a view of some slots, past and present bound to the same
memory. Knows nothing of QPCs; `rows.py` plans the calls, `lowering.py` says what the graph takes.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
import onnxruntime as ort

from .gqa import BATCH_INDEX, COMP_CTX_LENGTHS, POSITION_IDS, SEQLENS, TOTAL
from .lowering import INPUT_IDS
from .rows import Call, plan

_MAX_BINDINGS = 64
_TOKENS = np.array([1, 2, 0, 2, 1, 0])
_PIECES = (3, 2, 1)
_CHECK_TOLERANCE = 1e-3


class LoweredState:
    """The states of one activation and the bindings to views of them.

    Args:
        session: onnxruntime's session of the lowered graph.
        states: retained input -> array [slots, heads, ctx_len, dim]; written in place.
        outputs: retained input -> output.
    """

    def __init__(self, session: Any, states: Mapping[str, Any], outputs: Mapping[str, str]) -> None:
        self._session = session
        self._states = states
        self._outputs = outputs
        self._results = {
            o.name: (tuple(o.shape[1:]), _RESULT_TYPES[o.type])
            for o in session.get_outputs()
            if o.name not in outputs.values()
        }
        self._bindings: Dict[Tuple[int, int], Tuple[Any, List[Any]]] = {}
        first = next(iter(states.values()))
        self._num_slots, self._ctx_len = first.shape[0], first.shape[2]

    def run(self, inputs: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
        """Run one inference; None where its positions need the reference graph.

        A row that is all padding gets zeros.
        """
        ids, positions = inputs[INPUT_IDS], inputs[POSITION_IDS]
        slots = inputs.get(BATCH_INDEX)
        slots = np.arange(len(ids)) if slots is None else slots.reshape(-1)
        ctx_len = self._ctx_len
        if COMP_CTX_LENGTHS in inputs:
            ctx_len = min(ctx_len, len(inputs[COMP_CTX_LENGTHS]))
        calls = plan(positions, slots, self._num_slots, ctx_len)
        if calls is None:
            return None
        results: Dict[str, Any] = {}
        for call in calls:
            made = self._call(call, ids, positions)
            if call.rows == tuple(range(len(ids))):
                return made
            for name, array in made.items():
                if name not in results:
                    results[name] = np.zeros((len(ids), *array.shape[1:]), array.dtype)
                for index, row in enumerate(call.rows):
                    if row >= 0:
                        results[name][row] = array[index]
        for name, (dims, dtype) in self._results.items():
            results.setdefault(name, np.zeros((len(ids), *dims), dtype))
        return results

    def _call(self, call: Call, ids: Any, positions: Any) -> Dict[str, Any]:
        tokens = np.zeros((call.num_slots, call.length), np.int64)
        where = np.zeros((call.num_slots, call.length), np.int64)
        idle = []
        for index, row in enumerate(call.rows):
            if row < 0:
                idle.append(call.first + index)
                continue
            tokens[index] = ids[row, : call.length]
            where[index] = positions[row, : call.length]
        # An idle row is computed as one token at position 0, whose cache is put back afterwards.
        saved = [(array, slot, array[slot, :, 0].copy())
                 for slot in idle for array in self._states.values()]  # fmt: skip
        try:
            return self.execute(call.first, tokens, where)
        finally:
            for array, slot, kept in saved:
                array[slot, :, 0] = kept

    def execute(self, first: int, tokens: Any, where: Any) -> Dict[str, Any]:
        """Run rows of equal length in slots from `first` on; `where` are their positions.

        What is written is decided by each row's first position, whatever the others say.
        """
        num, length = tokens.shape
        seqlens = (where[:, 0] + length - 1).astype(np.int32)
        binding = self._binding(first, num)
        binding.bind_cpu_input(INPUT_IDS, tokens)
        binding.bind_cpu_input(POSITION_IDS, where)
        binding.bind_cpu_input(SEQLENS, seqlens)
        binding.bind_cpu_input(TOTAL, np.array(seqlens.max() + 1, np.int32))
        made = {}
        for name, (dims, dtype) in self._results.items():
            made[name] = np.empty((num, *dims), dtype)
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(made[name]))
        self._session.run_with_iobinding(binding)
        return made

    def _binding(self, first: int, num: int) -> Any:
        key = (first, num)
        if key not in self._bindings:
            if len(self._bindings) >= _MAX_BINDINGS:
                self._bindings.clear()
            binding, values = self._session.io_binding(), []
            for name, array in self._states.items():
                value = ort.OrtValue.ortvalue_from_numpy(array[first : first + num])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(self._outputs[name], value)
                values.append(value)
            self._bindings[key] = (binding, values)
        return self._bindings[key][0]


_RESULT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class Probe:
    """Small runs of a lowered session that have to agree, whatever its weights are.

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

        In pieces: onnxruntime's older kernels take no later chunk. With padding and another row
        beside it: that changes nothing is what lowered rows stand on. And the weights are read
        from where they were, or were copied.
        """
        return _agree(self._whole, self._pieces(*_PIECES)) and _agree(self._start, self._padded())

    def _pieces(self, *lengths: int) -> Dict[str, Any]:
        state, start, made = self._state(1), 0, {}
        for length in lengths:
            where = np.arange(start, start + length)[None]
            made = state.execute(0, _TOKENS[where], where)
            start += length
        return made

    def _padded(self) -> Dict[str, Any]:
        length = _PIECES[0]
        where = np.tile(np.arange(length + 1), (2, 1))
        tokens = np.stack([_TOKENS[: length + 1], _TOKENS[::-1][: length + 1]])
        # The padding's position only has to be lower than the last token's.
        where[0, length] = 0
        made = self._state(2).execute(0, tokens, where)
        return {name: array[:1] for name, array in made.items()}

    def _state(self, num_slots: int) -> LoweredState:
        states = {
            i.name: np.zeros((num_slots, i.shape[1], len(_TOKENS), i.shape[3]), np.float32)
            for i in self._session.get_inputs()
            if i.name in self._outputs
        }
        return LoweredState(self._session, states, self._outputs)


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs made the same, up to the order of sums."""
    return all(_close(array, other[name]) for name, array in one.items())


def _close(array: Any, other: Any) -> bool:
    if array.dtype.kind != "f":
        return np.array_equal(array, other)
    absolute = _CHECK_TOLERANCE * float(np.abs(array).max(initial=0))
    return np.allclose(other, array, rtol=_CHECK_TOLERANCE, atol=absolute, equal_nan=True)
