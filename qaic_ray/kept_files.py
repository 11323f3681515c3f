"""Files that are kept: what each was when it was made or read, and whether it still is that.

Unchanged status means unchanged content. Where it changed, the SHA-256 decides: a copy has another
inode and the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_BLOCK_BYTES = 2**20
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was read; unchanged status means unchanged content."""

    name: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """The present state of a file."""
        status = path.stat()
        return cls(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True)
class KeptFile:
    """A file of a folder that we made: its path in the folder, its status and its digest."""

    name: str
    status: SourceFile
    sha256: str

    def __post_init__(self) -> None:
        inside(self.name)

    @classmethod
    def of(cls, folder: Path, name: str) -> KeptFile:
        """A file as it is now; it is read through."""
        path = folder / name
        status = SourceFile.of(path)
        return cls(name, status, sha256_of(path))

    def is_untouched(self, folder: Path) -> bool:
        """Whether not even the file's status changed."""
        path = folder / self.name
        try:
            is_file = stat.S_ISREG(path.lstat().st_mode)
            return is_file and SourceFile.of(path) == self.status
        except OSError:
            return False

    def fault(self, folder: Path) -> str:
        """What is wrong with the file now, as the rest of a sentence; empty for nothing.

        It is read only where its status changed.
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
    """A relative path as it is, where it leads out of no folder.

    Raises:
        ValueError: for any other.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("a path leads out of the folder")
    if "\0" in name or any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts):
        raise ValueError("no file system takes such a path")
    return name


def first_fault(folder: Path, files: Iterable[KeptFile]) -> str:
    """What is wrong with the first file that is not what it was; empty for nothing."""
    return next(filter(None, (file.fault(folder) for file in files)), "")


def sha256_of(path: Path) -> str:
    """The digest of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
