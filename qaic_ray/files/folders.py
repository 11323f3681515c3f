"""Folders and files that we make: whole or not at all, built by one process at a time, replaced
only where they are ours, and checked later for whether they are still what was made."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from qaic_ray.errors import QaicRayError, UsageError

CACHE_VARIABLE = "QAIC_RAY_CACHE"
WAIT_SAID_S = 5.0

_POLL_S = 0.1
_MAX_TARGET_BYTES = 200  # of a name that something hidden is put beside
_MAX_NAME_BYTES = 255
_READ_BYTES = 2**20
_MARK = ".qaic-ray"  # in a builder's workspace: all of it may be removed
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_HOLDER = re.compile(r"process \d+ on [\w.-]+ since [\dT:Z-]+")

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The user's cache folder of this package; `QAIC_RAY_CACHE` overrides it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_path("qaic-ray", appauthor=False))


def foreign_files(folder: Path, is_ours: Callable[[str], bool], *, limit: int = 3) -> list[str]:
    """What lies in a folder that we did not put there.

    Args:
        folder: is searched with all below it; no link is followed.
        is_ours: of the path of a file, relative to the folder, with `/`.
        limit: how many are looked for.

    Returns:
        Relative paths of files that are not ours, of links, and of empty folders (with a `/`).
    """

    def foreign() -> Iterator[str]:
        pending = [folder]
        while pending:
            place = pending.pop()
            entries = list(os.scandir(place))
            if not entries and place != folder:
                yield f"{place.relative_to(folder).as_posix()}/"
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif not (entry.is_file(follow_symlinks=False) and is_ours(name)):
                    yield name

    return sorted(islice(foreign(), limit))


@contextmanager
def locked(target: Path, *, wait_said_s: float = WAIT_SAID_S) -> Iterator[None]:
    """Hold the lock for building `target`, against every path, user and node that may build it.

    The lock file lies beside the target while it is held; the kernel frees it when the process
    ends. On a file system without locks a warning is logged and nobody is waited for.

    Args:
        target: the file or folder to build.
        wait_said_s: after so long a warning names the process that is waited for.

    Raises:
        UsageError: no lock file can be made there.
    """
    target = Path(os.path.realpath(target))
    path = _beside(target, "lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, target, wait_said_s)
    except OSError as error:
        kind = QaicRayError if error.errno in _DISK else UsageError
        raise kind(f"Cannot write {path}, the lock of {target}: {error.strerror}.") from error
    try:
        yield
    finally:
        with suppress(OSError):  # another user's, in a folder where only the owner may remove
            if _is_at(path, descriptor):
                path.unlink()
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without an error.

    A kill at any moment leaves the old folder or none; the next builder removes what is left beside
    it. The caller holds `locked(target)` and has checked that what is there may be replaced.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{_beside(target, 'building').name}-"
    for entry in list(os.scandir(target.parent)):
        if entry.name.startswith(prefix) and _is_leftover(entry):
            shutil.rmtree(entry.path)
    workspace = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        (workspace / _MARK).touch()
        fresh = workspace / "new"
        fresh.mkdir()
        yield fresh
        sync_tree(fresh)
        if target.exists():
            target.rename(workspace / "old")
        fresh.rename(target)
        sync_path(target.parent)
    finally:
        shutil.rmtree(workspace)


def being_built(target: Path) -> Iterator[Path]:
    """The folders in which `building` makes `target`, here or on another machine; mostly one."""
    target = Path(os.path.realpath(target))
    return target.parent.glob(f"{_beside(target, 'building').name}-*/new")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; a link at its path is replaced, not followed."""
    with replacing(path, path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path, unfinished: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the name `path` when the block ends without an error.

    Args:
        path: a file there is replaced.
        unfinished: the name until then, in the same folder; a file there is removed, so writers
            that may run at the same time need different ones.
    """
    try:
        with open(new_file(unfinished), "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
        sync_path(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def new_file(path: Path) -> int:
    """Open a new file for writing; a link or file at its path is replaced."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def open_lock(path: Path, *, for_all: bool = False) -> int | None:
    """Open a lock file, or make it; None for a file that is no lock file.

    Args:
        path: the file; no link is followed.
        for_all: every user may open it; else only where its folder is one of all users.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        # Not created where it is there: in a folder of all users the kernel refuses that for a
        # file of somebody else's.
        with suppress(FileNotFoundError):
            descriptor = os.open(path, flags)
            break
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            if for_all or path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                os.fchmod(descriptor, 0o666)  # past the umask
            break
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        return None
    return descriptor


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync_path(Path(parent, name))
        sync_path(Path(parent))


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class SourceFile:
    """The status of a file when it was read; unchanged status means unchanged content."""

    name: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Of a file as it is now."""
        status = path.stat()
        return cls(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True)
class KeptFile:
    """A file of a folder that we made: its path in the folder, its status and its SHA-256."""

    name: str
    status: SourceFile
    sha256: str

    def __post_init__(self) -> None:
        inside(self.name)

    @classmethod
    def of(cls, folder: Path, name: str) -> KeptFile:
        """Of a file as it is now; it is read."""
        path = folder / name
        status = SourceFile.of(path)
        return cls(name, status, sha256_of(path))

    def is_untouched(self, folder: Path) -> bool:
        """Whether not even the file's status changed."""
        path = folder / self.name
        try:
            return not path.is_symlink() and SourceFile.of(path) == self.status
        except OSError:
            return False

    def fault(self, folder: Path) -> str:
        """What is wrong with the file now, as the rest of a sentence; empty for nothing.

        It is read only where its status changed: a copy has another inode and the same bytes.
        """
        if self.is_untouched(folder):
            return ""
        path = folder / self.name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return f"{self.name} is not a file"
            if status.st_size != self.status.num_bytes:
                return f"{self.name} has {status.st_size} bytes, not {self.status.num_bytes}"
            if sha256_of(path) != self.sha256:
                return f"{self.name} has changed since it was made"
        except OSError as error:
            return f"{self.name} cannot be read ({error.strerror})"
        return ""


def inside(name: str) -> str:
    """The same relative path, if it stays inside its folder.

    Raises:
        ValueError: it does not, or no file system takes it.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("a path leads out of the folder")
    if "\0" in name or any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts):
        raise ValueError("no file system takes such a path")
    return name


def first_fault(folder: Path, files: Iterable[KeptFile]) -> str:
    """What is wrong with the first file that is not what was made; empty for nothing."""
    return next(filter(None, (file.fault(folder) for file in files)), "")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _beside(target: Path, what: str) -> Path:
    """The path of a hidden file beside a target, of a length that file systems take."""
    name = target.name
    if len(os.fsencode(name)) > _MAX_TARGET_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.with_name(f".{name}.{what}")


def _is_leftover(entry: os.DirEntry[str]) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        return False
    if entry.stat(follow_symlinks=False).st_uid != os.getuid():
        return False  # only its owner may look into it
    content = os.listdir(entry.path)
    return not content or _MARK in content


def _acquire(path: Path, target: Path, wait_said_s: float) -> int:
    """Open the lock file and wait for the lock; the descriptor that holds it."""
    said_at_s = time.monotonic() + wait_said_s
    while True:
        descriptor = open_lock(path)
        if descriptor is None:
            raise UsageError(f"{path} is not a lock file of this tool: remove it.")
        is_held = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # If its last holder has removed the file, nobody else would find this lock.
            if _is_at(path, descriptor):
                _sign(descriptor)
                is_held = True
        except BlockingIOError:
            if time.monotonic() >= said_at_s:
                _log.warning("Waiting for %s, which %s builds.", target, _holder(descriptor))
                said_at_s = float("inf")
            time.sleep(_POLL_S)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            how = "The file system of %s has no locks (%s): let nobody else build it meanwhile."
            _log.warning(how, target, error.strerror)
            _sign(descriptor)
            is_held = True
        finally:
            if not is_held:
                os.close(descriptor)
        if is_held:
            return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at a path."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = f"process {os.getpid()} on {os.uname().nodename} since {since}".encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 512, 0).decode(errors="replace")
    return text if _HOLDER.fullmatch(text) else "another process"
