"""Step 2: a model folder to QPC folders, one or a grid of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from qaic_ray.compile.store import (
    SPECIALIZATIONS_FILE,
    Build,
    BuildRequest,
    build,
    check_request,
)
from qaic_ray.compile.variant import Precision, Variant, grid_variants
from qaic_ray.contract import Specializations
from qaic_ray.documents import user_path
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.options import CompileOptions
from qaic_ray.pipeline.devices import check_cores
from qaic_ray.pipeline.listener import CompileOutcome, Listener
from qaic_ray.pipeline.sources import ModelFolder, open_folder
from qaic_ray.sdk import Sdk

if TYPE_CHECKING:
    from qaic_ray.cluster.cluster import Cluster, Outcome


_SHAPES = ("batch_size", "prompt_len", "ctx_len", "num_speculative_tokens", "comp_ctx_lengths")


@dataclass(frozen=True)
class CompileRequest:
    """A grid over one exported model; a file of `specializations` stands in place of all shapes."""

    model_dir: Path
    grid: CompileOptions
    specializations: Path | None = None


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


def requested_builds(request: CompileRequest, sdk: Sdk) -> list[BuildRequest]:
    """A request's builds, by paths that mean the same on every node.

    Raises:
        UsageError: as `requested_variants`, and for folders that may not be replaced.
    """
    store = user_path(request.grid.output, "The folder of the QPCs").absolute()
    builds = [BuildRequest(v, sdk, store) for v in requested_variants(request, sdk)]
    for build_request in builds:
        user_path(build_request.target, "The folder of the QPC")
        check_request(build_request)
    return builds


def requested_variants(request: CompileRequest, sdk: Sdk) -> list[Variant]:
    """Every variant of a request, checked before anything is compiled.

    Raises:
        UsageError: for a model, shapes, a precision or NSPs that cannot be.
    """
    model = open_folder(request.model_dir)
    source = model.source
    grid = request.grid
    if request.specializations is None:
        _check_inputs(
            model,
            num_logits_to_keep=grid.num_speculative_tokens > 0 or None,
            comp_ctx_lengths=len(grid.comp_ctx_lengths) > 0,
        )
        variants = grid_variants(
            source,
            grid,
            continuous=model.continuous,
            num_logits_to_keep=model.num_logits_to_keep,
        )
    elif grid.num_speculative_tokens or grid.comp_ctx_lengths:
        raise UsageError(
            f"{request.specializations} says all shapes: leave --num-speculative-tokens and "
            "--comp-ctx-lengths out."
        )
    else:
        shapes = _shapes_of(request.specializations, model, request.model_dir)
        variants = [
            Variant(source, Precision(precision), cores, shapes)
            for precision, cores in product(grid.precision, grid.num_cores)
        ]
    for variant in variants:
        ctx_len = variant.specializations.ctx_len
        if model.max_position is not None and ctx_len > model.max_position:
            raise UsageError(
                f"ctx_len {ctx_len} is more than the {model.max_position} positions that "
                f"{source.name} was made for: choose a smaller one."
            )
    check_cores(variants, sdk)
    return variants


def compile_step(request: CompileRequest, sdk: Sdk, listener: Listener) -> list[CompileOutcome]:
    """Compile a request: a single variant in this process, several as Ray tasks.

    Raises:
        UsageError: before anything is compiled; a compile that fails is an outcome.
    """
    requests = requested_builds(request, sdk)
    if len(requests) == 1:
        outcome = _build_here(requests[0])
        listener.compiled(outcome)
        return [outcome]
    from qaic_ray.cluster.cluster import Cluster

    listener.began("Ray")
    with Cluster(num_cards=0) as cluster:
        listener.ended("Ray")
        return compile_on(cluster, requests, request.grid.parallel, listener)


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


def _shapes_of(path: Path, model: ModelFolder, model_dir: Path) -> Specializations:
    shapes = Specializations.load(path)
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


def _build_here(request: BuildRequest) -> CompileOutcome:
    try:
        return CompileOutcome(request.variant, build(request))
    except CompileError as error:
        return CompileOutcome(request.variant, error)
