"""What is computed row by row, as vectors: norms, sums, activations, roundings, planes of bytes.

A row of a buffer has room for a multiple of 64 values, so no kernel has a rest. What is after the
last one may be anything; who reads it there makes it zero first.
"""

from __future__ import annotations

from typing import Any, Callable, List, Tuple

from llvmlite import ir

from .control import Function, Num, function
from .emit import F32, FLOATS, HALVES, I8, I32, I64, INTS, LANES, VECTOR_BYTES, Emitter, Vec, splat
from .tiles import TILE

_BYTES_OF_VECTOR = ir.VectorType(I8, LANES)
_LARGEST = {1: 127, 2: 32639, 3: 8355584}
"""Of planes of 8 bits with a sign each, the largest number; less some that rounding may add."""


def _each(
    name: str,
    num_inputs: int,
    apply: Callable[[Emitter, List[Vec]], Vec],
    num_numbers: int = 0,
) -> Function:
    """A function of (count, out, inputs ..., numbers ...); a number is its float32's bits."""

    def build(emit: Emitter, *arguments: Num) -> None:
        builder = emit.builder
        count, out, *sources = (argument.value for argument in arguments)
        numbers = []
        for bits in sources[num_inputs:]:
            scalar = builder.bitcast(builder.trunc(bits, I32), F32)
            numbers.append(Vec(emit, emit.every(scalar)))

        def body(index: Any, _: List[Any]) -> List[Any]:
            offset = emit.times(index, VECTOR_BYTES)
            values = [emit.vec(emit.at(source, offset)) for source in sources[:num_inputs]]
            emit.store(apply(emit, values + numbers), emit.at(out, offset))
            return []

        vectors = builder.sdiv(builder.add(count, I64(LANES - 1)), I64(LANES))
        emit.loop(vectors, [], body)

    return Function(name, 2 + num_inputs + num_numbers, build)


def _silu(emit: Emitter, value: Vec) -> Vec:
    return value / (emit.exp(-value) + 1.0)


def _to_half(emit: Emitter, value: Vec) -> Vec:
    half = emit.builder.fptrunc(value.value, HALVES)
    return Vec(emit, emit.builder.fpext(half, FLOATS))


add = _each("add", 2, lambda emit, v: v[0] + v[1])
multiply = _each("multiply", 2, lambda emit, v: v[0] * v[1])
scale = _each("scale", 1, lambda emit, v: v[0] * v[1], 1)
silu = _each("silu", 1, lambda emit, v: _silu(emit, v[0]))
silu_times = _each("silu_times", 2, lambda emit, v: _silu(emit, v[0]) * v[1])
sigmoid = _each("sigmoid", 1, lambda emit, v: 1.0 / (emit.exp(-v[0]) + 1.0))
round_half = _each("round_half", 1, lambda emit, v: _to_half(emit, v[0]))
copy = _each("copy", 1, lambda emit, v: v[0])


@function("rms_norm")
def rms_norm(emit: Emitter, count: Num, out: Num, x: Num, weight: Num, epsilon: Num) -> None:
    """out = x / sqrt(mean(x ** 2) + epsilon) * weight; `epsilon` is a float32's bits.

    What follows x up to a multiple of 16 is zero.
    """
    builder = emit.builder
    vectors = ((count + (LANES - 1)) // LANES).value

    def squares(index: Any, sums: List[Any]) -> List[Any]:
        value = emit.vec(emit.at(x.value, emit.times(index, VECTOR_BYTES))).value
        return [emit.fma(value, value, sums[0])]

    total = emit.total(Vec(emit, emit.loop(vectors, [splat(FLOATS, 0.0)], squares)[0]))
    mean = builder.fdiv(total, builder.sitofp(count.value, F32))
    shifted = builder.fadd(mean, builder.bitcast(builder.trunc(epsilon.value, I32), F32))
    root = emit.call("llvm.sqrt.f32", F32, [shifted])
    factors = Vec(emit, emit.every(builder.fdiv(F32(1.0), root)))

    def scaled(index: Any, _: List[Any]) -> List[Any]:
        offset = emit.times(index, VECTOR_BYTES)
        value = emit.vec(emit.at(x.value, offset)) * factors
        emit.store(value * emit.vec(emit.at(weight.value, offset)), emit.at(out.value, offset))
        return []

    emit.loop(vectors, [], scaled)


@function("round_mxint8")
def round_mxint8(emit: Emitter, count: Num, out: Num, x: Num) -> None:
    """To what the cache would hold as MXINT8 (`numbers/kv_cache.py`); `count` is full blocks."""
    builder = emit.builder

    def body(index: Any, _: List[Any]) -> List[Any]:
        first = emit.times(index, 2 * VECTOR_BYTES)
        offsets = [first, emit.at(first, VECTOR_BYTES)]
        values = [emit.vec(emit.at(x.value, offset)) for offset in offsets]
        # As integers, magnitudes are in order, and NaN is the largest: the block becomes NaN.
        one, two = (builder.bitcast(emit.magnitude(v).value, INTS) for v in values)
        larger = builder.select(builder.icmp_unsigned(">", one, two), one, two)
        bits = emit.call("llvm.vector.reduce.umax.v16i32", I32, [larger])
        exponent = builder.and_(bits, I32(0x7F800000))
        lowest = builder.icmp_unsigned("<", exponent, I32(1 << 23))
        exponent = builder.select(lowest, I32(1 << 22), exponent)  # 2 ** -127
        # A power of two, so that dividing by it and multiplying with it is exact.
        step = Vec(emit, emit.every(builder.bitcast(exponent, F32))) * (1 / 64)
        for value, offset in zip(values, offsets):
            cut = emit.within(emit.rint(value / step), -127.0, 127.0)
            emit.store(cut * step, emit.at(out.value, offset))
        return []

    emit.loop((count // TILE).value, [], body)


def _quantize(planes: int) -> Function:
    """A function that cuts a row into planes of bytes, block by block of 32.

    It takes (blocks, x, planes, K, block scales, block sums, K / 32) and writes to each plane's row
    of K bytes; a block's value is its scale times the planes' number in base 256. The sums are -64
    times a plane's, what the offset of a weight's bytes adds. A block that is not finite gets a
    scale that is no number.
    """

    def build(emit: Emitter, *arguments: Num) -> None:
        builder = emit.builder
        count, x, out, k, scales, sums, num_blocks = (a.value for a in arguments)

        def body(index: Any, _: List[Any]) -> List[Any]:
            place, four = emit.at(x, emit.times(index, 2 * VECTOR_BYTES)), emit.times(index, 4)
            values = [emit.vec(place), emit.vec(emit.at(place, VECTOR_BYTES))]
            own, factor = _block_scale(emit, values, float(_LARGEST[planes]))
            emit.store(own, emit.at(scales, four))
            rest = [builder.fptosi(emit.rint(v * factor).value, INTS) for v in values]
            for plane in reversed(range(planes)):
                parts = [builder.trunc(r, _BYTES_OF_VECTOR) for r in rest]
                wide = [builder.sext(p, INTS) for p in parts]
                row = emit.at(out, emit.times(k, plane), emit.times(index, TILE))
                for half, part in enumerate(parts):
                    emit.store(part, emit.at(row, LANES * half), 16)
                added = emit.call("llvm.vector.reduce.add.v16i32", I32, [builder.add(*wide)])
                block = emit.at(sums, emit.times(num_blocks, 4 * plane), four)
                emit.store(builder.mul(added, I32(-64)), block)
                rest = [builder.ashr(builder.sub(r, w), splat(INTS, 8)) for r, w in zip(rest, wide)]
            return []

        emit.loop(count, [], body)

    return Function(f"quantize_{planes}", 7, build)


def _block_scale(emit: Emitter, values: List[Vec], top: float) -> Tuple[Any, Vec]:
    """A block's scale, and what its values are multiplied by."""
    builder = emit.builder
    high = emit.largest(emit.larger(*(emit.magnitude(v) for v in values)))
    poison = emit.total(values[0] * 0.0 + values[1] * 0.0)
    own = builder.fadd(builder.fdiv(high, F32(top)), poison)
    # Zeros, and numbers so small that their inverse is infinite, become zeros.
    usable = builder.fcmp_ordered(">", high, F32(1e-30))
    inverse = builder.select(usable, builder.fdiv(F32(top), high), F32(0.0))
    return own, Vec(emit, emit.every(inverse))


quantize = {planes: _quantize(planes) for planes in _LARGEST}
