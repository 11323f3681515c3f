"""Batches on the disk, each a private folder.

    batches/<id>/batch.json   the batch, written anew at each of its steps, before that is told
    batches/<id>/input.jsonl  its input, the same file as the client's
    batches/<id>/lines.json   which lines have how many prompts, once it is checked
    batches/<id>/journal/     its rows, as of a run

Of a batch that has ended only `batch.json` is left.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qaic_ray.errors import QaicRayError
from qaic_ray.files.documents import as_object, checked, read_object, shown
from qaic_ray.files.folders import sync_path
from qaic_ray.runs.intake import INPUT, Fingerprint
from qaic_ray.runs.journal import JOURNAL_NAME, LOCK_NAME, Journal
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.batches import disk
from qaic_ray.serve.batches.batch_record import BatchRecord
from qaic_ray.serve.batches.request_lines import LineTable

_RECORD, _INPUT, _LINES = "batch.json", "input.jsonl", "lines.json"

_log = logging.getLogger(__name__)


class BatchStore:
    """The batches of one server.

    Args:
        folder: made where it is not there; nobody else writes to it.
        ids: gives ids.

    Raises:
        UsageError: the folder cannot be used.
    """

    def __init__(self, folder: Path, ids: disk.Ids) -> None:
        self.folder = disk.private_folder(folder)
        self._ids = ids
        self._lock = threading.Lock()
        with disk.disk_refusals(folder):
            disk.sweep(folder)
            self._records = {record.id: record for record in self._found()}
        for record in self._records.values():
            if record.is_ended:
                self._drop_work(record.id)

    def _found(self) -> list[BatchRecord]:
        records = []
        for entry in sorted(os.listdir(self.folder)):
            if not disk.is_id(entry, disk.BATCH):
                continue
            path = self.folder / entry / _RECORD
            try:
                records.append(checked(BatchRecord, read_object(path), str(path)))
            except QaicRayError as error:
                _log.warning("A batch is left out: %s", error)
                continue
            self._ids.seen(entry)
        return records

    # -- what is there

    def get(self, id_: str) -> BatchRecord:
        """A batch.

        Raises:
            ApiError: 404.
        """
        record = self._records.get(id_)
        if record is None:
            raise ApiError(404, f"There is no batch {shown(id_)}: see GET /v1/batches.")
        return record

    def ids(self) -> list[str]:
        """Of all batches."""
        return list(self._records)

    def open_ones(self) -> list[BatchRecord]:
        """Those that have not ended, the oldest first."""
        found = [record for record in list(self._records.values()) if not record.is_ended]
        return sorted(found, key=lambda record: record.id)

    def input(self, id_: str) -> Path:
        """The input of a batch that has not ended."""
        return self.folder / id_ / _INPUT

    def lines(self, id_: str) -> LineTable | None:
        """The lines of a batch's input; None before it was checked."""
        path = self.folder / id_ / _LINES
        if not path.exists():
            return None
        document = as_object(read_object(path), str(path))
        several = {int(ordinal): num for ordinal, num in document["several"].items()}
        return LineTable(document["total"], several)

    def journal(self, record: BatchRecord, *, commit_s: float) -> Journal:
        """Open a batch's journal.

        Raises:
            QaicRayError: it is damaged, or the disk refuses.
        """
        source = {"bytes": record.input_bytes, "sha256": record.input_sha256}
        same: Fingerprint = {INPUT: source, "endpoint": record.endpoint, **record.program}
        disk.private_folder(self.folder / record.id / JOURNAL_NAME)
        return Journal(self.folder / record.id, same, commit_s=commit_s)

    # -- what changes

    def create(self, record: BatchRecord, content: Path) -> None:
        """Keep a new batch; its input stays, whatever becomes of the client's file."""
        with self._lock, disk.disk_refusals(self.folder):
            made = disk.workspace(self.folder)
            try:
                _link_or_copy(content, made / _INPUT)
                disk.write_private(made / _RECORD, _text(record))
                disk.publish(made, self.folder / record.id)
            except BaseException:
                disk.drop(made)
                raise
            self._records[record.id] = record

    def keep_lines(self, id_: str, table: LineTable) -> None:
        """Keep what was found of a batch's lines."""
        document = {"total": table.total, "several": table.several}
        with disk.disk_refusals(self.folder):
            disk.write_private(self.folder / id_ / _LINES, json.dumps(document))

    def change(self, id_: str, step: Callable[[BatchRecord], BatchRecord]) -> BatchRecord:
        """Take a batch a step on; it is on the disk when this returns, and told to nobody before.

        Raises:
            ApiError: the step's own, or the disk refuses.
        """
        with self._lock:
            before = self.get(id_)
            after = step(before)
            if after != before:
                with disk.disk_refusals(self.folder):
                    disk.write_private(self.folder / id_ / _RECORD, _text(after))
                self._records[id_] = after
        if after.is_ended:
            self._drop_work(id_)
        return after

    def _drop_work(self, id_: str) -> None:
        """Remove what a batch that has ended needs no more."""
        folder = self.folder / id_
        try:
            shutil.rmtree(folder / JOURNAL_NAME, ignore_errors=False)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("%s cannot be removed: %s.", folder / JOURNAL_NAME, error.strerror)
        for name in (_INPUT, _LINES, LOCK_NAME):
            with suppress(OSError):  # it is of no use, and of no harm
                (folder / name).unlink(missing_ok=True)


def _link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        with open(disk.private_file(target), "wb") as stream, source.open("rb") as content:
            shutil.copyfileobj(content, stream)
        sync_path(target)


def _text(record: BatchRecord) -> str:
    document: dict[str, Any] = asdict(record)
    return json.dumps(document)
