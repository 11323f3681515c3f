"""MXFP6, the weight format of `-mxfp6-matmul`: 32 weights share a power-of-two scale, 25 bytes.

An element is six bits (sign, then E2M3 or E3M2); the scale is one E8M0 byte. Rounding is to
nearest, ties to even, and saturates. The scale's exponent is floor(log2(max)) - 1 by the rule
`CARD`, inferred from errors measured on a card, and floor(log2(max)) - emax by `OCP`.

Packed form of a [K, N] weight: blocks run along K. 32 rows make one [25, N] tile: its first row is
the scales, and each three further rows hold four rows of codes, little end first. A last tile is
filled with zeros. `docs/emulated-sdk/formats.md` says it in full.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Tuple

import numpy as np

from . import EXPONENT_BIAS, NAN_EXPONENT, exponents, is_broken, magnitudes, scales

BLOCK = 32
BLOCK_BYTES = 25
CARD = "card"
OCP = "ocp"

_COLUMNS = 2048


class ElementFormat(NamedTuple):
    """A sign-magnitude minifloat without infinities; `emax` is its largest exponent."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    emax: int

    def values(self) -> Any:
        """Value of each of the 64 codes, float32."""
        code = np.arange(32)
        field = code >> self.mantissa_bits
        fraction = code & ((1 << self.mantissa_bits) - 1)
        hidden = np.where(field > 0, 1 << self.mantissa_bits, 0)
        exponent = np.maximum(field, 1) - self.bias - self.mantissa_bits
        magnitude = np.ldexp((hidden + fraction).astype(np.float32), exponent)
        return np.concatenate([magnitude, -magnitude])


E2M3 = ElementFormat("E2M3", 2, 3, 1, 2)
E3M2 = ElementFormat("E3M2", 3, 2, 3, 4)


def packed_shape(num_rows: int, num_columns: int) -> Tuple[int, int, int]:
    """Shape of the packed form of a [num_rows, num_columns] weight."""
    return -(-num_rows // BLOCK), BLOCK_BYTES, num_columns


def encode(weights: Any, element: ElementFormat = E2M3, rule: str = CARD) -> Any:
    """Pack a [K, N] float array; returns uint8 [ceil(K / 32), 25, N]."""
    num_rows, num_columns = weights.shape
    packed = np.empty(packed_shape(num_rows, num_columns), np.uint8)
    margin = 1 if rule == CARD and element is E2M3 else element.emax
    for tile in range(packed.shape[0]):
        rows = weights[tile * BLOCK : (tile + 1) * BLOCK]
        for start in range(0, num_columns, _COLUMNS):
            chunk = _full_block(rows[:, start : start + _COLUMNS])
            _encode_tile(chunk, element, margin, packed[tile, :, start : start + _COLUMNS])
    return packed


def decode(packed: Any, num_rows: int, element: ElementFormat = E2M3, out: Any = None) -> Any:
    """Unpack into float32 [num_rows, N]; into `out` where it is given."""
    num_tiles, _, num_columns = packed.shape
    if out is None:
        out = np.empty((num_rows, num_columns), np.float32)
    for tile in range(num_tiles):
        rows = min(BLOCK, num_rows - tile * BLOCK)
        for start in range(0, num_columns, _COLUMNS):
            with np.errstate(over="ignore"):
                values = _decode_tile(packed[tile, :, start : start + _COLUMNS], element)
            into = out[tile * BLOCK : tile * BLOCK + rows, start : start + _COLUMNS]
            np.copyto(into, values[:rows])
    return out


def quantize(weights: Any, element: ElementFormat = E2M3, rule: str = CARD) -> Any:
    """The float32 values that a [K, N] weight has on the card."""
    return decode(encode(weights, element, rule), weights.shape[0], element)


def _full_block(rows: Any) -> Any:
    if rows.shape[0] == BLOCK:
        return np.ascontiguousarray(rows, np.float32)
    padded = np.zeros((BLOCK, rows.shape[1]), np.float32)
    padded[: rows.shape[0]] = rows
    return padded


def _encode_tile(x: Any, element: ElementFormat, margin: int, out: Any) -> None:
    bits = x.view(np.uint32)
    magnitude = magnitudes(x)
    largest = magnitude.max(axis=0)
    exponent = exponents(largest) - margin
    np.maximum(exponent, -EXPONENT_BIAS, out=exponent)
    unit = np.ldexp(np.float32(1), -exponent)
    broken = is_broken(largest)
    if broken.any():
        magnitude[:, broken] = 0
        exponent[broken] = NAN_EXPONENT - EXPONENT_BIAS
    scaled = magnitude.view(np.float32)
    scaled *= unit
    codes = _round_codes(scaled, element)
    np.minimum(codes, 31, out=codes)
    code = codes.astype(np.uint8)
    code |= (bits >> np.uint32(26)).astype(np.uint8) & np.uint8(0x20)
    out[0] = exponent + EXPONENT_BIAS
    pack_codes(code.reshape(8, 4, -1), out[1:].reshape(8, 3, -1))


def _round_codes(scaled: Any, element: ElementFormat) -> Any:
    # A minifloat's code is a concave function of its value: the smallest of one line per exponent
    # field. Each line is exact in float32 before it is rounded, so ties go to even codes.
    codes = None
    for field in range(1, 1 << element.exponent_bits):
        step = np.float32(2.0 ** (element.bias + element.mantissa_bits - field))
        line = scaled * step
        np.rint(line, out=line)
        if codes is None:
            codes = line
            continue
        line += np.float32((field - 1) << element.mantissa_bits)
        np.minimum(codes, line, out=codes)
    return codes


def pack_codes(code: Any, out: Any) -> None:
    """Codes uint8 [..., 4, n] to bytes [..., 3, n]: four codes one above the other in three."""
    np.bitwise_or(code[..., 0, :], code[..., 1, :] << 6, out=out[..., 0, :])
    np.bitwise_or(code[..., 1, :] >> 2, code[..., 2, :] << 4, out=out[..., 1, :])
    np.bitwise_or(code[..., 2, :] >> 4, code[..., 3, :] << 2, out=out[..., 2, :])


def unpack_codes(packed: Any) -> Any:
    """What `pack_codes` was given: uint8 [..., 4, n]."""
    first, second, third = (packed[..., part, :] for part in range(3))
    code = np.empty((*packed.shape[:-2], 4, packed.shape[-1]), np.uint8)
    np.bitwise_and(first, 0x3F, out=code[..., 0, :])
    np.bitwise_or(first >> 6, (second & 0x0F) << 2, out=code[..., 1, :])
    np.bitwise_or(second >> 4, (third & 0x03) << 4, out=code[..., 2, :])
    np.right_shift(third, 2, out=code[..., 3, :])
    return code


def _decode_tile(packed: Any, element: ElementFormat) -> Any:
    rows = np.ascontiguousarray(packed[1:]).reshape(BLOCK // 4, 3, -1)
    code = unpack_codes(rows).reshape(BLOCK, -1)
    scale = scales(packed[0])
    if element is not E2M3:
        return element.values()[code] * scale
    # Eight times an E2M3 magnitude is the largest of three lines in its code: all within int8.
    magnitude = (code & 0x1F).astype(np.int8)
    eighths = np.maximum(magnitude, magnitude * np.int8(2) - np.int8(16))
    np.maximum(eighths, magnitude * np.int8(4) - np.int8(64), out=eighths)
    values = eighths.astype(np.float32)
    values *= np.float32(0.125)
    values *= scale
    # The sign goes in as a bit, so that a negative zero stays one.
    values.view(np.uint32)[...] |= (code & 0x20).astype(np.uint32) << np.uint32(26)
    return values
