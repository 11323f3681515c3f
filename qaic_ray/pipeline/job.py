"""A job from end to end: export, compile, run, report; and the plan of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from qaic_ray.compile.compiler import Source
from qaic_ray.compile.store import Build
from qaic_ray.errors import SdkNotFound, UsageError
from qaic_ray.model.checkpoint import CUSTOM_IO_FILE
from qaic_ray.options import Job
from qaic_ray.pipeline.compile_step import CompileRequest, compile_on, requested_builds
from qaic_ray.pipeline.export_step import export_step
from qaic_ray.pipeline.job_file import dump_job, job_variants
from qaic_ray.pipeline.request import RunRequest, absolute_model, absolute_paths, resolved
from qaic_ray.pipeline.run_step import check_chat_template, on_local_cards, resuming, run_on
from qaic_ray.pipeline.steps import Listener, SdkChoice, choose_sdk
from qaic_ray.sdk import SDK_NAMES, VENDOR_ROOT, Sdk, find_sdk

if TYPE_CHECKING:
    from qaic_ray.runs.report import RunSummary


def launch_job(
    job: Job, listener: Listener, *, resume: Path | None = None, retry_errors: bool = False
) -> RunSummary:
    """The whole road of a job, on one Ray from the first compile to the last row.

    Args:
        job: as it was read.
        listener: who is told.
        resume: folder of a run of the same job that is to go on.
        retry_errors: whether that run's rows of errors are tried again.

    Raises:
        UsageError: as early as it can be known.
        CompileError: when the variant to be run could not be compiled.
    """
    chosen_index(job)  # it is there
    sdk = choose_sdk(job.sdk, job.emulator, listener)
    request = run_request(job, resume, retry_errors=retry_errors)
    request, num_cards = on_local_cards(request, sdk)
    with resuming(request, sdk):
        return _launched(job, request, sdk, num_cards=num_cards, listener=listener)


def _launched(
    job: Job, request: RunRequest, sdk: SdkChoice, *, num_cards: int, listener: Listener
) -> RunSummary:
    chosen_at = chosen_index(job)
    run_input = request.open_input()
    exported = export_step(job.model, job.export, listener)
    check_chat_template(request)
    builds = requested_builds(CompileRequest(exported.folder, job.compile), sdk.here)
    from qaic_ray.cluster.cluster import Cluster

    listener.began("Ray")
    with Cluster(num_cards, address=job.ray.address, dashboard=job.ray.dashboard) as cluster:
        where = f", dashboard at {cluster.dashboard_url}" if cluster.dashboard_url else ""
        token = f" (its token is in {cluster.token_file})" if where and cluster.token_file else ""
        listener.ended(f"Ray{where}{token}")
        outcomes = compile_on(cluster, builds, job.compile.parallel, listener)
        chosen = outcomes[chosen_at].result
        if not isinstance(chosen, Build):
            raise chosen
        return run_on(
            cluster, replace(request, qpc=chosen.path), run_input, sdk=sdk, listener=listener
        )


@dataclass(frozen=True)
class Plan:
    """What a job would do; `compiles` holds name, argv and whether it is the variant run."""

    job: str
    text: str
    compiles: tuple[tuple[str, list[str], bool], ...]


def plan_job(job: Job) -> Plan:
    """Lay a job out without touching model, compiler or card.

    Where the SDK that the job asks for is not on this machine, the argv is the one for the
    vendor's folder at the version that the emulator part names.
    """
    try:
        sdk = find_sdk(job.sdk, job.emulator)
    except SdkNotFound:
        sdk = Sdk(VENDOR_ROOT, "real", job.emulator.apps_version)
    folder = Path(job.export.output or f"{_base(job.model.name)}-kv")
    name = folder.resolve().name
    onnx = folder / "generatedModels" / f"{name}_fp16_simplified.onnx"
    chosen = chosen_index(job)
    compiles = []
    for index, variant in enumerate(
        job_variants(job, Source(name, onnx, folder / CUSTOM_IO_FILE, ""))
    ):
        target = Path(job.compile.output) / variant.name
        argv = variant.argv(sdk, target / "specializations.json", target)
        compiles.append((variant.name, argv, index == chosen))
    cards = "all cards" if job.run.devices == "all" else f"{len(job.run.devices)} cards"
    text = (
        f"export {job.model.name} to {folder}, compile {len(compiles)} variant(s) with the "
        f"{sdk.label}, run one on {cards}"
    )
    return Plan(job.name, text, tuple(compiles))


def chosen_index(job: Job) -> int:
    """Index, in the grid's order, of the variant that is run.

    Raises:
        UsageError: where the choice fits none of the variants, or several.
    """
    num_variants = len(job_variants(job, Source("", Path(), None, "")))
    names = ("precision", "num_cores", "batch_size", "prompt_len", "ctx_len")
    wanted = [getattr(job.run.variant, name) for name in names]
    grid = product(*(getattr(job.compile, name) for name in names))
    fitting = [
        index
        for index, values in enumerate(grid)
        if all(want in (None, value) for want, value in zip(wanted, values, strict=True))
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise UsageError(
        f"run.variant of the job {job.name} fits {len(fitting)} of the {num_variants} compiled "
        "variants: say which one with precision, num_cores, batch_size, prompt_len or ctx_len."
    )


def run_request(job: Job, resume: Path | None = None, *, retry_errors: bool = False) -> RunRequest:
    """The run of a job, but for the QPC."""
    job = job.model_copy(update={"run": resolved(job.run, resume)})
    return RunRequest(
        name=job.name,
        model=job.model.name,
        qpc=Path(),
        run=job.run,
        ray=job.ray,
        job_text=dump_job(_absolute(job)),
        resume=resume,
        retry_errors=retry_errors,
    )


def _absolute(job: Job) -> Job:
    """The job as it is understood in every folder."""
    job = job.changed("model", name=absolute_model(job.model.name))
    job = job.changed("export", **absolute_paths(job.export, "output"))
    job = job.changed("compile", **absolute_paths(job.compile, "output"))
    job = job.changed("run", **absolute_paths(job.run, "output", "draft_qpc"))
    return job if job.sdk in SDK_NAMES else job.model_copy(update=absolute_paths(job, "sdk"))


def _base(model_name: str) -> str:
    path = Path(model_name)
    return path.stem if path.suffix == ".gguf" else path.name
