"""Reads the header of a GGUF file, or of all parts of a split one: its keys and tensors' places.

Every count is compared with the size of the file before it is used, so a damaged file gives an
error of one sentence and never a long loop. The gguf package's reader makes no such checks.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qaic_ray.errors import CheckpointError
from qaic_ray.files.documents import shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ARRAY = 1 << 24  # more values than any vocabulary has
MAX_STRING_BYTES = 1 << 26
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
NUMBER_MAX = 1 << 31

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LEAST_KEY_BYTES = 13  # a name's length, a type and one byte
_LEAST_TENSOR_BYTES = 24
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place; `kind` is ggml's number of its type, `shape` has the rows first."""

    name: str
    kind: int
    shape: tuple[int, ...]
    path: Path
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """The keys of the first part of a model, and the tensors of all parts."""

    name: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class GgufKeys:
    """The keys of a file with one prefix, checked as they are read; those that are read are used.

    What is wrong with one is a CheckpointError that names it.
    """

    def __init__(self, gguf: GgufFile, prefix: str) -> None:
        self.name = gguf.name
        self._prefix = prefix
        self._keys = gguf.keys
        self._used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        self._used.add(key)
        return self._keys.get(self._prefix + key, default)

    def size(self, key: str, *, default: int | None = None) -> int:
        """A whole number of at least 1; of an array over the layers, the one value of all."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 1 <= value < NUMBER_MAX:
            raise self.error(key, "a whole number of at least 1, the same in all layers")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A number above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.error(key, "a number above 0")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def scale(self, key: str, default: float) -> float:
        """A number above 0; `default` where the key is missing or 0."""
        return self.number(key) if self.get(key) else default

    def error(self, key: str, must: str) -> CheckpointError:
        """The error of a key whose value is not what it must be."""
        value = self._keys.get(self._prefix + key)
        given = "is missing" if value is None else f"is {shown(value)}"
        return CheckpointError(f"{self._prefix}{key} of {self.name} {given}; it must be {must}.")

    def refuse_the_rest(self, neutral: Mapping[str, tuple[Any, ...] | None]) -> None:
        """Refuse the first key that is neither used nor `neutral` at its value; None: at any."""
        for name, value in self._keys.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in self._used:
                continue
            allowed = neutral.get(key, ())
            if allowed is not None and value not in allowed:
                raise CheckpointError(
                    f"{self.name} has {name} = {shown(value)}, which asks for what we do not "
                    "compute."
                )


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of the model that a file belongs to, in order; itself where it is not split.

    Raises:
        CheckpointError: one of them is not there.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise CheckpointError(f"{path} is no part of {count}, as its name says.")
    names = (f"{match['name']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1))
    parts = tuple(map(path.with_name, names))
    for part in parts:
        if not part.is_file():
            raise CheckpointError(
                f"{path.name} is a part of a split GGUF file, and its part {part.name} is missing "
                f"from {part.parent}."
            )
    return parts


def model_name(path: Path) -> str:
    """The name of the file without its part number and its suffix."""
    match = _PART.fullmatch(path.name)
    return path.stem if match is None else match["name"]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a file and of the other parts of its model.

    Raises:
        CheckpointError: it is damaged, or a part is missing or of another model.
    """
    paths = part_paths(path)
    files = []
    for part in paths:
        with reading(part), part.open("rb") as file:
            files.append(_HeaderReader(file, part).read())
    keys = files[0][0]
    tensors: dict[str, GgufTensor] = {}
    for tensor in chain.from_iterable(part_tensors for _, part_tensors in files):
        if tensor.name in tensors:
            raise CheckpointError(
                f"The tensor {shown(tensor.name)} is in {tensors[tensor.name].path.name} and "
                f"again in {tensor.path.name}."
            )
        tensors[tensor.name] = tensor
    _check_split(paths, [part_keys for part_keys, _ in files], len(tensors))
    return GgufFile(path.name, keys, tensors)


def _check_split(paths: tuple[Path, ...], keys: list[Mapping[str, Any]], num_tensors: int) -> None:
    """Compare the counts that a split model carries with what was found."""
    for number, (path, part) in enumerate(zip(paths, keys, strict=True)):
        count, said = part.get("split.count", 0), part.get("split.no", 0)
        if count in (0, 1) and len(paths) == 1:
            continue
        if count != len(paths) or said != number:
            raise CheckpointError(
                f"{path.name} says that it is part {shown(said)} (split.no, from 0) of "
                f"{shown(count)} (split.count); its name says {number} of {len(paths)}: give the "
                "parts the names they were made with."
            )
    total = keys[0].get("split.tensors.count", num_tensors)
    if total != num_tensors:
        raise CheckpointError(
            f"{paths[0].name} says that there are {shown(total)} tensors (split.tensors.count); "
            f"its parts have {num_tensors}."
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Work on files of a model, whose OSError becomes a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"Cannot read {error.filename or path}: {error.strerror}.") from error


class _HeaderReader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        self._check_start()
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        self._check_count(num_keys, _LEAST_KEY_BYTES, "keys")
        self._check_count(num_tensors, _LEAST_TENSOR_BYTES, "tensors")
        keys: dict[str, Any] = {}
        for _ in range(num_keys):
            name = self._string()
            if name in keys:
                raise self._damaged(f"it has the key {shown(name)} twice")
            keys[name] = self._value(self._scalar("I"))
        tensors = [self._tensor() for _ in range(num_tensors)]
        alignment = keys.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"its general.alignment is {shown(alignment)}")
        start = -(-self._at // alignment) * alignment
        return keys, [self._placed(start, tensor) for tensor in tensors]

    def _check_start(self) -> None:
        start = self._take(4) if self._size >= 4 else b""
        if start != MAGIC:
            raise CheckpointError(f"{self._path} is not a GGUF file: it does not begin with GGUF.")
        version = self._scalar("I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self._path} is a big-endian GGUF file; convert it with gguf_convert_endian.py."
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self._path} is GGUF of version {version}; supported: "
                f"{' and '.join(map(str, VERSIONS))}."
            )

    def _tensor(self) -> GgufTensor:
        """The next tensor; its offset counts from where the data begins."""
        name, num_dims = self._string(), self._scalar("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._damaged(f"its tensor {shown(name)} has {num_dims} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dims)]))
        if prod(shape) < 1:
            raise self._damaged(f"its tensor {shown(name)} has the shape {list(shape)}")
        return GgufTensor(name, self._scalar("I"), shape, self._path, self._scalar("Q"))

    def _placed(self, start: int, tensor: GgufTensor) -> GgufTensor:
        begin = start + tensor.offset
        end = begin + _num_bytes(tensor)
        if end > self._size:
            raise CheckpointError(
                f"{self._path} is cut short: {self._size} bytes, and its tensor "
                f"{shown(tensor.name)} ends at {end}; fetch the file again."
            )
        return replace(tensor, offset=begin)

    def _value(self, kind: int, *, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or nested:
            raise self._damaged(f"a key has the type {kind}")
        item, count = self._scalar("I"), self._scalar("Q")
        width = struct.calcsize(_SCALARS[item]) if item in _SCALARS else 8
        self._check_count(count, width, "values of an array", most=MAX_ARRAY)
        if item in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(count * width)))
        return [self._value(item, nested=True) for _ in range(count)]

    def _string(self) -> str:
        length = self._scalar("Q")
        self._check_count(length, 1, "bytes of a text", most=MAX_STRING_BYTES)
        # A vocabulary may hold halves of characters.
        return self._take(length).decode("utf-8", "surrogateescape")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _take(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        self._at += num_bytes
        if len(data) != num_bytes:
            raise CheckpointError(
                f"{self._path} is cut short: it ends inside its header; fetch the file again."
            )
        return data

    def _check_count(self, count: int, width: int, what: str, *, most: int = 1 << 32) -> None:
        if count > most or count * width > self._size - self._at:
            raise self._damaged(f"it says that it has {count} {what}, with {self._size} bytes")

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is a damaged GGUF file: {reason}.")


def _num_bytes(tensor: GgufTensor) -> int:
    """The number of bytes that a tensor takes.

    Raises:
        CheckpointError: its type is unknown, or does not fit its rows.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = shown(tensor.name)
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except (KeyError, ValueError):
        raise CheckpointError(
            f"The tensor {name} has the type {tensor.kind}, which the installed gguf package does "
            "not know."
        ) from None
    if tensor.shape[-1] % block:
        raise CheckpointError(
            f"The tensor {name} has rows of {tensor.shape[-1]} values, which its type stores in "
            f"blocks of {block}."
        )
    return int(prod(tensor.shape) // block * size)


def read_values(
    tensor: GgufTensor, rows: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float32]:
    """The values of a tensor, or of some of its rows, as the gguf package computes them."""
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import QuantError, dequantize, quant_shape_to_byte_shape

    kind = GGMLQuantizationType(tensor.kind)
    shape = quant_shape_to_byte_shape(tensor.shape, kind)
    stored = np.memmap(tensor.path, np.uint8, "r", offset=tensor.offset, shape=shape)
    try:
        values: npt.NDArray[np.float32] = dequantize(
            np.array(stored if rows is None else stored[rows]), kind
        )
    except (NotImplementedError, QuantError) as error:
        raise CheckpointError(
            f"The tensor {tensor.name} has the type {kind.name}, which the installed gguf package "
            "cannot read."
        ) from error
    return values
