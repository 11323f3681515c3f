"""The QPC container, `programqpc.bin`: a header, a table of named segments, and their bytes.

`docs/emulated-sdk/formats.md` has the layout. Covered: everything that the open runtime's readers
need. Inferred: which bytes `metadata.crc` is of, and the content of `mdp_meta_info`. Not covered:
`network.elf` is not machine code for a card; it is an ELF for no machine, so a card refuses it.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any, BinaryIO, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..documents import Refusal

MAGIC = 0x00A1CD7C
AI100 = "ai100"
"""The hardware that emulated cards are, as the compiler names it."""
FILE_NAME = "programqpc.bin"
NETWORK = "network.elf"
NETWORK_DESC = "networkdesc.bin"
CONSTANTS_DESC = "constantsdesc.bin"
CONSTANTS = "constants.bin"
MDP_META_INFO = "mdp_meta_info"
METADATA_CRC = "metadata.crc"
METADATA_FB_CRC = "metadata_fb.crc"
NETWORK_CRC = "network.elf.crc"
CONSTANTS_CRC = "constants.bin.crc"
INTEGRITY = "qaic_emulator.crc"
"""CRC-32 of each other segment, in table order; no other compiler writes it."""

SEGMENTS = (CONSTANTS, NETWORK, NETWORK_DESC, CONSTANTS_DESC)
"""What a compiler writes; the checksums follow them, and `MDP_META_INFO` for several devices."""

CHECKSUMS = (METADATA_CRC, METADATA_FB_CRC, NETWORK_CRC, CONSTANTS_CRC, INTEGRITY)

_HEADER = struct.Struct("<IBBHQQQQ")
_SEGMENT = struct.Struct("<QQQQ")
_CONSTANTS_DESC = struct.Struct("<QQBB6x")
_SLOWPATH = 1
_PAGE_BYTES = 4096
_ALIGN_BYTES = 64
_MAX_STATIC_BYTES = 0xFFFFF000
_MAX_SEGMENTS = 64
_MAX_NAME_BYTES = 256


class QpcError(Refusal):
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


class ConstantsDesc(NamedTuple):
    """`constantsdesc.bin`: bytes of `constants.bin` that are mapped at once, and those after."""

    static_bytes: int
    dynamic_bytes: int

    @classmethod
    def of(cls, size: int) -> ConstantsDesc:
        """That of `size` bytes: what a core's table of mappings can say in 32 bits is static."""
        static = min(size, _MAX_STATIC_BYTES)
        return cls(static, size - static)

    def pack(self) -> bytes:
        """The segment: two sizes of 64 bits, and no error correction."""
        return _CONSTANTS_DESC.pack(*self, 0, 0)

    @classmethod
    def parse(cls, data: bytes) -> ConstantsDesc:
        """Read the segment; QpcError where it has another length."""
        if len(data) != _CONSTANTS_DESC.size:
            raise QpcError(f"{CONSTANTS_DESC} has {len(data)} bytes, not {_CONSTANTS_DESC.size}")
        return cls(*_CONSTANTS_DESC.unpack(data)[:2])


class QpcWriter:
    """Writes a container from front to back; `constants.bin` may be streamed, it comes first.

    The header is written last, so a file that was cut short is no QPC. `segments` are the names of
    what is written, `SEGMENTS` and those for several devices.
    """

    def __init__(self, file: BinaryIO, segments: Sequence[str] = SEGMENTS) -> None:
        self._file = file
        self._order = (*segments, *CHECKSUMS)
        self._segments: List[Segment] = []
        self._crcs: List[int] = []
        names = b"".join(name.encode() + b"\0" for name in self._order)
        self._table = _HEADER.size
        self._names = self._table + _SEGMENT.size * len(self._order)
        file.seek(0)
        file.write(b"\0" * self._names + names)
        self._begin(_PAGE_BYTES)

    def _begin(self, alignment: int) -> None:
        position = self._file.tell()
        self._file.write(b"\0" * (-position % alignment))
        self._start = self._file.tell()
        self._crc = 0

    def write(self, data: Any) -> int:
        """Append bytes (or an array) to the open segment; returns where they start in it."""
        offset = self.size()
        view = memoryview(data).cast("B") if len(data) else b""
        self._crc = zlib.crc32(view, self._crc)
        self._file.write(view)
        return offset

    def open_segment(self) -> Any:
        """What was written to the open segment, memory-mapped."""
        self._file.flush()
        return np.memmap(self._file.name, np.uint8, "r", self._start)

    def size(self) -> int:
        """Bytes that the open segment has so far."""
        return self._file.tell() - self._start

    def align(self, num_bytes: int) -> None:
        """Pad the open segment with zeros, so that the next write starts aligned."""
        self.write(b"\0" * (-self.size() % num_bytes))

    def end_segment(self) -> None:
        """Close the open segment and open the next."""
        is_constants = self._order[len(self._segments)] == CONSTANTS
        static_bytes = ConstantsDesc.of(self.size()).static_bytes if is_constants else 0
        self._segments.append(Segment(self._start, self.size(), static_bytes))
        self._crcs.append(self._crc)
        self._begin(_ALIGN_BYTES)

    def finish(self, metadata_crc: int) -> None:
        """Write the checksums and the header, and push the file to disk.

        `metadata_crc` is the CRC-32 of the section `metadata_fb` of `network.elf`.
        """
        if len(self._segments) != len(self._order) - len(CHECKSUMS):
            raise QpcError(f"a program has {len(self._order)} segments")
        by_name = dict(zip(self._order, self._crcs))
        for crc in (metadata_crc, metadata_crc, by_name[NETWORK], by_name[CONSTANTS]):
            self.write(_pack_crcs([crc]))
            self.end_segment()
        self.write(_pack_crcs(self._crcs))
        self.end_segment()
        total = self._segments[-1].start + self._segments[-1].size
        self._file.truncate(total)
        self._file.seek(0)
        count = len(self._order)
        self._file.write(_HEADER.pack(MAGIC, 0, 1, _SLOWPATH, total, 0, count, self._table))
        name_start = self._names
        for name, segment in zip(self._order, self._segments):
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
        """Compare segments with the checksums that our compiler wrote.

        Raises:
            QpcError: naming the first segment whose bytes are not those that were written.
        """
        stored = bytes(self.segment(INTEGRITY))
        order = [name for name in self.segments if name != INTEGRITY]
        if len(stored) != 4 * len(order):
            raise QpcError(f"{self.path} has a damaged {INTEGRITY}")
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
