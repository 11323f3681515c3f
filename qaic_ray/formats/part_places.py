"""Where part files go: a folder here or at a URI; each appears under its name whole, or not."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import user_path
from qaic_ray.files.folders import replacing
from qaic_ray.formats.inputs.filesystems import RemotePlace, is_uri, reason, remote_place

_COPY_BYTES = 8 * 2**20
# Their files appear when they are closed; those of others while they are written.
_WHOLE_ON_CLOSE = ("s3", "gcs", "abfs")


class PartPlace(Protocol):
    """A folder of part files."""

    def check(self) -> None:
        """See that it can hold files.

        Raises:
            UsageError: it cannot, as far as that is seen without writing.
        """

    def sizes(self) -> dict[str, int]:
        """The files that are there, and their bytes.

        Raises:
            QaicRayError: it cannot be looked into.
        """

    def read(self, name: str) -> bytes | None:
        """A small file there; None where there is none.

        Raises:
            QaicRayError: it cannot be read.
        """

    def put(self, name: str, file: Path) -> None:
        """Copy a file there under a name, in place of one that has it.

        Raises:
            QaicRayError: that is refused; nothing new has the name then.
        """

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            QaicRayError: that is refused.
        """


def part_place(text: str) -> PartPlace:
    """The folder that a path or a URI names; a path's is made.

    Raises:
        UsageError: it cannot be.
    """
    if is_uri(text) and not text.lower().startswith("file://"):
        return RemoteFolder(remote_place(text))
    folder = user_path(text.removeprefix("file://"), "The folder of parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder: {error.strerror}.") from error
    return LocalFolder(folder)


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    folder: Path

    def check(self) -> None:
        """See `PartPlace`."""
        if not os.access(self.folder, os.W_OK):
            raise UsageError(f"{self.folder} may not be written to: check its permissions.")

    def sizes(self) -> dict[str, int]:
        """See `PartPlace`."""
        with os.scandir(self.folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read(self, name: str) -> bytes | None:
        """See `PartPlace`."""
        path = self.folder / name
        try:
            return path.read_bytes() if path.exists() else None
        except OSError as error:
            raise QaicRayError(f"{path} cannot be read: {error.strerror}.") from error

    def put(self, name: str, file: Path) -> None:
        """See `PartPlace`."""
        path = self.folder / name
        try:
            with file.open("rb") as source, replacing(path, self._unfinished(name)) as stream:
                shutil.copyfileobj(source, stream, _COPY_BYTES)
        except OSError as error:
            raise QaicRayError(f"{path} cannot be written: {error.strerror}.") from error

    def remove(self, name: str) -> None:
        """See `PartPlace`."""
        path = self.folder / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise QaicRayError(f"{path} cannot be removed: {error.strerror}.") from error

    def _unfinished(self, name: str) -> Path:
        return self.folder / f".{name}.unfinished"


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URI."""

    place: RemotePlace

    def check(self) -> None:
        """See `PartPlace`."""
        import pyarrow
        from pyarrow import fs

        system = self.place.filesystem
        top = self.place.path.partition("/")[0]
        try:
            is_there = not top or system.get_file_info(top).type != fs.FileType.NotFound
        except (OSError, pyarrow.ArrowException) as error:
            raise UsageError(f"{self.place.uri} cannot be reached: {reason(error)}.") from error
        if not is_there:
            raise UsageError(
                f"There is no {top} for {self.place.uri}: make the bucket first, or look at the "
                "account whose credentials are in the environment."
            )

    def sizes(self) -> dict[str, int]:
        """See `PartPlace`."""
        import pyarrow
        from pyarrow import fs

        selector = fs.FileSelector(self.place.path, allow_not_found=True)
        try:
            infos = self.place.filesystem.get_file_info(selector)
        except (OSError, pyarrow.ArrowException) as error:
            raise QaicRayError(f"{self.place.uri} cannot be reached: {reason(error)}.") from error
        return {info.base_name: info.size for info in infos if info.is_file}

    def read(self, name: str) -> bytes | None:
        """See `PartPlace`."""
        import pyarrow

        at = self.place.written(name)
        try:
            if not at.filesystem.get_file_info(at.path).is_file:
                return None
            with at.filesystem.open_input_stream(at.path, compression=None) as stream:
                return bytes(stream.read())
        except (OSError, pyarrow.ArrowException) as error:
            raise QaicRayError(f"{at.uri} cannot be read: {reason(error)}.") from error

    def put(self, name: str, file: Path) -> None:
        """See `PartPlace`."""
        import pyarrow

        system, path = self.place.filesystem, self.place.written(name).path
        is_whole = system.type_name in _WHOLE_ON_CLOSE
        unfinished = path if is_whole else self.place.written(f".{name}.unfinished").path
        try:
            if not is_whole:
                system.create_dir(self.place.path, recursive=True)
            self._copy(file, unfinished)
            if not is_whole:
                system.move(unfinished, path)
            written = system.get_file_info(path).size
        except (OSError, pyarrow.ArrowException) as error:
            uri = self.place.written(name).uri
            raise QaicRayError(f"{uri} cannot be written: {reason(error)}.") from error
        if written != file.stat().st_size:
            raise QaicRayError(f"{self.place.written(name).uri} was written in part only.")

    def _copy(self, file: Path, path: str) -> None:
        stream: Any = self.place.filesystem.open_output_stream(path, compression=None)
        with file.open("rb") as source, stream:
            while piece := source.read(_COPY_BYTES):
                stream.write(piece)

    def remove(self, name: str) -> None:
        """See `PartPlace`."""
        import pyarrow

        uri = self.place.written(name)
        try:
            if self.place.filesystem.get_file_info(uri.path).is_file:
                self.place.filesystem.delete_file(uri.path)
        except (OSError, pyarrow.ArrowException) as error:
            raise QaicRayError(f"{uri.uri} cannot be removed: {reason(error)}.") from error
