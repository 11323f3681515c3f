"""MXINT8 (OCP MX 1.0), the KV cache format: 32 values share a power of two, 33 bytes a block.

An element is an 8-bit two's complement number of 64ths, rounded to nearest, ties to even, cut at
127 (-128 is not used). The exponent byte comes first. `blocks.py` says what the text leaves open.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import blocks

BLOCK = 32
BLOCK_BYTES = 33

_LIMIT = 127


def encode(x: Any) -> Any:
    """Pack along the last axis; returns uint8 [..., ceil(n / 32), 33]."""
    return blocks.encode_blocks(x, BLOCK, BLOCK_BYTES, _encode)


def decode(packed: Any, n: int) -> Any:
    """Unpack into float32 [..., n]."""
    return blocks.decode_blocks(packed, n, BLOCK, _decode)


def quantize(x: Any) -> Any:
    """The float32 values that an array has as MXINT8."""
    return decode(encode(x), x.shape[-1])


def _encode(x: Any, out: Any) -> None:
    bits = blocks.magnitudes(x)
    largest = bits.max(axis=1)
    exponent = blocks.exponents(largest)
    broken = blocks.is_broken(largest)
    scaled = np.where(broken[:, None], np.float32(0), x)
    scaled *= np.ldexp(np.float32(1), -np.where(broken, 0, exponent))[:, None]
    scaled *= np.float32(64)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -_LIMIT, _LIMIT, out=scaled)
    exponent_bytes = exponent + blocks.EXPONENT_BIAS
    out[:, 0] = np.where(broken, blocks.NAN_EXPONENT, exponent_bytes)
    out[:, 1:] = scaled.astype(np.int8).view(np.uint8)


def _decode(packed: Any) -> Any:
    values = np.ascontiguousarray(packed[:, 1:]).view(np.int8).astype(np.float32)
    values *= np.float32(1 / 64)
    values *= blocks.scales(packed[:, 0])[:, None]
    return values
