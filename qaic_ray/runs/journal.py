"""A run's rows on disk: written there before they are shown, and read when the run is resumed.

`outputs.jsonl` is made from the journal; `journal_segments.py` has its format. Only the last
segment can end in the middle of a line, which is cut off on opening. Damage anywhere else is an
error. A row that is not in the journal is answered again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from qaic_ray.errors import QaicRayError, Unfinished, UsageError
from qaic_ray.files.documents import differences, read_object
from qaic_ray.files.folders import sync_path
from qaic_ray.interruption import uninterrupted
from qaic_ray.rows import Row
from qaic_ray.runs.fingerprint import INPUT, Fingerprint
from qaic_ray.runs.journal_segments import (
    BEFORE_JSON,
    FORMAT,
    RECORD,
    Header,
    Place,
    RowReader,
    damaged,
    is_whole,
    line_of,
    read_header,
    row_line,
    segment_path,
    whole_bytes,
)
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

JOURNAL_NAME = "journal"
LOCK_NAME = ".lock"
REPORT_NAME = "report.json"
SEGMENT_BYTES = 64 * 2**20
LOOKED_AT_S = 0.2
"""Who only looks whether a run is going on (`inspect/holder.py`) holds its lock for an instant."""

_MAX_NAMED_CHARS = 800
_SEGMENT = re.compile("[0-9]{6,12}")
_ROW_INDEX = re.compile(rb'"row":\{"index":(\d+)')


@dataclass(frozen=True)
class Entry:
    """A row as the journal has it.

    `digest` is of the row's input. `session` is the number of the process that wrote it, and
    `span_s` is how long cards had worked in that session when the row was final.
    """

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
        self._reader = RowReader(self._folder)
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
        line = row_line(row, digest, span_s)
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
        """A row that was committed, by this session or an earlier one; see `RowReader`."""
        return self._reader.read(segment, offset)

    def close(self) -> None:
        """Release the folder. What was appended and not committed is lost."""
        self._close_segment()
        self._reader.close()
        self._lock.release()

    # -- segments

    def _recover(self) -> dict[int, Header]:
        """Cut what a killed session left half-written; return the header of each segment."""
        self._folder.mkdir(exist_ok=True)
        stems = (path.stem for path in self._folder.glob("*.jsonl"))
        segments = sorted(int(stem) for stem in stems if _SEGMENT.fullmatch(stem))
        if segments:
            path = segment_path(self._folder, segments[-1])
            num_bytes = whole_bytes(path)
            if num_bytes == 0:
                path.unlink()
                sync_path(self._folder)
                segments.pop()
            elif num_bytes < path.stat().st_size:
                os.truncate(path, num_bytes)
                sync_path(path)
        return {segment: read_header(segment_path(self._folder, segment)) for segment in segments}

    def _next_header(self, fingerprint: Fingerprint, retry_errors: bool, new_input: bool) -> Header:
        headers = list(self._headers.values())
        if not headers:
            return Header(FORMAT, secrets.token_hex(8), 0, retry_errors, fingerprint)
        first, last = headers[0], headers[-1]
        if any(header.run != first.run for header in headers):
            raise UsageError(
                f"{self._folder} holds segments of several runs: take out those of all but one."
            )
        before = last.fingerprint
        if new_input:
            before = {**before, INPUT: fingerprint[INPUT]}
        if named := ", ".join(differences(before, fingerprint))[:_MAX_NAMED_CHARS]:
            raise UsageError(
                f"The run in {self._run_folder} cannot go on: {named}. Resume it as it was begun "
                "(other prompts are given with --prompts-file), or begin a new run."
            )
        return Header(FORMAT, first.run, last.session + 1, retry_errors, fingerprint)

    def _begin_segment(self) -> None:
        """The next segment, its header on the disk."""
        self._close_segment()
        self._segment += 1
        path = segment_path(self._folder, self._segment)
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
        path = segment_path(self._folder, segment)
        with path.open("rb", buffering=2**20) as stream:
            offset = len(stream.readline())
            for number, line in enumerate(stream, start=2):
                if not is_whole(line):
                    raise damaged(path, number)
                try:
                    record = RECORD.validate_json(line[BEFORE_JSON:], strict=True)
                except ValidationError as error:
                    raise damaged(path, number) from error
                place = Place(segment, offset, len(line))
                yield Entry(record.row, record.input, record.span_s, header.session, place)
                offset += len(line)


def last_fingerprint(run_folder: Path) -> Fingerprint | None:
    """That of a run's last session; None where no session has begun a segment.

    Raises:
        UsageError: the journal is of another version.
        QaicRayError: it is damaged.
    """
    with disk_errors_end_the_run(run_folder):
        for path in sorted((run_folder / JOURNAL_NAME).glob("*.jsonl"), reverse=True):
            if whole_bytes(path):
                return read_header(path).fingerprint
    return None


def safe_rows(run_folder: Path) -> int:
    """How many rows of the input a run folder's journal has an answer for."""
    indexes = set()
    for path in sorted((run_folder / JOURNAL_NAME).glob("*.jsonl")):
        with path.open("rb", buffering=2**20) as stream:
            for line in stream:
                found = _ROW_INDEX.search(line)
                if found and line.endswith(b"\n"):
                    indexes.add(int(found[1]))
    return len(indexes)


def is_finished(run_folder: Path) -> bool:
    """Whether a run is done: it has a report that does not say that it can be resumed."""
    try:
        return read_object(run_folder / REPORT_NAME)["goes_on"] is False
    except (UsageError, KeyError):
        return False


def last_unfinished(output: Path, request_name: str, job: str = "") -> Path | None:
    """The newest run in `output` that can be resumed; None if there is none.

    Args:
        output: the folder of run folders.
        request_name: the file by which a run folder is known; written when the run begins.
        job: only runs of this job.
    """
    for folder in _newest_first(output, request_name, job):
        if not (is_finished(folder) or _is_held(folder)):
            return folder
    return None


def _newest_first(output: Path, request_name: str, job: str) -> Iterator[Path]:
    begun = []
    for request in output.glob(f"*/{request_name}"):
        with suppress(OSError):  # it is being removed just now
            begun.append((request.stat().st_mtime_ns, request.parent))
    for _, folder in sorted(begun, reverse=True):
        if not job or folder.name.startswith(f"{job}-"):
            yield folder


def _is_held(folder: Path) -> bool:
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
    lock = FileLock(run_folder / LOCK_NAME)
    with disk_errors_end_the_run(run_folder):
        try:
            lock.acquire(timeout=LOOKED_AT_S, poll_interval=LOOKED_AT_S / 10)
        except Timeout as error:
            raise UsageError(
                f"Another process is writing to {run_folder}: wait for it to end, or stop it."
            ) from error
    return lock
