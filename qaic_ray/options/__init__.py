"""Every option, once: its name, type, bounds, default, help, flag and group.

The command line with its help, the job file, a run folder's job.yaml and docs/options.md are made
from this tree. Its parts are handed down as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from qaic_ray.contract import COMP_CTX_LENGTHS, NUM_LOGITS_TO_KEEP, IoContract
from qaic_ray.errors import RowError, UsageError
from qaic_ray.option_types import (
    Count,
    Date,
    Devices,
    Layout,
    Listed,
    NumCores,
    OutputFormat,
    PathText,
    PositiveInt,
    Precision,
    PrecisionName,
    PromptFormat,
    PromptLen,
    Section,
    TemplateText,
    Words,
    opt,
)
from qaic_ray.options.machine import CARDS as CARDS
from qaic_ray.options.machine import RAY as RAY
from qaic_ray.options.machine import ClusterOptions as ClusterOptions
from qaic_ray.options.machine import EmulatorOptions as EmulatorOptions
from qaic_ray.options.machine import LocalRayOptions as LocalRayOptions
from qaic_ray.options.machine import RayOptions as RayOptions
from qaic_ray.options.machine import SdkOptions as SdkOptions
from qaic_ray.options.serving import LIMITS as LIMITS
from qaic_ray.options.serving import SCALE as SCALE
from qaic_ray.options.serving import SERVER as SERVER
from qaic_ray.options.serving import ServeOptions as ServeOptions
from qaic_ray.rows import ChatOptions
from qaic_ray.sampling_params import ANSWER_END, MAX_SEED, Sampling, SamplingParams

PROMPTS = "Prompts"
DRAFTS = "Speculative decoding (a QPC of --num-speculative-tokens)"
CHECKS = "Checks"
FOLDER = "The run and its folder"

TYPED_LEN = 256
"""Most tokens of an answer to a prompt that is typed on the command line, unless they are said."""
_ANSWER_LEN = f"{TYPED_LEN} for prompts typed here, else the context"

MODEL_HELP = "Local folder, hub id, .gguf file, or smollm2-135m."
MODEL_NAMES: dict[str, Any] = {
    "flag": "--model",
    "aliases": ("--model-name",),
    "short": "-m",
    "metavar": "NAME",
    "completes": "models",
}


class ModelOptions(Section):
    """Which checkpoint."""

    name: PathText = opt(..., MODEL_HELP, argument="[MODEL]", **MODEL_NAMES)
    model_class: Literal["LlamaForCausalLM"] = opt(
        "LlamaForCausalLM", "The model's class, as in the published recipe."
    )
    trust_remote_code: bool = opt(
        False, "Let transformers run code that the checkpoint brings.", flag=None
    )


class ExportOptions(Section):
    """How the graph is made."""

    output: PathText | None = opt(
        None, "Folder to write; its name is the model's.", short="-o", shown="<base>-kv"
    )
    io: IoContract = opt(
        IoContract.POSITION_IDS, "The interface: position-ids, or cache-index as the recipe's."
    )
    continuous_batching: bool = opt(
        True, "Slots, refilled while others run; else the rows of a batch start and end together."
    )
    opset: Literal[13, 17] | None = opt(
        None, "17, or 13 for SDKs up to Apps 1.20.", shown="by the interface"
    )
    dtype: Literal["float32", "float16"] = opt(
        "float32", "Weights in the files; what the card computes with is the compile's precision."
    )
    weights: Literal["copy", "reference"] = opt(
        "copy",
        "copy: into the model's folder; reference: they stay in the checkpoint's files, which the "
        "model points at and the SDK's compiler reads.",
    )
    kv_dtype: Literal["float16", "mxint8"] = opt(
        "float16", "KV cache on the card (custom_io.yaml)."
    )
    logits: Literal["last", "all", "num_logits_to_keep"] = opt(
        "last", "Of which tokens there are logits."
    )
    next_tokens: bool = opt(False, "The likeliest token ids as output, in place of logits.")
    replicate_kv_heads: PositiveInt = opt(
        1, "Copies of every key and value head, for device groups that share out the heads."
    )
    comp_ctx_lengths: bool = opt(
        False, "An input that says how much of the context is computed with."
    )
    verify: Literal["auto", "full", "quick", "off"] = opt(
        "auto",
        "Check against PyTorch. quick: the first and last two layers; auto: full under two "
        "billion parameters, else quick.",
    )

    @property
    def graph_opset(self) -> int:
        """The ONNX opset: the one asked for, or what the interface's own SDKs take."""
        return self.opset or (17 if self.io is IoContract.POSITION_IDS else 13)

    @model_validator(mode="after")
    def _fit_together(self) -> ExportOptions:
        if self.io is IoContract.CACHE_INDEX:
            if self.continuous_batching:
                raise ValueError(
                    "The cache-index contract has one cache_index for all rows, so there is no "
                    "continuous batching with it; use position-ids"
                )
            if self.logits == NUM_LOGITS_TO_KEEP:
                raise ValueError(
                    f"The cache-index contract has no {NUM_LOGITS_TO_KEEP}; use position-ids, or "
                    "logits last or all"
                )
            if self.comp_ctx_lengths:
                raise ValueError(
                    f"The cache-index contract has no {COMP_CTX_LENGTHS}; use position-ids"
                )
        if self.weights == "reference" and self.replicate_kv_heads > 1:
            raise ValueError(
                "Copies of key and value heads (replicate_kv_heads) are in no checkpoint, so "
                "weights cannot be reference; use copy"
            )
        if self.comp_ctx_lengths and self.graph_opset < 17:
            raise ValueError(
                f"{COMP_CTX_LENGTHS} needs opset 17: the compilers of older opsets know no such "
                "input"
            )
        return self


class CompileOptions(Section):
    """The grid of variants: every combination of the lists is compiled.

    The defaults are the published recipe's specializations.json, for the NSPs of a Standard card.
    """

    precision: Listed[PrecisionName] = opt(
        (Precision.MX6,),
        "How weights are kept on the card.",
        example="mx6,fp16",
        argument="[mx6|fp16|fp32]",
    )
    num_cores: Listed[NumCores] = opt(
        (14,), "NSPs of the program.", example="7,14", argument="[NSP]"
    )
    batch_size: Listed[PositiveInt] = opt(
        (1,),
        "Rows of a static program, slots of a continuous-batching one.",
        example="1,8",
    )
    prompt_len: Listed[PromptLen] = opt(
        (256,),
        "Tokens of a prefill; 32+64 is one program that has both.",
        example="32,64",
    )
    ctx_len: Listed[PositiveInt] = opt((2048,), "Tokens of a context.", example="512,2048")
    prefill_rows: PositiveInt = opt(
        1, "Rows of a continuous-batching program that one prefill computes, up to batch_size."
    )
    num_speculative_tokens: Count = opt(
        0, "Tokens guessed ahead in a decode step; of an export with num_logits_to_keep."
    )
    comp_ctx_lengths: Words[PositiveInt] = opt(
        (),
        "Contexts to compute with, beside ctx_len; of an export that has them.",
        example="512,1024",
    )
    output: PathText = opt("qpc", "Folder that gets one folder a variant.", short="-o")
    parallel: PositiveInt | None = opt(None, "Compiles at once.", flag="--jobs", shown="one a CPU")
    layout: Layout = opt(
        Layout.RECIPE, "qefficient: also a folder qpc in each, which QEfficient's commands take."
    )


class VariantChoice(Section):
    """Which variant is run; what is absent must have one value in a job's grid."""

    precision: PrecisionName | None = opt(None, "One of the grid's.", flag=None)
    num_cores: NumCores | None = opt(None, "One of the grid's.", flag=None)
    batch_size: PositiveInt | None = opt(None, "One of the grid's.", flag=None)
    prompt_len: PromptLen | None = opt(None, "One of the grid's.", flag=None)
    ctx_len: PositiveInt | None = opt(None, "One of the grid's.", flag=None)


class PromptOptions(Section):
    """What is answered."""

    GROUP: ClassVar[str] = PROMPTS

    prompt: str | None = opt(
        None, r"Prompts separated by |, as in the recipe; \| is a pipe of the text."
    )
    prompts: PathText | None = opt(
        None,
        "A file: lines of text; .jsonl, .csv: prompt or messages; - for stdin.",
        flag="--input",
        aliases=("--prompts-file",),
        short="-i",
        metavar="FILE",
        free=True,
    )
    prompts_format: PromptFormat | None = opt(
        None, "What the prompts file holds.", shown="by name and content"
    )
    max_prompts: PositiveInt | None = opt(
        None, "Answer only the first so many, to try a run out.", shown="all"
    )


class Decoding(Section):
    """How answers are made, and what of the QPC is relied on, for prompts from anywhere."""

    GROUP: ClassVar[str] = PROMPTS

    system: str | None = opt(
        None, "The system message of conversations that bring none; of prompts with --chat."
    )
    chat_template: TemplateText | None = opt(
        None, "A Jinja file instead of the model's own, or its text."
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
    )
    generation_len: PositiveInt | None = opt(
        None,
        "Most tokens of an answer.",
        flag="--max-tokens",
        aliases=("--generation-len",),
        group=ANSWER_END,
        shown=_ANSWER_LEN,
    )
    drafts: Literal["auto", "none", "prompt-lookup"] = opt(
        "auto",
        "What drafts tokens; auto: the draft QPC where there is one, else prompt lookup. The "
        "text is the same.",
        flag="--speculate",
        group=DRAFTS,
    )
    draft_qpc: PathText | None = opt(
        None, "Folder of a smaller model's QPC, to run beside the other.", group=DRAFTS
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
    input_len: PositiveInt | None = opt(None, "Tokens of a prefill of the QPC.", group=CHECKS)
    ctx_len: PositiveInt | None = opt(None, "Tokens of a context of the QPC.", group=CHECKS)

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
    output: PathText = opt("runs", "Folder that gets one folder a run.", short="-o", group=FOLDER)
    output_formats: Words[OutputFormat] = opt(
        (),
        "Also write this, beside outputs.jsonl; may be repeated.",
        flag="--output-format",
        group=FOLDER,
        repeated=True,
    )


class Job(SdkOptions):
    """One runnable scenario: a job file."""

    name: str = opt(
        ...,
        "Of the job, and the beginning of its run folders' names: letters, digits, dots, _ and -.",
        flag=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
    )
    model: ModelOptions
    export: ExportOptions = ExportOptions()
    compile: CompileOptions = CompileOptions()
    run: RunOptions = RunOptions()
    serve: ServeOptions = ServeOptions()
    emulator: EmulatorOptions = EmulatorOptions()
    ray: RayOptions = RayOptions()

    def changed(self, part: str, **options: Any) -> Job:
        """The same job with other options in one of its parts; they are not checked."""
        return self.model_copy(update={part: getattr(self, part).model_copy(update=options)})
