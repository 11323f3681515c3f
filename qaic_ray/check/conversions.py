"""What can be converted: config files in the form that a compiler and a card take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from qaic_ray.check.config_checks import RETAINED
from qaic_ray.check.facts import (
    Artifact,
    CustomIoFacts,
    PartitionFacts,
    ShapesFacts,
    Target,
    size_of,
)
from qaic_ray.check.shape_checks import ALSO_CALLED, free_context
from qaic_ray.contract import COMP_CTX_LENGTHS, NUM_LOGITS_TO_KEEP
from qaic_ray.limits import MAX_CORES, NAMED_SPECIALIZATIONS_FROM


@dataclass(frozen=True)
class Conversion:
    """A file as it should be: its path below the folder that it is written to, and its text."""

    place: str
    text: str
    says: str


def conversions(artifact: Artifact, target: Target) -> list[Conversion]:
    """The files of an artifact that can be made right and are not; their content is new."""
    found = []
    if artifact.shapes is not None and not artifact.shapes.fault:
        found += _shapes(artifact.shapes, target)
    if artifact.custom_io is not None and not artifact.custom_io.fault:
        found += _custom_io(artifact.custom_io)
    if artifact.partitions is not None and not artifact.partitions.fault:
        found += _partitions(artifact.partitions, target)
    return found


def _shapes(facts: ShapesFacts, target: Target) -> list[Conversion]:
    if PurePosixPath(facts.place).name == "hashed_compile_params.json":
        return []
    said = []
    entries: list[dict[str, Any]] = []
    for entry in facts.entries:
        if any(type(value) is int for value in entry.values()):
            said.append("sizes as strings")
        if any(key in ALSO_CALLED for key in entry):
            said.append("keys as the graph has them")
        entries.append({ALSO_CALLED.get(k, k): _as_text(value) for k, value in entry.items()})
    if _step_down(entries):
        said.append("compute contexts that prefill and decode do not share")
    is_named = facts.is_named and not target.before(NAMED_SPECIALIZATIONS_FROM)
    if facts.is_named and not is_named:
        said.append("flat entries")
    if not said:
        return []
    written: list[Any] = entries
    if is_named:
        pairs = zip(facts.names, entries, strict=True)
        written = [{"name": name, "symbols": entry} for name, entry in pairs]
    text = json.dumps({"specializations": written}, indent=2) + "\n"
    return [Conversion(facts.place, text, ", ".join(dict.fromkeys(said)))]


def _as_text(value: object) -> object:
    return str(value) if type(value) is int else value


def _step_down(entries: list[dict[str, Any]]) -> bool:
    """Give prefill entries compute contexts that no decode entry has; whether any changed."""
    sizes = [size_of(entry.get(COMP_CTX_LENGTHS)) for entry in entries]
    lens = [size_of(entry.get("seq_len")) or 1 for entry in entries]
    kept = [size_of(entry.get(NUM_LOGITS_TO_KEEP)) or 1 for entry in entries]
    is_decode = [seq_len == kept_here for seq_len, kept_here in zip(lens, kept, strict=True)]
    decodes = {size for size, decode in zip(sizes, is_decode, strict=True) if size and decode}
    taken, changed = {size for size in sizes if size}, False
    for entry, size, decode in zip(entries, sizes, is_decode, strict=True):
        if size and not decode and size in decodes:
            free = free_context(size, taken)
            taken.add(free)
            entry[COMP_CTX_LENGTHS] = str(free)
            changed = True
    return changed


def _custom_io(facts: CustomIoFacts) -> list[Conversion]:
    full = dict(facts.precisions)
    for name, precision in facts.precisions.items():
        if name.startswith("past_"):
            is_output = name.endswith(RETAINED)
            other = name.removesuffix(RETAINED) if is_output else name + RETAINED
            full.setdefault(other, precision)
    if len(full) == len(facts.precisions):
        return []
    text = "".join(f" - IOName: {n}\n   Precision: {p}\n\n" for n, p in _in_pairs(full).items())
    return [Conversion(facts.place, text, "both halves of each state")]


def _in_pairs(precisions: Mapping[str, str]) -> dict[str, str]:
    ordered: dict[str, str] = {}
    for name in precisions:
        base = name.removesuffix(RETAINED)
        for half in (base, base + RETAINED):
            if half in precisions:
                ordered[half] = precisions[half]
    return ordered


def _partitions(facts: PartitionFacts, target: Target) -> list[Conversion]:
    ids = sorted({device for device, _ in facts.devices})
    number = {device: index for index, device in enumerate(ids)}
    most = target.card.nsps if target.card is not None else MAX_CORES
    said = []
    if ids != list(range(len(ids))):
        said.append("ids from 0 on")
    if any(cores > most for _, cores in facts.devices):
        said.append(f"{most} cores a device")
    linked = {peer for group in facts.connections for peer in group}
    groups = [
        sorted(number[peer] for peer in group if peer in number) for group in facts.connections
    ]
    if len(ids) > 1 and not linked >= set(ids):
        said.append("a p2p connection")
        groups = [list(range(len(ids)))]
    if not said:
        return []
    document: dict[str, Any] = {
        "connections": [{"devices": group, "type": "p2p"} for group in groups if group],
        "partitions": [
            {
                "name": f"Partition{index}",
                "devices": [
                    {"deviceId": number[device], "numCores": min(cores, most)}
                    for device, cores in partition
                ],
            }
            for index, partition in enumerate(facts.partitions)
        ],
    }
    return [Conversion(facts.place, json.dumps(document, indent=1) + "\n", ", ".join(said))]
