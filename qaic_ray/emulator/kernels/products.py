"""Products of a few rows with one panel of a weight, in registers.

`bytes_kernel`: unsigned bytes of the weight times activations that were cut into planes of 8 bits
(`rowops.quantize`), exact in int32 within a block of 32. `floats_kernel`: float32 on both sides.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import Any, Dict, List, Sequence, Tuple

from llvmlite import ir

from . import operations as op
from .control import Function, Num
from .emit import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    VECTOR_BYTES,
    Emitter,
    splat,
)
from .machine import AVX512, processor
from .tiles import (
    BYTES_BYTES,
    MXFP6_BYTES,
    PANEL,
    TILE,
    scales,
    weight_bytes,
)

_UNROLL = 4
_HALF_BYTES, _HALF_WORDS = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
_HALF_INTS = ir.VectorType(I32, 8)


def _add_dots(emit: Emitter, sums: Any, weights: Any, activations: Any) -> Any:
    """sums + the dot product of each lane's four bytes; those of `weights` have no sign."""
    target = processor()
    if target is not None and target.kind == AVX512:
        return emit.call(
            "llvm.x86.avx512.vpdpbusd.512", INTS, [sums, *_operands(emit, weights, activations)]
        )
    halves = []
    for lanes in (range(32), range(32, 64)):
        weight, activation = (emit.shuffle(x, x, lanes) for x in (weights, activations))
        pairs = emit.call("llvm.x86.avx2.pmadd.ub.sw", _HALF_WORDS, [weight, activation])
        halves.append(
            emit.call("llvm.x86.avx2.pmadd.wd", _HALF_INTS, [pairs, splat(_HALF_WORDS, 1)])
        )
    return emit.builder.add(sums, emit.shuffle(halves[0], halves[1], range(LANES)))


def _operands(emit: Emitter, weights: Any, activations: Any) -> List[Any]:
    if _takes_bytes():
        return [weights, activations]
    return [emit.builder.bitcast(x, INTS) for x in (weights, activations)]


@functools.lru_cache(maxsize=None)
def _takes_bytes() -> bool:
    """Whether this LLVM's `vpdpbusd` is of bytes; before version 22 it was of int32."""
    from llvmlite import binding

    bytes_form = "<16 x i32>, <64 x i8>, <64 x i8>"
    try:
        binding.parse_assembly(f"declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512({bytes_form})")
    except RuntimeError:
        return False
    return True


class _Panel:
    """Where the tiles of a panel are: as bytes in a thread's memory, or packed in the QPC."""

    def __init__(self, emit: Emitter, tiles: Any, tile_scales: Any, is_packed: bool) -> None:
        self._emit = emit
        self._tiles = tiles
        self._scales = tile_scales
        self._is_packed = is_packed

    def weights(self, index: Any, group: int, num_vectors: int) -> List[Any]:
        """Vectors of bytes of four rows."""
        emit = self._emit
        if self._is_packed:
            tile = emit.at(self._tiles, emit.times(index, MXFP6_BYTES))
            return weight_bytes(emit, tile, group)
        first = emit.at(self._tiles, emit.times(index, BYTES_BYTES), group * 4 * VECTOR_BYTES)
        return [emit.load(BYTES, emit.at(first, VECTOR_BYTES * v), 64) for v in range(num_vectors)]

    def scales(self, index: Any, num_vectors: int) -> List[Any]:
        """The tile's scales."""
        emit = self._emit
        if self._is_packed:
            return scales(emit, emit.at(self._tiles, emit.times(index, MXFP6_BYTES)))
        first = emit.at(self._scales, emit.times(index, PANEL * 4))
        return [emit.load(FLOATS, emit.at(first, VECTOR_BYTES * v), 64) for v in range(num_vectors)]


def _sums(emit: Emitter, rows: Sequence[Any], is_first: Any) -> List[Any]:
    """What is added to: nothing at first, later what `out` has."""
    builder = emit.builder
    before, again = builder.block, builder.append_basic_block("again")
    go_on = builder.append_basic_block("go_on")
    builder.cbranch(builder.icmp_signed("!=", is_first, I64(0)), go_on, again)
    builder.position_at_end(again)
    old = [emit.load(FLOATS, address) for address in rows]
    builder.branch(go_on)
    builder.position_at_end(go_on)
    result = []
    for value in old:
        phi = builder.phi(FLOATS)
        phi.add_incoming(splat(FLOATS, 0.0), before)
        phi.add_incoming(value, again)
        result.append(phi)
    return result


def _outputs(emit: Emitter, out: Any, stride: Any, sizes: Tuple[int, int]) -> List[Any]:
    num_rows, num_vectors = sizes
    return [
        emit.at(out, emit.times(stride, row), VECTOR_BYTES * vector)
        for row in range(num_rows)
        for vector in range(num_vectors)
    ]


def bytes_kernel(
    num_rows: int, num_vectors: int, planes: int, *, is_packed: bool = False
) -> Function:
    """Rows times the tiles of a panel's 16 * `num_vectors` columns.

    The kernel takes (planes, K, block scales, block sums, K / 32, tiles, tile scales, number of
    tiles, out, bytes of a row of out, is_first). A row has its planes one after the other, the
    coarsest first, and as many sums; `quantize` makes them.
    """

    def build(emit: Emitter, *arguments: Num) -> None:
        builder = emit.builder
        x, k, x_scales, x_sums, blocks, tiles, tile_scales, count, out, stride, first = (
            argument.value for argument in arguments
        )
        panel = _Panel(emit, tiles, tile_scales, is_packed)
        size = emit.times(blocks, 4)
        rows = _outputs(emit, out, stride, (num_rows, num_vectors))

        def dots_of(index: Any, four: Any) -> Dict[Tuple[int, int, int], Any]:
            dots: Dict[Tuple[int, int, int], Any] = {}
            for row, plane in product(range(num_rows), range(planes)):
                offset = emit.times(size, row * planes + plane)
                start = emit.every(emit.load(I32, emit.at(x_sums, offset, four)), INTS)
                dots.update({(row, plane, vector): start for vector in range(num_vectors)})
            for group in range(TILE // 4):
                weights = panel.weights(index, group, num_vectors)
                for row, plane in product(range(num_rows), range(planes)):
                    offset = emit.times(k, row * planes + plane)
                    place = emit.at(x, offset, emit.times(index, TILE), 4 * group)
                    lanes = emit.every(emit.load(I32, place), INTS)
                    activation = builder.bitcast(lanes, BYTES)
                    for vector in range(num_vectors):
                        key = (row, plane, vector)
                        dots[key] = _add_dots(emit, dots[key], weights[vector], activation)
            return dots

        def body(index: Any, sums: List[Any]) -> List[Any]:
            four = emit.times(index, 4)
            dots = dots_of(index, four)
            scale = panel.scales(index, num_vectors)
            result = []
            for row in range(num_rows):
                offset = emit.times(size, row)
                factor = emit.every(emit.load(F32, emit.at(x_scales, offset, four)))
                for vector in range(num_vectors):
                    parts = [dots[row, plane, vector] for plane in range(planes)]
                    value = builder.fmul(_of_planes(emit, parts), scale[vector])
                    result.append(emit.fma(value, factor, sums[row * num_vectors + vector]))
            return result

        sums = emit.loop(count, _sums(emit, rows, first), body)
        for value, address in zip(sums, rows):
            emit.store(value, address)

    packed = "_packed" if is_packed else ""
    return Function(f"bytes_{num_rows}x{num_vectors}x{planes}{packed}", 11, build)


def _of_planes(emit: Emitter, dots: List[Any]) -> Any:
    """One float32 of the integers of one, two or three planes of 8 bits."""
    builder = emit.builder
    if len(dots) == 2:
        return builder.sitofp(builder.add(builder.shl(dots[0], splat(INTS, 8)), dots[1]), FLOATS)
    value = builder.sitofp(dots[0], FLOATS)
    if len(dots) == 1:
        return value
    low = builder.add(builder.shl(dots[1], splat(INTS, 8)), dots[2])
    return emit.fma(value, splat(FLOATS, 65536.0), builder.sitofp(low, FLOATS))


def floats_kernel(num_rows: int, num_vectors: int) -> Function:
    """Rows of float32 times rows of a tile, 64 values each, for 16 * `num_vectors` columns.

    The kernel takes (x, bytes of a row of x, weights, rows of weights (a multiple of four), out,
    bytes of a row of out, is_first).
    """

    def build(emit: Emitter, *arguments: Num) -> None:
        x, x_stride, weights, k, out, stride, first = (a.value for a in arguments)
        rows = _outputs(emit, out, stride, (num_rows, num_vectors))

        def body(index: Any, sums: List[Any]) -> List[Any]:
            result = list(sums)
            weight = emit.at(weights, emit.times(index, _UNROLL * PANEL * 4))
            for step in range(_UNROLL):
                vectors = [
                    emit.load(FLOATS, emit.at(weight, step * PANEL * 4 + VECTOR_BYTES * v), 64)
                    for v in range(num_vectors)
                ]
                for row in range(num_rows):
                    offset = emit.times(x_stride, row)
                    place = emit.at(x, offset, emit.times(index, _UNROLL * 4), 4 * step)
                    value = emit.every(emit.load(F32, place))
                    for vector, columns in enumerate(vectors):
                        at = row * num_vectors + vector
                        result[at] = emit.fma(columns, value, result[at])
            return result

        count = emit.builder.sdiv(k, I64(_UNROLL))
        sums = emit.loop(count, _sums(emit, rows, first), body)
        for value, address in zip(sums, rows):
            emit.store(value, address)

    return Function(f"floats_{num_rows}x{num_vectors}", 7, build)


def packed_floats_kernel(num_rows: int, kind: int, vectors: Sequence[int]) -> Function:
    """Rows of float32 times a weight as the QPC has it, for some of a panel's four vectors.

    The kernel takes (x, bytes of a row of x, the panel, K, out, bytes of a row of out). It adds in
    the order of `floats_kernel`, so that the bits are the same.
    """
    size = {op.MXFP6: 0, op.FLOAT16: 2, op.FLOAT32: 4}[kind]

    def build(emit: Emitter, *arguments: Num) -> None:
        x, x_stride, source, k, out, stride = (argument.value for argument in arguments)
        places = [emit.at(x, emit.times(x_stride, row)) for row in range(num_rows)]

        def add(sums: List[Any], weights: List[Any], offset: Any) -> None:
            for row, place in enumerate(places):
                value = emit.every(emit.load(F32, emit.at(place, offset)))
                for number, weight in enumerate(weights):
                    at = row * len(vectors) + number
                    sums[at] = emit.fma(weight, value, sums[at])

        def of_tile(index: Any, sums: List[Any]) -> List[Any]:
            result, tile = list(sums), emit.at(source, emit.times(index, MXFP6_BYTES))
            factors = [scales(emit, tile)[v] for v in vectors]
            for group in range(TILE // 4):
                four = weight_bytes(emit, tile, group, 0)
                for step in range(4):
                    weights = [
                        emit.builder.fmul(_byte(emit, four[v], step), factor)
                        for v, factor in zip(vectors, factors)
                    ]
                    offset = emit.times(index, TILE * 4)
                    add(result, weights, emit.at(offset, 16 * group + 4 * step))
            return result

        def of_rows(index: Any, sums: List[Any]) -> List[Any]:
            result = list(sums)
            for step in range(_UNROLL):
                row = emit.at(
                    source, emit.times(index, _UNROLL * PANEL * size), step * PANEL * size
                )
                weights = [_wide(emit, emit.at(row, LANES * size * v), size) for v in vectors]
                add(result, weights, emit.at(emit.times(index, _UNROLL * 4), 4 * step))
            return result

        zero = [splat(FLOATS, 0.0)] * (num_rows * len(vectors))
        steps, body = (_UNROLL, of_rows) if size else (TILE, of_tile)
        count = emit.builder.sdiv(emit.builder.add(k, I64(steps - 1)), I64(steps))
        sums = emit.loop(count, zero, body)
        for row in range(num_rows):
            for number, vector in enumerate(vectors):
                address = emit.at(out, emit.times(stride, row), VECTOR_BYTES * vector)
                emit.store(sums[row * len(vectors) + number], address)

    columns = "".join(map(str, vectors))
    return Function(f"packed_floats_{num_rows}x{columns}_{kind}", 6, build)


def _byte(emit: Emitter, lanes: Any, step: int) -> Any:
    """One of the four bytes of each lane, as float32."""
    builder = emit.builder
    moved = builder.bitcast(lanes, INTS)
    if step < 3:
        moved = builder.shl(moved, splat(INTS, 24 - 8 * step))
    return builder.sitofp(builder.ashr(moved, splat(INTS, 24)), FLOATS)


def _wide(emit: Emitter, address: Any, size: int) -> Any:
    if size == 4:
        return emit.load(FLOATS, address)
    return emit.builder.fpext(emit.load(HALVES, address, 2), FLOATS)
