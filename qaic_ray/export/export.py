"""Checkpoint to model folder: authors the graph, streams the weights, renames both into place.

The folder has the layout of the published recipe, whose scripts build file names from its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from qaic_ray import __version__
from qaic_ray.contract import past_names, retained
from qaic_ray.errors import ExportError, UsageError
from qaic_ray.export.architecture import Architecture, read_architecture, table_blocks
from qaic_ray.export.check.verify import (
    VerifyReport,
    read_report,
    verify_export,
    write_report,
)
from qaic_ray.export.graph import (
    COSINE_TABLE,
    SINE_TABLE,
    AuthoredGraph,
    Simplifier,
    as_authored,
    author,
    simplifying,
)
from qaic_ray.export.own_folder import GRAPH_FOLDER, check_ours
from qaic_ray.export.reference import point_at, spec_of
from qaic_ray.export.weights import (
    Table,
    WeightPlan,
    fit_architecture,
    plan_weights,
    weights_sha256,
    write_weights,
)
from qaic_ray.files.documents import shown
from qaic_ray.files.folders import (
    KeptFile,
    SourceFile,
    building,
    first_fault,
    locked,
)
from qaic_ray.model.checkpoint import (
    CUSTOM_IO_FILE,
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    Checkpoint,
    ModelManifest,
    read_manifest,
)
from qaic_ray.options import ExportOptions
from qaic_ray.weight_files.spec import WeightPlaces
from qaic_ray.weight_files.tensors import TensorEntry, read_entries

_TOOLS = ("numpy", "onnx", "onnxsim")
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EROFS)

FULL_PARAMETERS = 2_000_000_000
"""Models below this are compared with PyTorch in all their layers by default."""


@dataclass(frozen=True)
class ExportResult:
    """A finished model folder, and whether it was there already.

    `verification` is None where it was off and had not been done before.
    """

    folder: Path
    manifest: ModelManifest
    reused: bool
    verification: VerifyReport | None

    @property
    def onnx_path(self) -> Path:
        """The graph's file."""
        return self.folder / self.manifest.onnx_file


def default_level(architecture: Architecture) -> str:
    """`full` for a model that fits into the memory of a workstation, else `quick`."""
    return "full" if architecture.num_parameters < FULL_PARAMETERS else "quick"


def export_model(
    checkpoint: Checkpoint,
    options: ExportOptions | None = None,
    *,
    output: Path | None = None,
    verify: str | None = None,
    simplifier: Simplifier = simplifying,
) -> ExportResult:
    """Write the model folder of a checkpoint, or find that it is there already.

    Args:
        checkpoint: opened with its weights.
        options: what changes the graph; by default those of `qaic-ray export`.
        output: the folder, `<base>-kv` in the current one where not given. An earlier export there
            is reused when it comes from the same weights, options and tools, and else replaced.
        verify: `full`, `quick` or `off`; by default full up to two billion parameters.
        simplifier: what simplifies the graph's structure.

    Raises:
        UsageError: the checkpoint cannot be exported, or the folder is somebody else's.
        ExportError: the graph disagrees with PyTorch, or the disk is full. Nothing is left behind.
    """
    _check_extra(has_check=verify != "off")
    making = _making(checkpoint, options, output, verify, simplifier=simplifier)
    try:
        # Without the lock, which a folder that one may only read does not give.
        found = making.reuse()
        if found is not None:
            return found
        check_ours(making.folder)
        with locked(making.folder):
            return making.reuse(verify=True) or making.build()
    except OSError as error:
        kind = UsageError if error.errno in _NOT_WRITABLE else ExportError
        where = error.filename or making.folder
        raise kind(f"Cannot write {where}: {error.strerror}.") from error


def kept_export(
    checkpoint: Checkpoint,
    options: ExportOptions | None = None,
    *,
    output: Path | None = None,
    verify: str | None = None,
) -> ExportResult | None:
    """What `export_model` would find, without torch and without reading any weights.

    Raises:
        UsageError: as `export_model`.
    """
    try:
        return _making(checkpoint, options, output, verify).reuse(hashing=False)
    except OSError:
        return None  # `export_model` says what is wrong


def _making(
    checkpoint: Checkpoint,
    options: ExportOptions | None,
    output: Path | None,
    verify: str | None,
    *,
    simplifier: Simplifier = simplifying,
) -> _Making:
    if verify is not None and verify not in ("full", "quick", "off"):
        raise UsageError(f"verify must be full, quick or off, not {shown(verify)}.")
    # A link stays, and what it means is written.
    folder = Path(os.path.realpath(output or f"{checkpoint.base}-kv"))
    architecture = read_architecture(checkpoint.config)
    level = default_level(architecture) if verify is None else verify
    architecture = fit_architecture(architecture, read_entries(checkpoint.weight_files))
    options = options or ExportOptions(continuous_batching=False)  # as the command's
    return _Making(checkpoint, architecture, options, folder, level, simplifier)


def custom_io(num_layers: int, precision: str) -> str:
    """The compiler's custom_io.yaml: the KV cache, in and out, in `precision`."""
    inputs = past_names(num_layers)
    names = [*inputs, *(retained(name) for name in inputs)]
    return "".join(f" - IOName: {name}\n   Precision: {precision}\n\n" for name in names)


@dataclass(frozen=True)
class _Making:
    """One export: what it is made from, and where."""

    checkpoint: Checkpoint
    architecture: Architecture
    options: ExportOptions
    folder: Path
    level: str
    simplifier: Simplifier

    def reuse(self, *, verify: bool = False, hashing: bool = True) -> ExportResult | None:
        """The export that is in the folder, if making it again would give the same.

        With `verify` an export that lacks only its verification gets it. Without `hashing` weight
        files whose status has changed are not read through.
        """
        old = self._whole(hashing=hashing)
        if old is None:
            return None
        report = read_report(self.folder)
        done = ("full",) if self.level == "full" else ("full", "quick")
        if self.level != "off" and (report is None or report.level not in done):
            if not verify:
                return None
            report = self._verified(self.folder)
        return ExportResult(self.folder, old, reused=True, verification=report)

    def build(self) -> ExportResult:
        """Make the folder anew."""
        check_ours(self.folder)
        with building(self.folder) as fresh:
            manifest = self._write(fresh)
            report = None if self.level == "off" else self._verified(fresh)
        return ExportResult(self.folder, manifest, reused=False, verification=report)

    def _whole(self, *, hashing: bool) -> ModelManifest | None:
        """The manifest of an export that making it again would not change."""
        try:
            old = read_manifest(self.folder)
        except UsageError:
            return None  # none, or of another version of this tool: made again
        unchanged = (
            self._manifest(old.weights_sha256, old.num_clipped).same_making(old)
            and old.files
            and not first_fault(self.folder, old.files)
            and self._points_as(old)
            and (old.sources == self._sources() or (hashing and self._hashes_as(old)))
        )
        return old if unchanged else None

    def _verified(self, folder: Path) -> VerifyReport:
        """Check an export and leave the report in it."""
        report = verify_export(folder, self.checkpoint, level=self.level)
        report.raise_if_different()
        write_report(report, folder)
        return report

    def _write(self, folder: Path) -> ModelManifest:
        sources = self._sources()
        entries = read_entries(self.checkpoint.weight_files)
        graph = self._authored(entries)
        plan = plan_weights(graph.weights, entries, self.options.dtype)
        spec = self._spec(graph, entries)
        simplifier = self.simplifier
        if spec is not None:
            plan, simplifier = plan.of_tables(), as_authored
        manifest = self._manifest("", 0)
        onnx_path, data_file = folder / manifest.onnx_file, f"{manifest.onnx_file}.data"
        onnx_path.parent.mkdir()
        # Beside the new folder, where the next builder sweeps it away after a kill.
        with (
            tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
            simplifier(graph.model, Path(scratch)) as simplified,
            ThreadPoolExecutor(1) as pool,
        ):
            written = write_weights(plan, folder / data_file, self._tables())
            # Read once more, while the structure is being simplified.
            data = pool.submit(KeptFile.of, folder, data_file)
            model = simplified()
        _attach_weights(model, plan, Path(data_file).name)
        small_files = [manifest.onnx_file, CUSTOM_IO_FILE]
        if spec is not None:
            name = point_at(model, spec, onnx_path.parent)
            small_files.append(f"{GRAPH_FOLDER}/{name}")
        onnx.save(model, onnx_path)
        onnx.checker.check_model(str(onnx_path))
        if self._sources() != sources:
            raise ExportError(f"The weights of {self.checkpoint.name} changed while being read.")
        text = custom_io(self.architecture.num_layers, self.options.kv_dtype)
        (folder / CUSTOM_IO_FILE).write_text(text)
        small = [KeptFile.of(folder, name) for name in small_files]
        weights = written.sha256 if spec is None else spec.sha256
        manifest = replace(
            self._manifest(weights, written.num_clipped), files=(*small, data.result())
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json())
        return manifest

    def _manifest(self, weights: str, num_clipped: int) -> ModelManifest:
        a, o = self.architecture, self.options
        digest = hashlib.sha256(json.dumps(asdict(a), sort_keys=True).encode()).hexdigest()
        return ModelManifest(
            format=MANIFEST_FORMAT,
            name=self.folder.name,
            source=self.checkpoint.name,
            contract=o.io,
            continuous=o.continuous_batching,
            architecture=a.kind,
            num_layers=a.num_layers,
            hidden_size=a.hidden_size,
            intermediate_size=a.intermediate_size,
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads * o.replicate_kv_heads,
            head_dim=a.head_dim,
            vocab_size=a.vocab_size,
            max_position=a.max_position,
            opset=o.graph_opset,
            dtype=o.dtype,
            weights=o.weights,
            eos_ids=self.checkpoint.eos_ids,
            onnx_file=f"{GRAPH_FOLDER}/{self.folder.name}_fp16_simplified.onnx",
            weights_sha256=weights,
            architecture_sha256=digest,
            num_clipped=num_clipped,
            tool_versions={"qaic-ray": __version__} | {tool: version(tool) for tool in _TOOLS},
            sources=self._sources(),
            kv_dtype=o.kv_dtype,
            logits=o.logits,
            next_tokens=o.next_tokens,
            num_replicate_kv_heads=o.replicate_kv_heads,
            comp_ctx_lengths=o.comp_ctx_lengths,
        )

    def _sources(self) -> tuple[SourceFile, ...]:
        return tuple(SourceFile.of(path) for path in self.checkpoint.weight_files)

    def _authored(self, entries: Mapping[str, TensorEntry]) -> AuthoredGraph:
        stored = {name: entry.dtype for name, entry in entries.items()}
        in_place = self.options.weights == "reference"
        return author(self.architecture, self.options, stored if in_place else None)

    def _spec(
        self, graph: AuthoredGraph, entries: Mapping[str, TensorEntry]
    ) -> WeightPlaces | None:
        """What points at the checkpoint's tensors, where the weights stay there."""
        if self.options.weights == "copy":
            return None
        return spec_of(self.checkpoint, graph.weights, entries)

    def _points_as(self, old: ModelManifest) -> bool:
        """Whether weights that stay in the checkpoint would be pointed at in the same way."""
        if self.options.weights == "copy":
            return True
        entries = read_entries(self.checkpoint.weight_files)
        graph = self._authored(entries)
        plan_weights(graph.weights, entries, self.options.dtype)
        spec = self._spec(graph, entries)
        return spec is not None and spec.sha256 == old.weights_sha256

    def _hashes_as(self, old: ModelManifest) -> bool:
        if self.options.weights == "reference":
            return False  # made again in less time than the weights are read
        entries = read_entries(self.checkpoint.weight_files)
        specs = author(self.architecture, self.options).weights
        hashed = weights_sha256(plan_weights(specs, entries, self.options.dtype))
        return hashed == old.weights_sha256

    def _tables(self) -> Mapping[str, Table]:
        a = self.architecture
        blocks = partial(table_blocks, a.rope, a.head_dim, a.max_position)
        return {COSINE_TABLE: partial(blocks, sine=False), SINE_TABLE: partial(blocks, sine=True)}


def _check_extra(*, has_check: bool) -> None:
    needed = ("onnxsim", "torch") if has_check else ("onnxsim",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"An export needs {' and '.join(missing)}, which this Python has not: install what "
            "belongs to it with `pip install 'qaic-ray[export]'`."
        )


def _attach_weights(model: Any, plan: WeightPlan, location: str) -> None:
    """Turn the inputs that stand for weights into initializers in the external data file."""
    places = {placement.spec.name: placement for placement in plan.placements}
    graph = model.graph
    weights = [value for value in graph.input if value.name in places]
    if len(weights) != len(places):
        raise ExportError("The simplified graph has lost weights.")
    inputs = [value for value in graph.input if value.name not in places]
    del graph.input[:]
    graph.input.extend(inputs)
    for value in weights:
        place = places[value.name]
        tensor = graph.initializer.add(
            name=value.name,
            data_type=value.type.tensor_type.elem_type,
            dims=place.spec.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        where = {"location": location, "offset": place.offset, "length": place.num_bytes}
        for key, told in where.items():
            tensor.external_data.add(key=key, value=str(told))
