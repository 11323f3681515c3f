"""Dumps the first executions of each activation as a batch JSON, which `qaic-runner` replays.

For any program on this SDK: QAIC_EMULATOR_RECORD names how many and where (`100:/tmp/bundles`).
Folders are private, and the JSON is whole after each execution.
"""

from __future__ import annotations

import json
import os
from itertools import count
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import numpy as np

VARIABLE = "QAIC_EMULATOR_RECORD"
BATCH_FILE = "aic_batch_io.json"
FACTS_FILE = "bundle.json"

_HEAD, _TAIL = b'{"IO-files": [', b"]}\n"
_MAX_NAME = 100


class RecordingError(ValueError):
    """What the variable says is no recording, or cannot be written."""


class Recording(NamedTuple):
    """How many executions of an activation are dumped, and below which folder."""

    most: int
    folder: str


def from_environment() -> Optional[Recording]:
    """What the variable asks for; None where it is not set.

    Raises:
        RecordingError: where it is not a number and a folder.
    """
    said = os.environ.get(VARIABLE, "")
    if not said:
        return None
    most, _, folder = said.partition(":")
    if not (most.isascii() and most.isdigit() and int(most[:10]) > 0 and folder):
        raise RecordingError(
            f"{VARIABLE}={said[:200]!r}: give a number of executions and a folder, like "
            "100:/tmp/bundles"
        )
    return Recording(int(most[:10]), os.path.abspath(folder))


class ActivationRecorder:
    """Writes the bundle of one activation.

    Args:
        recording: what is asked for.
        program: the program's name.
        sdk: what the SDK is called.

    Raises:
        RecordingError: where the folder cannot be made.
    """

    def __init__(self, recording: Recording, program: str, sdk: str) -> None:
        self._most = recording.most
        self._num = 0
        self._dtypes: Dict[str, str] = {}
        self._facts = {"format": 1, "program": program, "sdk": sdk}
        place = os.path.join(recording.folder, f"{_safe(program)}-{os.getpid()}")
        try:
            os.makedirs(recording.folder, mode=0o700, exist_ok=True)
            self.folder = _new_folder(place)
            os.mkdir(os.path.join(self.folder, "data"), 0o700)
            self._write(BATCH_FILE, _HEAD + _TAIL)
        except OSError as error:
            raise RecordingError(f"{VARIABLE}: {place}: {error.strerror}") from error

    def add(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Dump one execution, while there are fewer than asked for.

        Raises:
            RecordingError: where it cannot be written; nothing is dumped after that.
        """
        if self._num >= self._most:
            return
        try:
            self._add(inputs, outputs)
        except OSError as error:
            self._most = 0
            raise RecordingError(f"{VARIABLE}: {self.folder}: {error.strerror}") from error

    def _add(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        known = len(self._dtypes)
        entries = [self._entry("in", name, array) for name, array in inputs.items()]
        entries += [self._entry("out", name, array) for name, array in outputs.items()]
        if len(self._dtypes) != known:
            facts = dict(self._facts, dtypes=self._dtypes)
            path = os.path.join(self.folder, FACTS_FILE)
            if os.path.exists(path):
                os.remove(path)
            self._write(FACTS_FILE, json.dumps(facts, indent=2).encode() + b"\n")
        with open(os.path.join(self.folder, BATCH_FILE), "r+b") as file:
            file.seek(-len(_TAIL), os.SEEK_END)
            file.write((b",\n" if self._num else b"\n") + json.dumps(entries).encode() + _TAIL)
        self._num += 1

    def _entry(self, direction: str, name: str, array: Any) -> Dict[str, Any]:
        path = f"data/{self._num:06d}-{direction}-{_safe(name)}.raw"
        values = np.ascontiguousarray(array)
        self._write(path, values.tobytes())
        self._dtypes[name] = values.dtype.name
        dims: List[int] = [int(dim) for dim in np.shape(array)]
        return {
            "path": path,
            "io-direction": direction,
            "elem-size": values.dtype.itemsize,
            "map-to": name,
            "dims": dims,
        }

    def _write(self, name: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(os.path.join(self.folder, name), flags, 0o600), "wb") as file:
            file.write(data)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:_MAX_NAME]


def _new_folder(place: str) -> str:
    for number in count(1):
        folder = place if number == 1 else f"{place}-{number}"
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always a next number")
