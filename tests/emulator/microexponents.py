"""MX9, MX6 and MX4 with shared microexponents, as in arXiv 2302.08007; for comparison only.

A compiler's "mx6" is not this MX6 but MXFP6 (`mxfp6.py`). 16 values share an 8-bit exponent, each
pair of them a 1-bit one that shifts it down, and an element is a sign and `mantissa_bits` without
a hidden bit: 9, 6 and 4 bits a value. Rounding is to nearest, ties to even, and saturates.

Packed form of a block: the exponent byte, a byte with one bit a pair (pair 0 lowest), then the 16
elements one after the other from the lowest bit on, magnitude first, then sign.
`emulator.numbers` says what the paper leaves open.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qaic_ray.emulator import numbers as blocks

BLOCK = 16
_PAIRS = 8


class Format(NamedTuple):
    """One of the paper's formats."""

    name: str
    mantissa_bits: int

    @property
    def block_bytes(self) -> int:
        """Bytes of 16 packed values."""
        return 2 + BLOCK * (self.mantissa_bits + 1) // 8

    def encode(self, x: Any) -> Any:
        """Pack along the last axis; returns uint8 [..., ceil(n / 16), block_bytes]."""
        return blocks.encode_blocks(x, BLOCK, self.block_bytes, self._encode)

    def decode(self, packed: Any, n: int) -> Any:
        """Unpack into float32 [..., n]."""
        return blocks.decode_blocks(packed, n, BLOCK, self._decode)

    def quantize(self, x: Any) -> Any:
        """The float32 values that an array has in this format."""
        return self.decode(self.encode(x), x.shape[-1])

    def _encode(self, x: Any, out: Any) -> None:
        bits = blocks.magnitudes(x)
        pairs = bits.reshape(-1, _PAIRS, 2).max(axis=2)
        largest = pairs.max(axis=1)
        broken = blocks.is_broken(largest)
        exponent = np.where(broken, 0, blocks.exponents(largest))
        shift = (blocks.exponents(pairs) < exponent[:, None]).astype(np.uint8)
        scaled = np.where(broken[:, None], np.float32(0), bits.view(np.float32))
        scaled *= np.ldexp(np.float32(1), -exponent)[:, None]
        scaled *= np.ldexp(np.float32(1), shift.repeat(2, axis=1) + (self.mantissa_bits - 1))
        np.rint(scaled, out=scaled)
        np.minimum(scaled, (1 << self.mantissa_bits) - 1, out=scaled)
        sign = (bits != x.view(np.uint32)).astype(np.uint8)
        code = scaled.astype(np.uint8) | sign << self.mantissa_bits
        out[:, 0] = np.where(broken, blocks.NAN_EXPONENT, exponent + blocks.EXPONENT_BIAS)
        out[:, 1] = np.packbits(shift, axis=1, bitorder="little")[:, 0]
        width = np.arange(self.mantissa_bits + 1, dtype=np.uint8)
        elements = (code[:, :, None] >> width & 1).reshape(len(x), -1)
        out[:, 2:] = np.packbits(elements, axis=1, bitorder="little")

    def _decode(self, packed: Any) -> Any:
        width = self.mantissa_bits + 1
        elements = np.unpackbits(packed[:, 2:], axis=1, bitorder="little")
        weights = 1 << np.arange(width, dtype=np.uint8)
        code = (elements.reshape(-1, BLOCK, width) * weights).sum(axis=2, dtype=np.uint8)
        shift = np.unpackbits(packed[:, 1:2], axis=1, bitorder="little").repeat(2, axis=1)
        values = (code & ((1 << self.mantissa_bits) - 1)).astype(np.float32)
        values *= np.ldexp(np.float32(1), -shift.astype(np.int32) - (self.mantissa_bits - 1))
        values *= blocks.scales(packed[:, 0])[:, None]
        return np.where(code >> self.mantissa_bits, -values, values)


MX9 = Format("MX9", 7)
MX6 = Format("MX6", 4)
MX4 = Format("MX4", 2)
