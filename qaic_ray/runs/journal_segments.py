"""The segments of a run's journal: their names, their lines, and how damage is found.

    journal/000000.jsonl, 000001.jsonl, ...      segments, of about equal size
    <CRC-32 of the JSON, 8 hex digits> <JSON>    a line; the first of a segment is its header

A header has the format, the run's id and fingerprint, and the session: each process that writes to
the folder is one, and begins a segment. Every other line is a row in full, with a short digest of
its input and how long the session had worked by then.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from pydantic import ConfigDict, TypeAdapter

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import as_object, checked, parse_json, shown
from qaic_ray.rows import Row
from qaic_ray.runs.fingerprint import Fingerprint

FORMAT = 2
MAX_OPEN_SEGMENTS = 16

BEFORE_JSON = len("01234567 ")
MAX_HEADER_BYTES = 2**20


class Place(NamedTuple):
    """Where a row's line is: its segment's number, and its first byte and size there."""

    segment: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """The first line of a segment."""

    format: int
    run: str
    session: int
    retry_errors: bool
    fingerprint: Fingerprint


@dataclass(frozen=True)
class JournalRecord:
    """The JSON of a row's line. Not `Row.to_json`, which rounds times and drops what is derived."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="constants")

    input: int
    span_s: float
    row: Row


RECORD = TypeAdapter(JournalRecord)


class RowReader:
    """Reads rows back by their place, with few files open."""

    def __init__(self, journal_folder: Path) -> None:
        self._folder = journal_folder
        self._streams: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, segment: int, offset: int) -> Row:
        """The row whose line begins there, once it has been committed.

        Raises:
            QaicRayError: the line has changed on the disk.
        """
        stream = self._stream(segment)
        stream.seek(offset)
        line = stream.readline()
        if not is_whole(line):
            raise QaicRayError(
                f"{stream.name} has changed under the run at byte {offset}: look after that disk, "
                "then resume the run."
            )
        return RECORD.validate_json(line[BEFORE_JSON:], strict=True).row

    def close(self) -> None:
        """Close the files."""
        while self._streams:
            self._streams.popitem()[1].close()

    def _stream(self, segment: int) -> BinaryIO:
        if segment in self._streams:
            self._streams.move_to_end(segment)
        else:
            if len(self._streams) == MAX_OPEN_SEGMENTS:
                self._streams.popitem(last=False)[1].close()
            self._streams[segment] = segment_path(self._folder, segment).open("rb")
        return self._streams[segment]


def read_header(path: Path) -> Header:
    """The header of a segment.

    Raises:
        UsageError: it is of another version.
        QaicRayError: it is damaged.
    """
    with path.open("rb") as stream:
        line = stream.readline(MAX_HEADER_BYTES)
    if not is_whole(line):
        raise damaged(path, 1)
    text = line[BEFORE_JSON:].decode(errors="replace")
    document = as_object(parse_json(text, str(path)), str(path))
    if document.get("format") != FORMAT:
        raise UsageError(
            f"{path} has journal format {shown(document.get('format'))}, and this version writes "
            f"{FORMAT}: resume with the version that began the run, or begin a new one."
        )
    return checked(Header, document, str(path), raises=QaicRayError)


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment, in the journal's folder."""
    return folder / f"{segment:06}.jsonl"


def line_of(json_bytes: bytes) -> bytes:
    """A line that holds this JSON object."""
    return b"%08x %s\n" % (zlib.crc32(json_bytes), json_bytes)


def row_line(row: Row, digest: int, span_s: float) -> bytes:
    """The line of a row; `digest` is of its input, `span_s` how long the session had worked."""
    record = JournalRecord(digest, round(span_s, 6), row)
    return line_of(RECORD.dump_json(record, exclude_defaults=True))


def is_whole(line: bytes) -> bool:
    """Whether a line is complete and its checksum fits."""
    if not line.endswith(b"}\n"):
        return False
    return line[:BEFORE_JSON] == b"%08x " % zlib.crc32(memoryview(line)[BEFORE_JSON:-1])


def whole_bytes(path: Path) -> int:
    """Bytes of the whole lines at the start of a segment; no whole line follows them.

    Raises:
        QaicRayError: for a damaged line that is not of the tail.
    """
    num_bytes = 0
    first = None
    with path.open("rb", buffering=2**20) as stream:
        for number, line in enumerate(stream, start=1):
            if not is_whole(line):
                first = first or number
            elif first:
                raise damaged(path, first)
            else:
                num_bytes += len(line)
    return num_bytes


def damaged(path: Path, number: int) -> QaicRayError:
    """The error for a damaged line, counted from 1."""
    what = "the file" if number == 1 else "that line"
    return QaicRayError(
        f"{path} is damaged at line {number}: delete {what}, and what it held is answered again "
        "when the run is resumed."
    )
