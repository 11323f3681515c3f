"""Files at URIs (s3, gs, hdfs, abfs), through pyarrow's filesystems.

Credentials are the environment's, as each filesystem's own client reads them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, AWS_REGION for S3;
GOOGLE_APPLICATION_CREDENTIALS for gs; Hadoop's own configuration. AWS_ENDPOINT_URL, or
`?endpoint_override=` of the URI, names another server that speaks S3.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qaic_ray.errors import UsageError
from qaic_ray.formats.frozen_file import InputChanged

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 4 * 2**20
"""One request to the server asks for so many."""
KEPT_BLOCKS = 4
"""An opened file holds so many of these: the columns of a parquet file are read side by side."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_MAX_REASON_CHARS = 240


def is_uri(text: str) -> bool:
    """Whether a text is a URI and no path."""
    return _SCHEME.match(text) is not None


@dataclass(frozen=True)
class RemotePlace:
    """A filesystem and a path in it; `uri` is as the user wrote it."""

    uri: str
    filesystem: Any
    path: str

    def below(self, path: str) -> RemotePlace:
        """Another path of the same filesystem that lies below this one."""
        rest = path.removeprefix(self.path).lstrip("/")
        start, query, after = self.uri.partition("?")
        uri = f"{start.rstrip('/')}/{rest}" if rest else start
        return RemotePlace(uri + query + after, self.filesystem, path)

    def written(self, name: str) -> RemotePlace:
        """A file of that name in this folder."""
        return self.below(f"{self.path.rstrip('/')}/{name}")


def remote_place(uri: str) -> RemotePlace:
    """The place that a URI names; nothing need be there.

    What follows the bucket or host is taken as it stands, without percent codes.

    Raises:
        UsageError: for a URI that no filesystem takes, or that brings a password.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc and ":" in parts.netloc.rpartition("@")[0]:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UsageError(
            f"A URI with a password would be written into run folders: give {shown}, and the "
            "credentials by the environment, like AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if not parts.netloc and parts.scheme != "hdfs":
        raise UsageError(f"{uri} names no bucket or host: write it like s3://bucket/folder.")
    from pyarrow import fs

    query = f"?{parts.query}" if parts.query else ""
    with _one_sentence(uri):
        filesystem, base = fs.FileSystem.from_uri(f"{parts.scheme}://{parts.netloc}/{query}")
    start, _, _ = uri.partition("?")
    rest = start[len(parts.scheme) + len("://") + len(parts.netloc) :].strip("/")
    return RemotePlace(uri, filesystem, f"{base.rstrip('/')}/{rest}" if rest else base)


@dataclass(frozen=True)
class RemoteStatus:
    """What a filesystem tells of a file without reading it; unchanged where the file is."""

    num_bytes: int
    mtime_ns: int | None


def remote_files(place: RemotePlace) -> list[tuple[RemotePlace, RemoteStatus]] | None:
    """The file at a place, or every file below it, in any order; None where there is nothing.

    Raises:
        UsageError: the filesystem refuses, or cannot be reached.
    """
    from pyarrow import fs

    with _one_sentence(place.uri):
        found = place.filesystem.get_file_info(place.path)
        if found.type == fs.FileType.NotFound:
            return None
        infos = [found]
        if found.type == fs.FileType.Directory:
            infos = place.filesystem.get_file_info(fs.FileSelector(place.path, recursive=True))
        return [
            (place.below(info.path), _status(info))
            for info in infos
            if info.type == fs.FileType.File
        ]


def _status(info: Any) -> RemoteStatus:
    return RemoteStatus(info.size or 0, info.mtime_ns)


@contextmanager
def _one_sentence(uri: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{uri} cannot be reached: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """What an error of a filesystem says, in one line without its end."""
    return " ".join(str(error).split())[:_MAX_REASON_CHARS].rstrip(". ")


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URI as it was when the run began, as far as that is known without reading it.

    Its size and time of change are looked at when it is opened and when its end is read.
    """

    place: RemotePlace
    status: RemoteStatus

    @property
    def path(self) -> str:
        """Its URI."""
        return self.place.uri

    def open(self) -> io.BufferedReader:
        """The content as a seekable file, whose reading raises InputChanged where it differs.

        Raises:
            OSError: it cannot be opened any more.
        """
        return io.BufferedReader(_RemoteReader(self))

    def check(self) -> None:
        """See that it is still the one that it was.

        Raises:
            InputChanged: it is not.
            OSError: the filesystem refuses.
        """
        info = self.place.filesystem.get_file_info(self.place.path)
        if not info.is_file:
            raise InputChanged(f"{self.path} is gone since the run began.")
        if _status(info) != self.status:
            raise InputChanged(
                f"{self.path} has changed since the run began: it had {self.status.num_bytes} "
                f"bytes, and has {info.size} of another time."
            )


class _RemoteReader(io.RawIOBase):
    """Reads a remote file from any place on, in blocks as large as one request."""

    def __init__(self, file: RemoteFile) -> None:
        file.check()
        self._file = file
        self._stream = file.place.filesystem.open_input_file(file.place.path)
        self._position = 0
        self._block = lru_cache(KEPT_BLOCKS)(self.read_block)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        size = self._file.status.num_bytes
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size}
        self._position = max(0, start[whence] + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._position >= self._file.status.num_bytes:
            return 0
        view = memoryview(buffer).cast("B")
        number, offset = divmod(self._position, READ_BYTES)
        piece = self._block(number)[offset : offset + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def read_block(self, number: int) -> bytes:
        """A block, counted from 0.

        Raises:
            InputChanged: the file is seen to be another one, or this was its last block and it is.
        """
        offset, size = number * READ_BYTES, self._file.status.num_bytes
        wanted = min(READ_BYTES, size - offset)
        block = bytes(self._stream.read_at(wanted, offset))
        if len(block) < wanted or offset + wanted == size:
            self._file.check()
        if len(block) < wanted:
            raise InputChanged(f"{self._file.path} ends at byte {offset + len(block)} of {size}.")
        return block

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
