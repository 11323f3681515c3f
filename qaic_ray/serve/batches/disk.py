"""The folder of files and batches: private, one server's, each thing in it whole or not there."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qaic_ray.errors import Unfinished, UsageError
from qaic_ray.files.folders import replacing, sync_path
from qaic_ray.runs.journal import LOCK_NAME
from qaic_ray.serve.api_errors import ApiError

FILE, BATCH = "file-", "batch_"
_ID = re.compile(r"(?:file-|batch_)[0-9a-f]{36}")
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600
_NO_STORAGE = 507  # Insufficient Storage
_LEFT_PREFIX = "."


class Ids:
    """Gives ids that nobody guesses and that sort in the order in which they were given.

    Twelve hex digits are the time in milliseconds, the others are random. So a page of a list
    begins behind an id, whether the thing that had it is still there or not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last_ms = 0

    def seen(self, id_: str) -> None:
        """An id that was given earlier; later ones come behind it."""
        self._last_ms = max(self._last_ms, int(id_[-36:-24], 16))

    def new(self, prefix: str, now_s: float) -> str:
        """An id that begins with `FILE` or `BATCH`."""
        with self._lock:
            self._last_ms = max(self._last_ms + 1, int(now_s * 1000))
            return f"{prefix}{self._last_ms:012x}{secrets.token_hex(12)}"


def is_id(text: str, prefix: str) -> bool:
    """Whether a text is an id of this kind; nothing else ever becomes part of a path."""
    return text.startswith(prefix) and _ID.fullmatch(text) is not None


@contextmanager
def disk_refusals(folder: Path) -> Iterator[None]:
    """Raise one sentence for what the disk refuses, to us or to a journal."""
    try:
        yield
    except (OSError, Unfinished) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        said = cause.strerror if isinstance(cause, OSError) else None
        raise ApiError(
            _NO_STORAGE,
            f"The server's folder of files and batches, {folder}, cannot be used "
            f"({said or error}): put that right; what is there is kept.",
            code="storage_failed",
        ) from error


def private_folder(path: Path) -> Path:
    """A folder that only its owner can look into; made where it is not there.

    Raises:
        UsageError: it cannot be made, or is somebody else's.
    """
    try:
        path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        path.chmod(_FOLDER_MODE)
        os.listdir(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be the folder of files and batches ({error.strerror}): give another "
            "one (--folder), or make this one yours."
        ) from error
    return path


def hold(folder: Path) -> FileLock:
    """The folder's lock, for this server alone; the system frees it when the process ends.

    Raises:
        UsageError: another server has it.
    """
    lock = FileLock(folder / LOCK_NAME, timeout=0, thread_local=False, mode=_FILE_MODE)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"Another server keeps its files and batches in {folder}: stop that one, or give this "
            "one another folder (--folder)."
        ) from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be locked ({error.strerror}): use another.") from error
    return lock


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all, to the disk."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    with replacing(path, unfinished) as stream:
        os.fchmod(stream.fileno(), _FILE_MODE)
        stream.write(text.encode())


def private_file(path: Path) -> int:
    """Open a new file for writing that only its owner can read."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)


def workspace(parent: Path) -> Path:
    """A new folder beside those that are whole; `publish` gives it its name."""
    path = parent / f"{_LEFT_PREFIX}{secrets.token_hex(8)}"
    path.mkdir(mode=_FOLDER_MODE)
    return path


def drop(made: Path) -> None:
    """Remove a workspace that gets no name, if it has none."""
    if made.exists():
        shutil.rmtree(made)


def publish(made: Path, target: Path) -> None:
    """Give a finished workspace its name; what a killed process left at that name is replaced."""
    if target.exists():
        remove(target)
    sync_path(made)
    made.rename(target)
    sync_path(target.parent)


def remove(path: Path) -> None:
    """Remove a folder: it loses its name first, so half of it is never seen."""
    away = path.with_name(f"{_LEFT_PREFIX}{secrets.token_hex(8)}")
    path.rename(away)
    sync_path(path.parent)
    shutil.rmtree(away)


def sweep(parent: Path) -> None:
    """Remove what a killed server left half made, or half removed."""
    for entry in list(os.scandir(parent)):
        if entry.name.startswith(_LEFT_PREFIX) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
