"""A prompts file as it was when the run looked through it: later reads give that, or an error.

The file is read twice: for its digest before the run, and for its rows while the run goes, which
may be hours later. Each block of the second reading is compared with the first one's, so a run has
the rows of one content, whatever happens to the file. What is appended later is not of the run.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qaic_ray.errors import QaicRayError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 2**20
_DIGEST_BYTES = 8
_KEPT_BLOCKS = 8


class InputChanged(QaicRayError):
    """The file does not hold any more what the run began with."""


@dataclass(frozen=True)
class FrozenFile:
    """The first `num_bytes` bytes of a file, known by their SHA-256 and a digest of each block."""

    path: Path
    num_bytes: int
    sha256: str
    blocks: bytes

    @classmethod
    def of(cls, path: Path, num_bytes: int | None = None) -> FrozenFile:
        """Look through a file, or through its first `num_bytes` bytes.

        Raises:
            InputChanged: the file is shorter.
            QaicRayError: it cannot be read.
        """
        whole = hashlib.sha256()
        blocks = bytearray()
        try:
            with path.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size if num_bytes is None else num_bytes
                for offset in range(0, size, BLOCK_BYTES):
                    block = _read_at(stream.fileno(), offset, min(BLOCK_BYTES, size - offset))
                    if offset + len(block) < min(offset + BLOCK_BYTES, size):
                        raise InputChanged(
                            f"{path} has {offset + len(block)} bytes, and had {size} when the run "
                            "began."
                        )
                    whole.update(block)
                    blocks += _digest(block)
        except OSError as error:
            raise QaicRayError(
                f"The prompts in {path} cannot be read: {error.strerror}."
            ) from error
        return cls(path, size, whole.hexdigest(), bytes(blocks))

    def open(self) -> io.BufferedReader:
        """The content, as a file to read and seek in; reading raises InputChanged where it differs.

        Raises:
            OSError: it cannot be opened any more.
        """
        return io.BufferedReader(_Frozen(self), BLOCK_BYTES)

    def block_digest(self, number: int) -> bytes:
        """Of a block, counted from 0."""
        return self.blocks[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES]


class _Frozen(io.RawIOBase):
    """Reads whole blocks, and gives nothing of one before it was compared."""

    def __init__(self, file: FrozenFile) -> None:
        self._file = file
        self._descriptor = os.open(file.path, os.O_RDONLY)
        self._position = 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.num_bytes}
        self._position = max(0, start[whence] + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        number, offset = divmod(self._position, BLOCK_BYTES)
        if self._position >= self._file.num_bytes:
            return 0
        piece = self._block(number)[offset : offset + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def _block(self, number: int) -> bytes:
        block = self._kept.get(number)
        if block is None:
            offset = number * BLOCK_BYTES
            size = min(BLOCK_BYTES, self._file.num_bytes - offset)
            block = _read_at(self._descriptor, offset, size)
            if _digest(block) != self._file.block_digest(number):
                raise InputChanged(
                    f"{self._file.path} has changed since the run began: it is another one from "
                    f"byte {offset} on."
                )
            if len(self._kept) == _KEPT_BLOCKS:
                self._kept.popitem(last=False)
            self._kept[number] = block
        return block


def _digest(block: bytes) -> bytes:
    return hashlib.sha256(block).digest()[:_DIGEST_BYTES]


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    """So many bytes from there; fewer at the end of the file."""
    pieces = []
    while size and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)
