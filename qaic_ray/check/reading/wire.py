"""Protobuf messages read field by field: ONNX files without the bytes of their weights.

Knows nothing of what the fields mean, but for which of ONNX's hold other messages.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

KEPT_BYTES = 4096
"""A field no longer than this is kept as it is; a tensor's data that is longer is left out."""

_MAX_DEPTH = 100
"""Messages inside of messages; protobuf itself reads no more."""

Buffer: TypeAlias = bytes | memoryview
Field: TypeAlias = tuple[int, int, int, Buffer]
"""Number, wire type, the number of a varint (else 0), and the bytes of another."""

# Message -> {number of a field: the message that it holds}; `Tensor` ends the way down.
_INNER: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}
_TENSOR_DATA = frozenset({4, 5, 6, 7, 9, 10, 11})
_DATA_LOCATION = b"\x70\x01"
"""`data_location: EXTERNAL`: readers look for no bytes in the tensor then."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class WireError(Exception):
    """Bytes that are no message; the text says why."""


def fields(data: Buffer) -> Iterator[Field]:
    """The fields of one message, in the order of the bytes.

    Raises:
        WireError: at the first byte that cannot be one.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError("a field has the number 0")
        value = 0
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, kind, value, b""
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise WireError(f"a field has the wire type {kind}")
        if at + length > end:
            raise WireError(f"it is cut short: {end} bytes of {at + length}")
        yield number, kind, 0, data[at : at + length]
        at += length


def slim_model(path: Path) -> bytes:
    """An ONNX file without the data of its large tensors.

    The file is mapped, so that its weights are never read. A tensor without its data is marked as
    external, with no location.

    Raises:
        OSError: where it cannot be read.
        WireError: where it is no message.
    """
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise WireError("it is empty")
        # Closed by its last reader: an error's traceback may hold some of it.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _slim(memoryview(mapped), "Model", 0)


def _slim(data: Buffer, message: str, depth: int) -> bytes:
    if depth > _MAX_DEPTH:
        raise WireError("its messages are nested too deep")
    if message == "Tensor":
        return _slim_tensor(data)
    inner = _INNER[message]
    parts: list[bytes] = []
    for number, kind, value, content in fields(data):
        is_long = kind == _BYTES and number in inner and len(content) > KEPT_BYTES
        kept = _slim(content, inner[number], depth + 1) if is_long else bytes(content)
        parts.append(_field(number, kind, value, kept))
    return b"".join(parts)


def _slim_tensor(data: Buffer) -> bytes:
    parts: list[bytes] = []
    is_cut = False
    for number, kind, value, content in fields(data):
        if number in _TENSOR_DATA and kind == _BYTES and len(content) > KEPT_BYTES:
            is_cut = True
        else:
            parts.append(_field(number, kind, value, bytes(content)))
    return b"".join(parts) + (_DATA_LOCATION if is_cut else b"")


def _field(number: int, kind: int, value: int, content: bytes) -> bytes:
    key = _encoded(number << 3 | kind)
    if kind == _VARINT:
        return key + _encoded(value)
    return key + _encoded(len(content)) + content if kind == _BYTES else key + content


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if at >= len(data):
            raise WireError("it is cut short inside of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise WireError("a number has more than 10 bytes")


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
