"""The flatbuffer in `network.elf` that tells a runtime what a program needs of a card.

The schema is our own, written from the field numbers and types of the open runtime's version 1.0.
A real program's semaphores, doorbells and threads are its compiler's; ours has none of them.
Inferred: where a DMA buffer lies in the card's shared memory, and which constants are dynamic.
"""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import flatbuffers

from . import AI100, ConstantsDesc
from .netdesc import DmaBuffer

_MAJOR_VERSION = 1
_EXEC_CONTEXT_VERSION = 4
_AI100_HARDWARE = 2
_HOST_INPUT, _HOST_OUTPUT = 100, 101
_SHARED_MEMORY = 1
_ALIGN_BYTES = 2048
_LEAST_BYTES = 1  # the vendor's writer refuses a program that needs none of a core's own memory
_MAX_32_BITS = 0xFFFFFFFF
_REQUIRED_FIELDS = ("requiredFields", "networkName")
_REQUIRED_PREFIX = "AicMetadataFlat_Metadata->"
_UNNAMED = "unnamed"


class Needs(NamedTuple):
    """What a program needs: cores of each device, DMA buffers, bytes of constants."""

    name: str
    hardware: str
    num_cores: int
    dma_buffers: Sequence[DmaBuffer]
    constants: ConstantsDesc


_Field = Tuple[int, Callable[[int, Any, int], None], int]


def serialize(needs: Needs) -> bytes:
    """The bytes of section `metadata_fb`."""
    builder = flatbuffers.Builder(1024)
    u8, u16 = builder.PrependUint8Slot, builder.PrependUint16Slot
    u32, u64 = builder.PrependUint32Slot, builder.PrependUint64Slot
    place = builder.PrependUOffsetTRelativeSlot
    all_cores = min((1 << needs.num_cores) - 1, _MAX_32_BITS)
    requests, shared_bytes = _dma_requests(builder, needs.dma_buffers)
    no_entries = _table(builder, 1, [(0, place, _vector(builder, []))])
    mappings = []
    if needs.constants.static_bytes:
        sizes: List[_Field] = [(1, u32, all_cores), (2, u32, needs.constants.static_bytes)]
        mappings = [_table(builder, 3, sizes)]
    name = builder.CreateString(needs.name or _UNNAMED)
    required = [builder.CreateString(_REQUIRED_PREFIX + field) for field in _REQUIRED_FIELDS]
    fields: List[_Field] = [
        (0, u16, _MAJOR_VERSION),
        (2, place, name),
        (3, place, _vector(builder, required)),
        (4, place, _vector(builder, [])),  # semaphores, as 32-bit words
        (5, place, builder.CreateByteVector(b"")),  # first content of a core's memory
        (6, place, _vector(builder, requests)),
        (7, place, _vector(builder, [no_entries] * needs.num_cores)),  # multicasts to cores
        (8, place, no_entries),  # multicasts from the host
        (9, place, _vector(builder, [])),  # threads
        (10, place, _vector(builder, mappings)),
        (11, u64, shared_bytes),
        (13, u64, needs.constants.static_bytes),
        (14, u64, needs.constants.dynamic_bytes),
        (18, u16, _EXEC_CONTEXT_VERSION),
        (19, u16, needs.num_cores),
        # No other hardware's number is public; a card refuses a program of another number.
        (21, u8, _AI100_HARDWARE if needs.hardware == AI100 else 0),
        (30, u32, _LEAST_BYTES),
        (31, u32, _LEAST_BYTES),
    ]
    builder.Finish(_table(builder, 34, fields))
    return bytes(builder.Output())


def _dma_requests(builder: Any, buffers: Sequence[DmaBuffer]) -> Tuple[List[int], int]:
    """Places of the requests, one a buffer, and the bytes of shared memory that they fill."""
    u8, u16 = builder.PrependUint8Slot, builder.PrependUint16Slot
    offset, places = 0, []
    for number, buffer in enumerate(buffers):
        fields: List[_Field] = [
            (3, builder.PrependUint64Slot, offset),
            (4, builder.PrependUint32Slot, buffer.size),
            (5, u16, number),
            (7, u8, _SHARED_MEMORY),
            (8, u8, 0 if buffer.is_input else 1),
            (9, u16, _HOST_INPUT if buffer.is_input else _HOST_OUTPUT),
        ]
        places.append(_table(builder, 10, fields))
        offset += buffer.size + -buffer.size % _ALIGN_BYTES
    return places, offset


def _table(builder: Any, num_fields: int, fields: Sequence[_Field]) -> int:
    builder.StartObject(num_fields)
    for slot, prepend, value in fields:
        prepend(slot, value, 0)
    return int(builder.EndObject())


def _vector(builder: Any, places: Sequence[int]) -> int:
    """A vector of tables or strings, or an empty one of anything of 32 bits."""
    builder.StartVector(4, len(places), 4)
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    return int(builder.EndVector())
