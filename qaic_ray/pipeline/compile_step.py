"""Step 2: a model folder to QPC folders, one or a grid of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qaic_ray.compile.store import Build, BuildRequest, build
from qaic_ray.compile.variant import Grid, Precision, Source, Variant, check_num_cores
from qaic_ray.contract import Specializations
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.manifest import CUSTOM_IO_FILE, ModelManifest, read_manifest
from qaic_ray.pipeline.devices import check_cores
from qaic_ray.pipeline.listener import CompileOutcome, Listener
from qaic_ray.sdk import Sdk

if TYPE_CHECKING:
    from qaic_ray.fleet.cluster import Cluster, Outcome


@dataclass(frozen=True)
class CompileRequest:
    """A grid over one exported model; `specializations` stands in place of the three lists.

    `parallel` None means as many compiles at once as there are CPUs.
    """

    model_dir: Path
    precisions: Sequence[str]
    num_cores: Sequence[int]
    batch_sizes: Sequence[int]
    prompt_lens: Sequence[int]
    ctx_lens: Sequence[int]
    store: Path
    specializations: Path | None = None
    parallel: int | None = None


def source_of(model_dir: Path) -> Source:
    """An exported model folder as the compile floor takes it.

    Raises:
        UsageError: where the folder is not one, or lost a file.
    """
    manifest = read_manifest(model_dir)
    onnx = model_dir / manifest.onnx_file
    custom_io = model_dir / CUSTOM_IO_FILE
    for file in (onnx, custom_io):
        if not file.is_file():
            raise UsageError(f"{model_dir} has no {file.relative_to(model_dir)}: export it again.")
    # The graph's file holds no weights: its bytes and the weights' digest are the whole content.
    digest = hashlib.sha256(onnx.read_bytes() + manifest.weights_sha256.encode()).hexdigest()
    return Source(model_dir.resolve().name, onnx.absolute(), custom_io.absolute(), digest)


def requested_variants(request: CompileRequest, sdk: Sdk) -> list[Variant]:
    """Every variant of a request, checked before anything is compiled.

    Raises:
        UsageError: for a model, shapes, a precision or NSPs that cannot be.
    """
    manifest = read_manifest(request.model_dir)
    source = source_of(request.model_dir)
    precisions = [Precision.parse(name) for name in request.precisions]
    cores = [check_num_cores(number) for number in request.num_cores]
    if request.specializations is None:
        lens = request.batch_sizes, request.prompt_lens, request.ctx_lens
        variants = Grid(precisions, cores, *lens).variants(source, continuous=manifest.continuous)
    else:
        shapes = _shapes_of(request.specializations, manifest, request.model_dir)
        variants = [Variant(source, p, c, shapes) for p in precisions for c in cores]
    for variant in variants:
        ctx_len = variant.specializations.ctx_len
        if ctx_len > manifest.max_position:
            raise UsageError(
                f"ctx_len {ctx_len} is more than the {manifest.max_position} positions that "
                f"{source.name} was made for: choose a smaller one."
            )
    check_cores(variants, sdk)
    return variants


def compile_step(request: CompileRequest, sdk: Sdk, listener: Listener) -> list[CompileOutcome]:
    """Compile a request: a single variant in this process, several as Ray tasks.

    Raises:
        UsageError: before anything is compiled; a compile that fails is an outcome.
    """
    requests = [BuildRequest(v, sdk, request.store) for v in requested_variants(request, sdk)]
    if len(requests) == 1:
        outcome = _build_here(requests[0])
        listener.compiled(outcome)
        return [outcome]
    from qaic_ray.fleet.cluster import Cluster

    listener.began("Ray")
    with Cluster(num_cards=0) as cluster:
        listener.ended("Ray")
        return compile_on(cluster, requests, request.parallel, listener)


def compile_on(
    cluster: Cluster, requests: Sequence[BuildRequest], parallel: int | None, listener: Listener
) -> list[CompileOutcome]:
    """Compile as Ray tasks, `parallel` at a time; None means as many as there are CPUs."""
    by_label = {request.label: request for request in requests}

    def told(outcome: Outcome[Build]) -> None:
        listener.compiled(CompileOutcome(by_label[outcome.label].variant, outcome.result))

    outcomes = cluster.compile_variants(
        build,
        by_label,
        parallel=parallel or os.cpu_count() or 1,
        on_done=told,
    )
    return [CompileOutcome(by_label[o.label].variant, o.result) for o in outcomes]


def _shapes_of(path: Path, manifest: ModelManifest, model_dir: Path) -> Specializations:
    shapes = Specializations.load(path)
    if shapes.continuous != manifest.continuous:
        how = "was not" if shapes.continuous else "was"
        raise UsageError(
            f"{path} does not fit {model_dir}, which {how} exported for continuous batching "
            "(full_batch_size)."
        )
    return shapes


def _build_here(request: BuildRequest) -> CompileOutcome:
    try:
        return CompileOutcome(request.variant, build(request))
    except CompileError as error:
        return CompileOutcome(request.variant, error)
