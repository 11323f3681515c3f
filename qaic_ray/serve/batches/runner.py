"""One batch, worked on in a thread: its input checked, its requests run, its output written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from qaic_ray.dispatch.dispatcher import Dispatcher
from qaic_ray.dispatch.policy import DEFAULT_POLICY
from qaic_ray.errors import QaicRayError
from qaic_ray.rows import Row
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.intake import ThreadedReader
from qaic_ray.runs.journal import Journal
from qaic_ray.serve.batches import disk
from qaic_ray.serve.batches.batch_record import (
    BatchRecord,
    BatchStatus,
    BatchUsage,
    LineError,
    RequestCounts,
)
from qaic_ray.serve.batches.batch_store import BatchStore
from qaic_ray.serve.batches.file_store import MAX_FILE_BYTES, MAX_LINES, FileStore
from qaic_ray.serve.batches.fleet_cards import (
    BackgroundFleet,
    FleetAsCards,
    Places,
    RunStopped,
)
from qaic_ray.serve.batches.outputs import write_outputs
from qaic_ray.serve.batches.request_lines import (
    Answering,
    LineTable,
    check_input,
    prompts_of_input,
)
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts

READ_AHEAD = 512
"""Requests that are read before there is room for them; a run's 8,192 would hold up the server."""
_log = logging.getLogger(__name__)
_POLICY = replace(DEFAULT_POLICY, read_ahead=READ_AHEAD)


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Limits of files and batches.

    Attributes:
        max_file_bytes: of one file.
        max_lines: requests of one batch.
        max_open: batches that have not ended.
        max_running: those whose requests run at the same time.
        hold_s: seconds after which a batch that could not go on is tried again.
        close_s: seconds that the end of all work is waited for.
    """

    max_file_bytes: int = MAX_FILE_BYTES
    max_lines: int = MAX_LINES
    max_open: int = 1000
    max_running: int = 4
    hold_s: float = 15.0
    close_s: float = 30.0


class BatchProgress:
    """How many requests of a batch are done; one thread adds, any may ask.

    Args:
        table: of the input's lines.
    """

    def __init__(self, table: LineTable) -> None:
        self._table = table
        self._left: dict[int, int] = {}
        self._bad: set[int] = set()
        self.counts = RequestCounts(table.total)
        self.usage = BatchUsage()

    def add(self, row: Row) -> None:
        """Count a row that is on the disk."""
        ordinal = self._table.line_of(row.index)
        num_prompts = self._table.several.get(ordinal, 1)
        left = self._left.pop(ordinal, num_prompts) - 1
        if not row.ok:
            self._bad.add(ordinal)
        if left:
            self._left[ordinal] = left
        else:
            is_bad = ordinal in self._bad
            self._bad.discard(ordinal)
            before = self.counts
            self.counts = RequestCounts(
                before.total, before.completed + (not is_bad), before.failed + is_bad
            )
        usage = self.usage
        self.usage = BatchUsage(
            usage.input_tokens + row.prompt_tokens,
            usage.cached_tokens + row.reused_tokens,
            usage.output_tokens + row.generated_tokens,
        )


@dataclass(frozen=True)
class Workplace:
    """What every batch of a server is worked on with."""

    batches: BatchStore
    files: FileStore
    ids: disk.Ids
    answering: Answering
    fleet: BackgroundFleet
    places: Places
    clock: Callable[[], float]
    timeouts: Timeouts = DEFAULT_TIMEOUTS

    def now(self) -> int:
        """Unix time in seconds."""
        return int(self.clock())


class BatchWork:
    """What a thread does about one batch; another thread may stop it.

    Attributes:
        progress: of its requests, once they run or ran.

    Args:
        place: what it works with.
        id_: of the batch.
        progress: from before.
    """

    def __init__(self, place: Workplace, id_: str, progress: BatchProgress | None = None) -> None:
        self.progress = progress
        self._place = place
        self._id = id_
        self._lock = threading.Lock()
        self._cards: FleetAsCards | None = None
        self._stopped: str | None = None

    def stop(self, why: str) -> None:
        """Have the work end soon, with RunStopped where it was not done; any thread may call it."""
        with self._lock:
            self._stopped = why
            if self._cards is not None:
                self._cards.stop(why)

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped is not None

    def _go_on(self) -> None:
        if self._stopped is not None:
            raise RunStopped(self._stopped)

    # -- its input

    def check(self) -> None:
        """Check the batch's input: it is in progress then, or has failed.

        Raises:
            QaicRayError: the disk refuses.
        """
        place = self._place
        record = place.batches.get(self._id)
        with disk.disk_refusals(place.batches.folder):
            found = check_input(
                place.batches.input(self._id),
                record,
                place.answering,
                max_lines=place.files.max_lines,
                is_wanted=lambda: not self.is_stopped,
            )
        self._go_on()
        errors: tuple[LineError, ...] = found.errors
        if errors:
            place.batches.change(self._id, lambda batch: batch.failed(errors, place.now()))
            return
        place.batches.keep_lines(self._id, found.table)
        total = found.table.total
        place.batches.change(self._id, lambda batch: batch.validated(total, place.now()))

    # -- its requests

    def run(self) -> None:
        """Answer the requests that have no answer yet, then write the output.

        Raises:
            RunStopped: it was stopped, or the fleet has ended; what was answered is kept.
            QaicRayError: the disk refuses, or the input is not what it was.
        """
        place = self._place
        record = place.batches.get(self._id)
        with self._journal(record) as journal:
            self._answer(record, self._table(), journal)
        self._write(self.end_as(BatchStatus.COMPLETED))

    def _answer(self, record: BatchRecord, table: LineTable, journal: Journal) -> None:
        progress = counted(table, journal)
        self.progress = progress
        place = self._place
        cards = FleetAsCards(place.fleet, place.places, record.id)
        with closing(cards):
            with self._lock:
                self._go_on()
                self._cards = cards
            driver = Driver(
                cards,
                prompts_of_input(place.batches.input(record.id), record, place.answering, table),
                Audience(on_saved=progress.add),
                dispatcher=Dispatcher(policy=_POLICY),
                journal=journal,
                reader=partial(ThreadedReader, timeouts=place.timeouts),
            )
            result = driver.run()
        if result.broken_off is not None:
            raise QaicRayError(result.broken_off.error)

    # -- its output

    def finish(self) -> None:
        """Write the output of a batch that is about to end, from what it has.

        Raises:
            QaicRayError: the disk refuses, or has not what the batch had.
        """
        self._write(self.end_as(BatchStatus.EXPIRED))

    def end_as(self, ending: BatchStatus) -> BatchRecord:
        """Let the batch be about to end, as this if nothing else was said before."""
        place = self._place

        def step(batch: BatchRecord) -> BatchRecord:
            reserved = tuple(place.ids.new(disk.FILE, place.clock()) for _ in range(2))
            return batch.ending_as(ending, (reserved[0], reserved[1]), place.now())

        return place.batches.change(self._id, step)

    def _write(self, record: BatchRecord) -> None:
        place = self._place
        with self._journal(record) as journal:  # opened anew, it has this session's rows too
            outcome = write_outputs(
                record,
                place.batches.input(record.id),
                journal,
                table=self._table(),
                answering=place.answering,
                store=place.files,
                go_on=self._go_on,
            )
        place.batches.change(self._id, lambda batch: batch.ended(outcome, place.now()))

    @contextmanager
    def _journal(self, record: BatchRecord) -> Iterator[Journal]:
        place = self._place
        with (
            disk.disk_refusals(place.batches.folder),
            place.batches.journal(record, commit_s=place.timeouts.commit_s) as journal,
        ):
            yield journal

    def _table(self) -> LineTable:
        table = self._place.batches.lines(self._id)
        # A batch that was cancelled before it was checked has no request to answer.
        return table or LineTable(0, {})


def counted(table: LineTable, journal: Journal) -> BatchProgress:
    """How far a journal is."""
    progress = BatchProgress(table)
    for entry in journal.replay():
        progress.add(entry.row)
    return progress


def sentence_of(id_: str, error: Exception) -> str:
    """What is wrong, for who reads the batch; the log has the traceback of a bug of ours."""
    if isinstance(error, QaicRayError):
        return str(error)
    _log.error("A fault of qaic-ray's over the batch %s:", id_, exc_info=error)
    return f"A fault of qaic-ray's, {type(error).__name__}: see the server's log, and report it."
