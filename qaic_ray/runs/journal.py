"""A run's rows on disk: written before they are shown, and read when the run is resumed.

    journal/000000.jsonl, 000001.jsonl, ...      segments, of about equal size
    <CRC-32 of the JSON, 8 hex digits> <JSON>    a line; the first of a segment is its header

A header has the format, the run's id and fingerprint, and the session: each process that writes to
the folder is one, and begins a segment. Every other line is a row in full, with a short digest of
its input and how long the session had worked by then. Only the last segment can end within a line,
which is cut off on opening; other damage is an error. A row not here is answered again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from filelock import FileLock, Timeout
from pydantic import ConfigDict, TypeAdapter, ValidationError

from qaic_ray.errors import QaicRayError, Unfinished, UsageError
from qaic_ray.files.documents import as_object, checked, differences, parse_json, shown
from qaic_ray.files.folders import sync_path
from qaic_ray.interruption import uninterrupted
from qaic_ray.rows import Row
from qaic_ray.runs.intake import INPUT, Fingerprint
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

FORMAT = 2
JOURNAL_NAME = "journal"
LOCK_NAME = ".lock"
SEGMENT_BYTES = 64 * 2**20
MAX_OPEN_SEGMENTS = 16

BEFORE_JSON = len("01234567 ")
MAX_HEADER_BYTES = 2**26  # it names every file of the input
_MAX_NAMED_CHARS = 800
_SEGMENT = re.compile("[0-9]{6,12}")
_ROW_INDEX = re.compile(rb'"row":\{"index":(\d+)')


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


@dataclass(frozen=True)
class Entry:
    """A row as the journal has it: with the digest of its input, the number of the session that
    wrote it, and how long cards had worked in that session by then."""

    row: Row
    digest: int
    span_s: float
    session: int
    place: Place


@contextmanager
def disk_errors_end_the_run(run_folder: Path) -> Iterator[None]:
    """Raise one sentence for what the disk refuses; the run can be resumed by its journal."""
    try:
        yield
    except OSError as error:
        raise Unfinished(
            f"{run_folder} cannot be written: {error.strerror}. What was answered is kept: put "
            f"that right, then go on with `qaic-ray run --resume {run_folder}`."
        ) from error


class Journal(AbstractContextManager["Journal"]):
    """The journal of a run folder, held by this process until it is closed.

    Opening creates it, or continues it where an earlier process left it.

    Args:
        run_folder: is there.
        fingerprint: must be that of the session before, if there was one.
        retry_errors: rows of finish_reason error count as not answered from now on.
        new_input: the input may be another one; `Intake` sees that its answered rows are the same.
        segment_bytes: about how large a segment gets.
        commit_s: rows are to be gathered so long before `commit`; see `Timeouts`.

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
        new_input: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        commit_s: float = DEFAULT_TIMEOUTS.commit_s,
    ) -> None:
        self.commit_s = commit_s
        self._run_folder = run_folder
        self._folder = run_folder / JOURNAL_NAME
        self._segment_bytes = segment_bytes
        self._buffer: list[bytes] = []
        self._fd = -1
        self._size = 0
        self._streams: dict[int, BinaryIO] = {}  # open for `read`, the last one used last
        self._lock = _locked(run_folder)
        try:
            with disk_errors_end_the_run(run_folder):
                self._headers = self._recover()
                self._header = self._next_header(fingerprint, retry_errors, new_input)
                self._segment = max(self._headers, default=-1)
                self._begin_segment()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
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
        record = JournalRecord(digest, round(span_s, 6), row)
        line = line_of(RECORD.dump_json(record, exclude_defaults=True))
        with uninterrupted():  # the next place is behind this line
            if self._size >= self._segment_bytes:
                self.commit()
                with disk_errors_end_the_run(self._run_folder):
                    self._begin_segment()
            place = Place(self._segment, self._size, len(line))
            self._buffer.append(line)
            self._size += len(line)
        return place

    def commit(self) -> None:
        """Write every row that was appended to the disk.

        Raises:
            QaicRayError: when the disk refuses; the journal takes nothing more.
        """
        if not self._buffer:
            return
        with uninterrupted(), disk_errors_end_the_run(self._run_folder):
            try:
                write_all(self._fd, b"".join(self._buffer))
                os.fdatasync(self._fd)
            except BaseException:
                # A line may be half there: nothing may follow it, and nothing come twice.
                self._close_segment()
                raise
            self._buffer.clear()

    def read(self, segment: int, offset: int) -> Row:
        """A row that was committed, by this session or an earlier one; unchanged, or an error."""
        stream = self._streams.pop(segment, None) or _path(self._folder, segment).open("rb")
        self._streams[segment] = stream
        if len(self._streams) > MAX_OPEN_SEGMENTS:
            self._streams.pop(next(iter(self._streams))).close()
        stream.seek(offset)
        line = stream.readline()
        if not is_whole(line):
            raise QaicRayError(
                f"{stream.name} has changed under the run at byte {offset}: look after that disk, "
                "then resume the run."
            )
        return RECORD.validate_json(line[BEFORE_JSON:], strict=True).row

    def close(self) -> None:
        """Release the folder. What was appended and not committed is lost."""
        self._close_segment()
        for stream in self._streams.values():
            stream.close()
        self._lock.release()

    # -- segments

    def _recover(self) -> dict[int, Header]:
        """Cut what a killed session left half-written; return the header of each segment."""
        self._folder.mkdir(exist_ok=True)
        stems = (path.stem for path in self._folder.glob("*.jsonl"))
        segments = sorted(int(stem) for stem in stems if _SEGMENT.fullmatch(stem))
        if segments:
            path = _path(self._folder, segments[-1])
            num_bytes = _whole_bytes(path)
            if num_bytes == 0:
                path.unlink()
                sync_path(self._folder)
                segments.pop()
            elif num_bytes < path.stat().st_size:
                os.truncate(path, num_bytes)
                sync_path(path)
        return {segment: read_header(_path(self._folder, segment)) for segment in segments}

    def _next_header(self, fingerprint: Fingerprint, retry_errors: bool, new_input: bool) -> Header:
        headers = list(self._headers.values())
        if not headers:
            return Header(FORMAT, secrets.token_hex(8), 0, retry_errors, fingerprint)
        last = headers[-1]
        if any(header.run != last.run for header in headers):
            raise UsageError(
                f"{self._folder} holds segments of several runs: take out those of all but one."
            )
        before = last.fingerprint
        if new_input:
            before = {**before, INPUT: fingerprint[INPUT]}
        if named := ", ".join(differences(before, fingerprint))[:_MAX_NAMED_CHARS]:
            raise UsageError(
                f"The run in {self._run_folder} cannot go on: {named}. Resume it as it was begun "
                "(other prompts are given with --input), or begin a new run."
            )
        return Header(FORMAT, last.run, last.session + 1, retry_errors, fingerprint)

    def _begin_segment(self) -> None:
        """The next segment, its header on the disk."""
        self._close_segment()
        self._segment += 1
        path = _path(self._folder, self._segment)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        header = line_of(json.dumps(asdict(self._header)).encode())
        write_all(self._fd, header)
        os.fsync(self._fd)
        sync_path(self._folder)
        self._size = len(header)

    def _close_segment(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _entries(self, segment: int, header: Header) -> Iterator[Entry]:
        path = _path(self._folder, segment)
        with path.open("rb", buffering=2**20) as stream:
            offset = len(stream.readline())
            for number, line in enumerate(stream, start=2):
                if not is_whole(line):
                    raise _damaged(path, number)
                try:
                    record = RECORD.validate_json(line[BEFORE_JSON:], strict=True)
                except ValidationError as error:
                    raise _damaged(path, number) from error
                place = Place(segment, offset, len(line))
                yield Entry(record.row, record.input, record.span_s, header.session, place)
                offset += len(line)


def last_fingerprint(run_folder: Path) -> Fingerprint | None:
    """That of a run's last session; None where no session has begun a segment.

    Raises:
        QaicRayError: the journal is damaged, or of another version.
    """
    with disk_errors_end_the_run(run_folder):
        for path in sorted((run_folder / JOURNAL_NAME).glob("*.jsonl"), reverse=True):
            if _whole_bytes(path):
                return read_header(path).fingerprint
    return None


def safe_rows(run_folder: Path) -> int:
    """How many rows of the input a run folder's journal has an answer for."""
    indexes: set[int] = set()
    for path in (run_folder / JOURNAL_NAME).glob("*.jsonl"):
        with path.open("rb", buffering=2**20) as stream:
            found = (_ROW_INDEX.search(line) for line in stream if line.endswith(b"\n"))
            indexes.update(int(match[1]) for match in found if match)
    return len(indexes)


def read_header(path: Path) -> Header:
    """The header of a segment; an error where it is damaged, or of another version."""
    with path.open("rb") as stream:
        line = stream.readline(MAX_HEADER_BYTES)
    if not is_whole(line):
        raise _damaged(path, 1)
    text = line[BEFORE_JSON:].decode(errors="replace")
    document = as_object(parse_json(text, str(path)), str(path))
    if document.get("format") != FORMAT:
        raise UsageError(
            f"{path} has journal format {shown(document.get('format'))}, and this version writes "
            f"{FORMAT}: resume with the version that began the run, or begin a new one."
        )
    return checked(Header, document, str(path), raises=QaicRayError)


def _path(folder: Path, segment: int) -> Path:
    return folder / f"{segment:06}.jsonl"


def line_of(json_bytes: bytes) -> bytes:
    """A line that holds this JSON object."""
    return b"%08x %s\n" % (zlib.crc32(json_bytes), json_bytes)


def is_whole(line: bytes) -> bool:
    """Whether a line is complete and its checksum fits."""
    checksum = b"%08x " % zlib.crc32(memoryview(line)[BEFORE_JSON:-1])
    return line.endswith(b"}\n") and line.startswith(checksum)


def _whole_bytes(path: Path) -> int:
    """Bytes of the whole lines at the start of a segment; a whole line behind others is damage."""
    num_bytes, first = 0, 0
    with path.open("rb", buffering=2**20) as stream:
        for number, line in enumerate(stream, start=1):
            if not is_whole(line):
                first = first or number
            elif first:
                raise _damaged(path, first)
            else:
                num_bytes += len(line)
    return num_bytes


def _damaged(path: Path, number: int) -> QaicRayError:
    what = "the file" if number == 1 else "that line"
    return QaicRayError(
        f"{path} is damaged at line {number}: delete {what}, and what it held is answered again "
        "when the run is resumed."
    )


def is_held(folder: Path) -> bool:
    """Whether another process holds the folder's lock."""
    try:
        with FileLock(folder / LOCK_NAME, timeout=0):
            return False
    except Timeout:
        return True
    except OSError as error:
        raise QaicRayError(f"{folder} cannot be looked at: {error.strerror}.") from error


def write_all(fd: int, data: bytes) -> None:
    """Write all of it; an error may leave some of it there."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _locked(run_folder: Path) -> FileLock:
    """The run folder's lock; the system frees it when this process ends, however it ends."""
    lock = FileLock(run_folder / LOCK_NAME, thread_local=False)  # any thread may close it
    with disk_errors_end_the_run(run_folder):
        try:
            lock.acquire(timeout=DEFAULT_TIMEOUTS.looked_at_s, poll_interval=0.02)
        except Timeout as error:
            raise UsageError(
                f"Another process is writing to {run_folder}: wait for it to end, or stop it."
            ) from error
    return lock
