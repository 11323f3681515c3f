"""A panel of a weight times rows: tile by tile into a thread's memory, then row by row from there.

Few rows of bytes take the weight as it is packed. Otherwise a stretch of tiles is unpacked that the
nearest cache holds, and every row goes over it.
"""

from __future__ import annotations

from typing import Any, List

from . import operations as op
from .control import Function, Num, Variable, choose, columns, function, repeat, span, when
from .emit import VECTOR_BYTES, Emitter
from .machine import AVX512, GENERIC, processor
from .products import bytes_kernel, floats_kernel, packed_floats_kernel
from .tiles import (
    BYTES_BYTES,
    MXFP6_BYTES,
    PANEL,
    TILE,
    bytes_of_mxfp6,
    floats_of_float16,
    floats_of_float32,
    floats_of_mxfp6,
)

BYTE_TILES = 4
FLOAT_TILES = 3
assert op.SCRATCH_BYTES >= BYTE_TILES * (BYTES_BYTES + PANEL * 4)
assert op.SCRATCH_BYTES >= FLOAT_TILES * TILE * PANEL * 4

_FLOAT_ROWS = 6
_BYTE_ROWS = {1: 3, 2: 2, 3: 2}
"""By planes: as many rows as there are registers for."""
_FIELDS = (op.OUT_STRIDE, op.IN, op.IN_STRIDE, op.P1, op.P2, op.P3, op.P6, op.P7)


class _Product:
    """The columns of a PRODUCT's row, as far as they are needed here."""

    def __init__(self, emit: Emitter, row: Num) -> None:
        self.stride, self.x, self.x_stride, self.kind, self.tiles, self.k, *rest = columns(
            emit, row, _FIELDS
        )
        self.scales, self.sums = rest


def planes_here() -> List[int]:
    """Into how many planes activations may be cut on this processor, for products of bytes."""
    target = processor()
    if target is None or target.kind == GENERIC:
        return []
    return [1, 2, 3] if target.kind == AVX512 else [1, 2]


def _vectors() -> int:
    target = processor()
    return 4 if target is not None and target.kind == AVX512 else 1


def _pick_rows(left: Num, most: int) -> Num:
    """How many of the rows that are left go together: no single one where two can."""
    at_most = left.at_most(most)
    return left.equals(most + 1).pick((most + 1) // 2, at_most)


@function("unpack_floats")
def _unpack_floats(emit: Emitter, kind: Num, source: Num, tile: Num, k: Num, out: Num) -> None:
    rows = (k - tile * TILE).at_most(TILE)
    choose(
        kind,
        [
            (op.MXFP6, lambda: floats_of_mxfp6(emit, source + tile * MXFP6_BYTES, out)),
            (
                op.FLOAT16,
                lambda: floats_of_float16(emit, source + tile * (TILE * PANEL * 2), rows, out),
            ),
        ],
        lambda: floats_of_float32(emit, source + tile * (TILE * PANEL * 4), rows, out),
    )


@function("product_of_floats")
def _floats(
    emit: Emitter, row: Num, source: Num, first: Num, last: Num, out: Num, scratch: Num
) -> None:
    p, vectors = _Product(emit, row), _vectors()
    with span(emit, 0, p.tiles, FLOAT_TILES) as tile:
        count = (p.tiles - tile).at_most(FLOAT_TILES)
        with span(emit, 0, count) as i:
            target = scratch + i * (TILE * PANEL * 4)
            _unpack_floats(emit, p.kind, source, tile + i, p.k, target)
        width = (count * TILE).at_most(p.k - tile * TILE)
        is_first = tile.equals(0).pick(1, 0)
        at = Variable(emit, first)
        with repeat(emit, lambda: at.get() < last):
            here = at.get()
            rows = _pick_rows(last - here, _FLOAT_ROWS)
            x = p.x + here * p.x_stride + tile * (TILE * 4)
            o = out + here * p.stride

            def times(count: int, x: Num = x, o: Num = o) -> None:
                for column in range(0, 4, vectors):
                    shift = column * VECTOR_BYTES
                    kernel = floats_kernel(count, vectors)
                    kernel(
                        emit, x, p.x_stride, scratch + shift, width, o + shift, p.stride, is_first
                    )

            _by_count(rows, _FLOAT_ROWS, times)
            at.set(here + rows)


def _by_count(rows: Num, most: int, run: Any) -> None:
    cases = [(count, lambda count=count: run(count)) for count in range(1, most)]
    choose(rows, cases, lambda: run(most))


def _bytes(planes: int) -> Function:
    """A function: rows times a panel, a stretch of tiles unpacked at a time."""

    def build(emit: Emitter, *arguments: Num) -> None:
        row, source, first, last, out, scratch = arguments
        p, vectors = _Product(emit, row), _vectors()
        k, scales = p.tiles * TILE, scratch + BYTE_TILES * BYTES_BYTES
        with span(emit, 0, p.tiles, BYTE_TILES) as tile:
            count = (p.tiles - tile).at_most(BYTE_TILES)
            with span(emit, 0, count) as i:
                packed = source + (tile + i) * MXFP6_BYTES
                target = scratch + i * BYTES_BYTES
                bytes_of_mxfp6(emit, packed, target, scales + i * (PANEL * 4))
            is_first = tile.equals(0).pick(1, 0)
            at = Variable(emit, first)
            with repeat(emit, lambda: at.get() < last):
                here = at.get()
                rows = _pick_rows(last - here, _BYTE_ROWS[planes])
                x = p.x + here * p.x_stride + tile * TILE
                own = p.scales + here * p.tiles * 4 + tile * 4
                sums = p.sums + here * p.tiles * (4 * planes) + tile * 4
                o = out + here * p.stride

                def times(number: int, given: Any = (x, own, sums, o)) -> None:
                    x, own, sums, o = given
                    for column in range(0, 4, vectors):
                        shift = column * VECTOR_BYTES
                        tiles = scratch + shift, scales + shift, count
                        kernel = bytes_kernel(number, vectors, planes)
                        activation = x, k, own, sums, p.tiles
                        kernel(emit, *activation, *tiles, o + shift, p.stride, is_first)

                _by_count(rows, _BYTE_ROWS[planes], times)
                at.set(here + rows)

    return Function(f"product_of_bytes_{planes}", 6, build)


def _packed(planes: int) -> Function:
    """A function: one or two rows times a panel as it is packed."""

    def build(emit: Emitter, *arguments: Num) -> None:
        row, source, here, rows, out = arguments
        p = _Product(emit, row)
        own = p.scales + here * p.tiles * 4
        sums = p.sums + here * p.tiles * (4 * planes)
        activation = p.x + here * p.x_stride, p.tiles * TILE, own, sums, p.tiles
        tiles = source, 0, p.tiles

        def times(number: int) -> None:
            kernel = bytes_kernel(number, 4, planes, is_packed=True)
            kernel(emit, *activation, *tiles, out + here * p.stride, p.stride, 1)

        _by_count(rows, 2, times)

    return Function(f"packed_product_{planes}", 5, build)


@function("packed_product_of_floats")
def _packed_floats(emit: Emitter, row: Num, source: Num, here: Num, rows: Num, out: Num) -> None:
    """One or two rows times a panel as it is packed."""
    p, width = _Product(emit, row), max(2, _vectors())
    x, o = p.x + here * p.x_stride, out + here * p.stride

    def times(number: int, kind: int) -> None:
        for first in range(0, 4, width):
            kernel = packed_floats_kernel(number, kind, range(first, first + width))
            kernel(emit, x, p.x_stride, source, p.k, o, p.stride)

    def of_kind(number: int) -> None:
        kinds = (op.MXFP6, op.FLOAT16, op.FLOAT32)
        cases = [(kind, lambda kind=kind: times(number, kind)) for kind in kinds[:-1]]
        choose(p.kind, cases, lambda: times(number, kinds[-1]))

    _by_count(rows, 2, of_kind)


@function("multiply_panel")
def multiply_panel(
    emit: Emitter, row: Num, panel: Num, first: Num, last: Num, scratch: Num
) -> None:
    """Rows `first` to `last` - 1 of a PRODUCT's input times one panel of its weight."""
    weight, planes, size, few, out = columns(emit, row, (op.P0, op.P5, op.P8, op.P9, op.OUT))
    source, target = weight + panel * size, out + panel * (PANEL * 4)
    cases = []
    for number in planes_here():

        def run(number: int = number) -> None:
            is_few = last - first <= (few if _vectors() == 4 else 0)
            with when(is_few), span(emit, first, last, 2) as here:
                rows = (last - here).at_most(2)
                _packed(number)(emit, row, source, here, rows, target)
            with when(is_few.equals_false()):
                _bytes(number)(emit, row, source, first, last, target, scratch)

        cases.append((number, run))

    def run_floats() -> None:
        # The last tile of a weight may have rows that are none; unpacked ones are counted.
        kind, k = columns(emit, row, (op.P1, op.P3))
        is_whole = (kind > op.MXFP6) | (k % TILE).equals(0)
        is_few = (last - first <= few) & is_whole
        with when(is_few), span(emit, first, last, 2) as here:
            _packed_floats(emit, row, source, here, (last - here).at_most(2), target)
        with when(is_few.equals_false()):
            _floats(emit, row, source, first, last, target, scratch)

    choose(planes, cases, run_floats)
