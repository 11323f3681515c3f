"""Rows on their way out: into the journal, back into the input's order, into the output files.

When a run is done, its outputs are written once more in the formats of other programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from qaic_ray.files.folders import new_file, replacing, sync_path
from qaic_ray.formats.json_rows import Origin, response_line, token_number
from qaic_ray.formats.tables import write_parquet
from qaic_ray.option_types import OutputFormat
from qaic_ray.rows import Row
from qaic_ray.runs.journal import Entry, Journal, Place, disk_errors_end_the_run, write_all

OUTPUTS_NAME = "outputs.jsonl"
ERRORS_NAME = "errors.jsonl"
PARQUET_NAME = "outputs.parquet"
OPENAI_NAMES = ("openai_output.jsonl", "openai_error.jsonl")

MAX_HELD_ROWS = 4096
MAX_HELD_BYTES = 8 * 2**20
"""Of rows held in memory, as text in the journal; the objects are several times as large."""

COMMIT_PAUSES = 4
"""Rows are gathered for at least this many times as long as it takes to write them to the disk."""
MAX_SHOWN_AT_ONCE = 512

# Python's str.splitlines (and others) also break lines here; inside JSON they can be escaped.
_LINE_BREAK = re.compile("[\x85\u2028\u2029]")

_OFFSET_BITS = 40
_FORGET_AT = 64


class InputOrder:
    """Takes rows in any order, each index once, and returns them by rising index.

    Only the first few rows that come before their turn are held in memory. Of the others only the
    place in the journal is held, in eight bytes, and they are read back when it is their turn.

    Args:
        read: gives the row at a segment's offset; without it every early row is held.
    """

    def __init__(
        self,
        read: Callable[[int, int], Row] | None = None,
        *,
        max_held_rows: int = MAX_HELD_ROWS,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._read = read
        self._max_held_rows = max_held_rows
        self._max_held_bytes = max_held_bytes
        self._held: dict[int, tuple[Row, int]] = {}
        self._held_bytes = 0
        self._spilled = _Places()
        self._next_index = 0

    @property
    def is_ready(self) -> bool:
        """Whether it is some row's turn."""
        return self._next_index in self._held or self._next_index in self._spilled

    def push(self, row: Row, place: Place | None = None) -> None:
        """Take a row; `place` is where it can be read back from.

        Raises:
            ValueError: for an index that was there before.
        """
        index = row.index
        if index < self._next_index or index in self._held or index in self._spilled:
            raise ValueError(f"Row {index} came twice.")
        num_bytes = place.num_bytes if place else 0
        has_bytes = self._held_bytes + num_bytes <= self._max_held_bytes
        has_room = has_bytes and len(self._held) < self._max_held_rows
        is_next = index == self._next_index  # it is returned at once
        if place is None or self._read is None or has_room or is_next:
            self._held[index] = row, num_bytes
            self._held_bytes += num_bytes
        else:
            self._spilled.add(index, place, least=self._next_index)

    def ready(self) -> Iterator[Row]:
        """The rows whose turn it is; those that are not taken remain."""
        while self.is_ready:
            index = self._next_index
            if index in self._held:
                row, num_bytes = self._held.pop(index)
                self._held_bytes -= num_bytes
            else:
                assert self._read is not None
                row = self._read(*self._spilled.pop(index))
            self._next_index += 1
            yield row


class _Places:
    """Index -> segment and offset, taken out by rising index: eight bytes for each index between
    the least and the greatest."""

    def __init__(self) -> None:
        self._first = 0
        self._packed = array("Q")  # 0 where there is none: offset 0 is a segment's header

    def __contains__(self, index: int) -> bool:
        at = index - self._first
        return 0 <= at < len(self._packed) and self._packed[at] != 0

    def add(self, index: int, place: Place, *, least: int) -> None:
        """Keep a place; from now on no index is below `least`."""
        if not self._packed:
            self._first = least
        at = index - self._first
        missing = max(0, at + 1 - len(self._packed))
        self._packed.frombytes(bytes(missing * self._packed.itemsize))
        self._packed[at] = place.segment << _OFFSET_BITS | place.offset

    def pop(self, index: int) -> tuple[int, int]:
        """Take out the place of the least index."""
        num_past = index - self._first + 1
        segment, offset = divmod(self._packed[num_past - 1], 1 << _OFFSET_BITS)
        if num_past == len(self._packed) or num_past > max(_FORGET_AT, len(self._packed) // 2):
            del self._packed[:num_past]
            self._first = index + 1
        return segment, offset


class Delivery:
    """Writes final rows to the journal, and gives them on in the input's order.

    Rows are committed together. The first of them waits for the journal's `commit_s`, or on a slow
    disk for `COMMIT_PAUSES` times as long as a commit takes, so that the disk is not always busy.

    Args:
        journal: None to run without: every early row is held in memory, and no run can be resumed.
        on_row: called with each row when it is its turn and it is on the disk.
        on_earlier_row: called before all else, with rows whose turn had come in earlier sessions.
        on_saved: called with each row as soon as it is on the disk, in the order of the journal.
        clock: in seconds.
        has_order: False for an open input: there is `on_saved` alone, no row waits for another one,
            and those of earlier sessions are none of this run.
    """

    def __init__(
        self,
        journal: Journal | None,
        on_row: Callable[[Row], None],
        on_earlier_row: Callable[[Row], None],
        *,
        on_saved: Callable[[Row], None] | None = None,
        clock: Callable[[], float],
        has_order: bool = True,
    ) -> None:
        self.earlier_s = 0.0
        """How long cards worked in earlier sessions."""
        self._journal = journal
        self._on_row = on_row
        self._on_earlier_row = on_earlier_row
        self._on_saved = on_saved
        self._clock = clock
        self._has_order = has_order
        self._order = InputOrder(journal.read if journal else None)
        self._uncommitted: list[tuple[Row, Place]] = []
        self._commit_at_s = 0.0
        self._least_pause_s = self._pause_s = journal.commit_s if journal else 0.0

    def replay(self) -> Iterator[Entry]:
        """The rows of earlier sessions; to be taken to the end, before any row is added."""
        spans_s: dict[int, float] = {}
        for entry in self._journal.replay() if self._journal and self._has_order else ():
            yield entry
            spans_s[entry.session] = max(entry.span_s, spans_s.get(entry.session, 0.0))
            self._order.push(entry.row, entry.place)
            for row in self._order.ready():
                self._on_earlier_row(row)
        self.earlier_s = sum(spans_s.values())

    def add(self, row: Row, digest: int, span_s: float) -> None:
        """Take a final row; see `Journal.append`."""
        if row.error is not None:
            # It quotes what was given, and half a surrogate pair cannot be written.
            row = replace(row, error=row.error.encode(errors="backslashreplace").decode())
        if self._journal is None:
            if self._has_order:
                self._order.push(row)
            self._tell_saved([row])
            return
        if not self._uncommitted:
            self._commit_at_s = self._clock() + self._pause_s
        self._uncommitted.append((row, self._journal.append(row, digest, span_s)))

    def due_in_s(self) -> float | None:
        """Seconds until `flush_due` has something to do; None while that needs another row."""
        if self._order.is_ready:
            return 0.0
        if self._uncommitted:
            return max(0.0, self._commit_at_s - self._clock())
        return None

    def flush_due(self) -> float | None:
        """Commit if it is time, and give on rows whose turn it is, but not too many in one call."""
        if self._uncommitted and self._clock() >= self._commit_at_s:
            self.save()
        for row in islice(self._order.ready(), MAX_SHOWN_AT_ONCE):
            self._on_row(row)
        return self.due_in_s()

    def finish(self) -> None:
        """Commit all rows and give them on."""
        self.save()
        for row in self._order.ready():
            self._on_row(row)

    def save(self) -> None:
        """Commit all rows."""
        if self._journal is None or not self._uncommitted:
            return
        begun_s = self._clock()
        self._journal.commit()
        self._pause_s = max(self._least_pause_s, COMMIT_PAUSES * (self._clock() - begun_s))
        saved = [row for row, _ in self._uncommitted]
        for row, place in self._uncommitted if self._has_order else ():
            self._order.push(row, place)
        self._uncommitted.clear()
        self._tell_saved(saved)

    def _tell_saved(self, rows: Sequence[Row]) -> None:
        if self._on_saved is not None:
            for row in rows:
                self._on_saved(row)


@dataclass(frozen=True)
class Proof:
    """Counts and digests of a run's input and outputs; they show that no row is missing or twice.

    `inputs_sha256` is over the digests of the input's rows in order, `outputs_sha256` over the
    bytes of `outputs.jsonl`. `complete`: the input was read to its end, and was one input.
    """

    rows_in: int
    rows_ok: int
    rows_error: int
    inputs_sha256: str
    outputs_sha256: str
    complete: bool = True

    @property
    def holds(self) -> bool:
        """Whether every row of the input has its one row in the outputs."""
        return self.complete and self.rows_in == self.rows_ok + self.rows_error


class RowWriter(AbstractContextManager["RowWriter"]):
    """Writes rows to `outputs.jsonl`, and to `errors.jsonl` too if they failed.

    Both grow row by row under their own names, so that they can be followed (`tail -f`) while the
    run goes. A run that is killed leaves the rows it had; the last line may be torn.

    Args:
        folder: the run's.
        resumed: the files that are there stay until all rows of earlier sessions are written
            again, and for good if that ends with an error.

    Raises:
        QaicRayError: when the disk refuses.
    """

    on_line: Callable[[bytes], None] | None = None
    """Called with each line of `outputs.jsonl` when it is written."""

    def __init__(self, folder: Path, *, resumed: bool = False) -> None:
        self._folder = folder
        self._paths = [folder / OUTPUTS_NAME, folder / ERRORS_NAME]
        self._unfinished = [path.with_name(f".{path.name}.unfinished") for path in self._paths]
        self._published = not resumed
        self._rows_ok = 0
        self._rows_error = 0
        self._sha256 = hashlib.sha256()
        with disk_errors_end_the_run(folder):
            self._fds = [new_file(path) for path in (self._unfinished if resumed else self._paths)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the files to the disk, after an error without their names; close them."""
        try:
            if kind is None:
                self._sync()
        finally:
            for fd, unfinished in zip(self._fds, self._unfinished, strict=True):
                os.close(fd)
                unfinished.unlink(missing_ok=True)

    def __call__(self, row: Row) -> None:
        """Write a new row; others can read it at once."""
        if not self._published:
            self._sync()
        self.rewrite(row)

    def rewrite(self, row: Row) -> None:
        """Write a row of an earlier session, before all new ones."""
        is_ok = row.ok
        text = json.dumps(row.to_json(), ensure_ascii=False)
        text = _LINE_BREAK.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
        line = text.encode() + b"\n"
        with disk_errors_end_the_run(self._folder):
            for fd in self._fds[: 1 if is_ok else 2]:
                write_all(fd, line)
        self._sha256.update(line)
        self._rows_ok += is_ok
        self._rows_error += not is_ok
        if self.on_line is not None:
            self.on_line(line)

    def open_lines(self) -> BinaryIO:
        """`outputs.jsonl` as it is written by now, to be read while that goes on."""
        return (self._paths if self._published else self._unfinished)[0].open("rb")

    def _sync(self) -> None:
        """Write the files to the disk; they replace those of an earlier session."""
        with disk_errors_end_the_run(self._folder):
            for fd, unfinished, path in zip(self._fds, self._unfinished, self._paths, strict=True):
                os.fsync(fd)
                if not self._published:
                    os.replace(unfinished, path)
            sync_path(self._folder)
        self._published = True

    def proof(self, rows_in: int, inputs_sha256: str, *, complete: bool = True) -> Proof:
        """Counts and digests of what was written, beside those of what was read."""
        counts = rows_in, self._rows_ok, self._rows_error
        return Proof(*counts, inputs_sha256, self._sha256.hexdigest(), complete)


def export_outputs(
    folder: Path,
    output_format: OutputFormat,
    *,
    model: str,
    token_text: Callable[[int], str] = token_number,
) -> tuple[Path, ...]:
    """Write a run's rows once more, in another format; return the files, each whole or not at all.

    The rows that are there are written: of a run that is still going, those that it has.

    Args:
        folder: the run's.
        output_format: which.
        model: the name of the model that answered, for the OpenAI format.
        token_text: a token's text, for the OpenAI format's logprobs.

    Raises:
        QaicRayError: when the disk refuses.
    """
    is_table = output_format is OutputFormat.PARQUET
    paths = tuple(folder / name for name in ((PARQUET_NAME,) if is_table else OPENAI_NAMES))
    with disk_errors_end_the_run(folder), ExitStack() as stack:
        streams = [
            stack.enter_context(replacing(path, path.with_name(f".{path.name}.unfinished")))
            for path in paths
        ]
        if is_table:
            write_parquet(_rows(folder), streams[0])
            return paths
        created = int((folder / OUTPUTS_NAME).stat().st_mtime)
        origin = Origin(folder.name, model, created, token_text)
        for row in _rows(folder):
            line = json.dumps(response_line(row, origin)) + "\n"
            streams["error" in row].write(line.encode())
    return paths


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / OUTPUTS_NAME).open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return  # it is being written
            yield json.loads(line)
