"""Values of a checkpoint's tensors as float32 or float16, in memory that is used again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qaic_ray.weight_files.tensors import ITEM_BYTES

FLOAT16_MAX = 65504.0

Array = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]

_MAGNITUDE = np.uint16(0x7FFF)
_SIGN = np.uint16(0x8000)
_FLOAT16_INFINITY = 0x7C00
# Powers of two as bfloat16: the smallest normal float16, and the first beyond the largest.
_BFLOAT16_2_TO_MINUS_14 = 0x3880
_BFLOAT16_2_TO_16 = 0x4780
_BIAS_DIFFERENCE = np.uint16((127 - 15) << 7)


class Converter:
    """Converts blocks of up to `num_elements` values to `dtype` (float32 or float16).

    It keeps its memory, because fresh pages cost more than the work on them: what it returns is
    overwritten by its next call.
    """

    def __init__(self, dtype: np.dtype[np.floating], num_elements: int) -> None:
        self._dtype = dtype
        self._wide = np.empty(num_elements, np.float32)
        self._narrow = np.empty(num_elements, np.float16)
        self._bits = np.empty(num_elements, np.uint16)

    def convert(self, raw: Bytes, kind: str) -> tuple[Array, int]:
        """The values of `raw`, and how many were brought into the range of float16.

        Args:
            raw: whole values, little-endian.
            kind: safetensors' name of their type, one of `ITEM_BYTES`.

        Raises:
            ValueError: one of them is not a number.
        """
        if self._dtype == np.float16 and kind != "F32":
            exact = self._float16_without_loss(raw.view(np.uint16), kind)
            if exact is not None:
                return exact, 0
        values = self._widened(raw, kind)
        num_clipped = clip_to_float16(values)
        if self._dtype == np.float32:
            return values, num_clipped
        narrow = self._narrow[: values.size]
        narrow[:] = values
        return narrow, num_clipped

    def _float16_without_loss(self, bits: npt.NDArray[np.uint16], kind: str) -> Array | None:
        """The same as by float32, in a third of the time; None where values must be clipped."""
        magnitude = np.bitwise_and(bits, _MAGNITUDE, out=self._bits[: bits.size])
        largest = int(magnitude.max(initial=0))
        if kind == "F16":
            return bits.view(np.float16) if largest < _FLOAT16_INFINITY else None
        if largest >= _BFLOAT16_2_TO_16:
            return None
        # A bfloat16 has fewer bits of fraction than a float16, and another bias of the exponent.
        small = np.flatnonzero(magnitude < _BFLOAT16_2_TO_MINUS_14)
        narrow = self._narrow[: bits.size]
        patterns = narrow.view(np.uint16)
        np.subtract(magnitude, _BIAS_DIFFERENCE, out=patterns)
        np.left_shift(patterns, 3, out=patterns)
        np.bitwise_and(bits, _SIGN, out=magnitude)
        np.bitwise_or(patterns, magnitude, out=patterns)
        narrow[small] = (bits[small].astype(np.uint32) << np.uint32(16)).view(np.float32)
        return narrow

    def _widened(self, raw: Bytes, kind: str) -> Array:
        """As float32, in memory that may be written."""
        if kind == "F32":
            return raw.view(np.float32)
        values = self._wide[: raw.size // ITEM_BYTES[kind]]
        if kind == "F16":
            values[:] = raw.view(np.float16)
            return values
        # A bfloat16 is the upper half of a float32.
        bits = values.view(np.uint32)
        bits[:] = raw.view(np.uint16)
        bits <<= np.uint32(16)
        return values


def clip_to_float16(values: Array) -> int:
    """Bring finite values and +inf into the range of float16, in place; -inf stays what it is.

    Returns:
        How many values changed.

    Raises:
        ValueError: one of them is not a number.
    """
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    if low >= -FLOAT16_MAX and high <= FLOAT16_MAX:
        return 0
    if np.isnan(low) or np.isnan(high):
        raise ValueError("not a number")
    outside = (values > FLOAT16_MAX) | ((values < -FLOAT16_MAX) & ~np.isneginf(values))
    np.copyto(values, np.clip(values, -FLOAT16_MAX, FLOAT16_MAX), where=outside)
    return int(np.count_nonzero(outside))
