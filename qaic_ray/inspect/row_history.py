"""What a run's journal has of one row of the input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qaic_ray.errors import UsageError
from qaic_ray.rows import Row
from qaic_ray.runs.journal import (
    BEFORE_JSON,
    JOURNAL_NAME,
    MAX_HEADER_BYTES,
    RECORD,
    is_whole,
    read_header,
    safe_rows,
)


@dataclass(frozen=True)
class RowRecord:
    """A row as one session of the run ended it.

    Attributes:
        row: with its answer or error.
        digest: of its input.
        session: the number of the process that had it, from 0.
        at_s: for how long cards had worked in that session when it ended.
        is_final: False for an error that a later session tries again.
    """

    row: Row
    digest: int
    session: int
    at_s: float
    is_final: bool


def row_history(run_folder: Path, which: str) -> list[RowRecord]:
    """All that a run's sessions have recorded of one row, the last one last.

    Args:
        run_folder: the run's.
        which: the row's index from 0, or else its id.

    Raises:
        UsageError: there is no such row in the journal.
        QaicRayError: the journal is of another version, or damaged.
    """
    found = _by_index(run_folder, int(which)) if which.isdecimal() and len(which) < 19 else []
    found = found or _by_id(run_folder, which)
    if not found:
        rows = safe_rows(run_folder)
        raise UsageError(
            f"{run_folder} has no answer to row {which[:80]}: {rows:,} rows are answered. Give an "
            "index from 0, or the id that the input gives it."
        )
    retried = _last_retry(run_folder)
    return [
        RowRecord(row, digest, session, at_s, is_final=row.ok or session >= retried)
        for row, digest, session, at_s in found
    ]


_Found = tuple[Row, int, int, float]


def _by_index(run_folder: Path, index: int) -> list[_Found]:
    key = b'"row":{"index":%d,' % index
    return list(_records(run_folder, key, lambda row: row.index == index))


def _by_id(run_folder: Path, row_id: str) -> list[_Found]:
    # An id with characters that JSON escapes may be escaped in several ways.
    is_plain = row_id.isprintable() and not set(row_id) & {'"', "\\"}
    key = f'"id":{json.dumps(row_id, ensure_ascii=False)}' if is_plain else '"id":'
    return list(_records(run_folder, key.encode(), lambda row: row.id == row_id))


def _records(run_folder: Path, key: bytes, is_it: Callable[[Row], bool]) -> Iterator[_Found]:
    for path in _segments(run_folder):
        session = read_header(path).session
        with path.open("rb", buffering=2**20) as stream:
            for line in stream:
                if key not in line or not is_whole(line):
                    continue
                try:
                    record = RECORD.validate_json(line[BEFORE_JSON:], strict=True)
                except ValidationError:
                    continue  # the header
                if is_it(record.row):
                    yield record.row, record.input, session, record.span_s


def _last_retry(run_folder: Path) -> int:
    """The last session that tried the errors of those before it again; 0 if there is none."""
    headers = map(read_header, _segments(run_folder))
    return max((header.session for header in headers if header.retry_errors), default=0)


def _segments(run_folder: Path) -> Iterator[Path]:
    """The segments, but one that is just being begun."""
    for path in sorted((run_folder / JOURNAL_NAME).glob("*.jsonl")):
        with path.open("rb") as stream:
            if stream.readline(MAX_HEADER_BYTES).endswith(b"\n"):
                yield path
