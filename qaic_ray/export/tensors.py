"""Reads safetensors files: a checked table of tensors, and blocks of rows on demand.

The library maps whole files, whose pages then count as this process's memory; here a block is read
into a buffer that is used again, so a checkpoint of any size passes through a few megabytes. Knows
nothing of ONNX.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_MAX_HEADER_BYTES = 100 << 20


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
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is not a safetensors file, or is cut short.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no object.")
    header.pop("__metadata__", None)
    entries = [_entry(path, 8 + length, name, fields) for name, fields in header.items()]
    end = max((e.offset + e.num_bytes for e in entries), default=0)
    if end > size:
        raise CheckpointError(
            f"{path} is cut short: {size} bytes of {end}; fetch the checkpoint again."
        )
    return sorted(entries, key=lambda e: e.offset)


def _entry(path: Path, data_start: int, name: str, fields: Mapping[str, Any]) -> TensorEntry:
    try:
        dtype, shape = str(fields["dtype"]), tuple(int(d) for d in fields["shape"])
        begin, end = (int(o) for o in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The header of {path} is malformed at {name}.") from error
    expected = prod(shape) * ITEM_BYTES.get(dtype, 0)
    if begin < 0 or end < begin or (dtype in ITEM_BYTES and end - begin != expected):
        raise CheckpointError(f"The header of {path} gives {name} an impossible place.")
    return TensorEntry(name, dtype, shape, path, data_start + begin, end - begin)
