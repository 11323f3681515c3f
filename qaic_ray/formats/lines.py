"""A prompts file or stdin, plain or compressed, as lines of UTF-8.

Reading is lazy: a line is given as soon as it has come, and no more than that is waited for.
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
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, BinaryIO, cast

from qaic_ray.errors import QaicRayError, UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from qaic_ray.formats.frozen_file import KnownFile

STDIN = "-"


MAX_LINE_BYTES = 2**24
"""The longest line, item of a JSON array, or prompt that is read. What is longer was never meant as
a prompt, and must not fill the memory: a disk image, a file of one line, a bomb in a gzip."""
MAX_SKIPPED_BYTES = 2**30
"""How much of a longer one is read over before the input is given up."""

_LOOK_BYTES = 2**16  # how far a format is looked for
_BUFFER_BYTES = 2**16
_LONGEST_MAGIC = 6
_MAX_REASON_CHARS = 300  # a remote file's error may hold the server's whole answer

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

_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError)


class EmptyInput(UsageError):
    """There are no prompts in an input."""


def check_readable(path: str) -> None:
    """Check that a prompts file can be opened.

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


class PromptInput:
    """A prompts file or stdin, unpacked, as UTF-8 without a byte order mark; entering it opens it.

    Gzip, zstd, bzip2 and xz are recognised by their first bytes, UTF-16 and UTF-32 by their mark.
    Call `look_on` to see the beginning, then take everything from one of the iterators.

    Args:
        path: of the file, or `-`.
        frozen: the file as it was when the run began; without it, it is read as it is.
        name: how error rows name it; empty for the file's own name.

    Raises:
        UsageError: for a packing that cannot be read.
        QaicRayError: while reading, when that fails or the compressed data is damaged.
    """

    last = ""
    """What was read last, for the error of an input that breaks off: `line 7`."""

    def __init__(self, path: str, frozen: KnownFile | None = None, name: str = "") -> None:
        self.path = path
        self.name = name or ("stdin" if path == STDIN else PurePath(path).name)
        """How error rows name it."""
        self._frozen = frozen
        self.head = b""
        """What `look_on` has seen."""
        self.damage: Exception | None = None
        """What reading behind the head failed with."""

    def __enter__(self) -> PromptInput:
        with self._guarded(), ExitStack() as opened:
            self._file = _opened(self.path, self._frozen)
            if self.path != STDIN:
                opened.enter_context(self._file)
            self._stream = _as_utf8(self.path, self._file)
            self._close = opened.pop_all().close
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def is_all_there(self) -> bool:
        """Whether it is a regular file, so that looking on never waits."""
        try:
            return self._frozen is not None or stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        except OSError:
            return False

    def look_on(self) -> bool:
        """Add a line to `head`; False at the end, after damage, or after 64 KiB."""
        if self.damage is not None:
            return False
        try:
            line = self._stream.readline(_LOOK_BYTES - len(self.head))
        except _DAMAGE as error:
            self.damage = error  # raised when the head has been read
            return False
        self.head += line
        return bool(line)

    def lines(self) -> Iterator[bytes]:
        r"""The lines without their ends, `\n` or `\r\n`; a lone `\r` ends no line.

        Of a line over the limit only the beginning is given, one byte more than the limit.
        """
        for line in self.whole_lines():
            yield line.removesuffix(b"\n").removesuffix(b"\r")

    def whole_lines(self) -> Iterator[bytes]:
        """The lines with their ends."""
        # Bytes: Python's text lines also end at a lone carriage return, and one undecodable line
        # must not stop the others.
        readline = self._from_the_start().readline
        most = MAX_LINE_BYTES + 1
        num_lines = 0
        try:
            while line := readline(most):
                if len(line) == most and not line.endswith(b"\n"):
                    self._skip_line(readline)
                yield line
                num_lines += 1
        except _DAMAGE as error:
            self.last = f"line {num_lines}" if num_lines else ""
            raise cannot_read(self.path, self.last, error) from error

    def chunks(self) -> Iterator[bytes]:
        """All of it in pieces as they come."""
        stream = self._from_the_start()
        with self._guarded():
            while chunk := stream.read1(_BUFFER_BYTES):
                yield chunk

    def broken(self, reason: str = "") -> QaicRayError:
        """The error of an input that breaks off after what was read last, or in an endless row."""
        return cannot_read(self.path, self.last, OSError(reason or _endless()))

    def _from_the_start(self) -> io.BufferedReader:
        return _buffered(self._stream.read1 if self.damage is None else self._fail, self.head)

    def _fail(self, _: int) -> bytes:
        raise cast(Exception, self.damage)

    def _skip_line(self, readline: Callable[[int], bytes]) -> None:
        num_bytes = 0
        while (rest := readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            num_bytes += len(rest)
            if num_bytes > MAX_SKIPPED_BYTES:
                raise EOFError(_endless())

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise cannot_read(self.path, self.last, error) from error


def _endless() -> str:
    return f"a row is longer than {MAX_SKIPPED_BYTES >> 30} GiB"


def cannot_read(path: str, last: str, error: Exception) -> QaicRayError:
    """The error of an input that breaks off; `last` is what was read last, if anything."""
    past = f" past {last}" if last else ""
    reason = getattr(error, "strerror", None) or str(error)
    reason = " ".join(reason.split())[:_MAX_REASON_CHARS].removesuffix(".")
    return QaicRayError(f"The prompts in {path} cannot be read{past}: {reason}.")


def _opened(path: str, frozen: KnownFile | None) -> io.BufferedReader:
    if path != STDIN:
        return open(path, "rb") if frozen is None else frozen.open()
    if sys.stdin is None:
        raise UsageError("There is no stdin to read prompts from: it is closed.")
    try:
        # Not sys.stdin: the end of the process would wait for a thread that is reading it.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # somebody put another stream in its place
        return sys.stdin.buffer  # type: ignore[return-value]


def _as_utf8(path: str, packed: io.BufferedReader) -> io.BufferedReader:
    """The stream without its packing and its encoding."""
    # Not more than the first line's: the end of a magic may be the end of what has come.
    head = packed.readline(_LONGEST_MAGIC)
    stream = _unpacked(head, _buffered(packed.read1, head))
    head = stream.readline(_LONGEST_MAGIC)
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise UsageError(f"The prompts in {path} are {what}: give them unpacked, as text.")
    stream = _buffered(stream.read1, head.removeprefix(_UTF8_MARK))
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    return stream if encoding is None else _joined(_recoded_pieces(stream, encoding))


def _unpacked(head: bytes, stream: io.BufferedReader) -> io.BufferedReader:
    # What reads from `raw` gets what has come; a buffer would wait until it is full.
    if head.startswith(_GZIP):
        return _buffered(gzip.GzipFile(fileobj=cast(BinaryIO, stream.raw)).read1)
    if head.startswith(_BZIP2):
        return _joined(_unpacked_pieces(stream, bz2.BZ2Decompressor))
    if head.startswith(_XZ):
        return _joined(_unpacked_pieces(stream, lzma.LZMADecompressor))
    if head.startswith(_ZSTD) or (0x50 <= (head or b"\0")[0] < 0x60 and head[1:4] == _ZSTD_SKIPPED):
        import pyarrow

        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream.raw, mode="r"), "zstd")
        return _buffered(lambda most: cast(bytes, unpacked.read1(min(most, _ZSTD_BLOCK_BYTES))))
    return stream


def _unpacked_pieces(
    stream: io.BufferedReader,
    make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor],
) -> Iterator[bytes]:
    """The content of one or more packed streams in a row, with zeros between them or not.

    `BZ2File` and `LZMAFile` end silently at damage behind the first stream.
    """
    unpacker = make()
    while True:
        packed = b""
        if unpacker.eof:
            packed = unpacker.unused_data.lstrip(b"\0")
            while not packed:
                if not (packed := stream.read1(_BUFFER_BYTES)):
                    return
                packed = packed.lstrip(b"\0")
            unpacker = make()
        elif unpacker.needs_input and not (packed := stream.read1(_BUFFER_BYTES)):
            raise EOFError("the compressed data ends too early")
        if piece := unpacker.decompress(packed, _BUFFER_BYTES):
            yield piece


def _recoded_pieces(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    """Text of an encoding with a mark, as UTF-8."""
    pieces = iter(lambda: stream.read1(_BUFFER_BYTES), b"")
    # Half of a surrogate pair is its line's error, and no other's.
    for text in codecs.iterdecode(pieces, encoding, "surrogatepass"):
        yield text.encode("utf-8", "surrogatepass")


def _joined(pieces: Iterator[bytes]) -> io.BufferedReader:
    return _buffered(lambda _: next(pieces, b""))


def _buffered(read1: Callable[[int], bytes], head: bytes = b"") -> io.BufferedReader:
    return io.BufferedReader(_PieceStream(read1, head), _BUFFER_BYTES)


class _PieceStream(io.RawIOBase):
    """A stream of `head` and then what `read1(most_bytes)` gives; nothing is its end."""

    def __init__(self, read1: Callable[[int], bytes], head: bytes) -> None:
        self._read1 = read1
        self._left = head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        chunk = self._left or self._read1(len(view))
        self._left = chunk[len(view) :]
        chunk = chunk[: len(view)]
        view[: len(chunk)] = chunk
        return len(chunk)
