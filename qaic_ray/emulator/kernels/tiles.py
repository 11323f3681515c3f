"""Tiles of a weight, as a panel has them in the QPC, into the form that a product takes.

A tile is 32 rows (along K) of a panel's 64 columns (`numbers/panels.py`). For products of bytes an
MXFP6 tile becomes unsigned bytes, eight times the value and 64 more: 2,048 of them, four rows of a
column side by side, and 64 scales. For products of float32 any tile becomes 32 rows of 64 values.
"""

from __future__ import annotations

from typing import Any, List

from llvmlite import ir

from ..numbers import mxfp6, panels
from .control import Function, Num, function
from .emit import BYTES, F16, F32, FLOATS, HALVES, I8, I16, INTS, VECTOR_BYTES, Emitter, Vec, splat
from .machine import processor

PANEL = panels.WIDTH
TILE = mxfp6.BLOCK
MXFP6_BYTES = panels.TILE_BYTES
BYTES_BYTES = 2048
OFFSET = 64
"""Added to a weight's byte, so that it has no sign."""

_VECTORS = 4
_WORDS = ir.VectorType(I16, 32)
_EIGHTHS = [int(v * 8) for v in mxfp6.E2M3.values()]


def scales(emit: Emitter, tile: Any) -> List[Any]:
    """Of each column an eighth of 2 ** (byte - 127); no number for byte 255."""
    builder, result = emit.builder, []
    for vector in range(_VECTORS):
        exponent = emit.load(ir.VectorType(I8, 16), emit.at(tile, 16 * vector), 16)
        byte = builder.zext(exponent, INTS)
        bits = builder.shl(byte, splat(INTS, 23))
        for special, pattern in ((255, 0x7FC00000), (0, 0x00400000)):
            hit = builder.icmp_unsigned("==", byte, splat(INTS, special))
            bits = builder.select(hit, splat(INTS, pattern), bits)
        result.append(builder.fmul(builder.bitcast(bits, FLOATS), splat(FLOATS, 0.125)))
    return result


def _codes(emit: Emitter, tile: Any, group: int) -> List[Any]:
    """Codes of four rows, as four vectors of 16 columns times 4 rows; high bits are undefined."""
    builder = emit.builder
    packed = [
        emit.load(BYTES, emit.at(tile, VECTOR_BYTES * (1 + 3 * group + part)), 64)
        for part in range(3)
    ]
    words = [builder.bitcast(part, _WORDS) for part in packed]

    def shifted(part: int, amount: int) -> Any:
        shift = builder.lshr if amount > 0 else builder.shl
        moved = shift(words[part], splat(_WORDS, abs(amount)))
        return builder.bitcast(moved, BYTES)

    def joined(low_bits: int, low: Any, high: Any) -> Any:
        kept = builder.and_(low, splat(BYTES, low_bits))
        return builder.or_(kept, builder.and_(high, splat(BYTES, 255 - low_bits)))

    return [
        packed[0],
        joined(3, shifted(0, 6), shifted(1, -2)),
        joined(15, shifted(1, 4), shifted(2, -4)),
        shifted(2, 2),
    ]


def weight_bytes(emit: Emitter, tile: Any, group: int, offset: int = OFFSET) -> List[Any]:
    """Four vectors of bytes, eight times the value and `offset`: 16 columns times 4 rows each."""
    target = processor()
    if target is not None and target.permutes:
        table = splat(BYTES, [(value + offset) & 255 for value in _EIGHTHS])
        name = "llvm.x86.avx512.permvar.qi.512"
        return [emit.call(name, BYTES, [table, code]) for code in _codes(emit, tile, group)]
    return [_by_lines(emit, code, offset) for code in _codes(emit, tile, group)]


def _by_lines(emit: Emitter, code: Any, offset: int) -> Any:
    # Eight times a magnitude is the largest of three lines in its code.
    builder = emit.builder
    magnitude = builder.and_(code, splat(BYTES, 31))
    twice = builder.add(magnitude, magnitude)
    result = magnitude
    for line in (
        builder.sub(twice, splat(BYTES, 16)),
        builder.sub(builder.add(twice, twice), splat(BYTES, 64)),
    ):
        result = builder.select(builder.icmp_signed(">", line, result), line, result)
    sign = builder.icmp_unsigned("!=", builder.and_(code, splat(BYTES, 32)), splat(BYTES, 0))
    result = builder.select(sign, builder.sub(splat(BYTES, 0), result), result)
    return builder.add(result, splat(BYTES, offset))


@function("bytes_of_mxfp6")
def bytes_of_mxfp6(emit: Emitter, tile: Num, out: Num, out_scales: Num) -> None:
    """Write a tile's 2,048 bytes and 64 scales."""
    for vector, scale in enumerate(scales(emit, tile.value)):
        emit.store(scale, emit.at(out_scales.value, VECTOR_BYTES * vector), 64)
    for group in range(TILE // 4):
        for vector, values in enumerate(weight_bytes(emit, tile.value, group)):
            address = emit.at(out.value, (group * _VECTORS + vector) * VECTOR_BYTES)
            emit.store(values, address, 64)


@function("floats_of_mxfp6")
def floats_of_mxfp6(emit: Emitter, tile: Num, out: Num) -> None:
    """Write a tile's 32 rows of 64 float32."""
    builder = emit.builder
    scale = [Vec(emit, s) for s in scales(emit, tile.value)]
    for group in range(TILE // 4):
        for vector, values in enumerate(weight_bytes(emit, tile.value, group, 0)):
            lanes = builder.bitcast(values, INTS)
            for row in range(4):
                moved = builder.shl(lanes, splat(INTS, 24 - 8 * row)) if row < 3 else lanes
                value = builder.sitofp(builder.ashr(moved, splat(INTS, 24)), FLOATS)
                offset = (4 * group + row) * PANEL * 4 + VECTOR_BYTES * vector
                emit.store(Vec(emit, value) * scale[vector], emit.at(out.value, offset), 64)


def _floats_of(name: str, kind: Any, vector: Any) -> Function:
    """A function that widens `rows` rows of 64 values."""
    size = 2 if kind is F16 else 4

    def build(emit: Emitter, tile: Num, rows: Num, out: Num) -> None:
        def body(row: Any, _: List[Any]) -> List[Any]:
            for index in range(_VECTORS):
                source = emit.at(tile.value, emit.times(row, PANEL * size), 16 * size * index)
                value = emit.load(vector, source, size)
                if kind is F16:
                    value = emit.builder.fpext(value, FLOATS)
                target = emit.at(out.value, emit.times(row, PANEL * 4), VECTOR_BYTES * index)
                emit.store(value, target, 64)
            return []

        emit.loop(rows.value, [], body)

    return Function(name, 3, build)


floats_of_float16 = _floats_of("floats_of_float16", F16, HALVES)
floats_of_float32 = _floats_of("floats_of_float32", F32, FLOATS)
