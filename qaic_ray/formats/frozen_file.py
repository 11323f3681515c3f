"""A prompts file as it was when the run began: later reads give that content, or an error.

The file is read twice: before the run for its digest, and during the run, perhaps hours later, for
its rows. Each block of the second reading is compared with the first one's. Bytes that are appended
in between are not read.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from qaic_ray.errors import QaicRayError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 2**20
_DIGEST_BYTES = 8
_KEPT_BLOCKS = 8


class KnownFile(Protocol):
    """A file whose content is known well enough to notice that it has become another one."""

    def open(self) -> io.BufferedReader:
        """The content as a seekable file, whose reading raises InputChanged where it differs.

        Raises:
            OSError: it cannot be opened any more.
        """


class InputChanged(QaicRayError):
    """The file no longer holds what the run began with."""


@dataclass(frozen=True)
class FrozenFile:
    """The first `num_bytes` bytes of a file, known by their SHA-256 and a digest of each block.

    `num_lines` counts the line feeds, which tells nothing of a packed file.
    """

    path: Path
    num_bytes: int
    sha256: str
    blocks: bytes
    num_lines: int = 0

    @classmethod
    def of(cls, path: Path, num_bytes: int | None = None) -> FrozenFile:
        """Read a file, or its first `num_bytes` bytes, for their digests.

        Raises:
            InputChanged: the file is shorter.
            QaicRayError: it cannot be read.
        """
        whole = hashlib.sha256()
        blocks = bytearray()
        num_lines = 0
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size if num_bytes is None else num_bytes
                for offset in range(0, size, BLOCK_BYTES):
                    wanted = min(BLOCK_BYTES, size - offset)
                    block = stream.read(wanted)
                    if len(block) < wanted:
                        raise InputChanged(
                            f"{path} has {offset + len(block)} bytes, and had {size} when the run "
                            "began."
                        )
                    num_lines += block.count(b"\n")
                    whole.update(block)
                    blocks += _digest(block)
        except OSError as error:
            raise QaicRayError(
                f"The prompts in {path} cannot be read: {error.strerror}."
            ) from error
        return cls(path, size, whole.hexdigest(), bytes(blocks), num_lines)

    def open(self) -> io.BufferedReader:
        """The content as a seekable file, whose reading raises InputChanged where it differs.

        Raises:
            OSError: it cannot be opened any more.
        """
        return io.BufferedReader(_ComparingReader(self), BLOCK_BYTES)

    def read_block(self, stream: BinaryIO, number: int) -> bytes:
        """A block of the opened file, counted from 0.

        Raises:
            InputChanged: it is not what it was.
        """
        offset = stream.seek(number * BLOCK_BYTES)
        block = stream.read(min(BLOCK_BYTES, self.num_bytes - offset))
        at = number * _DIGEST_BYTES
        if _digest(block) != self.blocks[at : at + _DIGEST_BYTES]:
            raise InputChanged(
                f"{self.path} has changed since the run began: it is another one from "
                f"byte {offset} on."
            )
        return block


class _ComparingReader(io.RawIOBase):
    """Reads whole blocks, and gives nothing of one before it was compared."""

    def __init__(self, file: FrozenFile) -> None:
        self._file = file
        self._stream = file.path.open("rb")
        self._position = 0
        self._block = lru_cache(_KEPT_BLOCKS)(file.read_block)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.num_bytes}
        self._position = max(0, start[whence] + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self._position >= self._file.num_bytes:
            return 0
        view = memoryview(buffer).cast("B")
        number, offset = divmod(self._position, BLOCK_BYTES)
        piece = self._block(self._stream, number)[offset : offset + len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _digest(block: bytes) -> bytes:
    return hashlib.sha256(block).digest()[:_DIGEST_BYTES]
