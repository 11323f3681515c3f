"""Where things are kept, and folders that appear whole or not at all. Knows nothing of models."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "QAIC_RAY_CACHE"


def cache_folder() -> Path:
    """The user's cache folder of this package; `QAIC_RAY_CACHE` overrides it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_path("qaic-ray", appauthor=False))


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold this machine's lock for `target`; its file is in the cache folder, not beside it."""
    from filelock import FileLock

    locks = cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(target.absolute())).hexdigest()
    with FileLock(locks / f"{digest[:24]}.lock"):
        yield


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield an empty sibling of `target` that takes its place when the block ends without an error.

    A kill at any moment leaves the old folder or none, and what a killed builder left beside it is
    swept away by the next one. The caller holds `locked(target)`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.building-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover)
    workspace = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
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


def sync_tree(folder: Path) -> None:
    """Put every file below `folder`, and every folder, onto the disk."""
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
