"""Dumps the first executions of a program as `aic_batch_io.json`, which `qaic-runner` replays.

The folder is private: inputs are what people asked. The JSON is whole after each execution.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

BATCH_FILE = "aic_batch_io.json"
FACTS_FILE = "bundle.json"
"""Beside it: what the form has no place for, above all the types of values."""

_HEAD, _TAIL = b'{"IO-files": [', b"]}\n"
_MAX_NAME = 100

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Recording:
    """What is to be recorded: the first `most` executions, into a new folder below `folder`."""

    folder: str
    most: int


def replay_command(folder: Path, qpc: Path, runner: Sequence[str]) -> str | None:
    """What a shell replays the first bundle below a folder by; None where there is none.

    The number of executions is given: `qaic-runner` writes the outputs of one where none is.

    Args:
        folder: of bundles.
        qpc: the program that was recorded.
        runner: the words that start `qaic-runner`.
    """
    for bundle in sorted(path.parent for path in folder.glob(f"*/{BATCH_FILE}")):
        num_lines = (bundle / BATCH_FILE).read_bytes().count(b"\n")
        if num_lines > 1:  # the last line ends the list
            words = [*runner, "-t", str(qpc), "--aic-batch-json-input", str(bundle / BATCH_FILE)]
            words += ["--write-output-dir", f"{bundle.name}-again"]
            return shlex.join([*words, "--write-output-num-samples", str(num_lines - 1)])
    return None


class BundleWriter:
    """Writes one bundle.

    Args:
        place: the folder to make; where there is one of its name, `-2`, `-3`, ... are put behind.
        most: executions; those after them are not recorded.
        facts: what `bundle.json` says beside the types.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, place: Path, most: int, facts: Mapping[str, Any]) -> None:
        self.folder = _new_folder(place)
        self._data = self.folder / "data"
        self._data.mkdir(mode=0o700)
        self._most = most
        self._facts = dict(facts)
        self._dtypes: dict[str, str] = {}
        self._num = 0
        self._file: BinaryIO | None = _private(self.folder / BATCH_FILE)
        self._file.write(_HEAD + _TAIL)
        self._file.flush()

    @property
    def is_full(self) -> bool:
        """Whether all that was asked for is recorded."""
        return self._file is None

    def add(self, inputs: Arrays, outputs: Arrays) -> None:
        """Record one execution.

        Raises:
            OSError: it cannot be written; what was there before is whole.
        """
        if self._file is None:
            return
        entries = [self._entry("in", name, array) for name, array in inputs.items()]
        entries += [self._entry("out", name, array) for name, array in outputs.items()]
        self._write_facts()
        text = json.dumps(entries).encode()
        self._file.seek(-len(_TAIL), os.SEEK_END)
        self._file.write((b",\n" if self._num else b"\n") + text + _TAIL)
        self._file.flush()
        self._num += 1
        if self._num >= self._most:
            self.close()

    def close(self) -> None:
        """Record no more; safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _entry(self, direction: str, name: str, array: npt.NDArray[Any]) -> dict[str, Any]:
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:_MAX_NAME]
        path = f"data/{self._num:06d}-{direction}-{safe}.raw"
        with _private(self.folder / path) as file:
            file.write(np.ascontiguousarray(array).tobytes())
        self._dtypes[name] = array.dtype.name
        return {
            "path": path,
            "io-direction": direction,
            "elem-size": array.dtype.itemsize,
            "map-to": name,
            "dims": list(array.shape),
        }

    def _write_facts(self) -> None:
        """Before the execution that may have brought a new name, and once for each of them."""
        path = self.folder / FACTS_FILE
        document = {"format": 1, **self._facts, "dtypes": self._dtypes}
        text = json.dumps(document, indent=2).encode() + b"\n"
        if not path.exists() or path.read_bytes() != text:
            path.unlink(missing_ok=True)
            with _private(path) as file:
                file.write(text)


def _new_folder(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = place if number == 1 else place.with_name(f"{place.name}-{number}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always a next number")


def _private(path: Path) -> BinaryIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return open(os.open(path, flags, 0o600), "r+b")
