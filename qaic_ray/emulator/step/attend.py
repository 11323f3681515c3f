"""Attention of one token over the cache of its row, and what is computed by position.

A cache is float16 or float32 [slots, heads, ctx_len, dim]. A token sees positions 0 to its own; the entries of
its own chunk are in the cache already. Heads whose width is no multiple of 16, and contexts shorter
than 16, take the plain loops.
"""

from __future__ import annotations

import math
from typing import Any, List, Tuple

from numba import njit
from numba.extending import intrinsic

from .emit import F32, FLOATS, HALVES, I64, LANES, VECTOR_BYTES, Emitter, Vec, splat
from .shared import get_float, get_half, put_float
from .tiles import addresses

_LOWEST = -3.0e38


def _entry(emit: Emitter, address: Any, size: int) -> Any:
    """16 numbers of the cache, `size` bytes each."""
    if size == 4:
        return emit.load(FLOATS, address)
    return emit.builder.fpext(emit.load(HALVES, address, 2), FLOATS)


def _scores(size: int) -> Any:
    """An intrinsic: 16 products of a query with keys in a row, times a factor (at an address)."""

    @intrinsic  # type: ignore[untyped-decorator]
    def kernel(
        _typing: Any, query: Any, keys: Any, vectors: Any, out: Any, scale: Any
    ) -> Tuple[Any, Any]:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit = Emitter(builder)
            query, keys, vectors, out, scale = args
            stride = emit.times(vectors, LANES * size)
            rows = [emit.at(keys, emit.times(stride, key)) for key in range(LANES)]

            def body(index: Any, sums: List[Any]) -> List[Any]:
                value = emit.load(FLOATS, emit.at(query, emit.times(index, VECTOR_BYTES)))
                offset = emit.times(index, LANES * size)
                return [
                    emit.fma(_entry(emit, emit.at(row, offset), size), value, total)
                    for row, total in zip(rows, sums)
                ]

            sums = emit.loop(vectors, [splat(FLOATS, 0.0)] * LANES, body)
            total = Vec(emit, _transposed_sum(emit, sums))
            factor = Vec(emit, emit.every(emit.load(F32, scale)))
            emit.store(total * factor, out)
            return context.get_dummy_value()

        return addresses(5), generate

    return kernel


def _transposed_sum(emit: Emitter, rows: List[Any]) -> Any:
    """Of 16 vectors, a vector of their sums."""
    width = 1
    while len(rows) > 1:
        # Lanes of a pair go side by side, in runs of `width`: sums of row i end in lane i.
        low, high = [], []
        for start in range(0, LANES, 2 * width):
            low += [start + i for i in range(width)] + [LANES + start + i for i in range(width)]
            high += [start + width + i for i in range(width)]
            high += [LANES + start + width + i for i in range(width)]
        rows = [
            emit.builder.fadd(emit.shuffle(one, two, low), emit.shuffle(one, two, high))
            for one, two in zip(rows[::2], rows[1::2])
        ]
        width *= 2
    return rows[0]


@intrinsic  # type: ignore[untyped-decorator]
def _softmax(_typing: Any, scores: Any, vectors: Any, factor: Any) -> Tuple[Any, Any]:
    """Scores to powers of e; one over their sum is written to an address."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        scores, vectors, factor = args

        def highest(index: Any, best: List[Any]) -> List[Any]:
            value = emit.vec(emit.at(scores, emit.times(index, VECTOR_BYTES)))
            return [emit.larger(Vec(emit, best[0]), value).value]

        best = emit.loop(vectors, [splat(FLOATS, _LOWEST)], highest)[0]
        top = Vec(emit, emit.every(emit.largest(Vec(emit, best))))

        def power(index: Any, sums: List[Any]) -> List[Any]:
            place = emit.at(scores, emit.times(index, VECTOR_BYTES))
            value = emit.exp(emit.vec(place) - top)
            emit.store(value, place)
            return [builder.fadd(sums[0], value.value)]

        sums = emit.loop(vectors, [splat(FLOATS, 0.0)], power)[0]
        total = emit.total(Vec(emit, sums))
        emit.store(builder.fdiv(F32(1.0), total), factor)
        return context.get_dummy_value()

    return addresses(3), generate


def _mixed(num_vectors: int, size: int) -> Any:
    """An intrinsic: the sum of values weighed with powers, times a factor, 16 dims a vector."""

    @intrinsic  # type: ignore[untyped-decorator]
    def kernel(
        _typing: Any, powers: Any, values: Any, count: Any, stride: Any, factor: Any, out: Any
    ) -> Tuple[Any, Any]:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            emit = Emitter(builder)
            powers, values, count, stride, factor, out = args

            def body(index: Any, sums: List[Any]) -> List[Any]:
                weight = emit.every(emit.load(F32, emit.at(powers, emit.times(index, 4))))
                row = emit.at(values, builder.mul(index, stride))
                return [
                    emit.fma(_entry(emit, emit.at(row, LANES * size * v), size), weight, total)
                    for v, total in enumerate(sums)
                ]

            sums = emit.loop(count, [splat(FLOATS, 0.0)] * num_vectors, body)
            scale = Vec(emit, emit.every(emit.load(F32, factor)))
            for vector, total in enumerate(sums):
                emit.store(Vec(emit, total) * scale, emit.at(out, VECTOR_BYTES * vector))
            return context.get_dummy_value()

        return addresses(6), generate

    return kernel


_scores_16, _scores_32 = _scores(2), _scores(4)
_mixed_4_16, _mixed_2_16, _mixed_1_16 = (_mixed(n, 2) for n in (4, 2, 1))
_mixed_4_32, _mixed_2_32, _mixed_1_32 = (_mixed(n, 4) for n in (4, 2, 1))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def attend(
    query: int, keys: int, values: int, count: int, ctx_len: int, dim: int, group: int, out: int,
    scale: int, size: int, scratch: int,
) -> None:  # fmt: skip
    """`group` heads that share keys and values of `count` positions.

    `query`, `out`: [group, dim]. `scale`: address of the scores' factor. `size`: bytes of a number
    of the cache. `scratch`: room for `group` times (`count` rounded up to 16, and 16).
    """
    if dim % LANES or ctx_len < LANES:
        for head in range(group):
            q, o = query + head * dim * 4, out + head * dim * 4
            _attend_plainly(q, keys, values, count, dim, o, scale, size, scratch)
        return
    vectors = dim // LANES
    blocks = (count + LANES - 1) // LANES
    room = (blocks + 1) * VECTOR_BYTES
    for block in range(blocks):
        # The last block reaches back rather than beyond the context.
        start = block * LANES
        if start + LANES > ctx_len:
            start = ctx_len - LANES
        first = keys + start * dim * size
        for head in range(group):
            place = scratch + head * room + start * 4
            if size == 2:
                _scores_16(query + head * dim * 4, first, vectors, place, scale)
            else:
                _scores_32(query + head * dim * 4, first, vectors, place, scale)
    for head in range(group):
        scores = scratch + head * room
        for rest in range(count, blocks * LANES):
            put_float(scores + rest * 4, _LOWEST)
        _softmax(scores, blocks, scores + blocks * VECTOR_BYTES)
        target = out + head * dim * 4
        _mix(scores, values, count, vectors, size, scores + blocks * VECTOR_BYTES, target)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _mix(
    scores: int, values: int, count: int, vectors: int, size: int, factor: int, out: int
) -> None:
    done, stride = 0, vectors * LANES * size
    while done < vectors:
        part, target = values + done * LANES * size, out + done * VECTOR_BYTES
        left = vectors - done
        if left >= 4 and size == 2:
            _mixed_4_16(scores, part, count, stride, factor, target)
        elif left >= 4:
            _mixed_4_32(scores, part, count, stride, factor, target)
        elif left >= 2 and size == 2:
            _mixed_2_16(scores, part, count, stride, factor, target)
        elif left >= 2:
            _mixed_2_32(scores, part, count, stride, factor, target)
        elif size == 2:
            _mixed_1_16(scores, part, count, stride, factor, target)
        else:
            _mixed_1_32(scores, part, count, stride, factor, target)
        done += 4 if left >= 4 else 2 if left >= 2 else 1


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _number(address: int, index: int, size: int) -> float:
    return get_half(address + index * 2) if size == 2 else get_float(address + index * 4)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _attend_plainly(
    query: int, keys: int, values: int, count: int, dim: int, out: int, scale: int, size: int,
    scratch: int,
) -> None:  # fmt: skip
    factor, best = get_float(scale), _LOWEST
    for position in range(count):
        total = 0.0
        for i in range(dim):
            total += get_float(query + i * 4) * _number(keys, position * dim + i, size)
        total *= factor
        put_float(scratch + position * 4, total)
        if not total <= best:
            best = total
    power_sum = 0.0
    for position in range(count):
        power = math.exp(get_float(scratch + position * 4) - best)
        put_float(scratch + position * 4, power)
        power_sum += power
    for i in range(dim):
        total = 0.0
        for position in range(count):
            value = _number(values, position * dim + i, size)
            total += get_float(scratch + position * 4) * value
        put_float(out + i * 4, total / power_sum)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def rotate(x: int, cos: int, sin: int, heads: int, half: int, out: int) -> None:
    """Rotary embedding of one token: [heads, 2 * half], tables of its position [half]."""
    for head in range(heads):
        low = head * half * 8
        if half % LANES == 0:
            _rotate_vectors(x + low, cos, sin, half // LANES, out + low)
            continue
        for i in range(half):
            one, other = get_float(x + low + i * 4), get_float(x + low + (half + i) * 4)
            c, s = get_float(cos + i * 4), get_float(sin + i * 4)
            put_float(out + low + i * 4, one * c - other * s)
            put_float(out + low + (half + i) * 4, other * c + one * s)


@intrinsic  # type: ignore[untyped-decorator]
def _rotate_vectors(_typing: Any, x: Any, cos: Any, sin: Any, vectors: Any, out: Any) -> Tuple[Any, Any]:
    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        emit = Emitter(builder)
        x, cos, sin, vectors, out = args
        half = builder.mul(vectors, I64(VECTOR_BYTES))

        def body(index: Any, _: List[Any]) -> List[Any]:
            offset = emit.times(index, VECTOR_BYTES)
            one, other = emit.vec(emit.at(x, offset)), emit.vec(emit.at(x, half, offset))
            c, s = emit.vec(emit.at(cos, offset)), emit.vec(emit.at(sin, offset))
            emit.store(one * c - other * s, emit.at(out, offset))
            emit.store(other * c + one * s, emit.at(out, half, offset))
            return []

        emit.loop(vectors, [], body)
        return context.get_dummy_value()

    return addresses(5), generate
