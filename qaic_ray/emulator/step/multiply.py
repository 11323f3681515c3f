"""A panel of a weight times rows: tile by tile into a thread's memory, then row by row from there.

Few rows of bytes take the weight as it is packed. Otherwise a stretch of tiles is unpacked that the
nearest cache holds, and every row goes over it.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from . import operations as op
from .machine import AVX512, AVX2, GENERIC, processor
from .products import bytes_kernel, floats_kernel
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

_target = processor()
_KIND = GENERIC if _target is None else _target.kind
_IS_WIDE = _KIND == AVX512
_HAS_BYTES = _KIND in (AVX512, AVX2)
_VECTORS = 4 if _IS_WIDE else 1
_BYTE_TILES = 4
_FLOAT_TILES = 3
_MOST_PACKED_1, _MOST_PACKED_3 = (4, 8) if _IS_WIDE else (0, 0)
SCRATCH_BYTES = max(_BYTE_TILES * (BYTES_BYTES + PANEL * 4), _FLOAT_TILES * TILE * PANEL * 4)

_f1, _f2, _f3, _f4, _f5, _f6 = (floats_kernel(rows, _VECTORS) for rows in range(1, 7))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _absent(
    _x: int, _k: int, _own: int, _sums: int, _blocks: int, _tiles: int, _scales: int, _n: int,
    _out: int, _stride: int, _first: int,
) -> None:  # fmt: skip
    """In the place of a kernel that this processor has not; never called."""


_packed_11 = _packed_21 = _packed_13 = _packed_23 = _absent
_bytes_11 = _bytes_21 = _bytes_31 = _bytes_13 = _bytes_23 = _absent
if _IS_WIDE:
    _packed_11, _packed_21 = (bytes_kernel(rows, 4, 1, is_packed=True) for rows in (1, 2))
    _packed_13, _packed_23 = (bytes_kernel(rows, 4, 3, is_packed=True) for rows in (1, 2))
    _bytes_13, _bytes_23 = (bytes_kernel(rows, 4, 3) for rows in (1, 2))
if _HAS_BYTES:
    _bytes_11, _bytes_21, _bytes_31 = (bytes_kernel(rows, _VECTORS, 1) for rows in (1, 2, 3))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _unpack_floats(kind: int, source: int, tile: int, k: int, out: int) -> None:
    if kind == op.MXFP6:
        floats_of_mxfp6(source + tile * MXFP6_BYTES, out)
        return
    rows = min(TILE, k - tile * TILE)
    if kind == op.FLOAT16:
        floats_of_float16(source + tile * TILE * PANEL * 2, rows, out)
    else:
        floats_of_float32(source + tile * TILE * PANEL * 4, rows, out)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _times_floats(
    rows: int, x: int, x_stride: int, weights: int, k: int, out: int, stride: int, is_first: int
) -> None:
    for column in range(0, 4, _VECTORS):
        w, o = weights + column * 64, out + column * 64
        if rows == 1:
            _f1(x, x_stride, w, k, o, stride, is_first)
        elif rows == 2:
            _f2(x, x_stride, w, k, o, stride, is_first)
        elif rows == 3:
            _f3(x, x_stride, w, k, o, stride, is_first)
        elif rows == 4:
            _f4(x, x_stride, w, k, o, stride, is_first)
        elif rows == 5:
            _f5(x, x_stride, w, k, o, stride, is_first)
        else:
            _f6(x, x_stride, w, k, o, stride, is_first)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _floats(o: Any, source: int, first: int, last: int, out: int, scratch: int) -> None:
    tiles, k, tile = o[op.P2], o[op.P3], 0
    while tile < tiles:
        count = min(_FLOAT_TILES, tiles - tile)
        for i in range(count):
            _unpack_floats(o[op.P1], source, tile + i, k, scratch + i * TILE * PANEL * 4)
        width = min(k - tile * TILE, count * TILE) if o[op.P1] != op.MXFP6 else count * TILE
        row = first
        while row < last:
            left = last - row
            rows = 6 if left >= 12 or left == 6 else min((left + 1) // 2 if left > 6 else left, 6)
            x = o[op.IN] + row * o[op.IN_STRIDE] + tile * TILE * 4
            target = out + row * o[op.OUT_STRIDE]
            is_first = 1 if tile == 0 else 0
            _times_floats(
                rows, x, o[op.IN_STRIDE], scratch, width, target, o[op.OUT_STRIDE], is_first
            )
            row += rows
        tile += count


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _packed(o: Any, source: int, row: int, rows: int, out: int) -> None:
    tiles, planes, k = o[op.P2], o[op.P5], o[op.P2] * TILE
    x = o[op.IN] + row * o[op.IN_STRIDE]
    own, sums = o[op.P6] + row * tiles * 4, o[op.P7] + row * tiles * planes * 4
    target, stride = out + row * o[op.OUT_STRIDE], o[op.OUT_STRIDE]
    if rows == 1 and planes == 1:
        _packed_11(x, k, own, sums, tiles, source, 0, tiles, target, stride, 1)
    elif rows == 1:
        _packed_13(x, k, own, sums, tiles, source, 0, tiles, target, stride, 1)
    elif planes == 1:
        _packed_21(x, k, own, sums, tiles, source, 0, tiles, target, stride, 1)
    else:
        _packed_23(x, k, own, sums, tiles, source, 0, tiles, target, stride, 1)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _bytes(o: Any, source: int, first: int, last: int, out: int, scratch: int) -> None:
    tiles, planes, k, stride = o[op.P2], o[op.P5], o[op.P2] * TILE, o[op.OUT_STRIDE]
    scales, tile = scratch + _BYTE_TILES * BYTES_BYTES, 0
    while tile < tiles:
        n = min(_BYTE_TILES, tiles - tile)
        for i in range(n):
            packed = source + (tile + i) * MXFP6_BYTES
            bytes_of_mxfp6(packed, scratch + i * BYTES_BYTES, scales + i * PANEL * 4)
        one = 1 if tile == 0 else 0
        row = first
        while row < last:
            left = last - row
            # As many rows as there are registers for.
            rows = 2 if left == 4 else min(left, 3 if planes == 1 else 2)
            x = o[op.IN] + row * o[op.IN_STRIDE] + tile * TILE
            own = o[op.P6] + row * tiles * 4 + tile * 4
            sums = o[op.P7] + row * tiles * planes * 4 + tile * 4
            for column in range(0, 4, _VECTORS):
                w, s = scratch + column * 64, scales + column * 64
                target = out + row * stride + column * 64
                if planes == 1:
                    if rows == 1:
                        _bytes_11(x, k, own, sums, tiles, w, s, n, target, stride, one)
                    elif rows == 2:
                        _bytes_21(x, k, own, sums, tiles, w, s, n, target, stride, one)
                    else:
                        _bytes_31(x, k, own, sums, tiles, w, s, n, target, stride, one)
                elif rows == 1:
                    _bytes_13(x, k, own, sums, tiles, w, s, n, target, stride, one)
                else:
                    _bytes_23(x, k, own, sums, tiles, w, s, n, target, stride, one)
            row += rows
        tile += n


@njit(nogil=True)  # type: ignore[untyped-decorator]
def multiply_panel(o: Any, panel: int, first: int, last: int, scratch: int) -> None:
    """Rows `first` to `last` - 1 of a PRODUCT's input times one panel of its weight."""
    source, out = o[op.P0] + panel * o[op.P8], o[op.OUT] + panel * PANEL * 4
    if o[op.P5] == 0:
        _floats(o, source, first, last, out, scratch)
    elif _HAS_BYTES:
        if last - first <= (_MOST_PACKED_1 if o[op.P5] == 1 else _MOST_PACKED_3):
            for row in range(first, last, 2):
                _packed(o, source, row, min(2, last - row), out)
        else:
            _bytes(o, source, first, last, out, scratch)
