"""The batches of a server, worked on beside its other requests, through every restart.

A thread looks at what is open, the oldest first, and gives each batch that can go on a thread of
its own. What a batch is comes from the disk alone, so a server that was killed goes on where it
was. A batch that cannot go on now is held, says why in its metadata, and is tried again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from qaic_ray.errors import QaicRayError
from qaic_ray.files.documents import differences, shown
from qaic_ray.runs.journal import JOURNAL_NAME
from qaic_ray.serve.api_errors import CLOSED_RETRY_S, ApiError, bad_request
from qaic_ray.serve.batches import disk
from qaic_ray.serve.batches.batch_record import (
    MAX_VALUE_CHARS,
    PROOF_PREFIX,
    WINDOW_S,
    BatchRecord,
    BatchStatus,
    NewBatch,
)
from qaic_ray.serve.batches.batch_store import BatchStore
from qaic_ray.serve.batches.file_store import (
    PURPOSE_INPUT,
    FileStore,
)
from qaic_ray.serve.batches.fleet_cards import BackgroundFleet, Places, RunStopped
from qaic_ray.serve.batches.pages import Paging, list_document, page_of
from qaic_ray.serve.batches.request_lines import Answering
from qaic_ray.serve.batches.runner import (
    BatchLimits,
    BatchProgress,
    BatchWork,
    Workplace,
    counted,
    sentence_of,
)
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts

HELD = f"{PROOF_PREFIX}held"
"""Key of a batch's metadata that says why it does not go on."""
FULL_RETRY_S = 60
_LOOK_S = 0.5
_SWEEP_S = 60.0

_log = logging.getLogger(__name__)


class _MessageKind(Enum):
    """What is done about a batch."""

    CHECK = "check"
    RUN = "run"
    FINISH = "finish"


@dataclass(frozen=True)
class _Working:
    kind: _MessageKind
    work: BatchWork
    thread: threading.Thread


class BatchManager(AbstractContextManager["BatchManager"]):
    """Files and batches of one server.

    Attributes:
        files: the files.

    Args:
        folder: keeps everything; this server's alone until `close`.
        fleet: answers requests.
        limits: of files and batches.
        clock: Unix time in seconds.
        timeouts: of the batches' runs.

    Raises:
        UsageError: the folder cannot be used, or another server has it.
    """

    def __init__(
        self,
        folder: Path,
        fleet: BackgroundFleet,
        *,
        limits: BatchLimits | None = None,
        clock: Callable[[], float] = time.time,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self._limits = limits = limits or BatchLimits()
        self._held_folder = disk.hold(disk.private_folder(folder))
        try:
            ids = disk.Ids()
            self.files = FileStore(
                folder / "files",
                ids,
                clock=clock,
                max_bytes=limits.max_file_bytes,
                max_lines=limits.max_lines,
            )
            self._batches = BatchStore(folder / "batches", ids)
        except BaseException:
            self._held_folder.release()
            raise
        self._ids = ids
        self._fleet = fleet
        self._clock = clock
        self._timeouts = timeouts
        self._place: Workplace | None = None
        self._lock = threading.Lock()
        self._working: dict[str, _Working] = {}
        self._progress: dict[str, BatchProgress] = {}
        self._held: dict[str, tuple[float, str]] = {}
        self._swept_s = 0.0
        self._bell = threading.Event()
        self._is_closed = False
        for record in self._batches.open_ones():
            self._count_kept(record)
        self._thread = threading.Thread(target=self._watch, name="batches", daemon=True)

    def start(self, answering: Answering) -> None:
        """Begin to work, and take batches. Before that, files are taken and batches told.

        Args:
            answering: how requests are read, and their answers written.
        """
        # As a batch's program will be when it is read back.
        answering = replace(answering, program=json.loads(json.dumps(answering.program)))
        self._place = Workplace(
            self._batches,
            self.files,
            self._ids,
            answering,
            self._fleet,
            Places(self._fleet),
            self._clock,
            timeouts=self._timeouts,
        )
        self._thread.start()

    @property
    def _workplace(self) -> Workplace:
        if self._place is None:
            raise ApiError(
                503, "The cards are opening: try again soon.", retry_after_s=CLOSED_RETRY_S
            )
        return self._place

    def _now(self) -> int:
        return int(self._clock())

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop all work, so that it can go on later, and give the folder back."""
        self._is_closed = True
        with self._lock:
            working = list(self._working.values())
            for each in working:
                each.work.stop("The server ends.")
        self._bell.set()
        until_s = time.monotonic() + self._limits.close_s
        for thread in (self._thread, *(each.thread for each in working)):
            if thread.ident is not None:
                thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                _log.warning("A batch has not stopped within %s s.", self._limits.close_s)
        self._held_folder.release()

    # -- what clients ask

    def create(self, asked: NewBatch) -> dict[str, Any]:
        """Take a batch; the interface's object of it.

        Raises:
            ApiError: 400, by the field; 429 where too many are open; 503 before `start`; 507 where
                the disk refuses.
        """
        answering = self._workplace.answering
        if asked.endpoint not in answering.endpoints:
            known = ", ".join(answering.endpoints)
            raise bad_request(
                f"endpoint is {shown(asked.endpoint)}: a batch is for one of {known}.", "endpoint"
            )
        try:
            file = self.files.get(asked.input_file_id)
        except ApiError as error:
            raise bad_request(str(error), "input_file_id", "file_not_found") from error
        if file.purpose != PURPOSE_INPUT:
            raise bad_request(
                f"{file.id} is for {file.purpose}: a batch reads a file whose purpose is batch.",
                "input_file_id",
            )
        if len(self._batches.open_ones()) >= self._limits.max_open:
            raise ApiError(
                429,
                f"{self._limits.max_open} batches are open, as many as may be: come again later.",
                code="too_many_batches",
                retry_after_s=FULL_RETRY_S,
            )
        now_s = self._clock()
        record = BatchRecord(
            id=self._ids.new(disk.BATCH, now_s),
            endpoint=asked.endpoint,
            input_file_id=file.id,
            created_at=int(now_s),
            expires_at=int(now_s) + WINDOW_S,
            model=answering.model,
            program=answering.program,
            input_bytes=file.num_bytes,
            input_sha256=file.sha256,
            metadata=asked.metadata,
            output_kept_s=asked.output_kept_s,
        )
        self._batches.create(record, self.files.path(file.id))
        self._bell.set()
        return self._document(record)

    def get(self, id_: str) -> dict[str, Any]:
        """A batch as the interface's object.

        Raises:
            ApiError: 404.
        """
        return self._document(self._batches.get(id_))

    def list(self, paging: Paging) -> dict[str, Any]:
        """A page of the batches, the newest first, as the interface's object."""
        ids, has_more = page_of(self._batches.ids(), paging)
        return list_document([self.get(id_) for id_ in ids], has_more=has_more)

    def cancel(self, id_: str) -> dict[str, Any]:
        """Have a batch end soon, with the answers that it has; the interface's object of it.

        Raises:
            ApiError: 404; 400 where it has ended; 507 where the disk refuses.
        """
        record = self._batches.change(id_, lambda batch: batch.cancelled(self._now()))
        self._stop(id_, "The batch was cancelled.")
        self._bell.set()
        return self._document(record)

    @property
    def num_open(self) -> int:
        """Batches that have not ended."""
        return len(self._batches.open_ones())

    def _document(self, record: BatchRecord) -> dict[str, Any]:
        working = self._working.get(record.id)
        progress = working.work.progress if working is not None else None
        progress = progress or self._progress.get(record.id)
        _, why = self._held.get(record.id, (0.0, ""))
        notes = {HELD: why[:MAX_VALUE_CHARS]} if why and not record.is_ended else None
        if progress is None:
            return record.document(notes=notes)
        return record.document(progress.counts, progress.usage, notes=notes)

    # -- the thread that looks at what is open

    def _watch(self) -> None:
        while not self._is_closed:
            self._look()
            self._bell.wait(_LOOK_S)
            self._bell.clear()

    def _look(self) -> None:
        if time.monotonic() >= self._swept_s:
            self._swept_s = time.monotonic() + _SWEEP_S
            try:
                self.files.remove_expired()
            except QaicRayError as error:
                _log.warning("Files that have expired are left: %s", error)
        for record in self._batches.open_ones():
            try:
                self._look_at(record)
            except Exception as error:  # noqa: BLE001 - the others must go on, and the server too
                self._hold(record.id, sentence_of(record.id, error))

    def _look_at(self, record: BatchRecord) -> None:
        is_over = record.is_running and self._now() >= record.expires_at
        with self._lock:
            working = self._working.get(record.id)
        if working is not None:
            if is_over:
                working.work.end_as(BatchStatus.EXPIRED)
                working.work.stop("The batch's time is over.")
            return
        until_s, _ = self._held.get(record.id, (0.0, ""))
        if time.monotonic() >= until_s and (kind := self._next(record, is_over)) is not None:
            self._begin(record, kind)

    def _next(self, record: BatchRecord, is_over: bool) -> _MessageKind | None:
        """What can be done about a batch that nobody works on."""
        if record.status is BatchStatus.VALIDATING:
            kind, most = _MessageKind.CHECK, 1
        elif record.is_running and not is_over:
            kind, most = _MessageKind.RUN, self._limits.max_running
        else:
            kind, most = _MessageKind.FINISH, 1
        with self._lock:
            num_such = sum(working.kind is kind for working in self._working.values())
        if num_such >= most:
            return None
        if kind is not _MessageKind.FINISH or record.total:
            changes = differences(record.program, self._workplace.answering.program)
            if changes:
                self._hold(
                    record.id,
                    f"It was begun with another program ({', '.join(changes)}): start the server "
                    "with that one, and it goes on.",
                )
                return None
        if kind is _MessageKind.RUN and not self._fleet.workers:
            return None
        return kind

    def _begin(self, record: BatchRecord, kind: _MessageKind) -> None:
        work = BatchWork(self._workplace, record.id, self._progress.get(record.id))
        what = {
            _MessageKind.CHECK: work.check,
            _MessageKind.RUN: work.run,
            _MessageKind.FINISH: work.finish,
        }[kind]
        # A daemon: a server that is told to end at once must not wait for it.
        thread = threading.Thread(
            target=self._work, args=(record.id, work, what), name=record.id, daemon=True
        )
        with self._lock:
            if self._is_closed:
                return
            self._working[record.id] = _Working(kind, work, thread)
        thread.start()

    def _work(self, id_: str, work: BatchWork, what: Callable[[], None]) -> None:
        why = ""
        try:
            what()
        except RunStopped as error:
            why = "" if work.is_stopped else str(error)
        except Exception as error:  # noqa: BLE001 - one batch must not end the server
            why = sentence_of(id_, error)
        if why:
            self._hold(id_, why)
        else:
            self._held.pop(id_, None)
        with self._lock:
            if work.progress is not None:
                self._progress[id_] = work.progress
            del self._working[id_]
        if self._batches.get(id_).is_ended:
            self._progress.pop(id_, None)
        self._bell.set()

    def _hold(self, id_: str, why: str) -> None:
        if self._held.get(id_, (0.0, ""))[1] != why:
            _log.warning("The batch %s does not go on: %s", id_, why)
        self._held[id_] = time.monotonic() + self._limits.hold_s, why

    def _stop(self, id_: str, why: str) -> None:
        with self._lock:
            working = self._working.get(id_)
        if working is not None:
            working.work.stop(why)
        self._held.pop(id_, None)

    def _count_kept(self, record: BatchRecord) -> None:
        """Count what an earlier server has answered of a batch."""
        try:
            table = self._batches.lines(record.id)
            has_rows = (self._batches.folder / record.id / JOURNAL_NAME).exists()
            if table is None or not has_rows:
                return
            with (
                disk.disk_refusals(self._batches.folder),
                self._batches.journal(record, commit_s=0.0) as journal,
            ):
                self._progress[record.id] = counted(table, journal)
        except QaicRayError as error:
            self._hold(record.id, str(error))
