"""`networkdesc.bin`, a program's inputs and outputs; wire-compatible with the vendor's descriptor.

The schema is our own, written from the field numbers and types of the open runtime's version 9.0;
only the fields that we write are named, others are skipped on reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from google.protobuf.message import DecodeError

from . import QpcError, aicapi

MAJOR_VERSION = 9
_PACKAGE = "aicnwdesc"
_ALIGN_BYTES = 64
_COPY_DMA_BUFFER = 6
_MAX_DMA_BYTES = 0xFFFFFFFF
_MAX_DIM = 0x7FFFFFFF

DTYPES: Dict[int, np.dtype[Any]] = {
    aicapi.FLOAT_TYPE: np.dtype(np.float32),
    aicapi.FLOAT_16_TYPE: np.dtype(np.float16),
    aicapi.BFLOAT16_TYPE: np.dtype(np.float16),
    aicapi.INT8_Q_TYPE: np.dtype(np.int8),
    aicapi.UINT8_Q_TYPE: np.dtype(np.uint8),
    aicapi.INT16_Q_TYPE: np.dtype(np.int16),
    aicapi.INT32_Q_TYPE: np.dtype(np.int32),
    aicapi.INT32_I_TYPE: np.dtype(np.int32),
    aicapi.INT64_I_TYPE: np.dtype(np.int64),
    aicapi.INT8_TYPE: np.dtype(np.int8),
}
"""Element type of a buffer -> numpy dtype; numpy has no bfloat16."""

# Message -> {field: (number, type)}; a leading * means repeated.
_MESSAGES: Dict[str, Dict[str, Tuple[int, str]]] = {
    "tensorShape": {"type": (1, "int32"), "dims": (2, "*int32")},
    "IOShapes": {"shapes": (1, "*tensorShape")},
    "IODescriptor": {
        "type": (1, "int32"),
        "qscale": (2, "float"),
        "qoffset": (3, "int32"),
        "dims": (4, "*int32"),
        "layout": (5, "int32"),
    },
    "CopyDMABuffer": {"dir": (1, "int32"), "offset": (2, "uint32"), "buffer_num": (3, "uint32")},
    "transform": {
        "kind": (1, "int32"),
        "type": (2, "int32"),
        "scale": (3, "float"),
        "offset": (4, "int32"),
        "dims": (5, "*int32"),
        "copy_dma_buffer": (9, "CopyDMABuffer"),
    },
    "DMABuffer": {"size": (1, "uint32"), "dir": (2, "int32")},
    "IOBinding": {
        "name": (1, "string"),
        "io_initial": (2, "IODescriptor"),
        "io_transformed": (3, "IODescriptor"),
        "transformseq": (4, "*transform"),
        "is_partial_allowed": (5, "bool"),
        "align": (6, "uint32"),
    },
    "networkDescriptor": {
        "major_version": (1, "uint32"),
        "minor_version": (2, "uint32"),
        "network_name": (3, "string"),
        "inputs": (4, "*IOBinding"),
        "outputs": (5, "*IOBinding"),
        "dma_buffers": (6, "*DMABuffer"),
        "num_cores": (7, "uint32"),
        "num_threads": (8, "uint32"),
        "batch_size": (14, "int32"),
        "allowed_shapes": (18, "*IOShapes"),
    },
}


@dataclass(frozen=True)
class Binding:
    """A buffer of a program; `dims` and `size` (bytes) are those of the largest specialization."""

    name: str
    index: int
    type: int
    is_input: bool
    dims: Tuple[int, ...]
    size: int
    is_partial_buf_allowed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the buffer's elements."""
        return DTYPES[self.type]


class Io(NamedTuple):
    """One input or output: `dims` and `type` as a program sees them."""

    name: str
    type: int
    dims: Tuple[int, ...]
    is_partial_buf_allowed: bool


class DmaBuffer(NamedTuple):
    """What carries one binding's bytes between host and card, in `size` bytes.

    `dims` is the shape of the bytes in it. A partial input lies behind a header that tells where
    it begins and how long it is; a reader takes its first dim for the number of its elements, so
    it has only that one.
    """

    binding: int
    size: int
    is_input: bool
    dims: Tuple[int, ...]


class Network(NamedTuple):
    """What the descriptor says; `allowed_shapes` has (type, dims) per IO, inputs then outputs."""

    name: str
    inputs: Tuple[Io, ...]
    outputs: Tuple[Io, ...]
    num_cores: int
    batch_size: int
    allowed_shapes: Tuple[Tuple[Tuple[int, Tuple[int, ...]], ...], ...]

    def bindings(self) -> Tuple[Binding, ...]:
        """The buffers in order.

        Raises:
            QpcError: where one has a type that this SDK does not know.
        """
        result = []
        for index, io in enumerate(self.inputs + self.outputs):
            if io.type not in DTYPES:
                raise QpcError(f"binding '{io.name}' has the unknown type {io.type}")
            is_input = index < len(self.inputs)
            size = DTYPES[io.type].itemsize * math.prod(io.dims)
            partial = io.is_partial_buf_allowed
            result.append(Binding(io.name, index, io.type, is_input, io.dims, size, partial))
        return tuple(result)

    def dma_buffers(self) -> Tuple[DmaBuffer, ...]:
        """One a binding, in order; one that the fields of 32 bits cannot tell (4 GiB) has none.

        Raises:
            QpcError: as `bindings`.
        """
        buffers = []
        for binding in self.bindings():
            size, dims = binding.size, binding.dims
            if binding.is_input and binding.is_partial_buf_allowed:
                size += _ALIGN_BYTES  # the header, and the alignment of what follows
                dims = (math.prod(dims),)
            if size <= _MAX_DMA_BYTES and max(dims, default=0) <= _MAX_DIM:
                buffers.append(DmaBuffer(binding.index, size, binding.is_input, dims))
        return tuple(buffers)


_NetworkDescriptor = aicapi.message_class(
    aicapi.message_pool("networkdesc.proto", _PACKAGE, _MESSAGES), f"{_PACKAGE}.networkDescriptor"
)


def serialize(network: Network) -> bytes:
    """The bytes of `networkdesc.bin`."""
    message = _NetworkDescriptor(
        major_version=MAJOR_VERSION,
        minor_version=0,
        network_name=network.name,
        num_cores=network.num_cores,
        num_threads=1,
        batch_size=network.batch_size,
    )
    bindings = []
    for field, ios in ((message.inputs, network.inputs), (message.outputs, network.outputs)):
        for io in ios:
            binding = field.add(name=io.name, is_partial_allowed=io.is_partial_buf_allowed)
            bindings.append(binding)
            binding.align = _ALIGN_BYTES
            for descriptor in (binding.io_initial, binding.io_transformed):
                descriptor.type = io.type
                descriptor.qscale = 1.0
                descriptor.dims.extend(io.dims)
    for number, buffer in enumerate(network.dma_buffers()):
        direction = int(not buffer.is_input)
        message.dma_buffers.add(size=buffer.size, dir=direction)
        carried = bindings[buffer.binding]
        transform = carried.transformseq.add(kind=_COPY_DMA_BUFFER, scale=1.0, dims=buffer.dims)
        transform.type = carried.io_initial.type
        transform.copy_dma_buffer.dir = direction
        transform.copy_dma_buffer.buffer_num = number
    for shapes in network.allowed_shapes:
        entry = message.allowed_shapes.add()
        for type_, dims in shapes:
            entry.shapes.add(type=type_, dims=dims)
    return bytes(message.SerializeToString())


def parse(data: bytes) -> Network:
    """Read `networkdesc.bin`.

    Raises:
        QpcError: where the bytes are no descriptor of version 9, or contradict themselves.
    """
    message = _NetworkDescriptor()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise QpcError(f"networkdesc.bin cannot be parsed: {error}") from error
    if message.major_version != MAJOR_VERSION:
        raise QpcError(f"networkdesc.bin has version {message.major_version}, not {MAJOR_VERSION}")
    inputs = [_io(b, b.io_initial) for b in message.inputs]
    outputs = [_io(b, b.io_transformed) for b in message.outputs]
    shapes = tuple(
        tuple((s.type, tuple(s.dims)) for s in entry.shapes) for entry in message.allowed_shapes
    )
    _check(inputs + outputs, shapes)
    return Network(
        message.network_name,
        tuple(inputs),
        tuple(outputs),
        message.num_cores,
        message.batch_size,
        shapes,
    )


def _io(binding: Any, descriptor: Any) -> Io:
    return Io(binding.name, descriptor.type, tuple(descriptor.dims), binding.is_partial_allowed)


def _check(ios: List[Io], shapes: Sequence[Sequence[Any]]) -> None:
    if not ios or len({io.name for io in ios}) != len(ios):
        raise QpcError("networkdesc.bin has no bindings, or two of one name")
    if any(d < 1 for io in ios for d in io.dims):
        raise QpcError("networkdesc.bin has a binding without a size")
    if any(len(entry) != len(ios) for entry in shapes):
        raise QpcError("networkdesc.bin has a shape list of the wrong length")
