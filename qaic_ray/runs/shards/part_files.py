"""A run's answers as parquet part files, written while it goes, in input order.

    part-00000.parquet, ...            `part_rows` rows each, the last one fewer
    _SUCCESS                           when the run is done: the parts, their digests and the proof
    part-03-of-64-00000.parquet, ...   of shard 3/64, so that all shards may share a folder

A part is made of lines of `outputs.jsonl` by a thread, put under its name whole, and noted in
`parts.jsonl` of the run folder. A run that goes on writes those that are not noted, and those that
hold other rows than they did.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qaic_ray.errors import QaicRayError, Unfinished, UsageError
from qaic_ray.files.folders import new_file, sha256_of
from qaic_ray.formats.part_places import PartPlace, part_place
from qaic_ray.formats.tables import write_parquet
from qaic_ray.options import RunOptions
from qaic_ray.runs.delivery import Proof, RowWriter
from qaic_ray.runs.journal import disk_errors_end_the_run, write_all

PARTS_NAME = "parts.jsonl"
SUCCESS_NAME = "_SUCCESS"
FORMAT = 1
STOP_S = 30.0
"""How long the end of a run that failed waits for the part that is being written."""


@dataclass(frozen=True)
class PartNames:
    """The names of a run's part files; `shard` as `K/N`, or None for a whole run."""

    shard: str | None = None

    @property
    def _of_shard(self) -> str:
        if self.shard is None:
            return ""
        number, _, count = self.shard.partition("/")
        return f"-{number.zfill(len(count))}-of-{count}"

    @property
    def success(self) -> str:
        """The file that says that all parts are there."""
        return f"{SUCCESS_NAME}{self._of_shard}"

    def part(self, number: int) -> str:
        """Part `number`, counted from 0."""
        return f"part{self._of_shard}-{number:05}.parquet"

    def are_of(self, name: str) -> bool:
        """Whether a file is one of these."""
        rest = name.removeprefix(f"part{self._of_shard}-").removesuffix(".parquet")
        return name == self.success or (rest.isdigit() and len(rest) < len(name))


@dataclass(frozen=True)
class WrittenPart:
    """A part that is there: the first of its rows and how many, their digest as lines of
    `outputs.jsonl`, and the file's size and digest."""

    name: str
    first: int
    rows: int
    rows_sha256: str
    bytes: int
    sha256: str


def check_part_place(text: str, shard: str | None) -> None:
    """See that a new run can write its parts there.

    Raises:
        UsageError: the place cannot be written to, or has such parts already.
        QaicRayError: it cannot be looked into.
    """
    names, place = PartNames(shard), part_place(text)
    place.check()
    taken = sorted(filter(names.are_of, place.sizes()))
    if taken:
        raise UsageError(
            f"{text} holds parts of another run ({taken[0]}): name another folder, or go on with "
            "that run by --resume."
        )


def part_files(
    run: RunOptions, folder: Path, write: RowWriter
) -> AbstractContextManager[PartFiles | None]:
    """What makes part files of the rows that are written from now on, if they are wanted.

    Args:
        run: says whether, where, and how large.
        folder: of the run.
        write: its rows; none is written yet.
    """
    if run.output_parts is None:
        return nullcontext()
    parts = PartFiles(
        folder,
        part_place(run.output_parts),
        PartNames(run.shard),
        part_rows=run.part_rows,
        lines=write.open_lines(),
    )
    write.on_line = parts.take
    return parts


@dataclass(frozen=True)
class _Lines:
    """Lines of `outputs.jsonl` that make a part."""

    number: int
    first: int
    rows: int
    offset: int
    num_bytes: int
    sha256: str


class PartFiles(AbstractContextManager["PartFiles"]):
    """Makes parts of the lines that a run writes to `outputs.jsonl`.

    Args:
        folder: of the run.
        place: where the parts go.
        names: of the parts.
        part_rows: rows of a part.
        lines: `outputs.jsonl`, opened to read what is written to it.
        again: what a user does after a part could not be written; empty for going on with the run.

    Raises:
        QaicRayError: the place cannot be looked into.
    """

    def __init__(
        self,
        folder: Path,
        place: PartPlace,
        names: PartNames,
        *,
        part_rows: int,
        lines: BinaryIO,
        again: str = "",
    ) -> None:
        self._again = again or f"go on with `qaic-ray run --resume {folder}`"
        self._folder, self._place, self._names = folder, place, names
        self._part_rows, self._lines = part_rows, lines
        self._digest = hashlib.sha256()
        self._number = self._first = self._rows = self._begin = self._end = 0
        sizes = place.sizes()
        self._says_success = names.success in sizes
        noted = {part.name: part for part in _noted(folder / PARTS_NAME)}
        self._there = {name: part for name, part in noted.items() if sizes.get(name) == part.bytes}
        self._made: list[WrittenPart] = []
        self._error: Exception | None = None
        self._is_over = False
        self._queue: queue.SimpleQueue[_Lines | None] = queue.SimpleQueue()
        with disk_errors_end_the_run(folder):
            self._ledger = os.open(
                folder / PARTS_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        self._thread = threading.Thread(target=self._run, name="parts", daemon=True)
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over = kind is not None
        self._queue.put(None)
        self._thread.join(None if kind is None else STOP_S)
        if not self._thread.is_alive():
            os.close(self._ledger)
            self._lines.close()

    def take(self, line: bytes) -> None:
        """Take the next line, which is written.

        Raises:
            Unfinished: a part could not be written.
        """
        self._raise_error()
        self._digest.update(line)
        self._rows += 1
        self._end += len(line)
        if self._rows == self._part_rows:
            self._give()

    def finish(self, proof: Proof) -> list[WrittenPart]:
        """Wait for all parts, and say that they are there, if the run is complete.

        Returns:
            The parts.

        Raises:
            Unfinished: one could not be written.
        """
        if proof.holds and self._rows:
            self._give()
        self._queue.put(None)
        self._thread.join()
        self._raise_error()
        if proof.holds:
            self._succeed(proof)
        return self._made

    def _give(self) -> None:
        num_bytes = self._end - self._begin
        lines = _Lines(
            *(self._number, self._first, self._rows, self._begin, num_bytes),
            sha256=self._digest.hexdigest(),
        )
        self._queue.put(lines)
        self._number += 1
        self._first += self._rows
        self._rows, self._begin, self._digest = 0, self._end, hashlib.sha256()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise Unfinished(
                f"{str(self._error).rstrip('.')}. What was answered is kept: put that right, then "
                f"{self._again}."
            ) from self._error

    # -- in the thread

    def _run(self) -> None:
        try:
            while (lines := self._queue.get()) is not None and not self._is_over:
                self._make(lines)
        except Exception as error:  # noqa: BLE001  # raised again by the next call
            self._error = error

    def _make(self, lines: _Lines) -> None:
        """One part, unless it is there with these rows."""
        name = self._names.part(lines.number)
        there = self._there.get(name)
        if there is not None and (there.rows, there.rows_sha256) == (lines.rows, lines.sha256):
            self._made.append(there)
            return
        unfinished = self._folder / f".{name}.unfinished"
        try:
            with open(new_file(unfinished), "wb") as stream:
                write_parquet(self._read(lines), stream)
            if self._says_success:  # of before some rows were tried again
                self._place.remove(self._names.success)
                self._says_success = False
            self._place.put(name, unfinished)
            part = WrittenPart(
                *(name, lines.first, lines.rows, lines.sha256),
                bytes=unfinished.stat().st_size,
                sha256=sha256_of(unfinished),
            )
        finally:
            unfinished.unlink(missing_ok=True)
        write_all(self._ledger, json.dumps(asdict(part)).encode() + b"\n")
        os.fsync(self._ledger)
        self._made.append(part)

    def _read(self, lines: _Lines) -> Iterator[dict[str, Any]]:
        self._lines.seek(lines.offset)
        for _ in range(lines.rows):
            yield json.loads(self._lines.readline())

    def _succeed(self, proof: Proof) -> None:
        document = {
            "format": FORMAT,
            "run": self._folder.name,
            "shard": self._names.shard,
            "proof": asdict(proof),
            "parts": [asdict(part) for part in self._made],
        }
        file = self._folder / f".{self._names.success}.unfinished"
        with disk_errors_end_the_run(self._folder):
            file.write_text(json.dumps(document, indent=2) + "\n")
        try:
            self._place.put(self._names.success, file)
        except QaicRayError as error:
            self._error = error
            self._raise_error()
        finally:
            file.unlink(missing_ok=True)


def _noted(path: Path) -> Iterator[WrittenPart]:
    """The parts that are noted; the last line may be torn."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        with suppress(ValueError, TypeError):
            if line.endswith(b"\n"):
                yield WrittenPart(**json.loads(line))
