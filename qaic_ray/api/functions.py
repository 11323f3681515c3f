"""The steps of a job as functions; options are keyword arguments of the names that a job has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.api.quiet import LogListener
from qaic_ray.errors import CompileError, ParameterError
from qaic_ray.files.documents import checked
from qaic_ray.option_types import Section
from qaic_ray.options import (
    CompileOptions,
    EmulatorOptions,
    ExportOptions,
    Job,
    LocalRayOptions,
    ModelOptions,
)

if TYPE_CHECKING:
    from qaic_ray.compile.store import Build
    from qaic_ray.export.export import ExportResult
    from qaic_ray.pipeline.job import Plan
    from qaic_ray.runs.report import RunSummary

JobLike = str | Path | Mapping[str, Any] | Job
"""A job file, a mapping as one holds, or a job that was read."""


def launch(
    job: JobLike,
    *,
    resume: str | Path | None = None,
    retry_errors: bool = False,
    stop_if_errors: float | None = None,
    **overrides: Any,
) -> RunSummary:
    """Run a whole job: export, compile, answer on every card; what came of it.

    Args:
        job: a file, a mapping, or a Job.
        resume: the folder of a run of the same job that is to go on.
        retry_errors: whether that run's rows of errors are tried again.
        stop_if_errors: the share of failed rows that ends the run early.
        overrides: parts of the job with other values: `run={"generation_len": 64}`.

    Raises:
        JobError: for the job; naming the key.
        UsageError: for a model, cards or prompts that do not fit.
        Unfinished: it stopped before its end, and can be resumed.
    """
    from qaic_ray.pipeline.job import launch_job

    return launch_job(
        read_job(job, overrides),
        LogListener(),
        resume=None if resume is None else Path(resume),
        retry_errors=retry_errors,
        stop_if_errors=stop_if_errors,
    )


def plan(job: JobLike, **overrides: Any) -> Plan:
    """What a job would compile and run; it runs nothing.

    Args:
        job: as in `launch`.
        overrides: as in `launch`.

    Raises:
        JobError: for the job; naming the key.
    """
    from qaic_ray.pipeline.job import plan_job

    return plan_job(read_job(job, overrides))


def export(model: str, *, trust_remote_code: bool = False, **options: Any) -> ExportResult:
    """Make an ONNX model with its KV cache from a checkpoint, and check it against PyTorch.

    Args:
        model: local folder, hub id, .gguf file, or `smollm2-135m`.
        trust_remote_code: let transformers run code that the checkpoint brings.
        options: of a job's `export`: `output`, `io`, `dtype`, `verify`, ...

    Raises:
        ParameterError: for an option.
        CheckpointError: for the model.
        ExportError: it is not equal to PyTorch's.
    """
    from qaic_ray.pipeline.export_step import export_step

    said = {"name": model, "trust_remote_code": trust_remote_code}
    return export_step(
        _section(ModelOptions, said, "export"),
        _section(ExportOptions, options, "export"),
        LogListener(),
    )


def compile(  # the recipe's word
    model_dir: str | Path,
    *,
    sdk: str | Path = "auto",
    emulator: Mapping[str, Any] | None = None,
    specializations: str | Path | None = None,
    keep_ray: bool = False,
    **options: Any,
) -> list[Build]:
    """Compile a model into QPCs, every combination of the options' lists; each built once.

    Args:
        model_dir: what `export` made, or a folder of the recipe's.
        sdk: `auto`, `real`, `emulated`, or an SDK folder.
        emulator: what the emulated SDK is to be.
        specializations: a file in place of all shapes.
        keep_ray: leave the Ray of several compiles up.
        options: of a job's `compile`: `precision`, `num_cores`, `batch_size`, `prompt_len`, ...

    Returns:
        The programs, in the order of the grid.

    Raises:
        ParameterError: for an option.
        CompileError: for the first variant that failed; the others are built.
    """
    from qaic_ray.compile.store import Build
    from qaic_ray.pipeline.compile_step import compile_step, requested_builds
    from qaic_ray.pipeline.request import choose_sdk

    listener = LogListener()
    grid = _section(CompileOptions, options, "compile")
    emulated = _section(EmulatorOptions, dict(emulator or {}), "compile: emulator")
    file = None if specializations is None else Path(specializations)
    found = choose_sdk(str(sdk), emulated, listener)
    requests = requested_builds(Path(model_dir), grid, found.here, file)
    ray = LocalRayOptions(dashboard=False, keep_ray=keep_ray)
    built = [result for _, result in compile_step(requests, grid.parallel, listener, ray)]
    for result in built:
        if not isinstance(result, Build):
            raise result if isinstance(result, CompileError) else CompileError(str(result))
    return [result for result in built if isinstance(result, Build)]


def read_job(job: JobLike, overrides: Mapping[str, Any]) -> Job:
    """A job of a file, a mapping or a Job, with parts of it replaced key by key.

    Raises:
        JobError: naming the key.
    """
    from qaic_ray.pipeline.job import dump_job, job_from, load_job

    if isinstance(job, Job):
        import yaml

        whole: dict[str, Any] = yaml.safe_load(dump_job(job))
    elif isinstance(job, Mapping):
        whole = dict(job)
    elif overrides:
        read = load_job(Path(job))
        return read_job(read, overrides)
    else:
        return load_job(Path(job))
    return job_from(_merged(whole, overrides), source="The job")


def _merged(whole: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(whole)
    for key, value in changes.items():
        before = merged.get(key)
        is_part = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(before, value) if is_part else _plain(value)  # type: ignore[arg-type]
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _section(kind: type[Any], said: Mapping[str, Any], what: str) -> Any:
    assert issubclass(kind, Section)
    return checked(kind, {k: _plain(v) for k, v in said.items()}, what, raises=ParameterError)
