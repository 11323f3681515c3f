"""A model folder as the compiler takes it: of `qaic-ray export` by its manifest, or of the
published recipe's generateONNX.py, which writes none, by its graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaic_ray.compile.variant import Source
from qaic_ray.contract import (
    BATCH_INDEX,
    COMP_CTX_LENGTHS,
    INPUT_IDS,
    NUM_LOGITS_TO_KEEP,
    is_past,
)
from qaic_ray.documents import shown
from qaic_ray.errors import UsageError
from qaic_ray.folders import inside, sha256_of
from qaic_ray.model.manifest import CUSTOM_IO_FILE, MANIFEST_FILE, check_files, read_manifest

_GRAPHS = "generatedModels/*.onnx"


@dataclass(frozen=True)
class ModelFolder:
    """What is compiled, and which shapes fit it.

    `max_position` is the longest context that the graph is right for, None where nobody says.
    """

    source: Source
    continuous: bool
    num_logits_to_keep: bool
    comp_ctx_lengths: bool
    max_position: int | None


def open_folder(model_dir: Path) -> ModelFolder:
    """Read a model folder.

    Raises:
        UsageError: where the folder is not one, lost a file, or is not what was exported.
    """
    graphs = sorted(model_dir.glob(_GRAPHS))
    if graphs and not (model_dir / MANIFEST_FILE).exists():
        return _of_graph(model_dir, _chosen(model_dir, graphs))
    manifest = read_manifest(model_dir)
    onnx = model_dir / manifest.onnx_file
    custom_io = model_dir / CUSTOM_IO_FILE
    for file in (onnx, custom_io):
        if not file.is_file():
            raise UsageError(f"{model_dir} has no {file.relative_to(model_dir)}: export it again.")
    check_files(model_dir, manifest)
    # The graph's file holds no weights: its bytes and the weights' digest are the whole content.
    digest = hashlib.sha256(onnx.read_bytes() + manifest.weights_sha256.encode()).hexdigest()
    return ModelFolder(
        Source(model_dir.resolve().name, onnx.absolute(), custom_io.absolute(), digest),
        continuous=manifest.continuous,
        num_logits_to_keep=manifest.logits == NUM_LOGITS_TO_KEEP,
        comp_ctx_lengths=manifest.comp_ctx_lengths,
        max_position=manifest.max_position,
    )


def source_of(model_dir: Path) -> Source:
    """An exported model folder as the compile floor takes it; see `open_folder`."""
    return open_folder(model_dir).source


def _chosen(model_dir: Path, graphs: list[Path]) -> Path:
    """The graph that the recipe's scripts would compile, or the only one."""
    usual = f"{model_dir.resolve().name}_fp16_simplified.onnx"
    fitting = [path for path in graphs if path.name == usual] or graphs
    if len(fitting) > 1:
        names = ", ".join(path.name for path in fitting[:3])
        raise UsageError(
            f"{model_dir} holds {len(fitting)} graphs ({names}) and none called {usual}: leave the "
            "one to be compiled, under that name."
        )
    return fitting[0]


def _of_graph(model_dir: Path, onnx_path: Path) -> ModelFolder:
    graph = _read_graph(onnx_path)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name for value in graph.input} - weights
    if INPUT_IDS not in inputs or not any(map(is_past, inputs)):
        raise UsageError(
            f"{onnx_path} is not a language model with its KV cache as inputs ({INPUT_IDS}, "
            f"past_key.0, ...): it has {shown(sorted(inputs))}; make one with `qaic-ray export`."
        )
    digest = hashlib.sha256(sha256_of(onnx_path).encode())
    for name in sorted(set(_data_files(graph, onnx_path))):
        path = onnx_path.parent / name
        if not path.is_file():
            raise UsageError(f"{onnx_path} keeps weights in {path}, which is not there.")
        digest.update(f"{name} {sha256_of(path)}".encode())
    custom_io = model_dir / CUSTOM_IO_FILE
    return ModelFolder(
        Source(
            model_dir.resolve().name,
            onnx_path.absolute(),
            custom_io.absolute() if custom_io.is_file() else None,
            digest.hexdigest(),
        ),
        continuous=BATCH_INDEX in inputs,
        num_logits_to_keep=NUM_LOGITS_TO_KEEP in inputs,
        comp_ctx_lengths=COMP_CTX_LENGTHS in inputs,
        max_position=None,
    )


def _read_graph(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise UsageError(f"{path} cannot be read as an ONNX model: {error}.") from error


def _data_files(graph: Any, onnx_path: Path) -> Iterator[str]:
    """The files that hold the graph's weights, by their paths beside it."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                try:
                    yield inside(entry.value)
                except ValueError as error:
                    raise UsageError(
                        f"{onnx_path} keeps weights in {shown(entry.value)}: {error}."
                    ) from error
