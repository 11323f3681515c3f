"""Attention of one token over the cache of its row, and what is computed by position.

A cache is float16 or float32 [slots, heads, ctx_len, dim]. A token sees positions 0 to its own; the
entries of its own chunk are in the cache already. Heads whose width is no multiple of 16, and
contexts shorter than 16, take the plain loops.
"""

from __future__ import annotations

from typing import Any, Callable, List, Tuple

from .control import Function, Num, Variable, accumulate, choose, function, repeat, span, when
from .emit import F16, F32, FLOATS, HALVES, LANES, VECTOR_BYTES, Emitter, Vec, splat

_KEYS = 8
_LOWEST = float("-inf")
"""Where there is nothing else, the softmax is no number, as that of infinities is."""


def _entry(emit: Emitter, address: Any, size: int) -> Any:
    """16 numbers of the cache, `size` bytes each."""
    if size == 4:
        return emit.load(FLOATS, address)
    return emit.builder.fpext(emit.load(HALVES, address, 2), FLOATS)


def _scores(size: int, heads: int) -> Function:
    """A function: products of `heads` queries with 16 keys in a row, times a factor.

    It takes (queries, keys, vectors of a key, out, bytes between the heads' scores, address of the
    factor). A key is read once for all heads.
    """

    def build(emit: Emitter, *arguments: Num) -> None:
        queries, keys, vectors, out, room, scale = arguments
        stride = emit.times(vectors.value, LANES * size)
        places = [(queries + vectors * (VECTOR_BYTES * head)).value for head in range(heads)]

        def products(first: int) -> List[Any]:
            rows = [emit.at(keys.value, emit.times(stride, first + key)) for key in range(_KEYS)]

            def body(index: Any, sums: List[Any]) -> List[Any]:
                offset = emit.times(index, VECTOR_BYTES)
                values = [emit.load(FLOATS, emit.at(place, offset)) for place in places]
                result = []
                for number, row in enumerate(rows):
                    key = _entry(emit, emit.at(row, emit.times(index, LANES * size)), size)
                    for head, value in enumerate(values):
                        result.append(emit.fma(key, value, sums[number * heads + head]))
                return result

            return emit.loop(vectors.value, [splat(FLOATS, 0.0)] * (_KEYS * heads), body)

        sums = [total for first in range(0, LANES, _KEYS) for total in products(first)]
        factor = Vec(emit, emit.every(emit.load(F32, scale.value)))
        for head in range(heads):
            total = Vec(emit, _transposed_sum(emit, sums[head::heads])) * factor
            emit.store(total, (out + room * head).value)

    return Function(f"scores_{size}x{heads}", 6, build)


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


@function("softmax")
def _softmax(emit: Emitter, scores: Num, vectors: Num, factor: Num) -> None:
    """Scores to powers of e; one over their sum is written to an address."""

    def highest(index: Any, best: List[Any]) -> List[Any]:
        value = emit.vec(emit.at(scores.value, emit.times(index, VECTOR_BYTES)))
        return [emit.larger(Vec(emit, best[0]), value).value]

    best = emit.loop(vectors.value, [splat(FLOATS, _LOWEST)], highest)[0]
    top = Vec(emit, emit.every(emit.largest(Vec(emit, best))))

    def power(index: Any, sums: List[Any]) -> List[Any]:
        place = emit.at(scores.value, emit.times(index, VECTOR_BYTES))
        value = emit.exp(emit.vec(place) - top)
        emit.store(value, place)
        return [emit.builder.fadd(sums[0], value.value)]

    sums = emit.loop(vectors.value, [splat(FLOATS, 0.0)], power)[0]
    total = emit.total(Vec(emit, sums))
    emit.store(emit.builder.fdiv(F32(1.0), total), factor.value)


def _mixed(num_vectors: int, size: int, heads: int) -> Function:
    """A function: sums of values weighed with each head's powers, times its factor.

    It takes (powers, bytes between the heads' powers and from them to their factor, values, count,
    bytes of a value, out, bytes between the heads' outputs). A value is read once for all heads.
    """

    def build(emit: Emitter, *arguments: Num) -> None:
        powers, room, factor, values, count, stride, out, out_room = arguments
        places = [(powers + room * head).value for head in range(heads)]

        def body(index: Any, sums: List[Any]) -> List[Any]:
            row = emit.at(values.value, emit.builder.mul(index, stride.value))
            entries = [
                _entry(emit, emit.at(row, LANES * size * v), size) for v in range(num_vectors)
            ]
            result = []
            for head, place in enumerate(places):
                weight = emit.every(emit.load(F32, emit.at(place, emit.times(index, 4))))
                for vector, entry in enumerate(entries):
                    result.append(emit.fma(entry, weight, sums[head * num_vectors + vector]))
            return result

        sums = emit.loop(count.value, [splat(FLOATS, 0.0)] * (num_vectors * heads), body)
        for head, place in enumerate(places):
            scale = Vec(emit, emit.every(emit.load(F32, emit.at(place, factor.value))))
            for vector in range(num_vectors):
                total = Vec(emit, sums[head * num_vectors + vector]) * scale
                emit.store(total, (out + out_room * head + VECTOR_BYTES * vector).value)

    return Function(f"mixed_{num_vectors}x{size}x{heads}", 8, build)


_MOST_HEADS = 4
_HEADS = range(1, _MOST_HEADS + 1)
_SCORES = {(size, heads): _scores(size, heads) for size in (2, 4) for heads in _HEADS}
_MIXED = {
    (width, size, heads): _mixed(width, size, heads)
    for width in (1, 4)
    for size in (2, 4)
    for heads in _HEADS
}


def _attend(size: int) -> Function:
    """A function: `group` heads that share keys and values of `count` positions.

    It takes (query, keys, values, count, ctx_len, dim, group, out, scale, scratch). Query and out
    are [group, dim], `scale` is the address of the scores' factor; `scratch` has room for `group`
    times (`count` rounded up to 16, and 16).
    """

    def build(emit: Emitter, *arguments: Num) -> None:
        query, keys, values, count, ctx_len, dim, group, out, scale, scratch = arguments
        plain = (dim % LANES > 0) | (ctx_len < LANES)
        with when(plain), span(emit, 0, group) as head:
            offset = head * dim * 4
            _PLAIN[size](
                emit, query + offset, keys, values, count, dim, out + offset, scale, scratch
            )
        with when(plain.equals_false()):
            vectors = dim // LANES
            blocks = (count + (LANES - 1)) // LANES
            room = (blocks + 1) * VECTOR_BYTES
            with span(emit, 0, blocks) as block:
                # The last block reaches back rather than beyond the context.
                start = (block * LANES).at_most(ctx_len - LANES)
                first, place = keys + start * dim * size, scratch + start * 4

                def score(head: Num, heads: int, first: Num = first, place: Num = place) -> None:
                    at = query + head * dim * 4, first, vectors, place + head * room, room, scale
                    _SCORES[size, heads](emit, *at)

                _by_heads(emit, group, score)
            with span(emit, 0, group) as head:
                scores = scratch + head * room
                with span(emit, count, blocks * LANES) as rest:
                    emit.store(F32(_LOWEST), (scores + rest * 4).value)
                _softmax(emit, scores, blocks, scores + blocks * VECTOR_BYTES)

            def mix(head: Num, heads: int) -> None:
                powers = scratch + head * room, room, blocks * VECTOR_BYTES
                shape = (values, count, vectors, out + head * dim * 4, dim * 4)
                _mix(emit, powers, shape, kind=(size, heads))

            _by_heads(emit, group, mix)

    return Function(f"attend_{size}", 10, build)


def _by_heads(emit: Emitter, group: Num, run: Callable[[Num, int], None]) -> None:
    """Run for every head of a group, up to four at once: (first head, how many)."""
    at = Variable(emit, 0)
    with repeat(emit, lambda: at.get() < group):
        head = at.get()
        heads = (group - head).at_most(_MOST_HEADS)
        cases = [(n, lambda n=n: run(head, n)) for n in range(1, _MOST_HEADS)]
        choose(heads, cases, lambda: run(head, _MOST_HEADS))
        at.set(head + heads)


def _mix(emit: Emitter, powers: Any, shape: Any, *, kind: Tuple[int, int]) -> None:
    values, count, vectors, out, out_room = shape
    size, heads = kind
    done, stride = Variable(emit, 0), vectors * (LANES * size)
    for width in (4, 1):
        with span(emit, 0, (vectors - done.get()) // width):
            at = done.get()
            places = values + at * (LANES * size), count, stride, out + at * VECTOR_BYTES
            _MIXED[width, size, heads](emit, *powers, *places, out_room)
            done.set(at + width)


def _attend_plainly(size: int) -> Function:
    """A function: one head, number by number; the arguments of `_attend` but for the sizes."""

    def number(emit: Emitter, base: Num, index: Num) -> Any:
        address = (base + index * size).value
        if size == 4:
            return emit.load(F32, address)
        return emit.builder.fpext(emit.load(F16, address, 2), F32)

    def build(emit: Emitter, *arguments: Num) -> None:
        query, keys, values, count, dim, out, scale, scratch = arguments
        builder = emit.builder
        with span(emit, 0, count) as position:
            with accumulate(emit) as total, span(emit, 0, dim) as i:
                key = number(emit, keys, position * dim + i)
                total.add(builder.fmul(emit.load(F32, (query + i * 4).value), key))
            product = builder.fmul(total.get(), emit.load(F32, scale.value))
            emit.store(product, (scratch + position * 4).value)
        blocks = (count + (LANES - 1)) // LANES
        with span(emit, count, blocks * LANES) as rest:
            emit.store(F32(_LOWEST), (scratch + rest * 4).value)
        factor = scratch + blocks * VECTOR_BYTES
        _softmax(emit, scratch, blocks, factor)
        with span(emit, 0, dim) as i:
            with accumulate(emit) as total, span(emit, 0, count) as position:
                value = number(emit, values, position * dim + i)
                power = emit.load(F32, (scratch + position * 4).value)
                total.add(builder.fmul(power, value))
            mean = builder.fmul(total.get(), emit.load(F32, factor.value))
            emit.store(mean, (out + i * 4).value)

    return Function(f"attend_plainly_{size}", 8, build)


_PLAIN = {size: _attend_plainly(size) for size in (2, 4)}
attend = {size: _attend(size) for size in (2, 4)}
"""By the bytes of a number of the cache."""


@function("rotate")
def rotate(emit: Emitter, x: Num, cos: Num, sin: Num, heads: Num, half: Num, out: Num) -> None:
    """Rotary embedding of one token: [heads, 2 * half], tables of its position [half]."""
    plain = half % LANES > 0
    with span(emit, 0, heads) as head:
        low = head * half * 8
        with when(plain.equals_false()):
            _rotate_vectors(emit, x + low, cos, sin, half // LANES, out + low)
        with when(plain), span(emit, 0, half) as i:
            places = [low + i * 4, low + (half + i) * 4]
            one, other = (emit.load(F32, (x + place).value) for place in places)
            c, s = (emit.load(F32, (table + i * 4).value) for table in (cos, sin))
            builder = emit.builder
            first = builder.fsub(builder.fmul(one, c), builder.fmul(other, s))
            second = builder.fadd(builder.fmul(other, c), builder.fmul(one, s))
            for place, value in zip(places, (first, second)):
                emit.store(value, (out + place).value)


@function("rotate_vectors")
def _rotate_vectors(emit: Emitter, x: Num, cos: Num, sin: Num, vectors: Num, out: Num) -> None:
    half = (vectors * VECTOR_BYTES).value

    def body(index: Any, _: List[Any]) -> List[Any]:
        offset = emit.times(index, VECTOR_BYTES)
        one, other = emit.vec(emit.at(x.value, offset)), emit.vec(emit.at(x.value, half, offset))
        c, s = emit.vec(emit.at(cos.value, offset)), emit.vec(emit.at(sin.value, offset))
        emit.store(one * c - other * s, emit.at(out.value, offset))
        emit.store(other * c + one * s, emit.at(out.value, half, offset))
        return []

    emit.loop(vectors.value, [], body)
