"""Tensors of safetensors files: a checked table of them, blocks of bytes, converted values.

The safetensors library maps whole files, whose pages then count as this process's memory. Here
blocks are read into a buffer that is used again, so a checkpoint of any size passes through a few
megabytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError
from qaic_ray.files.documents import as_object, parse_json, shown

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
FLOAT16_MAX = 65504.0

Array = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]

_MAX_HEADER_BYTES = 100 << 20
_LFS_POINTER = b"version "
_MAGNITUDE = np.uint16(0x7FFF)
_SIGN = np.uint16(0x8000)
_FLOAT16_INFINITY = 0x7C00
# Powers of two as bfloat16: the smallest normal float16, and the first beyond the largest.
_BFLOAT16_2_TO_MINUS_14 = 0x3880
_BFLOAT16_2_TO_16 = 0x4780
_BIAS_DIFFERENCE = np.uint16((127 - 15) << 7)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor of a checkpoint lies; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int


def read_entries(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint by name.

    Raises:
        CheckpointError: a file is missing, cut short or malformed, or two hold the same tensor.
    """
    entries: dict[str, TensorEntry] = {}
    for path in files:
        for entry in _read_file(path):
            if entry.name in entries:
                raise CheckpointError(
                    f"The tensor {entry.name} is in {entries[entry.name].path.name} and again in "
                    f"{path.name}."
                )
            entries[entry.name] = entry
    return entries


def read_into(entry: TensorEntry, start: int, buffer: npt.NDArray[np.uint8]) -> None:
    """Fill `buffer` with the bytes of a tensor from byte `start` on."""
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset + start)
        view = buffer.data
        while view:
            num_read = file.readinto(view)
            if not num_read:
                raise CheckpointError(f"{entry.path} ends inside the tensor {entry.name}.")
            view = view[num_read:]


def _read_file(path: Path) -> list[TensorEntry]:
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == _LFS_POINTER:
                raise CheckpointError(
                    f"{path} is a pointer of git-lfs, not the weights; run `git lfs pull`."
                )
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is not a safetensors file, or is cut short.")
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    return _read_header(path, data, size)


def _read_header(path: Path, data: bytes, size: int) -> list[TensorEntry]:
    source = f"The header of {path}"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source} is not UTF-8, so it is not a safetensors file.") from error
    header = as_object(
        parse_json(text, source, raises=CheckpointError), source, raises=CheckpointError
    )
    header.pop("__metadata__", None)
    entries = [_entry(path, 8 + len(data), name, fields) for name, fields in header.items()]
    entries.sort(key=lambda e: (e.offset, e.num_bytes))
    end = 8 + len(data)
    for entry in entries:
        if entry.offset != end:
            raise CheckpointError(
                f"{source} gives {shown(entry.name)} a place that is not behind the tensor before."
            )
        end = entry.offset + entry.num_bytes
    if end != size:
        raise CheckpointError(
            f"{path} is {'cut short' if end > size else 'too long'}: {size} bytes of {end}; fetch "
            "the checkpoint again."
        )
    return entries


def _entry(path: Path, data_start: int, name: str, fields: Any) -> TensorEntry:
    described = fields if isinstance(fields, dict) else {}
    dtype, shape = described.get("dtype"), described.get("shape")
    offsets = described.get("data_offsets")
    if not (isinstance(dtype, str) and _is_sizes(shape) and _is_sizes(offsets, length=2)):
        raise CheckpointError(
            f"The header of {path} is malformed at {shown(name)}, which is {shown(fields)}."
        )
    begin, end = offsets
    if end < begin or (dtype in ITEM_BYTES and end - begin != prod(shape) * ITEM_BYTES[dtype]):
        raise CheckpointError(
            f"The header of {path} gives {shown(name)} an impossible place, {shown(offsets)}."
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _is_sizes(value: Any, length: int | None = None) -> TypeGuard[list[int]]:
    """Whether a value of the header is a list of whole numbers from 0 on."""
    if not isinstance(value, list) or length not in (None, len(value)):
        return False
    return all(type(item) is int and item >= 0 for item in value)


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
