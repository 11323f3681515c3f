"""An export whose weights stay in the checkpoint: what points at them, and reading them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from qaic_ray.export.builder import WeightSpec
from qaic_ray.model.checkpoint import Checkpoint
from qaic_ray.weight_files.spec import METADATA_KEY, SPEC_FILE, WeightPlaces, read_places
from qaic_ray.weight_files.tensors import TensorEntry


def spec_of(
    checkpoint: Checkpoint, weights: Iterable[WeightSpec], entries: Mapping[str, TensorEntry]
) -> WeightPlaces:
    """Which tensor of the checkpoint each weight of its graph is; rotary tables are none."""
    tensors = {w.name: entries[w.source] for w in weights if w.source is not None}
    return WeightPlaces(
        model_name=str(checkpoint.config["architectures"][0]),
        folder=checkpoint.folder.resolve(),
        files=tuple(path.name for path in checkpoint.weight_files),
        tensors=tensors,
    )


def point_at(model: Any, spec: WeightPlaces, folder: Path) -> str:
    """Write into an `onnx.ModelProto`, and beside it, where its weights lie.

    Returns:
        The name of the file that was written in `folder`, the graph's.
    """
    model.metadata_props.add(key=METADATA_KEY, value=spec.metadata)
    (folder / SPEC_FILE).write_text(spec.text, encoding="utf-8")
    with suppress(OSError):  # compilers find the files by the checkpoint's path, too
        (folder / spec.folder.name).symlink_to(spec.folder)
    return SPEC_FILE


def take_inputs_out(model: Any, onnx_path: Path) -> dict[str, TensorEntry]:
    """Make initializers of an `onnx.ModelProto`'s weights that lie in a checkpoint, in place.

    Returns:
        Where each of them lies; they have no bytes in the model.

    Raises:
        UsageError: a file or tensor is not there.
    """
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    places: dict[str, TensorEntry] = {}
    for text in texts:
        places |= read_places(text, str(onnx_path), onnx_path.parent)
    graph = model.graph
    kept = [value for value in graph.input if value.name not in places]
    for value in graph.input:
        if value.name in places:
            tensor = graph.initializer.add(
                name=value.name,
                data_type=value.type.tensor_type.elem_type,
                dims=places[value.name].shape,
                data_location=TensorProto.EXTERNAL,
            )
            tensor.external_data.add(key="location", value=value.name)
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del graph.input[:]
    graph.input.extend(copies)
    return places


def mapped(entry: TensorEntry) -> Any:
    """A tensor of a checkpoint; its pages are read when they are used. bfloat16 comes as uint16."""
    kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry.dtype]
    return np.memmap(entry.path, kind, "r", entry.offset, entry.shape)
