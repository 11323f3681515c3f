"""Weights that are graph inputs: the metadata that names a checkpoint's own tensors, looked at.

QEfficient writes it (`weight_spec.json`, version 5); only headers of safetensors files are read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import parse_json, shown

KEY = "com.qti.aisw.extdata"
ROOT_VARIABLE = "AIC_EXTERNAL_DATA_ROOT"
KNOWN_VERSIONS = (5, 6, 7)

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100 * 2**20
_MAX_FAULTS = 20


class SpecError(Exception):
    """What is wrong with one entry; a whole sentence."""


def look(
    text: str, folder: Path, inputs: Mapping[str, tuple[int | str, ...]]
) -> tuple[frozenset[str], list[str]]:
    """The graph inputs that are weights by the metadata, and what is wrong with it.

    Args:
        text: the metadata.
        folder: of the ONNX file.
        inputs: graph input -> shape.
    """
    try:
        document = parse_json(text, f"The metadata {KEY}")
    except UsageError as error:
        return frozenset(), [str(error)]
    entries = document.get("inputs") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        return frozenset(), [f"The metadata {KEY} has no list 'inputs'."]
    version = document.get("version", 5)
    faults = []
    if version not in KNOWN_VERSIONS:
        faults.append(f"The metadata {KEY} has the version {shown(version)}, which nobody knows.")
    for fault in _faults(document, entries, folder, inputs):
        faults.append(fault)
        if len(faults) >= _MAX_FAULTS:
            break
    names = {entry.get("name") for entry in entries if isinstance(entry, dict)}
    return frozenset(name for name in names if isinstance(name, str)), faults


def _faults(
    document: dict[str, Any],
    entries: list[Any],
    folder: Path,
    inputs: Mapping[str, tuple[int | str, ...]],
) -> Iterator[str]:
    roots = _roots(document, folder)
    files = document.get("files", document.get("checkpoint_files", []))
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            yield f"An entry of {KEY} has no name: {shown(entry)}."
            continue
        location = entry.get("location")
        if location is None:
            continue
        name = entry["name"]
        try:
            if name not in inputs:
                raise SpecError(f"{KEY} names {shown(name)}, which is no input of the graph.")
            dims = _tensor_dims(location, files, roots, name)
            if dims != list(inputs[name]):
                raise SpecError(
                    f"{shown(name)} has the shape {list(inputs[name])} in the graph, and "
                    f"{shown(dims)} in the checkpoint."
                )
        except SpecError as error:
            yield str(error)


def _tensor_dims(location: Any, files: Any, roots: list[Path], name: str) -> Any:
    """The shape of the tensor that a location names."""
    fields = location if isinstance(location, dict) else {}
    file, key = fields.get("file"), fields.get("key")
    if type(file) is int and isinstance(files, list) and 0 <= file < len(files):
        listed = files[file]
        file = listed.get("path") if isinstance(listed, dict) else listed
    if not isinstance(file, str) or not isinstance(key, str):
        raise SpecError(f"{KEY} says no file and key for {shown(name)}.")
    path = next((root / file for root in roots if _is_file(root / file)), None)
    if path is None:
        raise SpecError(f"The weights {shown(name)} are in {shown(file)}, which is not there.")
    header = _header(path, path.stat().st_mtime_ns)
    if key not in header:
        raise SpecError(f"{path.name} has no tensor {shown(key)}, which {shown(name)} is.")
    tensor = header[key]
    return tensor.get("shape") if isinstance(tensor, dict) else None


def _roots(document: dict[str, Any], folder: Path) -> list[Path]:
    """Where files may be, in the order in which QEfficient's own reader looks."""
    roots = [_folder(document.get("external_data_root")), _folder(os.environ.get(ROOT_VARIABLE))]
    model = _folder(document.get("model_id"))
    every = [*roots, folder, model.parent if model is not None else None]
    return [root for root in every if root is not None]


def _folder(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) and value and "\0" not in value else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@lru_cache(maxsize=64)
def _header(path: Path, _modified_ns: int) -> Mapping[str, Any]:
    """The table of a safetensors file, read once while nobody changes it."""
    try:
        with path.open("rb") as file:
            length = file.read(_LENGTH.size)
            if len(length) < _LENGTH.size:
                raise SpecError(f"{path.name} is shorter than the header of a safetensors file.")
            (size,) = _LENGTH.unpack(length)
            if size > _MAX_HEADER_BYTES:
                raise SpecError(f"{path.name} is no safetensors file: its header has {size} bytes.")
            text = file.read(size).decode("utf-8", "replace")
    except OSError as error:
        raise SpecError(f"{path.name} cannot be read: {error.strerror}.") from error
    try:
        header = parse_json(text, f"The header of {path.name}")
    except UsageError as error:
        raise SpecError(str(error)) from error
    return header if isinstance(header, dict) else {}
