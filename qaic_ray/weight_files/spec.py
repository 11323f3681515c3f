"""`weight_spec.json`: which tensor of which file each weight of a graph is, as QEfficient has it.

A graph whose weights are inputs has the same text in its metadata, where a compiler reads it.
`docs/emulated-sdk/formats.md` has the form.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaic_ray.errors import CheckpointError, UsageError
from qaic_ray.files.documents import as_object, checked, parse_json, shown
from qaic_ray.files.folders import inside
from qaic_ray.weight_files.tensors import TensorEntry, read_entries

METADATA_KEY = "com.qti.aisw.extdata"
SPEC_FILE = "weight_spec.json"
"""Beside the graph."""
ROOT_VARIABLE = "AIC_EXTERNAL_DATA_ROOT"
"""A folder in which compilers look for the files first."""

_VERSION = 5
_FORMAT = "safetensors"
_MAX_SAID = 1000


@dataclass(frozen=True)
class WeightPlaces:
    """A graph's weights in the files of one folder.

    Args:
        model_name: what kind of model it is, for people.
        folder: the checkpoint's, absolute.
        files: names of its safetensors files.
        tensors: graph input -> the tensor that it is.
    """

    model_name: str
    folder: Path
    files: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]

    def document(self) -> dict[str, Any]:
        """What `weight_spec.json` holds."""
        names = sorted(self.files)
        index = {name: number for number, name in enumerate(names)}
        return {
            "version": _VERSION,
            "model_name": self.model_name,
            "model_id": str(self.folder),
            "files": [{"path": f"{self.folder.name}/{name}", "format": _FORMAT} for name in names],
            "inputs": [
                {"name": name, "location": {"file": index[entry.path.name], "key": entry.name}}
                for name, entry in self.tensors.items()
            ],
        }

    @property
    def text(self) -> str:
        """Of the file."""
        return json.dumps(self.document(), indent=2, sort_keys=True)

    @property
    def metadata(self) -> str:
        """The same for the graph."""
        return json.dumps(self.document(), separators=(",", ":"), sort_keys=True)

    @property
    def sha256(self) -> str:
        """Of what it says, types and shapes of the tensors among it."""
        facts = [(e.name, e.dtype, e.shape) for e in self.tensors.values()]
        return hashlib.sha256(json.dumps([self.document(), facts]).encode()).hexdigest()


@dataclass(frozen=True)
class _File:
    path: str
    format: str = _FORMAT


@dataclass(frozen=True)
class _Location:
    file: int | str
    key: str


@dataclass(frozen=True)
class _Input:
    name: str
    location: _Location | None = None


@dataclass(frozen=True)
class _Document:
    inputs: list[_Input]
    files: list[_File | str] = field(default_factory=list)
    checkpoint_files: list[_File | str] = field(default_factory=list)
    model_id: str | None = None
    external_data_root: str | None = None

    def path(self, location: _Location) -> str:
        """As the document has it.

        Raises:
            ValueError: there is no such file in it.
        """
        if isinstance(location.file, str):
            return location.file
        listed = self.files or self.checkpoint_files
        if not 0 <= location.file < len(listed):
            raise ValueError(f"there is no file {shown(location.file)}")
        chosen = listed[location.file]
        return chosen if isinstance(chosen, str) else chosen.path


def read_places(text: str, source: str, folder: Path) -> dict[str, TensorEntry]:
    """The tensor of each weight that a document names; its files are looked for as compilers do.

    Args:
        text: of the document, or of a graph's metadata.
        source: names it in errors.
        folder: the graph's.

    Raises:
        UsageError: the document is malformed, or a file or tensor is not there.
    """
    document = checked(_Document, as_object(parse_json(text, source), source), source)
    named = os.path.expanduser(os.environ.get(ROOT_VARIABLE, ""))
    model_root = os.path.dirname(os.path.normpath(document.model_id or ""))
    roots = [named, document.external_data_root or "", str(folder.absolute()), model_root]
    headers: dict[str, dict[str, TensorEntry]] = {}
    places = {}
    for item in document.inputs:
        if item.location is None:
            continue
        try:
            name = document.path(item.location)
            if name not in headers:
                found = _found(name, [Path(root) for root in roots if os.path.isabs(root)])
                headers[name] = read_entries([found])
            places[item.name] = headers[name][item.location.key]
        except ValueError as error:
            raise UsageError(f"{source} places {shown(item.name)} wrongly: {error}.") from error
        except KeyError as error:
            raise UsageError(
                f"{source} takes {shown(item.name)} from {shown(item.location.key)} of "
                f"{shown(name)}, which has no such tensor: export the model again."
            ) from error
        except CheckpointError as error:
            raise UsageError(str(error)) from error
    return places


def _found(name: str, roots: list[Path]) -> Path:
    candidates = [Path(name)] if os.path.isabs(name) else [root / inside(name) for root in roots]
    for path in candidates:
        if os.path.exists(path):  # unlike Path.exists also of names that no file system takes
            return path
    raise UsageError(
        f"The weights are not where the model points: {_said(str(candidates[-1]))} is not there. "
        "Put the checkpoint back, or export the model again."
    )


def _said(path: str) -> str:
    return path if path.isprintable() and len(path) <= _MAX_SAID else shown(path)
