"""Files that clients gave, and those that batches have written: each a private folder.

    files/<id>/file.json   what it is
    files/<id>/content     its bytes

A folder gets its name when all of it is on the disk. The client's name of a file is shown and never
a path.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from qaic_ray.errors import QaicRayError
from qaic_ray.files.documents import checked, read_object, shown
from qaic_ray.runs.journal import write_all
from qaic_ray.serve.api_errors import ApiError, bad_request
from qaic_ray.serve.batches import disk
from qaic_ray.serve.batches.pages import Paging, list_document, page_of

PURPOSE_INPUT, PURPOSE_OUTPUT = "batch", "batch_output"
INPUT_KEPT_S = 30 * 24 * 3600
"""An input that names no other time expires after so long: the interface's own default."""
LEAST_KEPT_S, MOST_KEPT_S = 3600, 30 * 24 * 3600
MAX_FILE_BYTES = 200 * 10**6
MAX_LINES = 50_000
_MAX_NAME_CHARS = 255
_INFO, _CONTENT = "file.json", "content"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """A file that is kept; times are Unix times in seconds, `expires_at` None means never."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    sha256: str
    created_at: int
    expires_at: int | None = None

    def document(self) -> dict[str, Any]:
        """The file as the interface's object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "expires_at": self.expires_at,
        }


class FileStore:
    """The files of one server.

    Args:
        folder: made where it is not there; nobody else writes to it.
        ids: gives ids.
        clock: Unix time in seconds.
        max_bytes: of one file that a client gives.
        max_lines: of one.

    Raises:
        UsageError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        ids: disk.Ids,
        *,
        clock: Callable[[], float],
        max_bytes: int = MAX_FILE_BYTES,
        max_lines: int = MAX_LINES,
    ) -> None:
        self.folder = disk.private_folder(folder)
        self.max_bytes = max_bytes
        self.max_lines = max_lines
        self._ids = ids
        self._clock = clock
        self._lock = threading.Lock()
        with disk.disk_refusals(folder):
            disk.sweep(folder)
            self._records = {record.id: record for record in self._found()}

    def _found(self) -> list[FileRecord]:
        records = []
        for entry in sorted(os.listdir(self.folder)):
            if not disk.is_id(entry, disk.FILE):
                continue
            path = self.folder / entry / _INFO
            try:
                records.append(checked(FileRecord, read_object(path), str(path)))
            except QaicRayError as error:
                _log.warning("A file is left out: %s", error)
                continue
            self._ids.seen(entry)
        return records

    # -- what is there

    def get(self, id_: str) -> FileRecord:
        """A file that has not expired.

        Raises:
            ApiError: 404.
        """
        record = self._records.get(id_)
        if record is None or self._is_expired(record):
            raise ApiError(
                404, f"There is no file {shown(id_)}: see GET /v1/files.", param="file_id"
            )
        return record

    def list(self, paging: Paging, purpose: str | None = None) -> dict[str, Any]:
        """A page of the files, as the interface's object."""
        records = [
            record
            for record in list(self._records.values())
            if purpose in (None, record.purpose) and not self._is_expired(record)
        ]
        by_id = {record.id: record for record in records}
        ids, has_more = page_of(list(by_id), paging)
        return list_document([by_id[id_].document() for id_ in ids], has_more=has_more)

    def path(self, id_: str) -> Path:
        """Where the bytes of a file are."""
        return self.folder / self.get(id_).id / _CONTENT

    def open(self, id_: str) -> BinaryIO:
        """The bytes of a file; they can be read to their end even if it is deleted meanwhile.

        Raises:
            ApiError: 404, or the disk refuses.
        """
        path = self.path(id_)
        with disk.disk_refusals(self.folder):
            return path.open("rb")

    def _is_expired(self, record: FileRecord) -> bool:
        return record.expires_at is not None and record.expires_at <= self._clock()

    # -- what changes

    def delete(self, id_: str) -> dict[str, Any]:
        """Remove a file; the interface's object of that."""
        record = self.get(id_)
        self._remove(record.id)
        return {"id": record.id, "object": "file", "deleted": True}

    def remove_expired(self) -> None:
        """Remove the files whose time is over."""
        for record in list(self._records.values()):
            if self._is_expired(record):
                self._remove(record.id)

    def _remove(self, id_: str) -> None:
        with self._lock, disk.disk_refusals(self.folder):
            if id_ in self._records:
                disk.remove(self.folder / id_)
                del self._records[id_]

    def begin(
        self, filename: str, purpose: str, *, id_: str | None = None, is_given: bool = False
    ) -> NewFile:
        """Begin to write a file.

        Args:
            filename: as it is shown.
            purpose: of the interface.
            id_: of the file; a new one where there is none.
            is_given: by a client, so that the limits hold.
        """
        name = "".join(letter for letter in filename if letter.isprintable())[:_MAX_NAME_CHARS]
        record = FileRecord(
            id_ or self._ids.new(disk.FILE, self._clock()),
            name.encode(errors="replace").decode() or "file.jsonl",
            purpose,
            num_bytes=0,
            sha256="",
            created_at=0,
        )
        return NewFile(self, record, is_given=is_given)

    def keep(self, made: Path, record: FileRecord, kept_s: int | None) -> FileRecord:
        """Take a file that is written."""
        now = int(self._clock())
        expires_at = None if kept_s is None else now + kept_s
        record = replace(record, created_at=now, expires_at=expires_at)
        with self._lock, disk.disk_refusals(self.folder):
            disk.write_private(made / _INFO, json.dumps(asdict(record)))
            disk.publish(made, self.folder / record.id)
            self._records[record.id] = record
        return record


class NewFile(AbstractContextManager["NewFile"]):
    """A file that is being written; nobody sees it before `finish`, and without that it is gone.

    Raises:
        ApiError: the disk refuses.
    """

    def __init__(self, store: FileStore, record: FileRecord, *, is_given: bool) -> None:
        self.num_bytes = 0
        self.num_lines = 0
        self._store = store
        self._record = record
        self._is_given = is_given
        self._sha256 = hashlib.sha256()
        self._is_kept = False
        self._ends_a_line = True
        with disk.disk_refusals(store.folder):
            self._folder = disk.workspace(store.folder)
            self._fd = disk.private_file(self._folder / _CONTENT)

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if not self._is_kept:
            with disk.disk_refusals(self._store.folder):
                disk.drop(self._folder)

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            ApiError: 413 or 400 over a limit; 507 where the disk refuses.
        """
        self.num_bytes += len(data)
        self.num_lines += data.count(b"\n")
        if data:
            self._ends_a_line = data.endswith(b"\n")
        if self._is_given:
            self._check_size()
        self._sha256.update(data)
        with disk.disk_refusals(self._store.folder):
            write_all(self._fd, data)

    def _check_size(self) -> None:
        store = self._store
        if self.num_bytes > store.max_bytes:
            raise too_large(store.max_bytes)
        if self.num_lines + (not self._ends_a_line) > store.max_lines:
            raise bad_request(
                f"The file has more than {store.max_lines:,} lines: make several of it.", "file"
            )

    def finish(self, kept_s: int | None = None) -> FileRecord:
        """All is written: put it on the disk, under its id.

        Args:
            kept_s: seconds until it expires; None for never.
        """
        with disk.disk_refusals(self._store.folder):
            os.fsync(self._fd)
        record = replace(self._record, num_bytes=self.num_bytes, sha256=self.sha256)
        record = self._store.keep(self._folder, record, kept_s)
        self._is_kept = True
        return record


def too_large(max_bytes: int) -> ApiError:
    """The error of a file over the limit."""
    return ApiError(
        413,
        f"The file is larger than {max_bytes:,} bytes, the most that is taken: make several of it.",
        param="file",
    )


def kept_seconds(field: str, anchor: object, seconds: object) -> int:
    """The seconds of an `expires_after` of the interface.

    Raises:
        ApiError: 400, by the field.
    """
    if anchor != "created_at":
        raise bad_request(f"{field} needs an anchor, which is created_at.", f"{field}[anchor]")
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() and len(seconds) < 10:
        seconds = int(seconds)
    if isinstance(seconds, bool) or not isinstance(seconds, int):
        raise bad_request(f"{field} needs seconds, a whole number.", f"{field}[seconds]")
    if not LEAST_KEPT_S <= seconds <= MOST_KEPT_S:
        raise bad_request(
            f"{field} is {seconds} seconds: it is from {LEAST_KEPT_S} to {MOST_KEPT_S}.",
            f"{field}[seconds]",
        )
    return seconds
