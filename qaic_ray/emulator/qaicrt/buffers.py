"""Buffers of `qaicrt`: memory, its shapes, which is which, and slices of them.

A slicing specification says which part of a buffer on the card a smaller host array stands for:

    {"BufferSpecs": [{"Name": "past_key.*", "ElemSize": 2,
                      "DimSpecs": [{"start": "batch_index"}, {"start": 0},
                                   {"start": "ctx_start"}, {"start": 0}]}]}

`Name` is a regular expression for a binding's name; a `start` is a number, or the name of a
parameter that is given with the data. Inferred from public callers: the offset counts in the
larger of the two (the card's buffer, or the host's array), and the smaller gives the extent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import (
    Any,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Pattern,
    Sequence,
    Tuple,
    Union,
)

import numpy as np

from ..container.netdesc import Binding
from .types import BufferIoTypeEnum, QAicBufferDataTypeEnum, incompatible, to_uint

Region = Tuple[slice, ...]


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


class SpecError(ValueError):
    """The specification is malformed, or does not fit a buffer."""


class BufferSpec(NamedTuple):
    """Where the slices of some buffers start, a number or a parameter's name a dimension."""

    name: Pattern[str]
    element_bytes: int
    starts: Tuple[Union[int, str], ...]


class Wiring(NamedTuple):
    """A host array, and the regions of it and of the card's buffer that correspond."""

    array: np.ndarray
    host: Region
    card: Region


class SlicingSpec:
    """A parsed specification; the handle of `Program.createSlicingSpecHandle`."""

    def __init__(self, specs: Sequence[BufferSpec]) -> None:
        self._specs = tuple(specs)

    @classmethod
    def parse(cls, text: str) -> SlicingSpec:
        """Read the JSON text."""
        try:
            entries = json.loads(text)["BufferSpecs"]
            return cls([_buffer_spec(entry) for entry in entries])
        except (
            ValueError,
            LookupError,
            TypeError,
            ArithmeticError,
            RecursionError,
            re.error,
        ) as error:
            raise SpecError(str(error)[:200]) from error

    def find(self, name: str) -> Optional[BufferSpec]:
        """The first specification whose `Name` matches the whole of a binding's name."""
        return next((spec for spec in self._specs if spec.name.fullmatch(name)), None)


def _buffer_spec(entry: Mapping[str, Any]) -> BufferSpec:
    starts = tuple(dim["start"] for dim in entry["DimSpecs"])
    if not all(isinstance(start, (int, str)) for start in starts):
        raise SpecError("a start must be a number or a parameter's name")
    return BufferSpec(re.compile(entry["Name"]), int(entry["ElemSize"]), starts)


def wire(
    spec: BufferSpec, array: np.ndarray, dims: Sequence[int], parameters: Mapping[str, int]
) -> Wiring:
    """Match `array` to a buffer of `dims`; SpecError where they do not fit each other."""
    if not array.ndim == len(dims) == len(spec.starts):
        raise SpecError(f"{array.ndim} dimensions for a buffer of {len(dims)}")
    if array.itemsize != spec.element_bytes:
        raise SpecError(f"elements of {array.itemsize} bytes, not {spec.element_bytes}")
    host: List[slice] = []
    card: List[slice] = []
    for have, want, start in zip(array.shape, dims, spec.starts):
        if isinstance(start, str):
            if start not in parameters:
                raise SpecError(f"no value for {start}")
            start = parameters[start]
        extent = min(have, want)
        if start < 0 or start + extent > max(have, want):
            raise SpecError(f"{extent} elements from {start} on are outside of {max(have, want)}")
        offset, whole = slice(start, start + extent), slice(0, extent)
        host.append(offset if have > want else whole)
        card.append(whole if have > want else offset)
    return Wiring(array, tuple(host), tuple(card))
