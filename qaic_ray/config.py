"""The Job tree: one file in jobs/, read once, frozen, unknown keys refused.

Every default of a job stands here, those of a variant in `contract.py`, and nowhere else. Knows
nothing of Ray, ONNX or cards.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qaic_ray.contract import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_CORES,
    DEFAULT_CTX_LEN,
    DEFAULT_PRECISION,
    DEFAULT_PROMPT_LEN,
    MAX_SIZE,
    MAX_VARIANTS,
    NUM_LOGITS_TO_KEEP,
    IoContract,
    Specializations,
)
from qaic_ray.documents import MAX_SHOWN_CHARS, first_error, parse_yaml, read_yaml, shown
from qaic_ray.errors import JobError, SpecializationError
from qaic_ray.option_values import (
    AppsVersion,
    Date,
    Devices,
    Listed,
    NumCores,
    PathText,
    PositiveInt,
    PrecisionName,
    PromptLen,
    Sampling,
    Sku,
    as_tuple,
    prompt_lens,
)
from qaic_ray.sampling_params import MAX_SEED, SamplingParams


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPart(_Part):
    """Which checkpoint."""

    name: PathText
    """Local folder, hub id, .gguf file, or `smollm2-135m`."""
    model_class: Literal["LlamaForCausalLM"] = "LlamaForCausalLM"
    trust_remote_code: bool = False


class ExportPart(_Part):
    """How the graph is made."""

    output: PathText | None = None
    """Folder to write; `<base>-kv` under the current folder when absent."""
    io: IoContract = IoContract.POSITION_IDS
    continuous_batching: bool = True
    opset: Literal[13, 17] | None = None
    """17, or 13 for the SDKs up to Apps 1.20; absent: what the contract's own SDKs take."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the weights in the ONNX files; what the card computes with is the variant's precision."""
    kv_dtype: Literal["float16", "mxint8"] = "float16"
    """Of the KV cache on the card (custom_io.yaml)."""
    logits: Literal["last", "all", "num_logits_to_keep"] = "last"
    next_tokens: bool = False
    """The most likely token ids as output, in place of logits."""
    replicate_kv_heads: PositiveInt = 1
    """Copies of every key and value head, for device groups that share out the heads."""
    comp_ctx_lengths: bool = False
    """An input that says how much of the context is computed with."""
    verify: Literal["auto", "full", "quick", "off"] = "auto"
    """`auto`: full under two billion parameters, else quick (the first and last two layers)."""


class CompilePart(_Part):
    """The grid of variants: every combination of the lists is compiled."""

    precision: Listed[PrecisionName] = (DEFAULT_PRECISION,)
    num_cores: Listed[NumCores] = (DEFAULT_CORES,)
    batch_size: Listed[PositiveInt] = (DEFAULT_BATCH_SIZE,)
    """Rows of a static program, slots of a continuous-batching one."""
    prompt_len: Listed[PromptLen] = (DEFAULT_PROMPT_LEN,)
    """Tokens of a prefill; `32+128` is one program that has both lengths."""
    ctx_len: Listed[PositiveInt] = (DEFAULT_CTX_LEN,)
    num_speculative_tokens: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    """Tokens guessed ahead in a decode step; needs `export.logits: num_logits_to_keep`."""
    comp_ctx_lengths: Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)] = ()
    """Contexts that every program can compute with, beside ctx_len; needs the export's."""
    output: PathText = "qpc"
    """Folder that holds one folder a variant."""
    parallel: PositiveInt | None = None
    """Compiles at once; as many as there are CPUs when absent."""


class VariantChoice(_Part):
    """Which variant of the grid is run; what is absent must have one value in the grid."""

    precision: PrecisionName | None = None
    num_cores: NumCores | None = None
    batch_size: PositiveInt | None = None
    prompt_len: PromptLen | None = None
    ctx_len: PositiveInt | None = None


class RunPart(_Part):
    """What is answered, by what, how."""

    variant: VariantChoice = VariantChoice()
    devices: Devices = "all"
    prompts: PathText | None = None
    """A prompts file; a relative path is relative to the job file."""
    prompts_format: Literal["text", "jsonl", "openai", "csv", "tsv", "parquet"] | None = None
    """What the prompts file holds; known by its name and content when absent."""
    prompt: str | None = None
    """Prompts separated by `|`, as in the published recipe; `\\|` is a pipe of the text."""
    generation_len: PositiveInt | None = None
    """Most tokens of an answer (`max_tokens` of a row); until the context is full when absent."""
    sampling: Sampling = SamplingParams()
    """How tokens are chosen and where answers end: the fields of `SamplingParams`, greedy when
    absent. A row's own fields go before these."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """What rows without a seed of their own get theirs from; drawn when absent, and then in the
    run folder's job.yaml, which so repeats the run. (`sampling.seed` is one seed for every row.)"""
    chat: bool = False
    """Put each prompt into the model's chat template; rows of `messages` always are."""
    system: str | None = None
    """With chat: the system message of conversations that bring none."""
    add_generation_prompt: bool = True
    """With chat: end with the beginning of the assistant's answer."""
    continue_final_message: bool = False
    """With chat: the answer goes on with the last message."""
    chat_template_kwargs: dict[str, Any] = {}
    """With chat: variables of the template's own, like `enable_thinking`; a row's go before."""
    chat_template: PathText | None = None
    """A Jinja file instead of the model's template; relative to the job file."""
    date: Date | None = None
    """What a chat template takes for the date and time, like 2026-01-31T12:00:00; the run's
    beginning when absent, and then in the run folder's job.yaml."""
    max_stall_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Seconds that running rows may wait for other rows' prefill."""
    prefix_reuse: bool = True
    """Start a prompt from what a slot's cache holds of it already."""
    drafts: Literal["auto", "none", "prompt-lookup"] = "auto"
    """Who drafts tokens for a QPC of `num_speculative_tokens`; auto: the draft QPC where there is
    one, else prompt lookup."""
    draft_qpc: PathText | None = None
    """Folder of a smaller model's QPC, compiled for NSPs that the other one leaves free."""
    partitions: PositiveInt = 1
    """Workers of one card, each with as many of its NSPs; the QPC is compiled for so few."""
    group_size: PositiveInt = 1
    """Cards of one worker, for a QPC whose tensors are sliced over so many."""
    output: PathText = "runs"
    """Folder that holds one folder a run."""
    output_formats: Annotated[
        tuple[Literal["openai", "parquet"], ...], BeforeValidator(as_tuple)
    ] = ()
    """Other forms of the outputs, beside `outputs.jsonl`."""


class EmulatorPart(_Part):
    """What the emulated SDK is asked to be, where it takes the vendor's place."""

    cards: Annotated[int, Field(ge=1, le=256)] = 4
    sku: Sku = "standard"
    apps_version: AppsVersion = "1.20"


class RayPart(_Part):
    """The cluster."""

    address: str | None = None
    """A running cluster; absent: a local Ray for the length of the job."""
    dashboard: bool = False


class Job(_Part):
    """One runnable scenario."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    model: ModelPart
    export: ExportPart = ExportPart()
    compile: CompilePart = CompilePart()
    run: RunPart = RunPart()
    sdk: PathText = "auto"
    """`auto`, `real`, `emulated`, or an SDK folder."""
    emulator: EmulatorPart = EmulatorPart()
    ray: RayPart = RayPart()


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


def emulator_from(document: dict[str, Any]) -> EmulatorPart:
    """The emulator part alone, for commands without a job file."""
    try:
        return EmulatorPart.model_validate(document)
    except ValidationError as error:
        raise JobError(f"emulator: {_first_error(error)}") from error


def dump_job(job: Job) -> str:
    """The job as YAML, every default written out."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _check_shapes(job: Job, source: str) -> None:
    grid = job.compile
    lists = (grid.precision, grid.num_cores, grid.batch_size, grid.prompt_len, grid.ctx_len)
    number = prod(map(len, lists))
    if number > MAX_VARIANTS:
        raise JobError(
            f"{source}: compile makes a grid of {number} variants: at most {MAX_VARIANTS} are "
            "compiled at once; shorten the lists."
        )
    continuous = job.export.continuous_batching
    for prompt_len in grid.prompt_len:
        for ctx_len in grid.ctx_len:
            try:
                Specializations.build(
                    batch_size=grid.batch_size[0],
                    prompt_len=prompt_lens(prompt_len),
                    ctx_len=ctx_len,
                    continuous=continuous,
                    num_speculative_tokens=grid.num_speculative_tokens,
                    comp_ctx_lengths=grid.comp_ctx_lengths,
                )
            except SpecializationError as error:
                raise JobError(f"{source}: compile: {error}") from error
    if grid.num_speculative_tokens and job.export.logits != NUM_LOGITS_TO_KEEP:
        raise JobError(
            f"{source}: compile.num_speculative_tokens needs export.logits: {NUM_LOGITS_TO_KEEP}."
        )
    if grid.comp_ctx_lengths and not job.export.comp_ctx_lengths:
        raise JobError(f"{source}: compile.comp_ctx_lengths needs export.comp_ctx_lengths: true.")
    if job.run.prompts is not None and job.run.prompt is not None:
        raise JobError(f"{source}: run has both prompts and prompt: keep one of them.")


def _with_files_beside(job: Job, folder: Path) -> Job:
    files = {"prompts": job.run.prompts, "chat_template": job.run.chat_template}
    absolute = {name: str(folder / path) for name, path in files.items() if path not in (None, "-")}
    return job.model_copy(update={"run": job.run.model_copy(update=absolute)})


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
    part: Any = Job
    for name in location:
        field = part.model_fields[name].annotation
        part = next(
            t for t in (field, *get_args(field)) if isinstance(t, type) and issubclass(t, BaseModel)
        )
    return list(part.model_fields)
