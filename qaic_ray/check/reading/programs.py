"""A programqpc.bin as facts: its table of segments and what its descriptor says, no more."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from qaic_ray.check.facts import ProgramFacts
from qaic_ray.check.reading.wire import WireError, fields
from qaic_ray.compile.compiler import QPC_FILE, program_fault

_HEADER = struct.Struct("<IBBHQQQQ")
"""Magic, version, compression, bytes of the file, base, number of segments, where they are."""
_SEGMENT = struct.Struct("<QQQQ")
"""Bytes, offset (of dynamic constants), where the name is, where the segment is."""
_MAX_SEGMENTS = 4096
_MAX_NAME_BYTES = 256
_MAX_DESCRIPTOR_BYTES = 64 * 2**20
_NUM_CORES = 7
"""The field of the network descriptor."""

NETWORK, DESCRIPTOR, CONSTANTS_DESCRIPTOR = "network.elf", "networkdesc.bin", "constantsdesc.bin"
CONSTANTS = "constants.bin"
PARTS = (NETWORK, DESCRIPTOR, CONSTANTS_DESCRIPTOR)
"""Segments without which the vendor's loader takes no program."""
_SLICE = "QAicGraph_slice"
"""Segments of a program for several devices are programs themselves, under such names."""


def read_program(folder: Path, place: str) -> ProgramFacts:
    """The facts of the program in a folder."""
    fault = program_fault(folder)
    if fault:
        return ProgramFacts(place, f"{fault}.")
    path = folder / QPC_FILE
    try:
        with path.open("rb") as file:
            return _read(file, place, path.stat().st_size)
    except OSError as error:
        return ProgramFacts(place, f"{path} cannot be read: {error.strerror}.")
    except (WireError, struct.error) as error:
        return ProgramFacts(place, f"{path.name} is damaged: {error}.")


def _read(file: BinaryIO, place: str, size: int) -> ProgramFacts:
    segments = _segments(file, 0, size)
    slices = [span for name, span in segments.items() if name.startswith(_SLICE)]
    inner = [_segments(file, start, length) for start, length in slices] or [segments]
    missing = [name for name in PARTS if any(name not in each for each in inner)]
    if missing:
        return ProgramFacts(place, f"the program has no {' and no '.join(missing)}.")
    cores = max(_num_cores(file, *each[DESCRIPTOR]) for each in inner)
    held = max(each[NETWORK][1] + each.get(CONSTANTS, (0, 0))[1] for each in inner)
    return ProgramFacts(place, "", cores, len(inner), held)


def _segments(file: BinaryIO, base: int, size: int) -> Mapping[str, tuple[int, int]]:
    """Name -> start and bytes of each segment of the container that begins at `base`."""
    file.seek(base)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise WireError("it is shorter than its header")
    _, _, _, _, total, _, count, table = _HEADER.unpack(header)
    if total > size:
        raise WireError(f"it should have {total} bytes, and has {size}")
    if count > _MAX_SEGMENTS or table + count * _SEGMENT.size > size:
        raise WireError("its table of segments lies outside of it")
    file.seek(base + table)
    rows = file.read(count * _SEGMENT.size)
    segments = {}
    for length, _, name, start in _SEGMENT.iter_unpack(rows):
        if name >= size or start + length > size:
            raise WireError("a segment lies outside of it")
        file.seek(base + name)
        text = file.read(_MAX_NAME_BYTES).partition(b"\0")[0].decode("ascii", "replace")
        segments[text] = base + start, length
    return segments


def _num_cores(file: BinaryIO, start: int, length: int) -> int:
    if length > _MAX_DESCRIPTOR_BYTES:
        raise WireError(f"its {DESCRIPTOR} has {length} bytes")
    file.seek(start)
    found = fields(file.read(length))
    return max((value for n, kind, value, _ in found if (n, kind) == (_NUM_CORES, 0)), default=0)
