"""A run's rows on disk: each durable before it is shown, and found again when the run goes on.

The truth of a run folder; `outputs.jsonl` is made from it. Knows no cards, no dispatcher, no Ray.

    journal/000000.jsonl, 000001.jsonl, ...      segments, of about equal size
    <CRC-32 of the JSON, 8 hex digits> <JSON>    a line; the first of a segment is its header

A header has the format, the run's id and fingerprint, and the session: each process that writes to
the folder is one, and begins a segment. Every other line is a row in full, with a short digest of
its input and how long the session had worked by then. Only the last segment can end in the middle
of a line; that tail is cut on opening. Damage anywhere else is an error. Whatever lines are gone,
what is left is a run to go on with: a row that is not in the journal is answered again.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ClassVar, NamedTuple

from filelock import FileLock, Timeout
from pydantic import ConfigDict, TypeAdapter, ValidationError

from qaic_ray.errors import QaicRayError, Unfinished, UsageError
from qaic_ray.fleet.fingerprint import Fingerprint, differences
from qaic_ray.folders import sync_path
from qaic_ray.interruption import uninterrupted
from qaic_ray.rows import Row

FORMAT = 1
JOURNAL_NAME = "journal"
LOCK_NAME = ".lock"
SEGMENT_BYTES = 64 * 2**20
MAX_OPEN_SEGMENTS = 16

_BEFORE_JSON = len("01234567 ")


class Place(NamedTuple):
    """Where a row's line is: its segment's number, and its first byte and size there."""

    segment: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Entry:
    """A row as the journal has it.

    `digest` is of the row's input. `session` counts the processes that wrote to the journal, and
    `span_s` is how long cards had worked in that one when the row was final.
    """

    row: Row
    digest: int
    span_s: float
    session: int
    place: Place


@dataclass(frozen=True)
class _Header:
    format: int
    run: str
    session: int
    retry_errors: bool
    fingerprint: Fingerprint


@dataclass(frozen=True)
class _Record:
    """The JSON of a row's line. Not `Row.to_json`, which rounds times and drops what is derived."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="constants")

    input: int
    span_s: float
    row: Row


_RECORD = TypeAdapter(_Record)


@contextmanager
def disk_errors_end_the_run(run_folder: Path) -> Iterator[None]:
    """Make the one sentence of what the disk refuses; the journal keeps the run resumable."""
    try:
        yield
    except OSError as error:
        raise Unfinished(
            f"{run_folder} cannot be written: {error.strerror}. What was answered is kept: put "
            f"that right, then go on with `qaic-ray run --resume {run_folder}`."
        ) from error


class RowReader:
    """Reads rows back by their place, with few files open."""

    def __init__(self, journal_folder: Path) -> None:
        self._folder = journal_folder
        self._streams: OrderedDict[int, BinaryIO] = OrderedDict()

    def read(self, segment: int, offset: int) -> Row:
        """The row whose line begins there, once it has been committed.

        Raises:
            QaicRayError: for a line that is not what it was.
        """
        stream = self._stream(segment)
        stream.seek(offset)
        line = stream.readline()
        if not _is_whole(line):
            raise QaicRayError(
                f"{stream.name} has changed under the run at byte {offset}: look after that disk, "
                "then resume the run."
            )
        return _RECORD.validate_json(line[_BEFORE_JSON:], strict=True).row

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
            self._streams[segment] = _segment_path(self._folder, segment).open("rb")
        return self._streams[segment]


class Journal:
    """The journal of a run folder, held by this process until it is closed.

    Opening makes it, or takes it up where an earlier process left it.

    Args:
        run_folder: is there.
        fingerprint: must be that of the sessions before, if there were any.
        retry_errors: rows of finish_reason error count as not answered from now on.
        segment_bytes: about how large a segment gets.

    Raises:
        UsageError: another process has it; it is of another run, or of another version.
        QaicRayError: it is damaged, or the disk refuses.
    """

    def __init__(
        self,
        run_folder: Path,
        fingerprint: Fingerprint,
        *,
        retry_errors: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._run_folder = run_folder
        self._folder = run_folder / JOURNAL_NAME
        self._segment_bytes = segment_bytes
        self._buffer: list[bytes] = []
        self._fd = -1
        self._size = 0
        self._reader = RowReader(self._folder)
        self._lock = _locked(run_folder)
        try:
            with disk_errors_end_the_run(run_folder):
                self._headers = self._recover()
                self._header = self._next_header(fingerprint, retry_errors)
                self._segment = max(self._headers, default=-1)
                self._begin_segment()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def replay(self) -> Iterator[Entry]:
        """The rows of earlier sessions, as they were appended; no row comes twice.

        Error rows from before the last session that retries them are left out.

        Raises:
            QaicRayError: for a damaged line, naming it.
        """
        headers = [*self._headers.values(), self._header]
        retried = max((header.session for header in headers if header.retry_errors), default=0)
        for segment, header in self._headers.items():
            for entry in self._entries(segment, header):
                if entry.row.ok or header.session >= retried:
                    yield entry

    def append(self, row: Row, digest: int, span_s: float) -> Place:
        """Take a row for the next `commit`; return where it will be."""
        json_bytes = _RECORD.dump_json(
            _Record(digest, round(span_s, 6), row), exclude_defaults=True
        )
        line = _line(json_bytes)
        if self._size >= self._segment_bytes:
            self.commit()
            with uninterrupted(), disk_errors_end_the_run(self._run_folder):
                self._begin_segment()
        with uninterrupted():  # the next place is behind this line
            place = Place(self._segment, self._size, len(line))
            self._buffer.append(line)
            self._size += len(line)
        return place

    def commit(self) -> None:
        """Bring every row that was appended onto the disk.

        Raises:
            QaicRayError: when the disk refuses; the journal takes nothing more.
        """
        if not self._buffer:
            return
        with uninterrupted(), disk_errors_end_the_run(self._run_folder):
            try:
                write_whole(self._fd, b"".join(self._buffer))
                os.fdatasync(self._fd)
            except BaseException:
                # A line may be half there: nothing may follow it, and nothing come twice.
                self._close_segment()
                raise
            self._buffer.clear()

    def read(self, segment: int, offset: int) -> Row:
        """A row that was committed, by this session or an earlier one; see `RowReader`."""
        return self._reader.read(segment, offset)

    def close(self) -> None:
        """Let go of the folder. What was appended and not committed is gone."""
        self._close_segment()
        self._reader.close()
        self._lock.release()

    # -- segments

    def _recover(self) -> dict[int, _Header]:
        """Cut what a killed session left half-written; return the header of each segment."""
        self._folder.mkdir(exist_ok=True)
        segments = sorted(int(path.stem) for path in self._folder.glob("*.jsonl"))
        if segments:
            path = _segment_path(self._folder, segments[-1])
            num_bytes = _whole_bytes(path)
            if num_bytes == 0:
                path.unlink()
                sync_path(self._folder)
                segments.pop()
            elif num_bytes < path.stat().st_size:
                os.truncate(path, num_bytes)
                sync_path(path)
        return {segment: self._read_header(segment) for segment in segments}

    def _read_header(self, segment: int) -> _Header:
        path = _segment_path(self._folder, segment)
        with path.open("rb") as stream:
            line = stream.readline()
        if not _is_whole(line):
            raise _damaged(path, 1)
        document = json.loads(line[_BEFORE_JSON:])
        if document["format"] != FORMAT:
            raise UsageError(
                f"{path} has journal format {document['format']}, and this version writes "
                f"{FORMAT}: resume the run with the version that began it, or begin a new one."
            )
        return _Header(**document)

    def _next_header(self, fingerprint: Fingerprint, retry_errors: bool) -> _Header:
        headers = list(self._headers.values())
        if not headers:
            return _Header(FORMAT, secrets.token_hex(8), 0, retry_errors, fingerprint)
        first = headers[0]
        if any(header.run != first.run for header in headers):
            raise UsageError(
                f"{self._folder} holds segments of several runs: take out those of all but one."
            )
        if changes := differences(first.fingerprint, fingerprint):
            raise UsageError(
                f"The run in {self._run_folder} cannot go on: {', '.join(changes)}. Resume it as "
                "it was begun, or begin a new run."
            )
        session = headers[-1].session + 1
        return _Header(FORMAT, first.run, session, retry_errors, first.fingerprint)

    def _begin_segment(self) -> None:
        """The next segment, its header on the disk."""
        self._close_segment()
        self._segment += 1
        path = _segment_path(self._folder, self._segment)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        header = _line(json.dumps(asdict(self._header)).encode())
        write_whole(self._fd, header)
        os.fsync(self._fd)
        sync_path(self._folder)
        self._size = len(header)

    def _close_segment(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _entries(self, segment: int, header: _Header) -> Iterator[Entry]:
        path = _segment_path(self._folder, segment)
        with path.open("rb", buffering=2**20) as stream:
            offset = len(stream.readline())
            for number, line in enumerate(stream, start=2):
                if not _is_whole(line):
                    raise _damaged(path, number)
                try:
                    record = _RECORD.validate_json(line[_BEFORE_JSON:], strict=True)
                except ValidationError as error:
                    raise _damaged(path, number) from error
                place = Place(segment, offset, len(line))
                yield Entry(record.row, record.input, record.span_s, header.session, place)
                offset += len(line)


def _segment_path(folder: Path, segment: int) -> Path:
    return folder / f"{segment:06}.jsonl"


def _line(json_bytes: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(json_bytes), json_bytes)


def _is_whole(line: bytes) -> bool:
    if not line.endswith(b"}\n"):
        return False
    return line[:_BEFORE_JSON] == b"%08x " % zlib.crc32(memoryview(line)[_BEFORE_JSON:-1])


def _whole_bytes(path: Path) -> int:
    """How much of a segment is whole lines, from its start; after the end of those there is none.

    Raises:
        QaicRayError: for a damaged line that is not of the tail.
    """
    num_bytes = 0
    damaged = None
    with path.open("rb", buffering=2**20) as stream:
        for number, line in enumerate(stream, start=1):
            if not _is_whole(line):
                damaged = damaged or number
            elif damaged:
                raise _damaged(path, damaged)
            else:
                num_bytes += len(line)
    return num_bytes


def _damaged(path: Path, number: int) -> QaicRayError:
    what = "the file" if number == 1 else "that line"
    return QaicRayError(
        f"{path} is damaged at line {number}: delete {what}, and what it held is answered again "
        "when the run is resumed."
    )


def write_whole(fd: int, data: bytes) -> None:
    """Write all of it; an error may leave some of it there."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _locked(run_folder: Path) -> FileLock:
    """The run folder's lock; the system frees it when this process ends, however it ends."""
    lock = FileLock(run_folder / LOCK_NAME)
    with disk_errors_end_the_run(run_folder):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"Another process is writing to {run_folder}: wait for it to end, or stop it."
            ) from error
    return lock
