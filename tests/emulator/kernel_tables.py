"""Single operations of the compiled step, run through a table made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from qaic_ray.emulator.kernels import operations as op
from qaic_ray.emulator.kernels.native import step_function
from qaic_ray.emulator.numbers import panels
from qaic_ray.emulator.step.tables import address_of

WIDTH = 64
TILE = 32
_ALIGN = 64
_KINDS = {"mxfp6": op.MXFP6, "float16": op.FLOAT16, "float32": op.FLOAT32}


def aligned(array: Any, room: int = 0) -> Any:
    """A copy at an address that vectors like, with `room` bytes of zeros behind it."""
    memory = np.zeros(array.nbytes + room + _ALIGN, np.uint8)
    start = -address_of(memory) % _ALIGN
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def padded(x: Any, beyond: float = 0.0) -> Any:
    """Rows [n, width] with room up to a multiple of 64, which has a number of its own."""
    rows = np.full((len(x), -(-x.shape[1] // WIDTH) * WIDTH), beyond, np.float32)
    rows[:, : x.shape[1]] = x
    return aligned(rows)


def bits(number: float) -> int:
    """A float32 as an int64 parameter."""
    return int(np.float32(number).view(np.int32))


def run(
    phase_kind: int,
    operation: dict[int, int],
    rows: int,
    *,
    tasks: int,
    block: int,
    tokens: Any = None,
) -> None:
    """One phase of one operation, given as its columns; `tokens` are int64 [4, rows]."""
    table = np.zeros((1, op.NUM_COLUMNS), np.int64)
    for column, value in operation.items():
        table[0, column] = value
    phases = np.array([[phase_kind, 0, 1, tasks, block, rows]], np.int64)
    tokens = np.zeros((4, rows), np.int64) if tokens is None else tokens
    addresses = np.array([[address_of(row) for row in tokens]] * 2, np.int64)
    counters = aligned(np.zeros(op.COUNTER_BYTES, np.uint8))
    scratch = aligned(np.full(1 << 17, 0xFF, np.uint8))  # NaN, where it is read unwritten
    places = address_of(table), address_of(phases), 1, address_of(addresses), address_of(counters)
    step_function()(*places, address_of(scratch))


def row_operation(kind: int, x: Any, other: Any = None, *parameters: int, count: int = 0) -> Any:
    """An operation on rows [n, width], and what comes out, in the same shape."""
    source = padded(x)
    out = padded(np.full(x.shape, np.nan, np.float32), np.nan)
    columns = {
        op.KIND: kind, op.OUT: address_of(out), op.OUT_STRIDE: out.strides[0],
        op.IN: address_of(source), op.IN_STRIDE: source.strides[0], op.COUNT: count or x.shape[1],
    }  # fmt: skip
    if other is not None:
        second = padded(np.atleast_2d(other))
        columns[op.OTHER] = address_of(second)
        columns[op.OTHER_STRIDE] = second.strides[0] if len(second) > 1 else 0
    columns.update({op.P0 + i: value for i, value in enumerate(parameters)})
    run(op.ROWWISE, columns, len(x), tasks=-(-len(x) // 2), block=2)
    return out[:, : x.shape[1]]


class Quantized:
    """Rows cut into planes: `planes` int8 [n, planes, K], `scales` [n, blocks], `sums`."""

    def __init__(self, x: Any, num_planes: int, beyond: float = 0.0) -> None:
        num_rows, width = x.shape
        blocks = -(-width // TILE)
        source = padded(x, beyond)
        self.planes = aligned(np.zeros((num_rows, num_planes, blocks * TILE), np.int8))
        self.scales = aligned(np.zeros((num_rows, blocks), np.float32))
        self.sums = aligned(np.zeros((num_rows, num_planes, blocks), np.int32))
        run(
            op.ROWWISE,
            {
                op.KIND: op.QUANTIZE, op.OUT: address_of(self.planes),
                op.OUT_STRIDE: self.planes.strides[0], op.IN: address_of(source),
                op.IN_STRIDE: source.strides[0], op.COUNT: width, op.P0: blocks * TILE,
                op.P1: address_of(self.scales), op.P2: address_of(self.sums), op.P3: blocks,
                op.P4: num_planes,
            },
            num_rows, tasks=num_rows, block=1,
        )  # fmt: skip


def product(
    x: Any,
    weight: Any,
    kind: str,
    num_planes: int = 0,
    *,
    block: int = 0,
    beyond: float = 0.0,
    packed: int = 4,
) -> Any:
    """Rows [n, K] times a weight: [K, N], or MXFP6 [tiles, 25, N]; float32 [n, N].

    `num_planes` is 0 for float32 activations; `block` is how many rows a task has, all for 0;
    `packed` up to how many take the weight as it is packed.
    """
    num_rows, width = x.shape
    in_panels = panels.of_mxfp6(weight) if kind == "mxfp6" else panels.of_floats(weight)
    memory, num_columns = aligned(in_panels), weight.shape[-1]
    of_panel = memory.nbytes // len(memory)
    out = padded(np.full((num_rows, num_columns), np.nan, np.float32))
    tiles, block = -(-width // TILE), block or num_rows
    columns = {
        op.KIND: op.PRODUCT, op.OUT: address_of(out), op.OUT_STRIDE: out.strides[0],
        op.P0: address_of(memory), op.P1: _KINDS[kind], op.P2: tiles, op.P3: width,
        op.P4: len(memory), op.P5: num_planes, op.P8: of_panel, op.P9: packed,
    }  # fmt: skip
    if num_planes:
        activations = Quantized(x, num_planes, beyond)
        columns[op.IN] = address_of(activations.planes)
        columns[op.IN_STRIDE] = activations.planes.strides[0]
        columns[op.P6], columns[op.P7] = (
            address_of(activations.scales),
            address_of(activations.sums),
        )
    else:
        source = padded(x, beyond)
        columns[op.IN], columns[op.IN_STRIDE] = address_of(source), source.strides[0]
    tasks = len(memory) * -(-num_rows // block)
    run(op.PRODUCTS, columns, num_rows, tasks=tasks, block=block)
    return out[:, :num_columns]


def attention(query: Any, keys: Any, values: Any, positions: Any, slots: Any, factor: float) -> Any:
    """Queries [n, heads, dim] over caches [slots, kv heads, ctx_len, dim]: [n, heads, dim]."""
    num_rows, heads, dim = query.shape
    source = padded(query.reshape(num_rows, -1))
    out = padded(np.full((num_rows, heads * dim), np.nan, np.float32))
    caches, scale = (
        [aligned(cache, _ALIGN) for cache in (keys, values)],
        np.array([factor], np.float32),
    )
    kv_heads, ctx_len = keys.shape[1:3]
    parameters = (
        address_of(caches[0]), address_of(caches[1]), *caches[0].strides[:2], heads, kv_heads, dim,
        address_of(scale), ctx_len, keys.itemsize,
    )  # fmt: skip
    columns = {
        op.KIND: op.ATTEND, op.OUT: address_of(out), op.OUT_STRIDE: out.strides[0],
        op.IN: address_of(source), op.IN_STRIDE: source.strides[0],
    } | {op.P0 + i: value for i, value in enumerate(parameters)}  # fmt: skip
    tokens = np.zeros((4, num_rows), np.int64)
    tokens[op.POSITIONS], tokens[op.SLOTS] = positions, slots
    tasks = -(-num_rows // 2) * kv_heads
    run(op.ATTENTION, columns, num_rows, tasks=tasks, block=2, tokens=tokens)
    return out[:, : heads * dim].reshape(query.shape)
