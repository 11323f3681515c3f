"""Step 2: a model folder to QPC folders, one or a grid of them.

A folder of `qaic-ray export` is read by its manifest. One of the published recipe's
generateONNX.py has none, and is read by its graph.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray import contract
from qaic_ray.check.builds import check_builds
from qaic_ray.compile.compiler import Source, Variant, grid_variants
from qaic_ray.compile.probe import check_reads_weights
from qaic_ray.compile.store import SPECIALIZATIONS_FILE, Build, BuildRequest, build, check_request
from qaic_ray.errors import CompileError, DeviceError, QaicRayError, UsageError
from qaic_ray.files.documents import read_text, shown, user_path
from qaic_ray.files.folders import SourceFile, inside, sha256_of
from qaic_ray.limits import too_many_cores
from qaic_ray.model.checkpoint import (
    CUSTOM_IO_FILE,
    MANIFEST_FILE,
    ModelManifest,
    check_files,
    read_manifest,
)
from qaic_ray.options import CompileOptions, LocalRayOptions
from qaic_ray.pipeline.request import Listener
from qaic_ray.sdk import Sdk
from qaic_ray.weight_files.content import PointedAt, pointed_at
from qaic_ray.weight_files.spec import METADATA_KEY, SPEC_FILE, read_places

if TYPE_CHECKING:
    from qaic_ray.cluster.cluster import Cluster

_NO_DASHBOARD = LocalRayOptions(dashboard=False)
_GRAPHS = "generatedModels/*.onnx"
_SHAPES = (
    "batch_size",
    "prompt_len",
    "ctx_len",
    "prefill_rows",
    "num_speculative_tokens",
    "comp_ctx_lengths",
)


Compiled = tuple[Variant, Build | QaicRayError]
"""What came of one variant: a build, or the error in its place."""


def specializations_file(given: Path | None, grid: CompileOptions) -> Path | None:
    """The file that says all shapes: the one given, or the current folder's, as in the recipe.

    Args:
        given: by the user.
        grid: the options; the file may stand beside those that say no shape.

    Raises:
        UsageError: where both say shapes.
    """
    here = Path(SPECIALIZATIONS_FILE)
    path = given or (here if here.is_file() else None)
    said = [f"--{name.replace('_', '-')}" for name in _SHAPES if name in grid.model_fields_set]
    if path is None or not said:
        return path
    named = f"{path} says all shapes, and {' and '.join(said)} too"
    if given is not None:
        raise UsageError(f"{named}: leave one of them out.")
    raise UsageError(
        f"{named}: the file in this folder is used as the recipe's scripts do; leave the options "
        "out, or move it away."
    )


def requested_builds(
    model_dir: Path, grid: CompileOptions, sdk: Sdk, specializations: Path | None = None
) -> list[BuildRequest]:
    """The builds of `requested_variants`, by paths that mean the same on every node.

    Raises:
        UsageError: as `requested_variants`, for folders that may not be replaced, for an SDK that
            does not read weights from where the model points, and for what the compiler or every
            card of this machine would refuse.
    """
    store = user_path(grid.output, "The folder of the QPCs").absolute()
    variants = requested_variants(model_dir, grid, sdk, specializations)
    external = variants[0].source.external
    if external is not None:
        check_reads_weights(sdk, external.dtypes)
    builds = [BuildRequest(variant, sdk, store, grid.layout) for variant in variants]
    for request in builds:
        user_path(request.target, "The folder of the QPC")
        check_request(request)
    check_builds(builds)
    return builds


def requested_variants(
    model_dir: Path, grid: CompileOptions, sdk: Sdk, specializations: Path | None = None
) -> list[Variant]:
    """Every variant of a grid over one exported model, checked before anything is compiled.

    Args:
        model_dir: of the model.
        grid: what is compiled.
        sdk: whose cards the programs are for.
        specializations: a file in place of all shapes of the grid.

    Raises:
        UsageError: for a model, shapes, a precision or NSPs that cannot be.
    """
    model = open_folder(model_dir)
    if specializations is None:
        _check_inputs(
            model,
            num_logits_to_keep=grid.num_speculative_tokens > 0 or None,
            comp_ctx_lengths=len(grid.comp_ctx_lengths) > 0,
        )
        variants = grid_variants(
            model.source,
            grid,
            continuous=model.continuous,
            num_logits_to_keep=model.num_logits_to_keep,
        )
    else:
        shapes = _shapes_of(specializations, model, model_dir)
        variants = [
            Variant(model.source, precision, cores, shapes)
            for precision, cores in product(grid.precision, grid.num_cores)
        ]
    for variant in variants:
        ctx_len = variant.specializations.ctx_len
        if model.max_position is not None and ctx_len > model.max_position:
            raise UsageError(
                f"ctx_len {ctx_len} is more than the {model.max_position} positions that "
                f"{model.source.name} was made for: choose a smaller one."
            )
    _check_cores(variants, sdk)
    return variants


def _check_cores(variants: Sequence[Variant], sdk: Sdk) -> None:
    """A program may not need more NSPs than the cards of this machine have.

    Raises:
        UsageError: naming both numbers.
    """
    try:
        devices = sdk.devices()
    except DeviceError:
        return  # a machine that only compiles needs no card and no driver
    most = max((device.nsp_total for device in devices), default=0)
    for variant in variants:
        refusal = too_many_cores(variant.num_cores, most) if most else None
        if refusal is not None:
            raise UsageError(refusal)


def compile_step(
    requests: Sequence[BuildRequest],
    parallel: int | None,
    listener: Listener,
    ray: LocalRayOptions = _NO_DASHBOARD,
) -> list[Compiled]:
    """Compile what `requested_builds` gave: several variants as Ray tasks.

    One is compiled in this process, where nothing is asked of Ray. A compile that fails is an
    outcome.
    """
    if len(requests) == 1 and ray == _NO_DASHBOARD:
        (request,) = requests
        result: Build | QaicRayError
        _remark(requests, listener)
        listener.compiling(1)
        listener.building(request)
        try:
            result = build(request)
        except CompileError as error:
            result = error
        listener.compiled(request.variant, result)
        return [(request.variant, result)]
    from qaic_ray.pipeline.open_ray import open_ray

    sdk = requests[0].sdk
    with open_ray(ray, 0, name="compile", sdk=sdk, listener=listener) as cluster:
        return compile_on(cluster, requests, parallel, listener)


def compile_on(
    cluster: Cluster, requests: Sequence[BuildRequest], parallel: int | None, listener: Listener
) -> list[Compiled]:
    """Compile as Ray tasks, `parallel` at a time; None means as many as there are CPUs."""
    by_label = {request.label: request for request in requests}
    outcomes: dict[str, Compiled] = {}

    def done(label: str, result: Build | QaicRayError) -> None:
        outcomes[label] = (by_label[label].variant, result)
        listener.compiled(*outcomes[label])

    _remark(requests, listener)
    listener.compiling(len(by_label))
    cluster.compile_variants(
        build,
        by_label,
        parallel=parallel or os.cpu_count() or 1,
        on_done=done,
        on_begin=lambda label: listener.building(by_label[label]),
    )
    return [outcomes[label] for label in by_label]


def _remark(requests: Sequence[BuildRequest], listener: Listener) -> None:
    for one in check_builds(requests):
        listener.remark(f"{one.place}: {one.says} {one.remedy}")


def _shapes_of(path: Path, model: ModelFolder, model_dir: Path) -> contract.Specializations:
    shapes = contract.Specializations.load(path)
    if shapes.continuous != model.continuous:
        how = "was not" if shapes.continuous else "was"
        raise UsageError(
            f"{path} does not fit {model_dir}, which {how} exported for continuous batching "
            "(full_batch_size)."
        )
    first = shapes.entries[0]
    _check_inputs(
        model,
        num_logits_to_keep=first.num_logits_to_keep is not None,
        comp_ctx_lengths=first.comp_ctx_lengths is not None,
    )
    return shapes


def _check_inputs(
    model: ModelFolder, *, num_logits_to_keep: bool | None, comp_ctx_lengths: bool
) -> None:
    """Refuse shapes whose symbols are not those of the graph; None fits either."""
    name = model.source.name
    if num_logits_to_keep not in (None, model.num_logits_to_keep):
        raise UsageError(
            f"{name} was exported without num_logits_to_keep, which speculation needs: "
            "export it with --logits num_logits_to_keep."
            if num_logits_to_keep
            else f"{name} was exported with num_logits_to_keep: every specialization must "
            "say how many."
        )
    if comp_ctx_lengths != model.comp_ctx_lengths:
        raise UsageError(
            f"{name} was exported without compute-context lengths: export it with "
            "--comp-ctx-lengths."
            if comp_ctx_lengths
            else f"{name} was exported with compute-context lengths: say which ones, like "
            "--comp-ctx-lengths 512,1024 (ctx_len is added)."
        )


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
    external = _external(onnx, manifest) if manifest.weights == "reference" else None
    # The graph's file holds no weights: its bytes and the weights' digest are the whole content.
    weights = manifest.weights_sha256 if external is None else external.sha256
    digest = hashlib.sha256(onnx.read_bytes() + weights.encode()).hexdigest()
    return ModelFolder(
        Source(model_dir.resolve().name, onnx.absolute(), custom_io.absolute(), digest, external),
        continuous=manifest.continuous,
        num_logits_to_keep=manifest.logits == contract.NUM_LOGITS_TO_KEEP,
        comp_ctx_lengths=manifest.comp_ctx_lengths,
        max_position=manifest.max_position,
    )


def _external(onnx: Path, manifest: ModelManifest) -> PointedAt:
    """The weights of an export of ours in the checkpoint's files.

    Raises:
        UsageError: they are not there, or not those that the model was made from.
    """
    spec = onnx.with_name(SPEC_FILE)
    places = read_places(read_text(spec), str(spec), onnx.parent)
    made_from = {source.name: source for source in manifest.sources}
    for path in sorted({entry.path for entry in places.values()}):
        if SourceFile.of(path) != made_from.get(path.name):
            raise UsageError(
                f"{path} has changed since {manifest.name} was exported from it: export it again, "
                "which takes seconds."
            )
    return pointed_at(places)


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
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(onnx_path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UsageError(f"{onnx_path} cannot be read as an ONNX model: {error}.") from error
    graph = model.graph
    inputs = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    if contract.INPUT_IDS not in inputs or not any(map(contract.is_past, inputs)):
        raise UsageError(
            f"{onnx_path} is not a language model with its KV cache as inputs (input_ids, "
            f"past_key.0, ...): it has {shown(sorted(inputs))}; make one with `qaic-ray export`."
        )
    digest = hashlib.sha256(sha256_of(onnx_path).encode())
    for name in _data_files(graph):
        try:
            path = onnx_path.parent / inside(name)
        except ValueError as error:
            raise UsageError(f"{onnx_path} keeps weights in {shown(name)}: {error}.") from error
        if not path.is_file():
            raise UsageError(f"{onnx_path} keeps weights in {path}, which is not there.")
        digest.update(f"{name} {sha256_of(path)}".encode())
    external = None
    for text in [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]:
        external = pointed_at(read_places(text, str(onnx_path), onnx_path.parent))
        digest.update(external.sha256.encode())
    custom_io = model_dir / CUSTOM_IO_FILE
    custom_io_path = custom_io.absolute() if custom_io.is_file() else None
    name = model_dir.resolve().name
    return ModelFolder(
        Source(name, onnx_path.absolute(), custom_io_path, digest.hexdigest(), external),
        continuous=contract.BATCH_INDEX in inputs,
        num_logits_to_keep=contract.NUM_LOGITS_TO_KEEP in inputs,
        comp_ctx_lengths=contract.COMP_CTX_LENGTHS in inputs,
        max_position=None,
    )


def _data_files(graph: Any) -> list[str]:
    """The files that hold the graph's weights, by their paths beside it."""
    entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
    return sorted({entry.value for entry in entries if entry.key == "location"})
