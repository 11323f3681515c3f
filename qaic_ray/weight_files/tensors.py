"""Tensors of safetensors files: a checked table of them, and blocks of their bytes.

The safetensors library maps whole files, whose pages then count as this process's memory. Here
blocks are read into a buffer that is used again, so a checkpoint of any size passes through a few
megabytes.
"""

from __future__ import annotations

import os
import stat
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
"""Bytes of a value, by safetensors' name of its type; the types that weights may have."""

_MAX_HEADER_BYTES = 100 << 20
_MAX_RANK = 32
_LFS_POINTER = b"version "


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
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{path} is not a file.")
        size = status.st_size
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
    if not isinstance(value, list) or length not in (None, len(value)) or len(value) > _MAX_RANK:
        return False
    return all(type(item) is int and item >= 0 for item in value)
