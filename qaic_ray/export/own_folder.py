"""The folder of an export: whose it is, so that nothing of anybody else's is replaced."""

from __future__ import annotations

import os
from pathlib import Path

from qaic_ray.errors import UsageError
from qaic_ray.export.builder import PRODUCER
from qaic_ray.files.documents import read_object, shown
from qaic_ray.files.folders import foreign_files
from qaic_ray.model.checkpoint import CUSTOM_IO_FILE, MANIFEST_FILE, VERIFY_FILE
from qaic_ray.weight_files.spec import SPEC_FILE

GRAPH_FOLDER = "generatedModels"

_OURS = {MANIFEST_FILE, CUSTOM_IO_FILE, VERIFY_FILE, f"{GRAPH_FOLDER}/{SPEC_FILE}"}
_MARKS = {"format", "onnx_file", "weights_sha256", "architecture_sha256", "tool_versions"}
"""Keys that a manifest of every version has."""
_PRODUCER_WITHIN = 64
"""Bytes at the start of an ONNX file among which is the producer's name."""


def check_ours(folder: Path) -> None:
    """Refuse to replace a folder that is not an export of ours.

    Raises:
        UsageError: naming what is there.
    """
    if not os.path.lexists(folder):
        return
    remedy = "choose another --output, or move it away"
    onnx_file = _exported_file(folder) if folder.is_dir() else None
    if onnx_file is None:
        content = sorted(os.listdir(folder)) if folder.is_dir() else [folder.name]
        if not content:
            return
        raise UsageError(
            f"{folder} exists and is not an exported model of this tool "
            f"({', '.join(map(shown, content[:3]))}): {remedy}."
        )
    ours = {onnx_file, f"{onnx_file}.data", *_OURS}
    link = _checkpoint_link(folder)
    rest = [name for name in foreign_files(folder, ours.__contains__, limit=4) if name != link][:3]
    if rest:
        raise UsageError(
            f"{folder} would be replaced, and holds what no export put there "
            f"({', '.join(map(shown, rest))}): {remedy}."
        )


def _exported_file(folder: Path) -> str | None:
    """Name of the graph in an export of ours, of any version; None for any other folder."""
    try:
        document = read_object(folder / MANIFEST_FILE)
    except UsageError:
        document = {}
    named = document.get("onnx_file")
    if isinstance(named, str) and document.keys() >= _MARKS:
        return named
    # A damaged manifest beside a graph that says who wrote it.
    graphs = sorted((folder / GRAPH_FOLDER).glob("*.onnx"))
    if (folder / MANIFEST_FILE).exists() and len(graphs) == 1 and graphs[0].is_file():
        with graphs[0].open("rb") as stream:
            if PRODUCER.encode() in stream.read(_PRODUCER_WITHIN):
                return f"{GRAPH_FOLDER}/{graphs[0].name}"
    return None


def _checkpoint_link(folder: Path) -> str:
    """The link to the checkpoint that an export with its weights there has; empty for none."""
    try:
        target = read_object(folder / GRAPH_FOLDER / SPEC_FILE).get("model_id")
    except UsageError:
        return ""
    name = f"{GRAPH_FOLDER}/{os.path.basename(str(target))}"
    return name if (folder / name).is_symlink() else ""
