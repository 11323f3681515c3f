"""A step's memory for some number of tokens: its buffers, and the tables that the kernels read."""

from __future__ import annotations

from typing import Any, List, Mapping, Sequence, Tuple

import numpy as np

from ..kernels import operations as op
from ..numbers import mxfp6
from .program import PANEL, StepProgram
from .team import ALIGN

MOST_PACKED_FLOATS = 4
"""Rows of float32, at most, that take a weight as it is packed."""
TILE = mxfp6.BLOCK
_FLOAT_BYTES = 4
_PRODUCT_KINDS = {"mxfp6": op.MXFP6, "float16": op.FLOAT16, "float32": op.FLOAT32}


def address_of(array: Any) -> int:
    """Where an array's numbers begin."""
    address: int = array.ctypes.data
    return address


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.int32))


class Tables:
    """Buffers and tables for `capacity` tokens.

    Attributes:
        tokens: int64 [2, 4, capacity], by domain: ids, positions, slots, source rows.
        token_addresses: where their rows are.
        operations: int64 [operations, 20], see `kernels/operations.py`.
    """

    def __init__(
        self, program: StepProgram, states: Mapping[str, Any], ctx_len: int, capacity: int
    ) -> None:
        self._program = program
        self._states = states
        self._ctx_len = ctx_len
        self.capacity = capacity
        plan = program.schedule
        self._buffers = []
        planes = {p.out: _planes(p) for p in plan.placed if p.operation.kind == op.QUANTIZE}
        for number, (width, _) in enumerate(plan.buffers):
            size = _stride(width)
            if number in planes:
                size = sum(_plane_bytes(width, planes[number]))
            self._buffers.append(_aligned(capacity * size))
        self.tokens = np.zeros((2, 4, capacity), np.int64)
        addresses = [[address_of(a) for a in domain] for domain in self.tokens]
        self.token_addresses = np.array(addresses, np.int64)
        self.operations = np.array([self._row(p) for p in plan.placed], np.int64)
        index_of = {p.operation.out: index for index, p in enumerate(plan.placed)}
        self._direct = {n: index_of[program.fused.results[n]] for n in _direct_results(program)}

    def bind(self, name: str, array: Any) -> None:
        """Let the step write a result where it is wanted, if its rows are as the step's are."""
        if name in self._direct:
            self.operations[self._direct[name], op.OUT] = address_of(array)

    def collect(self, name: str, array: Any) -> Any:
        """The result that `bind` was told of."""
        if name not in self._direct:
            buffer = self._program.schedule.results[name]
            stride = _stride(self._program.schedule.buffers[buffer][0])
            rows = self._buffers[buffer][: self.capacity * stride].view(array.dtype)
            array[:] = rows.reshape(self.capacity, -1)[: len(array), : array.shape[1]]
        return array

    def _row(self, placed: Any) -> List[int]:
        operation, program = placed.operation, self._program
        row = [0] * op.NUM_COLUMNS
        width = program.schedule.buffers[placed.out][0]
        row[op.KIND], row[op.DOMAIN], row[op.COUNT] = operation.kind, placed.domain, width
        row[op.OUT], row[op.OUT_STRIDE] = address_of(self._buffers[placed.out]), _stride(width)
        sources = [
            (address_of(self._buffers[b]), _stride(program.schedule.buffers[b][0]))
            for b in placed.inputs
        ]
        if operation.kind in (op.ADD, op.MULTIPLY, op.NORM):
            sources += [(address_of(program.tables[name]), 0) for name in operation.constants]
        for column, (address, stride) in zip((op.IN, op.OTHER), sources):
            row[column], row[column + 1] = address, stride
        if operation.kind == op.EMBED:
            table = program.tables[operation.constants[0]]
            row[op.IN], row[op.IN_STRIDE] = address_of(table), table.strides[0]
        if operation.kind == op.NORM:
            row[op.COUNT] = width // int(operation.numbers[1])
        if operation.kind in (op.STORE, op.ARGMAX):
            row[op.COUNT] = program.schedule.buffers[placed.inputs[0]][0]
        if operation.kind == op.QUANTIZE:
            row[op.OUT_STRIDE] = _plane_bytes(width, _planes(placed))[0]
        if operation.kind == op.PRODUCT and operation.constants[0] in program.planes:
            num_rows = program.weights[operation.constants[0]].num_rows
            planes = program.planes[operation.constants[0]]
            row[op.IN_STRIDE] = _plane_bytes(num_rows, planes)[0]
        parameters = self._parameters(placed, width)
        row[op.P0 : op.P0 + len(parameters)] = parameters
        return row

    def _parameters(self, placed: Any, width: int) -> Sequence[int]:
        """What an operation has beside what it reads and writes; see `operations`."""
        operation, program = placed.operation, self._program
        numbers, names = operation.numbers, operation.constants
        if operation.kind == op.NORM:
            return _bits(numbers[0]), int(numbers[1])
        if operation.kind == op.SCALE:
            return (_bits(numbers[0]),)
        if operation.kind == op.ROTATE:
            tables = [address_of(program.tables[name]) for name in names]
            return (*tables, int(numbers[0]), int(numbers[1]))
        if operation.kind == op.EMBED:
            return (int(program.tables[names[0]].dtype == np.float16),)
        if operation.kind == op.STORE:
            array = self._states[names[0]]
            return (address_of(array), *array.strides[:2], *map(int, numbers), array.itemsize)
        if operation.kind == op.ATTEND:
            keys, values = (self._states[name] for name in names)
            heads, kv_heads, dim, _, window = numbers
            factor = address_of(program.factors[numbers[3]])
            sizes = int(heads), int(kv_heads), int(dim), factor, self._ctx_len, keys.itemsize
            caches = address_of(keys), address_of(values)
            return (*caches, *keys.strides[:2], *sizes, int(window))
        if operation.kind == op.QUANTIZE:
            offsets = _plane_offsets(width, _planes(placed), self.capacity)
            places = [address_of(self._buffers[placed.out]) + offset for offset in offsets]
            tiles = -(-width // TILE)
            return tiles * TILE, places[1], places[2], tiles, _planes(placed)
        if operation.kind == op.PRODUCT:
            return self._product_parameters(placed)
        return ()

    def _product_parameters(self, placed: Any) -> Sequence[int]:
        program = self._program
        name = placed.operation.constants[0]
        weight = program.weights[name]
        tiles = -(-weight.num_rows // TILE)
        planes = program.planes.get(name, 0)
        places = [0, 0, 0]
        if planes:
            start = address_of(self._buffers[placed.inputs[0]])
            offsets = _plane_offsets(weight.num_rows, planes, self.capacity)
            places = [start + offset for offset in offsets]
        count, size = weight.panels.shape
        kind = _PRODUCT_KINDS[weight.kind]
        source = address_of(weight.panels)
        shape = source, kind, tiles, weight.num_rows, count, planes
        few = program.most_packed.get(planes, 0) if planes else MOST_PACKED_FLOATS
        return (*shape, places[1], places[2], size, few)


def _direct_results(program: StepProgram) -> List[str]:
    """Results whose rows are as the step's are, and that nothing else is made of."""
    results = program.fused.results
    used = [v for p in program.schedule.placed for v in p.operation.inputs] + list(results.values())
    shapes = program.results.items()
    return [
        name
        for name, (width, kind) in shapes
        if kind == np.float32 and width % PANEL == 0 and used.count(results[name]) == 1
    ]


def _stride(width: int) -> int:
    return -(-width // PANEL) * PANEL * _FLOAT_BYTES


def _planes(placed: Any) -> int:
    """Of a QUANTIZE, how many planes it makes."""
    return int(placed.operation.numbers[0])


def _plane_bytes(width: int, planes: int) -> Tuple[int, int, int]:
    """Bytes of a row of planes, of their scales, and of their sums."""
    tiles = -(-width // TILE)
    return tiles * TILE * planes, tiles * _FLOAT_BYTES, tiles * planes * _FLOAT_BYTES


def _plane_offsets(width: int, planes: int, capacity: int) -> Tuple[int, int, int]:
    """Where a buffer of so many rows has them."""
    of_planes, of_scales, _ = _plane_bytes(width, planes)
    return 0, of_planes * capacity, (of_planes + of_scales) * capacity


def _aligned(size: int) -> Any:
    memory = np.zeros(size + 2 * ALIGN, np.uint8)
    start = -address_of(memory) % ALIGN
    return memory[start : start + size + ALIGN]
