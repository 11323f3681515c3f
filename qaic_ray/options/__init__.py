"""Every option, once: its name, type, bounds, default, help, flag and group.

The command line with its help, the job file, a run folder's job.yaml and the reference pages are
made from this tree. Its parts are handed down as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from qaic_ray.contract import NUM_LOGITS_TO_KEEP
from qaic_ray.errors import RowError, UsageError
from qaic_ray.option_types import (
    Date,
    Devices,
    OutputFormat,
    PathText,
    PositiveInt,
    Section,
    TemplateText,
    Words,
    opt,
)
from qaic_ray.options.inputs import PROMPTS as PROMPTS
from qaic_ray.options.inputs import PromptOptions as PromptOptions
from qaic_ray.options.machine import CARDS as CARDS
from qaic_ray.options.machine import RAY as RAY
from qaic_ray.options.machine import ClusterOptions as ClusterOptions
from qaic_ray.options.machine import EmulatorOptions as EmulatorOptions
from qaic_ray.options.machine import LocalRayOptions as LocalRayOptions
from qaic_ray.options.machine import RayOptions as RayOptions
from qaic_ray.options.machine import SdkOptions as SdkOptions
from qaic_ray.options.program import MODEL_HELP as MODEL_HELP
from qaic_ray.options.program import MODEL_NAMES as MODEL_NAMES
from qaic_ray.options.program import CompileOptions as CompileOptions
from qaic_ray.options.program import ExportOptions as ExportOptions
from qaic_ray.options.program import ModelOptions as ModelOptions
from qaic_ray.options.program import VariantChoice as VariantChoice
from qaic_ray.options.serving import LIMITS as LIMITS
from qaic_ray.options.serving import SCALE as SCALE
from qaic_ray.options.serving import SERVER as SERVER
from qaic_ray.options.serving import ServeOptions as ServeOptions
from qaic_ray.rows import ChatOptions
from qaic_ray.sampling_params import ANSWER_END, MAX_SEED, Sampling, SamplingParams

DRAFTS = "Speculative decoding (a QPC of --num-speculative-tokens)"
CHECKS = "Checks"
FOLDER = "The run and its folder"

TYPED_LEN = 256
"""Most tokens of an answer to a prompt that is typed on the command line, unless they are said."""
_ANSWER_LEN = f"{TYPED_LEN} for prompts typed here, else the context"


class Decoding(Section):
    """How answers are made, and what of the QPC is relied on, for prompts from anywhere."""

    GROUP: ClassVar[str] = PROMPTS

    system: str | None = opt(
        None,
        "The system message of conversations that bring none; of prompts with --chat.",
        sample="Answer in one sentence.",
    )
    chat_template: TemplateText | None = opt(
        None, "A Jinja file instead of the model's own, or its text.", sample="template.jinja"
    )
    chat_template_kwargs: dict[str, Any] = opt(
        {}, "Variables for the template.", example='{"enable_thinking": false}'
    )
    date: Date | None = opt(
        None,
        "What a chat template takes for the date.",
        example="2026-01-31T12:00:00",
        flag=None,
        shown="the run's beginning",
    )
    sampling: Sampling = SamplingParams()
    seed: int | None = opt(
        None,
        "What each row's own seed is made from; the run folder's job.yaml has it.",
        ge=0,
        le=MAX_SEED,
        flag="--run-seed",
        group=SamplingParams.GROUP,
        shown="drawn",
        sample=7,
    )
    generation_len: PositiveInt | None = opt(
        None,
        "Most tokens of an answer.",
        flag="--max-tokens",
        aliases=("--generation-len",),
        group=ANSWER_END,
        shown=_ANSWER_LEN,
        sample=64,
    )
    drafts: Literal["auto", "none", "prompt-lookup"] = opt(
        "auto",
        "What drafts tokens; auto: the draft QPC where there is one, else prompt lookup. The "
        "text is the same.",
        flag="--speculate",
        group=DRAFTS,
    )
    draft_qpc: PathText | None = opt(
        None,
        "Folder of a smaller model's QPC, to run beside the other.",
        group=DRAFTS,
        sample="qpc/draft",
    )
    max_stall_s: float = opt(
        1.0,
        "Seconds that running rows may wait for other rows' prefill.",
        ge=0,
        allow_inf_nan=False,
        flag=None,
    )
    prefix_reuse: bool = opt(
        True, "Start a prompt from what a slot's cache holds of it already.", flag=None
    )
    input_len: PositiveInt | None = opt(
        None, "Tokens of a prefill of the QPC.", group=CHECKS, sample=64
    )
    ctx_len: PositiveInt | None = opt(
        None, "Tokens of a context of the QPC.", group=CHECKS, sample=512
    )

    @property
    def defaults(self) -> SamplingParams:
        """The parameters of a row that brings none.

        Raises:
            UsageError: where those of the run do not go together.
        """
        if self.generation_len is None:
            return self.sampling
        try:
            return replace(self.sampling, max_tokens=self.generation_len)
        except RowError as error:
            raise UsageError(str(error)) from error


class Generation(Decoding):
    """The same, and how a run's prompts become conversations: what a worker is handed."""

    GROUP: ClassVar[str] = PROMPTS

    chat: bool = opt(
        False, "Put each prompt into the model's chat template; rows of messages always are."
    )
    continue_final_message: bool = opt(False, "Go on with the last message of a chat.")
    add_generation_prompt: bool = opt(
        True,
        "End a chat with the beginning of the assistant's answer.",
        off="Do not end a chat with the beginning of the assistant's answer.",
    )

    @property
    def chat_options(self) -> ChatOptions:
        """For prompts that bring none; their template variables are for all."""
        return ChatOptions(
            self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs
        )


class CardOptions(Section):
    """Which cards, and how they are shared out."""

    GROUP: ClassVar[str] = CARDS

    devices: Devices = opt(
        "all",
        "Ids of cards, or all.",
        example="0,1,2,3",
        flag="--device-id",
        aliases=("--devices",),
        metavar="IDS",
        free=True,
    )
    partitions: PositiveInt = opt(
        1, "Workers of one card, each with as many of its NSPs; the QPC is compiled for so few."
    )
    group_size: PositiveInt = opt(1, "Cards of one worker, for a tensor-sliced QPC.")


class RunOptions(CardOptions, Generation, PromptOptions):
    """What is answered, by what, how."""

    variant: VariantChoice = VariantChoice()
    metrics: bool = opt(
        True,
        "Export metrics of requests, cards and the run through Ray, for Prometheus.",
        group=RAY,
        free=True,
    )
    output: PathText = opt(
        "runs", "Folder that gets one folder a run.", short="-o", group=FOLDER, sample="elsewhere"
    )
    output_formats: Words[OutputFormat] = opt(
        (),
        "Also write this, beside outputs.jsonl; may be repeated.",
        flag="--output-format",
        group=FOLDER,
        repeated=True,
        sample=["parquet"],
    )
    output_parts: PathText | None = opt(
        None,
        "Also write the rows as parquet part files, into this folder or URI (s3://bucket/folder); "
        "each is whole or not there.",
        metavar="FOLDER",
        group=FOLDER,
        sample="s3://bucket/answers",
    )
    part_rows: PositiveInt = opt(100_000, "Rows of a part file.", group=FOLDER, sample=20_000)
    record: PositiveInt | None = opt(
        None,
        "Dump the first N executions of each card's program into bundles/ of the run folder, as "
        "aic_batch_io.json: qaic-runner replays them, `qaic-ray compare` compares them.",
        metavar="N",
        group=FOLDER,
        sample=100,
    )


_GIVEN = {"not": {"type": "null"}}


def _has(part: str, **keys: Any) -> dict[str, Any]:
    """Of a job that has these keys in a part, each as its schema says."""
    inner = {"type": "object", "required": list(keys), "properties": keys}
    return {"required": [part], "properties": {part: inner}}


class Job(SdkOptions):
    """One runnable scenario: a job file."""

    name: str = opt(
        ...,
        "Of the job, and the beginning of its run folders' names: letters, digits, dots, _ and -.",
        flag=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        sample="mine",
    )
    model: ModelOptions
    export: ExportOptions = ExportOptions()
    compile: CompileOptions = CompileOptions()
    run: RunOptions = RunOptions()
    serve: ServeOptions = ServeOptions()
    emulator: EmulatorOptions = EmulatorOptions()
    ray: RayOptions = RayOptions()

    RULES: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "if": _has("compile", num_speculative_tokens={"minimum": 1}),
            "then": _has("export", logits={"const": NUM_LOGITS_TO_KEEP}),
        },
        {
            "if": _has("compile", comp_ctx_lengths={"not": {"maxItems": 0}}),
            "then": _has("export", comp_ctx_lengths={"const": True}),
            "else": {"not": _has("export", comp_ctx_lengths={"const": True})},
        },
        {"not": _has("run", prompts=_GIVEN, prompt=_GIVEN)},
    )
    """What is refused when a job is read (`pipeline/job.py`)."""

    def changed(self, part: str, **options: Any) -> Job:
        """The same job with other options in one of its parts; they are not checked."""
        return self.model_copy(update={part: getattr(self, part).model_copy(update=options)})
