"""What a model whose weights lie in a checkpoint depends on: the bytes that it points at.

Reading them takes as long as the disk needs, so the digest of a file's tensors is kept in the
user's cache with the file's status, and taken from there while that is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qaic_ray.errors import CheckpointError, UsageError
from qaic_ray.files.documents import checked, json_text, read_object
from qaic_ray.files.folders import SourceFile, cache_folder, write_whole
from qaic_ray.weight_files.tensors import TensorEntry, read_into

DIGESTS_FOLDER = "weights"
"""Of the cache."""

_NUM_READERS = 2
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class PointedAt:
    """The weights that a model points at.

    `files` are paths and the status in which each was read, `dtypes` safetensors' names of the
    tensors' types, `sha256` is over names, types, shapes and bytes of the tensors.
    """

    files: tuple[tuple[Path, SourceFile], ...]
    dtypes: tuple[str, ...]
    sha256: str

    def change(self) -> str:
        """What has happened to the files since, as the start of a sentence; empty for nothing."""
        for path, status in self.files:
            try:
                if SourceFile.of(path) != status:
                    return f"The weights in {path} have changed since they were looked at"
            except OSError as error:
                return f"The weights in {path} cannot be read ({error.strerror})"
        return ""


@dataclass(frozen=True)
class _Kept:
    """A file's status, and the digests of tensors in it."""

    status: SourceFile
    tensors: dict[str, str]


def pointed_at(places: Mapping[str, TensorEntry]) -> PointedAt:
    """Look at the weights of a model, by the names that they have in its graph.

    Raises:
        UsageError: a file cannot be read.
    """
    by_path: dict[Path, list[TensorEntry]] = {}
    for entry in places.values():
        by_path.setdefault(entry.path, []).append(entry)
    files, digests = [], {}
    try:
        for path, entries in sorted(by_path.items()):
            status = SourceFile.of(path)
            for key, digest in _digests(path, status, entries).items():
                digests[path, key] = digest
            files.append((path, status))
    except OSError as error:
        raise UsageError(f"Cannot read {error.filename}: {error.strerror}.") from error
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    combined = hashlib.sha256()
    for name, entry in sorted(places.items()):
        digest = digests[entry.path, entry.name]
        combined.update(f"{name} {entry.dtype} {entry.shape} {digest}\n".encode())
    dtypes = tuple(sorted({entry.dtype for entry in places.values()}))
    return PointedAt(tuple(files), dtypes, combined.hexdigest())


def _digests(path: Path, status: SourceFile, entries: list[TensorEntry]) -> dict[str, str]:
    """The digests of a file's tensors by key: kept ones where the file is still the same."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    place = cache_folder() / DIGESTS_FOLDER / f"{name}.json"
    known: dict[str, str] = {}
    with suppress(UsageError):  # none yet, or damaged
        kept = checked(_Kept, read_object(place), str(place))
        known = kept.tensors if kept.status == status else {}
    missing = {entry.name: entry for entry in entries if entry.name not in known}
    if missing:
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            known |= dict(zip(missing, pool.map(_digest_of, missing.values()), strict=True))
        with suppress(OSError):  # a cache that cannot be written is read through every time
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json_text(asdict(_Kept(status, known))))
    return known


def _digest_of(entry: TensorEntry) -> str:
    buffer = np.empty(min(_BLOCK_BYTES, entry.num_bytes), np.uint8)
    digest = hashlib.sha256()
    for start in range(0, entry.num_bytes, _BLOCK_BYTES):
        block = buffer[: min(_BLOCK_BYTES, entry.num_bytes - start)]
        read_into(entry, start, block)
        digest.update(block.data)
    return digest.hexdigest()
