"""Buffers of `qaicrt`: memory, its shapes, and which buffer of a program is which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, List, Tuple, Union

import numpy as np

from ..container.netdesc import Binding
from .types import BufferIoTypeEnum, QAicBufferDataTypeEnum, incompatible, to_uint


class QBuffer(np.ndarray):
    """Bytes of one input or output, over the memory it was made from, without a copy.

    An array of uint8, because only then has it the buffer protocol on every Python: `bytes(b)`,
    `memoryview(b)` and `numpy.frombuffer(b)` work. `size` is in bytes.
    """

    def __new__(cls, data: Union[bytes, bytearray, np.ndarray]) -> QBuffer:
        if isinstance(data, np.ndarray):
            if not data.flags.c_contiguous:
                raise incompatible("QBuffer")
            return data.reshape(-1).view(np.uint8).view(cls)
        if not isinstance(data, (bytes, bytearray)):
            raise incompatible("QBuffer")
        return np.frombuffer(data, np.uint8).view(cls) if data else np.empty(0, np.uint8).view(cls)

    def __repr__(self) -> str:
        return f"<qaicrt.QBuffer of {self.size} bytes>"

    def __bytes__(self) -> bytes:
        # bytes(QBuffer(b)) is b itself when that is all there is: most callers ask for just that.
        owner = self.base
        while isinstance(owner, np.ndarray):
            owner = owner.base
        return owner if isinstance(owner, bytes) and len(owner) == self.size else self.tobytes()


Dimensions = Tuple[int, List[int]]


def _dimensions(item: Any) -> Dimensions:
    try:
        element_bytes, dims = item
        return to_uint(element_bytes, "BufferDimensionsVecRef"), [
            to_uint(dim, "BufferDimensionsVecRef") for dim in dims
        ]
    except (TypeError, ValueError) as error:
        raise incompatible("BufferDimensionsVecRef") from error


class BufferDimensionsVecRef(List[Dimensions]):
    """`(bytes of an element, dims)` of each buffer; dims `[0]` mean that the buffer is skipped."""

    def __init__(self, items: Iterable[Tuple[int, Iterable[int]]] = ()) -> None:
        super().__init__(_dimensions(item) for item in items)

    def __setitem__(self, index: Any, item: Any) -> None:
        if isinstance(index, slice):
            raise incompatible("BufferDimensionsVecRef")
        super().__setitem__(index, _dimensions(item))

    def append(self, item: Any) -> None:
        """Add the dimensions of one more buffer."""
        super().append(_dimensions(item))


@dataclass(frozen=True)
class BufferMapping:
    """One buffer of a program, as `Qpc.getBufferMappings` tells it."""

    bufferName: str
    index: int
    ioType: BufferIoTypeEnum
    size: int
    isPartialBufferAllowed: bool
    dataType: QAicBufferDataTypeEnum


def mapping_of(binding: Binding) -> BufferMapping:
    """The vendor's form of a binding."""
    directions = BufferIoTypeEnum
    return BufferMapping(
        binding.name,
        binding.index,
        directions.BUFFER_IO_TYPE_INPUT if binding.is_input else directions.BUFFER_IO_TYPE_OUTPUT,
        binding.size,
        binding.is_partial_buf_allowed,
        QAicBufferDataTypeEnum(binding.type),
    )
