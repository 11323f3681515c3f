"""Weights that are graph inputs: the metadata that names a checkpoint's own tensors, looked at.

Only headers of safetensors files are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import parse_json, shown
from qaic_ray.weight_files.spec import METADATA_KEY, read_places

KNOWN_VERSIONS = (5, 6, 7)
"""Of the metadata; files before 5 did not say theirs."""
_MAX_FAULTS = 20


def look(
    text: str, folder: Path, inputs: Mapping[str, tuple[int | str, ...]]
) -> tuple[frozenset[str], list[str]]:
    """The graph inputs that are weights by the metadata, and what is wrong with it.

    Args:
        text: the metadata.
        folder: of the ONNX file.
        inputs: graph input -> shape.
    """
    source = f"The metadata {METADATA_KEY}"
    try:
        document = parse_json(text, source)
    except UsageError as error:
        return frozenset(), [str(error)]
    fields = document if isinstance(document, dict) else {}
    entries = fields.get("inputs")
    rows = entries if isinstance(entries, list) else []
    names = {row.get("name") for row in rows if isinstance(row, dict)}
    known = frozenset(name for name in names if isinstance(name, str))
    version = fields.get("version", KNOWN_VERSIONS[0])
    if version not in KNOWN_VERSIONS:
        return known, [f"{source} has the version {shown(version)}, which nobody knows."]
    faults = [
        f"{METADATA_KEY} names {shown(name)}, which is no input of the graph."
        for name in sorted(known.difference(inputs))
    ]
    try:
        places = read_places(text, source, folder)
    except QaicRayError as error:
        return known, [*faults[:_MAX_FAULTS], str(error)]
    for name, entry in places.items():
        if name in inputs and list(entry.shape) != list(inputs[name]):
            faults.append(
                f"{shown(name)} has the shape {shown(list(inputs[name]))} in the graph, and "
                f"{shown(list(entry.shape))} in the checkpoint."
            )
    return known, faults[:_MAX_FAULTS]
