"""A job: its file read, checked and frozen; the plan of it; and the whole road, export to report.

In a job file unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from qaic_ray.compile.compiler import Source, Variant, grid_variants
from qaic_ray.compile.store import Build
from qaic_ray.contract import NUM_LOGITS_TO_KEEP
from qaic_ray.errors import JobError, SdkNotFound, UsageError
from qaic_ray.files.documents import MAX_SHOWN_CHARS, first_error, parse_yaml, read_yaml, shown
from qaic_ray.model.checkpoint import CUSTOM_IO_FILE
from qaic_ray.option_types import OptionValue
from qaic_ray.options import Job
from qaic_ray.pipeline.compile_step import compile_on, requested_builds
from qaic_ray.pipeline.export_step import export_step
from qaic_ray.pipeline.local_cards import on_local_cards
from qaic_ray.pipeline.prepare_step import export_options, program_folder
from qaic_ray.pipeline.request import (
    Listener,
    RunRequest,
    absolute_model,
    absolute_paths,
    choose_sdk,
    resolved,
)
from qaic_ray.pipeline.run_record import compile_facts
from qaic_ray.pipeline.run_step import check_chat_template, resuming, run_on
from qaic_ray.runs.run_input import absolute_sources, beside
from qaic_ray.sdk import SDK_NAMES, VENDOR_ROOT, Sdk, find_sdk
from qaic_ray.shipped.jobs import job_file

if TYPE_CHECKING:
    from qaic_ray.runs.report import RunSummary

_IN_PLACE_OF = {
    "run.prompts": ("run.prompt", "run.prompts_format"),
    "run.prompt": ("run.prompts", "run.prompts_format"),
}


def load_job(
    path: Path, overrides: Iterable[str] = (), *, changes: Mapping[str, Any] | None = None
) -> Job:
    """Read a job file.

    Args:
        path: the YAML file, or the name of a job that comes with the package.
        overrides: `key=value` with a dotted key, the value read as YAML.
        changes: dotted key -> value, before the overrides. Relative paths start in the folder of
            the caller, not of the file. A prompt takes the place of the file's prompts, and
            prompts that of its prompt and their format.

    Raises:
        JobError: naming the file, the key, the value and the nearest known key.
    """
    path = job_file(path)
    document = read_yaml(path, raises=JobError)
    if not isinstance(document, dict):
        raise JobError(f"{path} must hold a mapping with at least 'name' and 'model'.")
    for key, value in (changes or {}).items():
        for other in _IN_PLACE_OF.get(key, ()):
            _parent_of(document, other).pop(other.rpartition(".")[2], None)
        _put(document, key, absolute_sources(value) if key == "run.prompts" else value)
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
    changes: dict[str, Any] = {}
    if job.run.prompts is not None:
        changes["prompts"] = beside(job.run.prompts, folder)
    if job.run.chat_template is not None:
        changes["chat_template"] = str(folder / job.run.chat_template)
    return job.changed("run", **changes)


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise JobError(f"--set takes key=value, like run.generation_len=64, not {shown(override)}.")
    _put(document, key, parse_yaml(text, f"--set {shown(key)}: the value", raises=JobError))


def _put(document: dict[str, Any], key: str, value: Any) -> None:
    _parent_of(document, key)[key.rpartition(".")[2]] = value


def _parent_of(document: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping in which a dotted key stands, made where there is none."""
    place = document
    for parent in key.split(".")[:-1]:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise JobError(
                f"{shown(key)} cannot be changed: {shown(parent)} is not a mapping in the job."
            )
    return place


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
        part = OptionValue(part.model_fields[name]).kind
    return list(part.model_fields)


def launch_job(
    job: Job,
    listener: Listener,
    *,
    resume: Path | None = None,
    retry_errors: bool = False,
    new_input: bool = False,
    stop_if_errors: float | None = None,
) -> RunSummary:
    """The whole road of a job, on one Ray from the first compile to the last row.

    Args:
        job: as it was read.
        listener: who is told.
        resume: folder of a run of the same job that is to go on.
        retry_errors: whether that run's rows of errors are tried again.
        new_input: whether that run goes on with another file, whose answered rows are the same.
        stop_if_errors: the share of failed rows that ends the run early.

    Raises:
        UsageError: as early as it can be known.
        CompileError: when the variant to be run could not be compiled.
    """
    chosen_at = chosen_index(job)
    sdk = choose_sdk(job.sdk, job.emulator, listener)
    request = run_request(job, resume, retry_errors=retry_errors)
    request = replace(request, stop_if_errors=stop_if_errors, new_input=new_input)
    slots = job_variants(job, Source("", Path(), None, ""))[chosen_at].specializations.batch_size
    request, num_cards = on_local_cards(request, sdk, slots, listener)
    with resuming(request, sdk):
        run_input = request.open_input()
        exported = export_step(job.model, job.export, listener, sdk=sdk.here)
        check_chat_template(request)
        request.check_parts()
        builds = requested_builds(exported.folder, job.compile, sdk.here)
        from qaic_ray.pipeline.open_ray import open_ray

        with open_ray(
            job.ray, num_cards, name=job.name, sdk=sdk.here, listener=listener
        ) as cluster:
            outcomes = compile_on(cluster, builds, job.compile.parallel, listener)
            _, chosen = outcomes[chosen_at]
            if not isinstance(chosen, Build):
                raise chosen
            request = replace(request, qpc=chosen.path)
            compiles = compile_facts([result for _, result in outcomes])
            return run_on(
                cluster, request, run_input, sdk=sdk, listener=listener, compiles=compiles
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


def beside_prepared(job: Job) -> Job:
    """A job whose model and programs are kept with those that runs make, and shared with them.

    One that exports in another way than these keeps its folders.

    Raises:
        SdkNotFound: the SDK that it asks for is not here.
    """
    sdk = find_sdk(job.sdk, job.emulator)
    if job.export != export_options(sdk):
        return job
    place = program_folder(job.model, sdk)
    job = job.changed("export", output=str(place / f"{_base(job.model.name)}-kv"))
    return job.changed("compile", output=str(place / "qpc"))


def chosen_index(job: Job) -> int:
    """Index, in the grid's order, of the variant that is run.

    Raises:
        UsageError: where the choice fits none of the variants, or several.
    """
    names = ("precision", "num_cores", "batch_size", "prompt_len", "ctx_len")
    wanted = [getattr(job.run.variant, name) for name in names]
    grid = list(product(*(getattr(job.compile, name) for name in names)))
    fitting = [
        index
        for index, values in enumerate(grid)
        if all(want in (None, value) for want, value in zip(wanted, values, strict=True))
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise UsageError(
        f"run.variant of the job {job.name} fits {len(fitting)} of the {len(grid)} compiled "
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
    if job.run.output_parts is not None:
        job = job.changed("run", output_parts=absolute_sources(job.run.output_parts))
    return job if job.sdk in SDK_NAMES else job.model_copy(update=absolute_paths(job, "sdk"))


def _base(model_name: str) -> str:
    path = Path(model_name)
    return path.stem if path.suffix == ".gguf" else path.name
