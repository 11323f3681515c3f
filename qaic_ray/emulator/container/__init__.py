"""The QPC container, `programqpc.bin`: a header, a table of named segments, and their bytes.

`docs/emulated-sdk/formats.md` has the layout. Covered: everything that a reader of the container
needs. Inferred: the content of `constantsdesc.bin` and `metadata.crc`. Not covered: `network.elf`
is not machine code for a card; it carries our own magic, so that a card's loader refuses it.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any, BinaryIO, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

MAGIC = 0x00A1CD7C
AI100 = "ai100"
"""The hardware that emulated cards are, as the compiler names it."""
FILE_NAME = "programqpc.bin"
NETWORK = "network.elf"
NETWORK_DESC = "networkdesc.bin"
CONSTANTS_DESC = "constantsdesc.bin"
CONSTANTS = "constants.bin"
CRC = "metadata.crc"
SEGMENTS = (CONSTANTS, NETWORK, NETWORK_DESC, CONSTANTS_DESC, CRC)

_HEADER = struct.Struct("<IBBHQQQQ")
_SEGMENT = struct.Struct("<QQQQ")
_SLOWPATH = 1
_PAGE_BYTES = 4096
_MAX_SEGMENTS = 64
_MAX_NAME_BYTES = 256


class QpcError(Exception):
    """Not a QPC, a damaged one, or one of a form that this SDK does not run."""


class Segment(NamedTuple):
    """Where a segment's bytes are in the file."""

    start: int
    size: int
    offset: int


def program_path(path: str) -> str:
    """The container's file, for a QPC folder or for the file itself."""
    return os.path.join(path, FILE_NAME) if os.path.isdir(path) else path


def _pack_crcs(crcs: Sequence[int]) -> bytes:
    return np.array(crcs, "<u4").tobytes()


class QpcWriter:
    """Writes a container from front to back; `constants.bin` may be streamed, it comes first.

    The header is written last, so a file that was cut short is no QPC.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._segments: List[Segment] = []
        self._crcs: List[int] = []
        names = b"".join(name.encode() + b"\0" for name in SEGMENTS)
        self._table = _HEADER.size
        self._names = self._table + _SEGMENT.size * len(SEGMENTS)
        file.seek(0)
        file.write(b"\0" * self._names + names)
        self._begin()

    def _begin(self) -> None:
        position = self._file.tell()
        self._file.write(b"\0" * (-position % _PAGE_BYTES))
        self._start = self._file.tell()
        self._crc = 0

    def write(self, data: Any) -> int:
        """Append bytes (or an array) to the open segment; returns where they start in it."""
        offset = self._file.tell() - self._start
        view = memoryview(data).cast("B") if len(data) else b""
        self._crc = zlib.crc32(view, self._crc)
        self._file.write(view)
        return offset

    def open_segment(self) -> Any:
        """What was written to the open segment, memory-mapped."""
        self._file.flush()
        return np.memmap(self._file.name, np.uint8, "r", self._start)

    def align(self, num_bytes: int) -> None:
        """Pad the open segment with zeros, so that the next write starts aligned."""
        self.write(b"\0" * (-(self._file.tell() - self._start) % num_bytes))

    def end_segment(self) -> int:
        """Close the open segment, open the next; returns the closed one's size in bytes."""
        size = self._file.tell() - self._start
        is_constants = SEGMENTS[len(self._segments)] == CONSTANTS
        self._segments.append(Segment(self._start, size, size if is_constants else 0))
        self._crcs.append(self._crc)
        self._begin()
        return size

    def finish(self) -> None:
        """Write the CRC segment and the header, and push the file to disk."""
        self.write(_pack_crcs(self._crcs))
        self.end_segment()
        if len(self._segments) != len(SEGMENTS):
            raise QpcError(f"a program has {len(SEGMENTS)} segments")
        total = self._segments[-1].start + self._segments[-1].size
        self._file.truncate(total)
        self._file.seek(0)
        self._file.write(_HEADER.pack(MAGIC, 0, 1, _SLOWPATH, total, 0, len(SEGMENTS), self._table))
        name_start = self._names
        for name, segment in zip(SEGMENTS, self._segments):
            self._file.write(_SEGMENT.pack(segment.size, segment.offset, name_start, segment.start))
            name_start += len(name) + 1
        self._file.flush()
        os.fsync(self._file.fileno())


class Container:
    """A container's table, checked; segments are memory-mapped, never read ahead.

    Raises:
        QpcError: on anything that is not a whole, well-formed container.
    """

    def __init__(self, path: str) -> None:
        self.path = program_path(path)
        try:
            with open(self.path, "rb") as file:
                self.size_bytes = os.fstat(file.fileno()).st_size
                self.segments = _read_table(file, self.size_bytes)
        except OSError as error:
            raise QpcError(f"Failed to open file {self.path} ({error.strerror})") from error

    def segment(self, name: str) -> Any:
        """Bytes of a segment as a read-only array over the file."""
        if name not in self.segments:
            raise QpcError(f"{self.path} has no segment {name}")
        segment = self.segments[name]
        if segment.size == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", segment.start, (segment.size,))

    def check(self, names: Sequence[str]) -> None:
        """Compare segments with their checksums.

        Raises:
            QpcError: naming the first segment whose bytes are not those that were written.
        """
        stored = bytes(self.segment(CRC))
        order = [name for name in self.segments if name != CRC]
        if len(stored) != 4 * len(order):
            raise QpcError(f"{self.path} has a damaged {CRC}")
        crcs = dict(zip(order, np.frombuffer(stored, "<u4").tolist()))
        for name in names:
            if zlib.crc32(self.segment(name)) != crcs.get(name):
                raise QpcError(f"CRC mismatch in segment {name} of {self.path}")


def _read_table(file: BinaryIO, size: int) -> Dict[str, Segment]:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise QpcError("the file is too short")
    magic, major, _, compression, total, base, count, table = _HEADER.unpack(header)
    if magic != MAGIC:
        raise QpcError(f"Invalid magic number 0x{magic:08X}")
    if major != 0 or compression != _SLOWPATH or base != 0:
        raise QpcError("unsupported version or compression")
    if total != size:
        raise QpcError(f"the header says {total} bytes, the file has {size}")
    if count > _MAX_SEGMENTS or table + count * _SEGMENT.size > size:
        raise QpcError("bad segment table")
    file.seek(table)
    rows = file.read(count * _SEGMENT.size)
    segments: Dict[str, Segment] = {}
    for segment_bytes, offset, name_start, start in _SEGMENT.iter_unpack(rows):
        if start + segment_bytes > size or offset > segment_bytes or name_start >= size:
            raise QpcError("a segment lies outside of the file")
        segments[_read_name(file, name_start)] = Segment(start, segment_bytes, offset)
    if len(segments) != count:
        raise QpcError("two segments have one name")
    return segments


def _read_name(file: BinaryIO, start: int) -> str:
    file.seek(start)
    name, end, _ = file.read(_MAX_NAME_BYTES).partition(b"\0")
    if not end or not name.isascii():
        raise QpcError("a segment has no readable name")
    return name.decode("ascii")


def read_qpc(path: str) -> Tuple[str, Dict[str, bytes]]:
    """File path and whole segments of a container; for tools, not for running."""
    container = Container(path)
    return container.path, {n: bytes(container.segment(n)) for n in container.segments}
