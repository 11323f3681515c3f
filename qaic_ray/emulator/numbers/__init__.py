"""Number formats of a card; this file has what they share: blocks with a common exponent byte.

The formats' texts leave three things open, and they are defined here for all of them: a block of
zeros has exponent byte 0; exponents below -127 are cut there; a block that holds an infinity or a
NaN has exponent byte 255 and decodes to NaN.
"""

from __future__ import annotations

from typing import Any, Callable, Tuple

import numpy as np

EXPONENT_BIAS = 127
NAN_EXPONENT = 255

_PIECE = 1 << 16
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)


def magnitudes(x: Any) -> Any:
    """Bits of |x|, uint32; they are ordered as the magnitudes are."""
    return x.view(np.uint32) & _MAGNITUDE


def exponents(bits: Any) -> Any:
    """floor(log2) of positive floats from their bits, int32; -127 for zero and subnormals."""
    return (bits >> np.uint32(23)).astype(np.int32) - EXPONENT_BIAS


def is_broken(bits: Any) -> Any:
    """Whether magnitudes are infinite or no number."""
    return bits >= _INFINITY


def scales(exponent_bytes: Any) -> Any:
    """2 ** (byte - 127) as float32, NaN for byte 255."""
    broken = exponent_bytes == NAN_EXPONENT
    exponent = np.where(broken, 0, exponent_bytes.astype(np.int32) - EXPONENT_BIAS)
    return np.where(broken, np.float32(np.nan), np.ldexp(np.float32(1), exponent))


def encode_blocks(x: Any, block: int, block_bytes: int, encode: Callable[[Any, Any], None]) -> Any:
    """Pack a float array along its last axis; returns uint8 [..., ceil(n / block), block_bytes].

    `encode(values, out)` packs float32 [blocks, block] into uint8 [blocks, block_bytes]. A last
    block is filled with zeros.
    """
    num_blocks = -(-x.shape[-1] // block)
    padded = np.zeros((*x.shape[:-1], num_blocks * block), np.float32)
    padded[..., : x.shape[-1]] = x
    rows = padded.reshape(-1, block)
    out = np.empty((rows.shape[0], block_bytes), np.uint8)
    for start, stop in _pieces(rows.shape[0], block):
        encode(rows[start:stop], out[start:stop])
    return out.reshape(*x.shape[:-1], num_blocks, block_bytes)


def decode_blocks(packed: Any, n: int, block: int, decode: Callable[[Any], Any]) -> Any:
    """Undo `encode_blocks` for a last axis of `n`; `decode` gives float32 [blocks, block]."""
    rows = packed.reshape(-1, packed.shape[-1])
    values = np.empty((rows.shape[0], block), np.float32)
    for start, stop in _pieces(rows.shape[0], block):
        values[start:stop] = decode(rows[start:stop])
    return values.reshape(*packed.shape[:-2], -1)[..., :n]


def _pieces(num_rows: int, block: int) -> Tuple[Tuple[int, int], ...]:
    # Pieces that fit into a core's own cache: the arithmetic is a chain of simple passes.
    step = max(1, _PIECE // block)
    return tuple((start, min(start + step, num_rows)) for start in range(0, num_rows, step))
