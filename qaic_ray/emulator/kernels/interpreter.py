"""The compiled step: phases of operations, done by any number of threads that share them.

A phase is cut into tasks; threads take them one by one from a counter, and go on to the next phase
when all of its tasks are done. A thread that comes late joins where the others are, and one that
never comes is not missed. What the columns of `operations` mean is in `operations.py`.
"""

from __future__ import annotations

from typing import Any, Callable, List

from llvmlite import ir

from . import operations as op
from . import rowops
from .attend import attend, rotate
from .control import (
    Function,
    Num,
    Variable,
    choose,
    columns,
    function,
    read,
    repeat,
    span,
    when,
)
from .emit import F16, F32, I64, LANES, Emitter
from .multiply import multiply_panel, planes_here
from .shared import fetch_add, wait_for
from .tiles import TILE

_ROW_BYTES = 8 * op.NUM_COLUMNS
_PHASE_BYTES = 8 * op.NUM_PHASE_COLUMNS


def _token(emit: Emitter, tokens: Num, what: int, row: Num) -> Num:
    """What is known of a row: its token, position, slot, or the row that it is taken from."""
    return read(emit, read(emit, tokens, 8 * what) + row * 8)


def _store_number(emit: Emitter, value: Any, address: Num, size: int) -> None:
    if size == 2:
        emit.store(emit.builder.fptrunc(value, F16), address.value, 2)
    else:
        emit.store(value, address.value)


@function("store")
def _store(emit: Emitter, row: Num, slot: Num, position: Num, x: Num) -> None:
    """Write a token's keys or values into the cache."""
    fields = (op.P0, op.P1, op.P2, op.P3, op.P4, op.P5)
    cache, of_slot, of_head, heads, dim, size = columns(emit, row, fields)
    with span(emit, 0, heads) as head:
        target = cache + slot * of_slot + head * of_head + position * dim * size
        with span(emit, 0, dim) as i:
            value = emit.load(F32, (x + (head * dim + i) * 4).value)
            for number in (2, 4):
                with when(size.equals(number)):
                    _store_number(emit, value, target + i * number, number)


@function("embed")
def _embed(emit: Emitter, row: Num, token: Num, out: Num) -> None:
    count, table, stride, is_half = columns(emit, row, (op.COUNT, op.IN, op.IN_STRIDE, op.P0))
    source = table + token * stride
    with span(emit, 0, count) as i:
        with when(is_half > 0):
            half = emit.load(F16, (source + i * 2).value, 2)
            emit.store(emit.builder.fpext(half, F32), (out + i * 4).value)
        with when(is_half.equals(0)):
            emit.store(emit.load(F32, (source + i * 4).value), (out + i * 4).value)


@function("argmax")
def _argmax(emit: Emitter, count: Num, x: Num, out: Num) -> None:
    """The place of the first of the largest numbers, as int64."""
    best = Variable(emit, 0)
    with span(emit, 1, count) as i:
        here, there = (emit.load(F32, (x + at * 4).value) for at in (i, best.get()))
        larger = Num(emit, emit.builder.fcmp_ordered(">", here, there))
        best.set(larger.pick(i, best.get()))
    emit.store(best.get().value, out.value, 8)


def _clear(emit: Emitter, x: Num, count: Num, multiple: int) -> None:
    """Zeros behind `count` numbers, up to a multiple: another row's NaN may have been there."""
    with span(emit, count, (count + (multiple - 1)) // multiple * multiple) as i:
        emit.store(F32(0.0), (x + i * 4).value)


@function("norm")
def _norm(emit: Emitter, row: Num, out: Num, one: Num, other: Num) -> None:
    count, epsilon, groups = columns(emit, row, (op.COUNT, op.P0, op.P1))
    with span(emit, 0, groups) as group:
        offset = group * count * 4
        _clear(emit, one + offset, count, LANES)
        rowops.rms_norm(emit, count, out + offset, one + offset, other, epsilon)


@function("quantize")
def _quantize(emit: Emitter, row: Num, index: Num, out: Num, one: Num) -> None:
    fields = (op.P0, op.P1, op.P2, op.P3, op.P4)
    k, scales, sums, blocks, planes = columns(emit, row, fields)
    own, total = scales + index * blocks * 4, sums + index * blocks * planes * 4
    _clear(emit, one, read(emit, row, 8 * op.COUNT), TILE)
    for number in planes_here():
        with when(planes.equals(number)):
            rowops.quantize[number](emit, blocks, one, out, k, own, total, blocks)


@function("run_row")
def _run_row(emit: Emitter, row: Num, index: Num, tokens: Num) -> None:
    """One operation on one row; `tokens` is the address of what is known of its rows."""
    fields = (op.OUT, op.OUT_STRIDE, op.IN, op.IN_STRIDE, op.OTHER, op.OTHER_STRIDE)
    out, out_stride, one, one_stride, other, other_stride = columns(emit, row, fields)
    count, kind, first = columns(emit, row, (op.COUNT, op.KIND, op.P0))
    out, other = out + index * out_stride, other + index * other_stride
    source, one = one, one + index * one_stride

    def token(what: int) -> Num:
        return _token(emit, tokens, what, index)

    def rotated() -> None:
        cos, sin, heads, dim = columns(emit, row, (op.P0, op.P1, op.P2, op.P3))
        offset = token(op.POSITIONS) * dim * 2
        rotate(emit, one, cos + offset, sin + offset, heads, dim // 2, out)

    of_two = {op.ADD: rowops.add, op.MULTIPLY: rowops.multiply, op.SILU_TIMES: rowops.silu_times}
    of_one = {
        op.ROUND_HALF: rowops.round_half,
        op.ROUND_MXINT8: rowops.round_mxint8,
        op.SILU: rowops.silu,
        op.SIGMOID: rowops.sigmoid,
    }
    cases: List[Any] = []
    for number, run in of_two.items():
        cases.append((number, _bound(run, emit, count, out, one, other)))
    for number, run in of_one.items():
        cases.append((number, _bound(run, emit, count, out, one)))
    cases += [
        (op.NORM, lambda: _norm(emit, row, out, one, other)),
        (op.QUANTIZE, lambda: _quantize(emit, row, index, out, one)),
        (op.ROTATE, rotated),
        (op.STORE, lambda: _store(emit, row, token(op.SLOTS), token(op.POSITIONS), one)),
        (op.EMBED, lambda: _embed(emit, row, token(op.IDS), out)),
        (
            op.SELECT,
            lambda: rowops.copy(emit, count, out, source + token(op.SOURCES) * one_stride),
        ),
        (op.SCALE, lambda: rowops.scale(emit, count, out, one, first)),
    ]
    choose(kind, cases, lambda: _argmax(emit, count, one, out))


def _bound(run: Function, emit: Emitter, *arguments: Num) -> Callable[[], None]:
    return lambda: run(emit, *arguments)


@function("run_rows")
def _run_rows(emit: Emitter, operations: Num, phase: Num, task: Num, tokens: Num) -> None:
    fields = (op.FIRST, op.LAST, op.BLOCK, op.ROWS)
    first, last, block, rows = columns(emit, phase, fields)
    end = ((task + 1) * block).at_most(rows)
    with span(emit, task * block, end) as index, span(emit, first, last) as number:
        row = operations + number * _ROW_BYTES
        domain = read(emit, row, 8 * op.DOMAIN)
        _run_row(emit, row, index, tokens + domain * 32)


@function("run_products")
def _run_products(emit: Emitter, operations: Num, phase: Num, task: Num, scratch: Num) -> None:
    """One panel of one of the phase's weights, times a block of rows."""
    first, block, rows = columns(emit, phase, (op.FIRST, op.BLOCK, op.ROWS))
    blocks = (rows + block - 1) // block
    panel = Variable(emit, task // blocks)
    row = Variable(emit, operations + first * _ROW_BYTES)

    def is_beyond() -> Num:
        return panel.get() >= read(emit, row.get(), 8 * op.P4)

    with repeat(emit, is_beyond):
        panel.set(panel.get() - read(emit, row.get(), 8 * op.P4))
        row.set(row.get() + _ROW_BYTES)
    start = task % blocks * block
    end = (start + block).at_most(rows)
    multiply_panel(emit, row.get(), panel.get(), start, end, scratch)


@function("run_attention")
def _run_attention(
    emit: Emitter, operations: Num, phase: Num, task: Num, tokens: Num, scratch: Num
) -> None:
    """A block of tokens, with one head of the cache."""
    first, block, rows = columns(emit, phase, (op.FIRST, op.BLOCK, op.ROWS))
    row = operations + first * _ROW_BYTES
    fields = (op.P0, op.P1, op.P2, op.P3, op.P4, op.P5, op.P6, op.P7, op.P8, op.P9)
    keys, values, of_slot, of_head, heads, kv_heads, dim, factor, ctx_len, size = columns(
        emit, row, fields
    )
    window, domain = columns(emit, row, (op.P10, op.DOMAIN))
    places = (op.IN, op.IN_STRIDE, op.OUT, op.OUT_STRIDE)
    query, query_stride, out, out_stride = columns(emit, row, places)
    head, part, group = task % kv_heads, task // kv_heads, heads // kv_heads
    where, place = tokens + domain * 32, head * group * dim * 4
    with span(emit, part * block, ((part + 1) * block).at_most(rows)) as index:
        offset = _token(emit, where, op.SLOTS, index) * of_slot + head * of_head
        seen = _token(emit, where, op.POSITIONS, index) + 1
        skipped = ((window > 0) & (seen > window)).pick(seen - window, 0)
        offset = offset + skipped * dim * size
        cache = keys + offset, values + offset, seen - skipped, ctx_len - skipped
        q, o = query + index * query_stride + place, out + index * out_stride + place
        for number in (2, 4):
            with when(size.equals(number)):
                attend[number](emit, q, *cache, dim, group, o, factor, scratch)


def build_step() -> Any:
    """The module: `qaic_step(operations, phases, number of phases, tokens, counters, scratch)`.

    All are addresses: of int64 [operations, 20], [phases, 6] and [2, 4] (addresses by domain), of
    `op.COUNTER_BYTES` for each phase, zero before the first thread comes, and of a thread's own
    memory. The thread works until all of the step is done.
    """
    module = ir.Module("qaic_step")
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 6), op.ENTRY)
    emit = Emitter(ir.IRBuilder(entry.append_basic_block("entry")))
    operations, phases, count, tokens, counters, scratch = (Num(emit, a) for a in entry.args)
    with span(emit, 0, count) as number:
        phase, taken = phases + number * _PHASE_BYTES, counters + number * op.COUNTER_BYTES
        kind, total = columns(emit, phase, (op.PHASE_KIND, op.TASKS))
        task = Variable(emit, fetch_add(emit, taken, 1))
        with repeat(emit, lambda: task.get() < total):
            now = task.get()
            choose(
                kind,
                [
                    (op.PRODUCTS, lambda: _run_products(emit, operations, phase, now, scratch)),
                    (
                        op.ATTENTION,
                        lambda: _run_attention(emit, operations, phase, now, tokens, scratch),
                    ),
                ],
                lambda: _run_rows(emit, operations, phase, now, tokens),
            )
            fetch_add(emit, taken + op.COUNTER_BYTES // 2, 1)
            task.set(fetch_add(emit, taken, 1))
        wait_for(emit, taken + op.COUNTER_BYTES // 2, total)
    emit.builder.ret_void()
    return module
