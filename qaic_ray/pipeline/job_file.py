"""A job file: read once, checked, frozen; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qaic_ray.compile.compiler import Source, Variant, grid_variants
from qaic_ray.contract import NUM_LOGITS_TO_KEEP
from qaic_ray.errors import JobError, UsageError
from qaic_ray.files.documents import MAX_SHOWN_CHARS, first_error, parse_yaml, read_yaml, shown
from qaic_ray.option_types import OptionValue
from qaic_ray.options import Job


def load_job(path: Path, overrides: Iterable[str] = ()) -> Job:
    """Read a job file.

    Args:
        path: the YAML file.
        overrides: `key=value` with a dotted key, the value read as YAML.

    Raises:
        JobError: naming the file, the key, the value and the nearest known key.
    """
    document = read_yaml(path, raises=JobError)
    if not isinstance(document, dict):
        raise JobError(f"{path} must hold a mapping with at least 'name' and 'model'.")
    for override in overrides:
        _override(document, override)
    job = job_from(document, source=str(path))
    return _with_files_beside(job, path.resolve().parent)


def job_from(document: dict[str, Any], *, source: str) -> Job:
    """Check a document and freeze it; `source` names it in errors."""
    try:
        job = Job.model_validate(document)
    except ValidationError as error:
        raise JobError(f"{source}: {_first_error(error)}") from error
    except RecursionError as error:
        raise JobError(f"{source} is nested too deep to be read.") from error
    _check_shapes(job, source)
    return job


def dump_job(job: Job) -> str:
    """The job as YAML, every default written out."""
    document = {"name": job.name, **job.model_dump(mode="json")}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def job_variants(job: Job, source: Source) -> list[Variant]:
    """The grid of a job, over a model that need not be there yet.

    Raises:
        UsageError: for shapes that cannot be.
    """
    return grid_variants(
        source,
        job.compile,
        continuous=job.export.continuous_batching,
        num_logits_to_keep=job.export.logits == NUM_LOGITS_TO_KEEP,
    )


def _check_shapes(job: Job, source: str) -> None:
    grid = job.compile
    try:
        job_variants(job, Source("", Path(), None, ""))
    except UsageError as error:
        raise JobError(f"{source}: compile: {error}") from error
    if grid.num_speculative_tokens and job.export.logits != NUM_LOGITS_TO_KEEP:
        raise JobError(
            f"{source}: compile.num_speculative_tokens needs export.logits: {NUM_LOGITS_TO_KEEP}."
        )
    if grid.comp_ctx_lengths and not job.export.comp_ctx_lengths:
        raise JobError(f"{source}: compile.comp_ctx_lengths needs export.comp_ctx_lengths: true.")
    if job.export.comp_ctx_lengths and not grid.comp_ctx_lengths:
        raise JobError(
            f"{source} exports with comp_ctx_lengths: say which ones with "
            "compile.comp_ctx_lengths, like [512, 1024] (ctx_len is added)."
        )
    if job.run.prompts is not None and job.run.prompt is not None:
        raise JobError(f"{source}: run has both prompts and prompt: keep one of them.")


def _with_files_beside(job: Job, folder: Path) -> Job:
    files = {"prompts": job.run.prompts, "chat_template": job.run.chat_template}
    absolute = {name: str(folder / path) for name, path in files.items() if path not in (None, "-")}
    return job.changed("run", **absolute)


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise JobError(f"--set takes key=value, like run.generation_len=64, not {shown(override)}.")
    *parents, last = key.split(".")
    place = document
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise JobError(f"--set {shown(override)}: {shown(parent)} is not a mapping in the job.")
    place[last] = parse_yaml(text, f"--set {shown(key)}: the value", raises=JobError)


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return first_error(error)
    location = [str(part) for part in first["loc"]]
    known = _known_keys(location[:-1])
    near = difflib.get_close_matches(location[-1][:MAX_SHOWN_CHARS], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
    return f"unknown key {shown('.'.join(location))}; {hint}"


def _known_keys(location: Sequence[str]) -> list[str]:
    part: type[BaseModel] = Job
    for name in location:
        part = OptionValue.of(part.model_fields[name]).kind
    return list(part.model_fields)
