"""A step on memory: weights where the QPC has them, buffers for its rows, and states in place."""

from __future__ import annotations

import math
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np

from ..kernels import operations as op
from ..lowering.attention import (
    BATCH_INDEX,
    COMP_CTX_LENGTHS,
    INPUT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
)
from .errors import TokenError
from .fuse import Fused
from .schedule import Schedule, schedule
from .team import ALIGN, TEAM, Scratch

PANEL = 64
TILE = 32
_FLOAT_BYTES = 4
_MAX_SHAPES = 256
_PRODUCT_KINDS = {"mxfp6": op.MXFP6, "float16": op.FLOAT16, "float32": op.FLOAT32}


class Weight(NamedTuple):
    """A MatMul's weight [K, N] in panels: uint8 [panels, bytes of one]; `kind` of its values."""

    panels: Any
    kind: str
    num_rows: int


class StepProgram:
    """A step and its weights, for all activations of a program.

    Args:
        fused: what to compute.
        weight: gives the panels of a product's weight.
        table: gives any other constant, float32 or (for embeddings) float16.
        planes: of 8 bits that activations of MXFP6 weights are cut into; 0 for float32.
    """

    def __init__(
        self,
        fused: Fused,
        weight: Callable[[str], Weight],
        table: Callable[[str], Any],
        planes: int,
    ) -> None:
        self.fused = fused
        self.planes = planes
        names = {o.constants[0] for o in fused.operations if o.kind == op.PRODUCT}
        self.weights = {name: weight(name) for name in names}
        in_bytes = {n for n, w in self.weights.items() if planes and w.kind == "mxfp6"}
        self.schedule: Schedule = schedule(fused, in_bytes)
        self.in_bytes = in_bytes
        self.tables: Dict[str, Any] = {}
        scales = {o.numbers[3] for o in fused.operations if o.kind == op.ATTEND}
        self.factors = {scale: np.array([scale], np.float32) for scale in scales}
        for operation in fused.operations:
            if operation.kind in (op.PRODUCT, op.STORE, op.ATTEND):
                continue
            for name in operation.constants:
                if name not in self.tables:
                    self.tables[name] = _padded(table(name), operation.kind == op.EMBED)
        self.num_rows_of_table = next(
            int(o.numbers[0]) for o in fused.operations if o.kind == op.EMBED
        )


def _padded(array: Any, is_large: bool) -> Any:
    """A constant with room to read beyond its end; a large table stays where it is."""
    if is_large:
        return array
    room = np.zeros(array.size + 2 * PANEL, np.float32)
    room[: array.size] = array.reshape(-1)
    return room


def _address(array: Any) -> int:
    address: int = array.ctypes.data
    return address


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.int32))


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
        self._capacity = 0
        self._buffers: List[Any] = []
        self._phases: Dict[Tuple[int, int, int], Any] = {}
        heads = [o.numbers for o in program.fused.operations if o.kind == op.ATTEND]
        group = max(int(n[0] // n[1]) for n in heads)
        scores = group * (self._ctx_len + 3 * 16) * _FLOAT_BYTES
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
        kept = {"last": 1, "all": ids.shape[1]}.get(self._program.fused.kept, 0)
        kept = kept or len(inputs[NUM_LOGITS_TO_KEEP])
        return self._run(ids, positions, slots, (lengths, kept))

    def _run(self, ids: Any, positions: Any, slots: Any, sizes: Tuple[Any, int]) -> Dict[str, Any]:
        lengths, kept = sizes
        num_tokens = int(lengths.sum())
        rows_kept = np.minimum(lengths, kept)
        num_kept = int(rows_kept.sum())
        shapes = {
            name: (len(ids), kept, self._width(name)) for name in self._program.schedule.results
        }
        if not num_tokens:
            return {n: np.zeros(s, self._dtype(n)) for n, s in shapes.items()}
        self._reserve(num_tokens)
        self._place(ids, positions, slots, (lengths, rows_kept))
        whole = num_kept == len(ids) * kept
        results = {}
        for name, shape in shapes.items():
            array = np.empty((num_kept, shape[2]), self._dtype(name))
            results[name] = array
            self._bind(name, array)
        self._compute(num_tokens, num_kept)
        made = {}
        for name, shape in shapes.items():
            rows = self._collect(name, results[name])
            if whole:
                made[name] = rows.reshape(shape)
                continue
            made[name] = np.zeros(shape, rows.dtype)
            made[name][np.arange(kept) < rows_kept[:, None]] = rows
        return made

    def _width(self, name: str) -> int:
        return self._program.fused.widths[self._program.fused.results[name]]

    def _dtype(self, name: str) -> Any:
        value = self._program.fused.results[name]
        made = next(o for o in self._program.fused.operations if o.out == value)
        return np.int64 if made.kind == op.ARGMAX else np.float32

    def _reserve(self, num_tokens: int) -> None:
        """Buffers and tables for so many tokens."""
        if num_tokens <= self._capacity:
            return
        self._capacity = max(16, 1 << (num_tokens - 1).bit_length())
        plan = self._program.schedule
        self._buffers = []
        quantized = {p.out for p in plan.placed if p.operation.kind == op.QUANTIZE}
        for number, (width, _) in enumerate(plan.buffers):
            size = _stride(width)
            if number in quantized:
                size = sum(_plane_bytes(width, self._program.planes))
            self._buffers.append(_aligned(self._capacity * size))
        self._tokens = np.zeros((2, 4, self._capacity), np.int64)
        addresses = [[_address(a) for a in domain] for domain in self._tokens]
        self._token_addresses = np.array(addresses, np.int64)
        self._operations = np.array([self._row(p) for p in plan.placed], np.int64)

    def _row(self, placed: Any) -> List[int]:
        operation, program = placed.operation, self._program
        row = [0] * op.NUM_COLUMNS
        width = program.schedule.buffers[placed.out][0]
        row[op.KIND], row[op.DOMAIN], row[op.COUNT] = operation.kind, placed.domain, width
        row[op.OUT], row[op.OUT_STRIDE] = _address(self._buffers[placed.out]), _stride(width)
        sources = [
            (_address(self._buffers[b]), _stride(program.schedule.buffers[b][0]))
            for b in placed.inputs
        ]
        if operation.kind in (op.ADD, op.MULTIPLY, op.NORM):
            sources += [(_address(program.tables[name]), 0) for name in operation.constants]
        for column, (address, stride) in zip((op.IN, op.OTHER), sources):
            row[column], row[column + 1] = address, stride
        if operation.kind == op.EMBED:
            table = program.tables[operation.constants[0]]
            row[op.IN], row[op.IN_STRIDE] = _address(table), table.strides[0]
        if operation.kind == op.NORM:
            row[op.COUNT] = width // int(operation.numbers[1])
        if operation.kind in (op.STORE, op.ARGMAX):
            row[op.COUNT] = program.schedule.buffers[placed.inputs[0]][0]
        if operation.kind == op.QUANTIZE:
            row[op.OUT_STRIDE] = _plane_bytes(width, program.planes)[0]
        if operation.kind == op.PRODUCT and operation.constants[0] in program.in_bytes:
            num_rows = program.weights[operation.constants[0]].num_rows
            row[op.IN_STRIDE] = _plane_bytes(num_rows, program.planes)[0]
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
            tables = [_address(program.tables[name]) for name in names]
            return (*tables, int(numbers[0]), int(numbers[1]))
        if operation.kind == op.EMBED:
            return (int(program.tables[names[0]].dtype == np.float16),)
        if operation.kind == op.STORE:
            array = self._states[names[0]]
            return (_address(array), *array.strides[:2], *map(int, numbers), array.itemsize)
        if operation.kind == op.ATTEND:
            keys, values = (self._states[name] for name in names)
            heads, kv_heads, dim, _ = numbers
            factor = _address(program.factors[numbers[3]])
            sizes = int(heads), int(kv_heads), int(dim), factor, self._ctx_len, keys.itemsize
            return (_address(keys), _address(values), *keys.strides[:2], *sizes)
        if operation.kind == op.QUANTIZE:
            offsets = _plane_offsets(width, program.planes, self._capacity)
            places = [_address(self._buffers[placed.out]) + offset for offset in offsets]
            tiles = -(-width // TILE)
            return tiles * TILE, places[1], places[2], tiles, program.planes
        if operation.kind == op.PRODUCT:
            return self._product_parameters(placed)
        return ()

    def _product_parameters(self, placed: Any) -> Sequence[int]:
        program = self._program
        name = placed.operation.constants[0]
        weight = program.weights[name]
        tiles = -(-weight.num_rows // TILE)
        planes = program.planes if name in program.in_bytes else 0
        places = [0, 0, 0]
        if planes:
            start = _address(self._buffers[placed.inputs[0]])
            offsets = _plane_offsets(weight.num_rows, planes, self._capacity)
            places = [start + offset for offset in offsets]
        count, size = weight.panels.shape
        kind = _PRODUCT_KINDS[weight.kind]
        source = _address(weight.panels)
        return source, kind, tiles, weight.num_rows, count, planes, places[1], places[2], size

    def _place(self, ids: Any, positions: Any, slots: Any, sizes: Tuple[Any, Any]) -> None:
        """Tell the step which token is where."""
        lengths, kept = sizes
        is_token = np.arange(ids.shape[1]) < lengths[:, None]
        flat = ids[is_token]
        limit = self._program.num_rows_of_table
        if flat.size and not -limit <= flat.min() <= flat.max() < limit:
            worst = int(flat.max() if flat.max() >= limit else flat.min())
            raise TokenError(f"token {worst} is not among the {limit} of the embeddings")
        everywhere, some = self._tokens
        count, num_kept = len(flat), int(kept.sum())
        everywhere[op.IDS, :count] = np.where(flat < 0, flat + limit, flat)
        everywhere[op.POSITIONS, :count] = positions[is_token]
        everywhere[op.SLOTS, :count] = np.repeat(slots, lengths)
        ends = np.repeat(np.cumsum(lengths), kept)
        before_end = np.repeat(np.cumsum(kept), kept) - np.arange(num_kept)
        sources = ends - before_end
        some[op.SOURCES, :num_kept] = sources
        some[op.IDS : op.SLOTS + 1, :num_kept] = everywhere[op.IDS : op.SLOTS + 1, sources]

    def _bind(self, name: str, array: Any) -> None:
        if array.dtype == np.float32 and array.shape[1] % PANEL == 0:
            value = self._program.fused.results[name]
            for index, placed in enumerate(self._program.schedule.placed):
                if placed.operation.out == value:
                    self._operations[index, op.OUT] = _address(array)

    def _collect(self, name: str, array: Any) -> Any:
        if array.dtype == np.float32 and array.shape[1] % PANEL == 0:
            return array
        buffer = self._program.schedule.results[name]
        width = self._program.schedule.buffers[buffer][0]
        stride = _stride(width)
        memory = self._buffers[buffer][: self._capacity * stride]
        rows = memory.view(array.dtype).reshape(self._capacity, -1)
        array[:] = rows[: len(array), : array.shape[1]]
        return array

    def _compute(self, num_tokens: int, num_kept: int) -> None:
        with self._threads() as threads:
            self._compute_with(num_tokens, num_kept, threads)

    def _compute_with(self, num_tokens: int, num_kept: int, threads: int) -> None:
        from ..kernels.native import step_function

        key = (num_tokens, num_kept, threads)
        if key not in self._phases:
            if len(self._phases) >= _MAX_SHAPES:
                self._phases.clear()
            self._phases[key] = self._phase_table(*key)
        phases, operations, tokens = self._phases[key], self._operations, self._token_addresses
        counters = np.zeros(len(phases) * op.COUNTER_BYTES + ALIGN, np.uint8)
        first = _address(counters) + -_address(counters) % ALIGN
        given = _address(operations), _address(phases), len(phases), _address(tokens), first
        run_step, size = step_function(), self._scratch_bytes

        def work(scratch: Scratch) -> None:
            # What the addresses point into lives as long as this does.
            _ = counters, operations, phases, tokens, self
            run_step(*given, scratch.address(size))

        TEAM.run(work, threads)

    def _phase_table(self, num_tokens: int, num_kept: int, threads: int) -> Any:
        plan = self._program.schedule
        rows_of = (num_tokens, num_kept)
        table = []
        for phase in plan.phases:
            rows = rows_of[phase.domain]
            placed = plan.placed[phase.first : phase.last]
            if phase.kind == op.ROWWISE:
                block = max(1, math.ceil(rows / (threads * 4)))
                tasks = math.ceil(rows / block)
            elif phase.kind == op.PRODUCTS:
                names = [p.operation.constants[0] for p in placed]
                panels = sum(len(self._program.weights[name].panels) for name in names)
                block = _row_block(rows, panels, threads)
                tasks = panels * math.ceil(rows / block)
            else:
                kv_heads = int(placed[0].operation.numbers[1])
                block = max(1, math.ceil(rows * kv_heads / (threads * 32)))
                tasks = math.ceil(rows / block) * kv_heads
            table.append([phase.kind, phase.first, phase.last, tasks, block, rows])
        return np.array(table, np.int64)


def _row_block(rows: int, panels: int, threads: int) -> int:
    """Rows of one task: all, or fewer where there would be less than a few tasks a thread."""
    parts = max(1, min(rows // 48, math.ceil(8 * threads / panels)))
    return math.ceil(rows / parts / 6) * 6 if parts > 1 else rows


def _stride(width: int) -> int:
    return -(-width // PANEL) * PANEL * _FLOAT_BYTES


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
    start = -_address(memory) % ALIGN
    return memory[start : start + size + ALIGN]


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
    if np.any(positions[active, 0] + lengths[active] > ctx_len):
        return None
    if np.any((taken < 0) | (taken >= num_slots)) or len(np.unique(taken)) < len(taken):
        return None
    return lengths
