"""A file or stdin, plain or compressed, as lines of UTF-8. Knows nothing of what stands in them.

Everything is read when it is asked for, and no more of a stream than has come: whoever types a line
is not kept waiting for a second one.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar, cast

from qaic_ray.errors import QaicRayError, UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from qaic_ray.formats.frozen_file import FrozenFile

STDIN = "-"

MAX_LINE_BYTES = 2**24
"""What is longer was never meant as a prompt, and must not fill the memory: a disk image, a file of
one line, a bomb in a gzip."""
MAX_SKIPPED_BYTES = 2**30
"""So much of a line that is too long is read over; what goes on is no file of prompts."""
ENDLESS = f"a row is longer than {MAX_SKIPPED_BYTES >> 30} GiB"
LOOK_BYTES = 2**16
"""How far a format is looked for."""

_BUFFER_BYTES = 2**16
_LONGEST_MAGIC = 6

_GZIP = b"\x1f\x8b"
_BZIP2 = b"BZh"
_XZ = b"\xfd7zXZ\x00"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPED = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f

_REFUSED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x04\x22\x4d\x18": "packed with lz4",
    b"ARROW1": "an Arrow file",
}

# The longer marks first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"

# The zstd reader loses what it had read of a block when it meets damage.
_ZSTD_BLOCK_BYTES = 4096

_T = TypeVar("_T")

_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)


def check_readable(path: str) -> None:
    """See that a prompts file can be opened.

    Raises:
        UsageError: it cannot.
    """
    shown = path if len(path) <= 512 else f"{path[:80]}..."
    if os.path.isdir(path):
        raise UsageError(f"{shown} is a folder: give a file of prompts.")
    if not os.path.exists(path):
        raise UsageError(f"There is no prompts file {shown}.")
    if not os.access(path, os.R_OK):
        raise UsageError(f"The prompts file {shown} may not be read: check its permissions.")


class Input:
    """An opened prompts file or stdin, unpacked and as UTF-8 without a mark.

    Gzip, zstd, bzip2 and xz are known by their first bytes, whatever the name, and so is UTF-16 or
    UTF-32 by its mark. First `look_on` may show what comes, then one of the iterators takes it.

    Args:
        path: of the file, or `-`.
        frozen: the file as it was when the run began; without it, it is read as it is.

    Raises:
        UsageError: for what is packed in a way that cannot be read.
        QaicRayError: while reading, when that fails or the compressed data is damaged.
    """

    last = ""
    """What was read last, for the error of an input that breaks off: `line 7`."""

    def __init__(self, path: str, frozen: FrozenFile | None = None) -> None:
        self._path = path
        self._frozen = frozen
        self.head = b""
        """What `look_on` has seen."""
        self._damage: Exception | None = None
        self._file = self._guarded(partial(_opened, path, frozen))
        try:
            self._stream = self._guarded(partial(_as_utf8, path, self._file))
        except QaicRayError:
            self._close()
            raise

    def __enter__(self) -> Input:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._path != STDIN:
            self._file.close()

    @property
    def is_all_there(self) -> bool:
        """Whether it is a file: looking on never waits."""
        try:
            return self._frozen is not None or stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        except OSError:
            return False

    @property
    def is_broken(self) -> bool:
        """Whether it breaks off behind the head."""
        return self._damage is not None

    def look_on(self) -> bool:
        """See one line more in `head`; False where there is none, or has been enough."""
        if self._damage is not None:
            return False
        try:
            line = self._stream.readline(LOOK_BYTES - len(self.head))
        except _DAMAGE as error:
            self._damage = error  # of what comes behind the head
            return False
        self.head += line
        return bool(line)

    def lines(self) -> Iterator[bytes]:
        r"""The lines without their ends: `\n` or `\r\n`, a lone `\r` is none.

        Of a line that is longer than `MAX_LINE_BYTES` only the beginning is given, one byte more
        than that.
        """
        for line in self.whole_lines():
            yield line.removesuffix(b"\n").removesuffix(b"\r")

    def whole_lines(self) -> Iterator[bytes]:
        """The lines with their ends."""
        # Bytes: Python's text lines also end at a lone carriage return, and one undecodable line
        # must not stop the others.
        readline = self._from_the_start().readline
        limit = MAX_LINE_BYTES + 1
        num_lines = 0
        try:
            while line := readline(limit):
                if len(line) == limit and not line.endswith(b"\n"):
                    _skip_line(readline)
                yield line
                num_lines += 1
        except _DAMAGE as error:
            self.last = f"line {num_lines}" if num_lines else ""
            raise cannot_read(self._path, self.last or None, error) from error

    def chunks(self) -> Iterator[bytes]:
        """All of it in pieces as they come."""
        stream = self._from_the_start()
        while chunk := self._guarded(partial(stream.read1, _BUFFER_BYTES)):
            yield chunk

    def broken(self, reason: str) -> QaicRayError:
        """The error of an input that breaks off behind what was read last."""
        return cannot_read(self._path, self.last or None, OSError(reason))

    def _from_the_start(self) -> io.BufferedReader:
        rest = self._stream if self._damage is None else _buffered(_Damaged(self._damage))
        return _rejoined(self.head, rest)

    def _guarded(self, read: Callable[[], _T]) -> _T:
        try:
            return read()
        except _DAMAGE as error:
            raise cannot_read(self._path, self.last or None, error) from error


def cannot_read(path: str, last: str | None, error: Exception) -> QaicRayError:
    """The error of an input that breaks off; `last` is what was read last."""
    past = f" past {last}" if last else ""
    reason = getattr(error, "strerror", None) or str(error).removesuffix(".")
    return QaicRayError(f"The prompts in {path} cannot be read{past}: {reason}.")


class _Stream(Protocol):
    """What is needed of a stream of bytes."""

    def readline(self, size: int = -1, /) -> bytes: ...

    def read1(self, size: int = -1, /) -> bytes: ...


def _opened(path: str, frozen: FrozenFile | None) -> io.BufferedReader:
    if path != STDIN:
        return open(path, "rb") if frozen is None else frozen.open()
    if sys.stdin is None:
        raise UsageError("There is no stdin to read prompts from: it is closed.")
    try:
        # Not sys.stdin: the end of the process would wait for a thread that is reading it.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # somebody put another stream in its place
        return sys.stdin.buffer  # type: ignore[return-value]


def _as_utf8(path: str, packed: _Stream) -> io.BufferedReader:
    """The stream without its packing and its encoding."""
    # Not more than the first line's: the end of a magic may be the end of what has come.
    head = packed.readline(_LONGEST_MAGIC)
    stream = _unpacked(head, _rejoined(head, packed))
    head = stream.readline(_LONGEST_MAGIC)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise UsageError(f"The prompts in {path} are {what}: give them unpacked, as text.")
    stream = _rejoined(head.removeprefix(_UTF8_MARK), stream)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    return stream if encoding is None else _buffered(_Recoded(stream, encoding))


def _unpacked(head: bytes, stream: io.BufferedReader) -> io.BufferedReader:
    # What reads from `raw` gets what has come; a buffer would wait until it is full.
    if head.startswith(_GZIP):
        return _rejoined(b"", gzip.GzipFile(fileobj=cast(BinaryIO, stream.raw)))
    if head.startswith(_BZIP2):
        return _buffered(_Unpacked(bz2.BZ2Decompressor, stream))
    if head.startswith(_XZ):
        return _buffered(_Unpacked(lzma.LZMADecompressor, stream))
    if head.startswith(_ZSTD) or (0x50 <= (head or b"\0")[0] < 0x60 and head[1:4] == _ZSTD_SKIPPED):
        import pyarrow

        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream.raw, mode="r"), "zstd")
        return _buffered(_Rejoined(b"", unpacked, _ZSTD_BLOCK_BYTES))
    return stream


def _buffered(raw: io.RawIOBase) -> io.BufferedReader:
    return io.BufferedReader(raw, _BUFFER_BYTES)


def _rejoined(head: bytes, stream: _Stream) -> io.BufferedReader:
    return _buffered(_Rejoined(head, stream))


def _skip_line(readline: Callable[[int], bytes]) -> None:
    num_bytes = 0
    while (rest := readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        num_bytes += len(rest)
        if num_bytes > MAX_SKIPPED_BYTES:
            raise EOFError(ENDLESS)


class _InputPieces(io.RawIOBase):
    """A stream that is made piece by piece."""

    def __init__(self) -> None:
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        chunk = self._left or self._next(len(view))
        self._left = chunk[len(view) :]
        chunk = chunk[: len(view)]
        view[: len(chunk)] = chunk
        return len(chunk)

    def _next(self, most: int) -> bytes:
        """What comes next, nothing at the end."""
        raise NotImplementedError


class _Rejoined(_InputPieces):
    """A stream from its start, after `head` has been read from it."""

    def __init__(self, head: bytes, stream: _Stream, most: int = _BUFFER_BYTES) -> None:
        super().__init__()
        self._left = head
        self._stream = stream
        self._most = most

    def _next(self, most: int) -> bytes:
        return self._stream.read1(min(most, self._most))


class _Damaged(_InputPieces):
    """What is left of a stream that broke off."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def _next(self, most: int) -> bytes:
        raise self._error


class _Unpacked(_InputPieces):
    """One or more packed streams behind each other, with zeros between them or not."""

    def __init__(
        self,
        make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor],
        stream: io.BufferedReader,
    ) -> None:
        super().__init__()
        self._make = make
        self._stream = stream
        self._unpacker = make()

    def _next(self, most: int) -> bytes:
        piece = b""
        while not piece:
            packed = b""
            if self._unpacker.eof:
                packed = self._unpacker.unused_data.lstrip(b"\0")
                while not packed:
                    if not (packed := self._stream.read1(_BUFFER_BYTES)):
                        return b""
                    packed = packed.lstrip(b"\0")
                self._unpacker = self._make()
            elif self._unpacker.needs_input:
                packed = self._stream.read1(_BUFFER_BYTES)
                if not packed:
                    raise EOFError("the compressed data ends too early")
            piece = self._unpacker.decompress(packed, most)
        return piece


class _Recoded(_InputPieces):
    """Text of an encoding with a mark, as UTF-8."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        super().__init__()
        self._stream = stream
        # Half of a surrogate pair is its line's error, and no other's.
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._has_ended = False

    def _next(self, most: int) -> bytes:
        text = ""
        while not text and not self._has_ended:
            chunk = self._stream.read1(most)
            self._has_ended = not chunk
            text = self._decoder.decode(chunk, final=self._has_ended)
        return text.encode("utf-8", "surrogatepass")
