"""The compiled step: phases of operations, done by any number of threads that share them.

A phase is cut into tasks; threads take them one by one from a counter, and go on to the next phase
when all of its tasks are done. A thread that comes late joins where the others are, and one that
never comes is not missed. What the columns of `operations` mean is in `operations.py`.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from . import operations as op
from .attend import attend, rotate
from .machine import sources_digest
from .multiply import multiply_panel
from .rowops import (
    add,
    copy,
    multiply,
    quantize,
    rms_norm,
    round_half,
    round_mxint8,
    scale,
    sigmoid,
    silu,
    silu_times,
)
from .shared import (
    fetch_add,
    get_float,
    get_half,
    get_int,
    put_float,
    put_half,
    put_int,
    wait_for,
)

COUNTER_BYTES = 128
"""Of a phase: what was taken, and what is done, each in a cache line of its own."""

_quantize_1, _quantize_3 = quantize[1], quantize[3]


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _embed(o: Any, token: int, out: int) -> None:
    count, source = o[op.COUNT], o[op.IN] + token * o[op.IN_STRIDE]
    if o[op.P0]:
        for i in range(count):
            put_float(out + i * 4, get_half(source + i * 2))
    else:
        for i in range(count):
            put_float(out + i * 4, get_float(source + i * 4))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _store(o: Any, slot: int, position: int, x: int) -> None:
    """Write a token's keys or values into the cache."""
    dim, size = o[op.P4], o[op.P5]
    for head in range(o[op.P3]):
        target = o[op.P0] + slot * o[op.P1] + head * o[op.P2] + position * dim * size
        for i in range(dim):
            value = get_float(x + (head * dim + i) * 4)
            if size == 2:
                put_half(target + i * 2, value)
            else:
                put_float(target + i * 4, value)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _argmax(count: int, x: int) -> int:
    best, place = get_float(x), 0
    for i in range(1, count):
        value = get_float(x + i * 4)
        if value > best:
            best, place = value, i
    return place


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _run_row(o: Any, row: int, tokens: Any) -> None:
    """One operation on one row; `tokens`: addresses of ids, positions, slots, source rows."""
    kind, count = o[op.KIND], o[op.COUNT]
    out, one = o[op.OUT] + row * o[op.OUT_STRIDE], o[op.IN] + row * o[op.IN_STRIDE]
    other = o[op.OTHER] + row * o[op.OTHER_STRIDE]
    if kind == op.ADD:
        add(count, out, one, other)
    elif kind == op.MULTIPLY:
        multiply(count, out, one, other)
    elif kind == op.NORM:
        for part in range(o[op.P1]):
            offset = part * count * 4
            rms_norm(count, out + offset, one + offset, other, o[op.P0])
    elif kind == op.SILU_TIMES:
        silu_times(count, out, one, other)
    elif kind == op.QUANTIZE:
        planes, blocks = o[op.P4], o[op.P3]
        own, sums = o[op.P1] + row * blocks * 4, o[op.P2] + row * blocks * planes * 4
        if planes == 1:
            _quantize_1(blocks, one, out, o[op.P0], own, sums, blocks)
        else:
            _quantize_3(blocks, one, out, o[op.P0], own, sums, blocks)
    elif kind == op.ROTATE:
        position = get_int(tokens[op.POSITIONS] + row * 8)
        offset = position * o[op.P3] * 2
        rotate(one, o[op.P0] + offset, o[op.P1] + offset, o[op.P2], o[op.P3] // 2, out)
    elif kind == op.ROUND_HALF:
        round_half(count, out, one)
    elif kind == op.ROUND_MXINT8:
        round_mxint8(count, out, one)
    elif kind == op.STORE:
        slot = get_int(tokens[op.SLOTS] + row * 8)
        _store(o, slot, get_int(tokens[op.POSITIONS] + row * 8), one)
    elif kind == op.EMBED:
        _embed(o, get_int(tokens[op.IDS] + row * 8), out)
    elif kind == op.SELECT:
        source = get_int(tokens[op.SOURCES] + row * 8)
        copy(count, out, o[op.IN] + source * o[op.IN_STRIDE])
    elif kind == op.SCALE:
        scale(count, out, one, o[op.P0])
    elif kind == op.SILU:
        silu(count, out, one)
    elif kind == op.SIGMOID:
        sigmoid(count, out, one)
    elif kind == op.ARGMAX:
        put_int(out, _argmax(count, one))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _run_rows(operations: Any, phase: Any, task: int, tokens: Any) -> None:
    first, last, block, rows = phase[op.FIRST], phase[op.LAST], phase[op.BLOCK], phase[op.ROWS]
    for row in range(task * block, min(rows, (task + 1) * block)):
        for index in range(first, last):
            o = operations[index]
            _run_row(o, row, tokens[o[op.DOMAIN]])


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _run_products(operations: Any, phase: Any, task: int, scratch: int) -> None:
    """One panel of one of the phase's weights, times a block of rows."""
    block, rows = phase[op.BLOCK], phase[op.ROWS]
    blocks = (rows + block - 1) // block
    panel, part = task // blocks, task % blocks
    index = phase[op.FIRST]
    while panel >= operations[index, op.P4]:
        panel -= operations[index, op.P4]
        index += 1
    multiply_panel(operations[index], panel, part * block, min(rows, part * block + block), scratch)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _run_attention(operations: Any, phase: Any, task: int, tokens: Any, scratch: int) -> None:
    """A block of tokens, with one head of the cache."""
    o = operations[phase[op.FIRST]]
    kv_heads, dim, block = o[op.P5], o[op.P6], phase[op.BLOCK]
    head, part = task % kv_heads, task // kv_heads
    group = o[op.P4] // kv_heads
    where = tokens[o[op.DOMAIN]]
    for row in range(part * block, min(phase[op.ROWS], (part + 1) * block)):
        slot = get_int(where[op.SLOTS] + row * 8)
        offset = slot * o[op.P2] + head * o[op.P3]
        place = head * group * dim * 4
        attend(
            o[op.IN] + row * o[op.IN_STRIDE] + place,
            o[op.P0] + offset,
            o[op.P1] + offset,
            get_int(where[op.POSITIONS] + row * 8) + 1,
            o[op.P8],
            dim,
            group,
            o[op.OUT] + row * o[op.OUT_STRIDE] + place,
            o[op.P7],
            o[op.P9],
            scratch,
        )


def _compiled(digest: int) -> Any:
    @njit(nogil=True, cache=True, boundscheck=False)  # type: ignore[untyped-decorator]
    def run(operations: Any, phases: Any, tokens: Any, counters: int, scratch: int) -> int:
        for number in range(phases.shape[0]):
            phase, taken = phases[number], counters + number * COUNTER_BYTES
            total = phase[op.TASKS]
            task = fetch_add(taken, 1)
            while task < total:
                if phase[op.PHASE_KIND] == op.PRODUCTS:
                    _run_products(operations, phase, task, scratch)
                elif phase[op.PHASE_KIND] == op.ATTENTION:
                    _run_attention(operations, phase, task, tokens, scratch)
                else:
                    _run_rows(operations, phase, task, tokens)
                fetch_add(taken + COUNTER_BYTES // 2, 1)
                task = fetch_add(taken, 1)
            wait_for(taken + COUNTER_BYTES // 2, total)
        return digest

    return run


# numba's cache notices changes of this file, and of what a function closes over.
run_step = _compiled(int(sources_digest()[:8], 16))
"""Work on a step until all of it is done.

It takes operations (int64 [operations, 20], addresses and numbers), phases (int64 [phases, 6]),
tokens (int64 [2, 4], addresses by domain), the address of `COUNTER_BYTES` for each phase, zero
before the first thread comes, and the address of this thread's own memory.
"""
