"""A MatMul's weight [K, N] in panels of 64 columns: how `constants.bin` holds it.

A panel is read from front to back while its 64 columns are computed. The last panel's missing
columns are zeros.

Float panels are [K, 64]. An MXFP6 panel is made of tiles of 32 rows, 1,600 bytes each: 64 scales,
then for every four rows 192 bytes of codes, three rows of 64 as `mxfp6` packs four. What it packs
there is not four rows, but four times 16 columns, with the four codes of a column side by side: the
order in which a processor multiplies bytes.
"""

from __future__ import annotations

from typing import Any, Tuple

import numpy as np

from . import mxfp6

WIDTH = 64
TILE_BYTES = WIDTH * mxfp6.BLOCK_BYTES
_GROUPS = mxfp6.BLOCK // 4


def num_panels(num_columns: int) -> int:
    """Panels of so many columns."""
    return -(-num_columns // WIDTH)


def mxfp6_shape(num_rows: int, num_columns: int) -> Tuple[int, int, int]:
    """Shape of the MXFP6 panels of a [num_rows, num_columns] weight."""
    return num_panels(num_columns), -(-num_rows // mxfp6.BLOCK), TILE_BYTES


def of_mxfp6(packed: Any) -> Any:
    """Panels uint8 [panels, tiles, 1600] of what `mxfp6.encode` gave: uint8 [tiles, 25, N]."""
    num_tiles, _, num_columns = packed.shape
    count = num_panels(num_columns)
    wide = np.zeros((num_tiles, mxfp6.BLOCK_BYTES, count * WIDTH), np.uint8)
    wide[..., :num_columns] = packed
    by_panel = wide.reshape(num_tiles, mxfp6.BLOCK_BYTES, count, WIDTH).transpose(2, 0, 1, 3)
    panels = np.empty((count, num_tiles, TILE_BYTES), np.uint8)
    panels[..., :WIDTH] = by_panel[:, :, 0]
    codes = mxfp6.unpack_codes(by_panel[:, :, 1:].reshape(count, num_tiles, _GROUPS, 3, WIDTH))
    # [..., row of four, 4 times 16 columns] to [..., 4, 16 columns times four rows].
    turned = codes.reshape(count, num_tiles, _GROUPS, 4, 4, 16).swapaxes(3, 4).swapaxes(4, 5)
    mixed = turned.reshape(count, num_tiles, _GROUPS, 4, WIDTH)
    mxfp6.pack_codes(mixed, panels[..., WIDTH:].reshape(count, num_tiles, _GROUPS, 3, WIDTH))
    return panels


def to_mxfp6(panels: Any, num_columns: int) -> Any:
    """What `of_mxfp6` was given."""
    count, num_tiles, _ = panels.shape
    wide = np.empty((num_tiles, mxfp6.BLOCK_BYTES, count, WIDTH), np.uint8)
    wide[:, 0] = panels[..., :WIDTH].swapaxes(0, 1)
    packed = panels[..., WIDTH:].reshape(count, num_tiles, _GROUPS, 3, WIDTH)
    mixed = mxfp6.unpack_codes(packed).reshape(count, num_tiles, _GROUPS, 4, 16, 4)
    codes = mixed.swapaxes(4, 5).swapaxes(3, 4).reshape(count, num_tiles, _GROUPS, 4, WIDTH)
    rows = np.empty((count, num_tiles, _GROUPS, 3, WIDTH), np.uint8)
    mxfp6.pack_codes(codes, rows)
    wide[:, 1:] = rows.reshape(count, num_tiles, 3 * _GROUPS, WIDTH).transpose(1, 2, 0, 3)
    whole = wide.reshape(num_tiles, mxfp6.BLOCK_BYTES, count * WIDTH)
    return np.ascontiguousarray(whole[..., :num_columns])


def of_floats(weight: Any) -> Any:
    """Panels [panels, K, 64] of a [K, N] array, in its type."""
    num_rows, num_columns = weight.shape
    count = num_panels(num_columns)
    wide = np.zeros((num_rows, count * WIDTH), weight.dtype)
    wide[:, :num_columns] = weight
    return np.ascontiguousarray(wide.reshape(num_rows, count, WIDTH).swapaxes(0, 1))


def to_floats(panels: Any, num_columns: int) -> Any:
    """What `of_floats` was given, as a view or a copy."""
    count, num_rows, _ = panels.shape
    return panels.swapaxes(0, 1).reshape(num_rows, count * WIDTH)[:, :num_columns]
