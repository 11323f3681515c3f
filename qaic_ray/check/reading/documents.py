"""The compiler's config files as facts: specializations, custom IO, MDP partitions, command lines.

A file that cannot be read is a fact too: nothing here raises for what a file holds.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qaic_ray.check.facts import (
    CommandFacts,
    CustomIoFacts,
    PartitionFacts,
    ShapesFacts,
    size_of,
)
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import parse_json, read_text, shown

MAX_LISTED = 10_000
"""The most entries of one file that are looked at."""

_IO_LINE = re.compile(r"\s*(-\s+)?(IOName|Precision|Layout)\s*:\s*(.*?)\s*")


def _document(path: Path, key: str) -> tuple[list[Any], dict[str, Any], str]:
    """The list under a key, the whole object, and what is wrong with them."""
    try:
        value = parse_json(read_text(path), path.name)
    except UsageError as error:
        return [], {}, str(error)
    if not isinstance(value, dict):
        return [], {}, f"{path.name} must be an object with {key}, not {shown(value)}."
    entries = value.get(key)
    if not isinstance(entries, list) or not entries:
        return [], value, f"{path.name} must have '{key}', a list with at least one entry."
    if len(entries) > MAX_LISTED:
        return [], value, f"{path.name} has {len(entries)} {key}, more than {MAX_LISTED}."
    return entries, value, ""


def read_shapes(path: Path, place: str) -> ShapesFacts:
    """A specializations.json, in the flat or the named form."""
    entries, _, fault = _document(path, "specializations")
    if fault:
        return ShapesFacts(place, fault)
    found: list[Mapping[str, object]] = []
    names: list[str] = []
    for number, entry in enumerate(entries):
        inner = entry.get("symbols", entry) if isinstance(entry, dict) else None
        if not isinstance(inner, dict):
            fault = f"entry {number} of {path.name} must be an object, not {shown(entry)}."
            return ShapesFacts(place, fault)
        # Older files of QEfficient say the name among the symbols.
        flat = {key: value for key, value in inner.items() if key not in ("name", "graph_name")}
        found.append(flat)
        given = entry.get("name", entry.get("graph_name"))
        names.append(given if isinstance(given, str) else "")
    is_named = any(isinstance(entry.get("symbols"), dict) or "name" in entry for entry in entries)
    return ShapesFacts(place, "", is_named, tuple(found), tuple(names))


def read_custom_io(path: Path, place: str) -> CustomIoFacts:
    """A custom IO list: pairs of `IOName` and `Precision`, one a line."""
    try:
        lines = read_text(path).splitlines()
    except UsageError as error:
        return CustomIoFacts(place, str(error))
    precisions: dict[str, str] = {}
    name = ""
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _IO_LINE.fullmatch(line.split(" #")[0])
        if match is None or (match[2] != "IOName" and not name):
            fault = f"line {number} of {path.name} is neither IOName nor Precision: {shown(line)}."
            return CustomIoFacts(place, fault)
        value = match[3].strip("'\"")
        if match[2] == "IOName":
            name = value
        elif match[2] == "Precision":
            precisions[name] = value
    if not precisions:
        return CustomIoFacts(place, f"{path.name} names no input or output.")
    return CustomIoFacts(place, "", precisions)


def read_partitions(path: Path, place: str) -> PartitionFacts:
    """An MDP partition file."""
    entries, document, fault = _document(path, "partitions")
    if fault:
        return PartitionFacts(place, fault)
    partitions = []
    for number, entry in enumerate(entries):
        rows = entry.get("devices") if isinstance(entry, dict) else None
        devices = [_device(row) for row in rows] if isinstance(rows, list) else []
        if not devices or None in devices:
            fault = (
                f"partition {number} of {path.name} needs 'devices', each with a deviceId from 0 "
                "on and numCores from 1 on."
            )
            return PartitionFacts(place, fault)
        partitions.append(tuple(device for device in devices if device is not None))
    connections = document.get("connections", [])
    links = [entry.get("devices") for entry in _objects(connections)]
    peers = tuple(tuple(ids) for ids in links if isinstance(ids, list) and _are_ids(ids))
    return PartitionFacts(place, "", tuple(partitions), peers)


def _device(row: Any) -> tuple[int, int] | None:
    fields = row if isinstance(row, dict) else {}
    device, cores = fields.get("deviceId"), fields.get("numCores")
    if type(device) is not int or type(cores) is not int:
        return None
    return (device, cores) if 0 <= device < 1 << 16 and 1 <= cores < 1 << 16 else None


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def read_hashed_params(path: Path, place: str) -> tuple[CommandFacts, ShapesFacts | None]:
    """QEfficient's record of a compile: its command, and the shapes that it was for."""
    command, document, fault = _document(path, "command")
    if fault:
        return CommandFacts(place, fault), None
    if not all(isinstance(word, str) for word in command):
        return CommandFacts(place, f"'command' of {path.name} must be a list of words."), None
    entries = document.get("specializations")
    shapes = None
    if isinstance(entries, list) and entries and len(_objects(entries)) == len(entries):
        # Numbers here, strings in the file that the compiler reads.
        shapes = ShapesFacts(place, "", False, tuple(_symbols(entry) for entry in entries))
    return command_of(command, place), shapes


def _symbols(entry: dict[str, Any]) -> dict[str, object]:
    inner = entry.get("symbols", entry)
    fields = inner if isinstance(inner, dict) else {}
    sizes = {key: size_of(value) for key, value in fields.items()}
    return {key: str(size) for key, size in sizes.items() if size is not None}


def read_script(path: Path, place: str) -> CommandFacts:
    """A qaic-compile.sh: the one line of it that calls the compiler."""
    try:
        text = read_text(path).replace("\\\n", " ")
    except UsageError as error:
        return CommandFacts(place, str(error))
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            return CommandFacts(place, f"a line of {path.name} is no command: {error}.")
        if any(Path(word).name in ("qaic-compile", "qaic-exec") for word in words):
            return command_of(words, place)
    return CommandFacts(place, f"no line of {path.name} calls qaic-compile or qaic-exec.")


def command_of(words: list[str], place: str) -> CommandFacts:
    """The flags of a compiler's command line, its program's name included or not."""
    compiler = next((n for w in words if (n := Path(w).name) in ("qaic-compile", "qaic-exec")), "")
    flags: dict[str, str] = {}
    for word in words:
        if word.startswith("-"):
            name, _, value = word.partition("=")
            flags["-m" if name == "-model" else name] = value
    return CommandFacts(place, "", compiler, flags)
