"""The lines of a file or of stdin, plain or compressed. Knows nothing of what stands in them."""

from __future__ import annotations

import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, cast

from qaic_ray.errors import QaicRayError, UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from qaic_ray.fleet.frozen_file import FrozenFile

STDIN = "-"

MAX_LINE_BYTES = 2**24
"""What is longer was never meant as a prompt, and must not fill the memory: a disk image, a file of
one line, a bomb in a gzip."""

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"

# The zstd reader loses what it had read of a block when it meets damage.
_ZSTD_BLOCK_BYTES = 4096


def check_readable(path: str) -> None:
    """See that a prompts file can be opened.

    Raises:
        UsageError: it cannot.
    """
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder: give a file of prompts.")
    if not os.path.exists(path):
        raise UsageError(f"There is no prompts file {path}.")
    if not os.access(path, os.R_OK):
        raise UsageError(f"The prompts file {path} may not be read: check its permissions.")


def input_lines(path: str, frozen: FrozenFile | None = None) -> Iterator[bytes]:
    r"""The lines without their ends, each when it is asked for; of the file as it was, if frozen.

    Lines end at `\n` or `\r\n`; a byte order mark before the first is left out. Gzip and zstd are
    known by their first bytes, whatever the name. Of a line that is longer than `MAX_LINE_BYTES`
    only the beginning is given, one byte more than that.

    Raises:
        QaicRayError: while reading, when that fails or the compressed data is damaged.
    """
    # Bytes: Python's text lines also end at a lone carriage return, and one undecodable line must
    # not stop the others.
    num_lines = 0
    try:
        with _open(path, frozen) as stream:
            for line in _whole_lines(stream):
                start = len(_BOM) if num_lines == 0 and line.startswith(_BOM) else 0
                yield line[start:].removesuffix(b"\n").removesuffix(b"\r")
                num_lines += 1
    except (OSError, EOFError, zlib.error) as error:
        raise cannot_read(path, f"line {num_lines}" if num_lines else None, error) from error


def cannot_read(path: str, last: str | None, error: Exception) -> QaicRayError:
    """The error of an input that breaks off; `last` is what was read last."""
    past = f" past {last}" if last else ""
    reason = getattr(error, "strerror", None) or str(error).removesuffix(".")
    return QaicRayError(f"The prompts in {path} cannot be read{past}: {reason}.")


def _open(path: str, frozen: FrozenFile | None) -> BinaryIO:
    if path != STDIN:
        return open(path, "rb") if frozen is None else cast("BinaryIO", frozen.open())
    try:
        # Not sys.stdin: the end of the process would wait for a thread that is reading it.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # somebody put another stream in its place
        return cast("BinaryIO", sys.stdin.buffer)


def _whole_lines(stream: BinaryIO) -> Iterator[bytes]:
    # Not more than the first line's: whoever types it is not kept waiting for a second one.
    head = stream.readline(len(_ZSTD))
    if head.startswith(_GZIP):
        yield from _bounded(gzip.GzipFile(fileobj=_Rejoined(head, stream)).readline)
        return
    if head.startswith(_ZSTD):
        yield from _bounded(_zstd_reader(_Rejoined(head, stream)).readline)
        return
    if head:
        rest = b"" if head.endswith(b"\n") else _shortened(stream.readline)
        yield head + rest
        yield from _bounded(stream.readline)


def _bounded(readline: Callable[[int], bytes]) -> Iterator[bytes]:
    limit = MAX_LINE_BYTES + 1
    for line in iter(partial(readline, limit), b""):
        if len(line) == limit and not line.endswith(b"\n"):
            _skip_line(readline)
        yield line


def _shortened(readline: Callable[[int], bytes]) -> bytes:
    return next(_bounded(readline), b"")


def _skip_line(readline: Callable[[int], bytes]) -> None:
    while (rest := readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _zstd_reader(stream: io.RawIOBase) -> io.BufferedReader:
    import pyarrow

    unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
    return io.BufferedReader(unpacked, _ZSTD_BLOCK_BYTES)


class _Rejoined(io.RawIOBase):
    """A stream from its start, after `head` has been read from it."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = head
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        chunk = self._head[: len(view)] or self._stream.read(len(view))
        self._head = self._head[len(view) :]
        view[: len(chunk)] = chunk
        return len(chunk)
