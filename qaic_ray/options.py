"""Every option, once: its name, type, bounds, default, help, flag and group.

The command line with its help, the job file, a run folder's job.yaml and docs/options.md are made
from this tree. Its parts are handed down as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qaic_ray.contract import (
    COMP_CTX_LENGTHS,
    DEFAULT_BATCH_SIZE,
    DEFAULT_CORES,
    DEFAULT_CTX_LEN,
    DEFAULT_PRECISION,
    DEFAULT_PROMPT_LEN,
    NUM_LOGITS_TO_KEEP,
    IoContract,
)
from qaic_ray.documents import read_object
from qaic_ray.errors import RowError, UsageError
from qaic_ray.option_types import (
    Count,
    Date,
    Devices,
    Listed,
    NumCores,
    Opt,
    PathText,
    PositiveInt,
    PrecisionName,
    PromptLen,
    Section,
    TemplateText,
    Words,
    one_of,
)
from qaic_ray.rows import ChatOptions
from qaic_ray.sampling_params import ANSWER_END, MAX_SEED, Sampling, SamplingParams

PROMPTS = "Prompts"
DRAFTS = "Speculative decoding (a QPC of --num-speculative-tokens)"
CHECKS = "Checks"
CARDS = "Cards"
FOLDER = "The run folder"

LIMITS = read_object(Path(__file__).parent / "emulator" / "limits.json")
"""What the emulated SDK can be asked to be."""

MODEL_HELP = "Local folder, hub id, .gguf file, or smollm2-135m."


class ModelOptions(Section):
    """Which checkpoint."""

    name: Annotated[PathText, Opt(MODEL_HELP, flag="--model-name")]
    model_class: Annotated[
        Literal["LlamaForCausalLM"], Opt("The model's class, as in the published recipe.")
    ] = "LlamaForCausalLM"
    trust_remote_code: Annotated[
        bool, Opt("Let transformers run code that the checkpoint brings.", flag=None)
    ] = False


class ExportOptions(Section):
    """How the graph is made."""

    output: Annotated[
        PathText | None, Opt("Folder to write; its name is the model's.", shown="<base>-kv")
    ] = None
    io: Annotated[
        IoContract, Opt("The interface: position-ids, or cache-index as the recipe's.")
    ] = IoContract.POSITION_IDS
    continuous_batching: Annotated[
        bool,
        Opt(
            "Slots, refilled while others run; else the rows of a batch start and end together.",
        ),
    ] = True
    opset: Annotated[
        Literal[13, 17] | None, Opt("17, or 13 for SDKs up to Apps 1.20.", shown="by the interface")
    ] = None
    dtype: Annotated[
        Literal["float32", "float16"],
        Opt("Weights in the files; what the card computes with is the compile's precision."),
    ] = "float32"
    kv_dtype: Annotated[
        Literal["float16", "mxint8"], Opt("KV cache on the card (custom_io.yaml).")
    ] = "float16"
    logits: Annotated[
        Literal["last", "all", "num_logits_to_keep"], Opt("Of which tokens there are logits.")
    ] = "last"
    next_tokens: Annotated[bool, Opt("The likeliest token ids as output, in place of logits.")] = (
        False
    )
    replicate_kv_heads: Annotated[
        PositiveInt,
        Opt("Copies of every key and value head, for device groups that share out the heads."),
    ] = 1
    comp_ctx_lengths: Annotated[
        bool, Opt("An input that says how much of the context is computed with.")
    ] = False
    verify: Annotated[
        Literal["auto", "full", "quick", "off"],
        Opt(
            "Check against PyTorch. quick: the first and last two layers; auto: full under two "
            "billion parameters, else quick.",
        ),
    ] = "auto"

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
        if self.comp_ctx_lengths and self.graph_opset < 17:
            raise ValueError(
                f"{COMP_CTX_LENGTHS} needs opset 17: the compilers of older opsets know no such "
                "input"
            )
        return self


class CompileOptions(Section):
    """The grid of variants: every combination of the lists is compiled."""

    precision: Annotated[
        Listed[PrecisionName], Opt("Lists: mx6,fp16.", argument="[mx6|fp16|fp32]")
    ] = (DEFAULT_PRECISION,)
    num_cores: Annotated[Listed[NumCores], Opt("NSPs; lists: 7,14.", argument="[NSP]")] = (
        DEFAULT_CORES,
    )
    batch_size: Annotated[
        Listed[PositiveInt],
        Opt("Rows of a static program, slots of a continuous-batching one; lists: 1,8."),
    ] = (DEFAULT_BATCH_SIZE,)
    prompt_len: Annotated[
        Listed[PromptLen],
        Opt("Tokens of a prefill; lists: 32,64; 32+64 is one program that has both."),
    ] = (DEFAULT_PROMPT_LEN,)
    ctx_len: Annotated[Listed[PositiveInt], Opt("Tokens of a context; lists: 512,2048.")] = (
        DEFAULT_CTX_LEN,
    )
    num_speculative_tokens: Annotated[
        Count, Opt("Tokens guessed ahead in a decode step; of an export with num_logits_to_keep.")
    ] = 0
    comp_ctx_lengths: Annotated[
        Words[PositiveInt],
        Opt("Contexts to compute with, beside ctx_len: 512,1024; of an export that has them."),
    ] = ()
    output: Annotated[PathText, Opt("Folder that gets one folder a variant.")] = "qpc"
    parallel: Annotated[
        PositiveInt | None, Opt("Compiles at once.", flag="--jobs", shown="one a CPU")
    ] = None


class VariantChoice(Section):
    """Which variant of the grid is run; what is absent must have one value in the grid."""

    precision: PrecisionName | None = None
    num_cores: NumCores | None = None
    batch_size: PositiveInt | None = None
    prompt_len: PromptLen | None = None
    ctx_len: PositiveInt | None = None


class PromptOptions(Section):
    """What is answered."""

    GROUP: ClassVar[str] = PROMPTS

    prompt: Annotated[
        str | None, Opt(r"Prompts separated by |, as in the recipe; \| is a pipe of the text.")
    ] = None
    prompts: Annotated[
        PathText | None,
        Opt(
            "A file: lines of text; .jsonl, .csv: prompt or messages; - for stdin.",
            flag="--prompts-file",
            free=True,
        ),
    ] = None
    prompts_format: Annotated[
        Literal["text", "jsonl", "openai", "csv", "tsv", "parquet"] | None,
        Opt("What the prompts file holds.", shown="by name and content"),
    ] = None


class Generation(Section):
    """How answers are made, and what of the QPC is relied on: what a worker is handed."""

    GROUP: ClassVar[str] = PROMPTS

    chat: Annotated[
        bool,
        Opt("Put each prompt into the model's chat template; rows of messages always are."),
    ] = False
    system: Annotated[
        str | None, Opt("With --chat: the system message of conversations that bring none.")
    ] = None
    chat_template: Annotated[
        TemplateText | None, Opt("A Jinja file instead of the model's own, or its text.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], Opt("""Variables for the template: '{"enable_thinking": false}'.""")
    ] = Field(default_factory=dict)
    continue_final_message: Annotated[bool, Opt("Go on with the last message of a chat.")] = False
    add_generation_prompt: Annotated[
        bool, Opt("End a chat with the beginning of the assistant's answer.")
    ] = True
    date: Annotated[
        Date | None,
        Opt(
            "What a chat template takes for the date, like 2026-01-31T12:00:00.",
            flag=None,
            shown="the run's beginning",
        ),
    ] = None
    sampling: Sampling = SamplingParams()
    seed: Annotated[
        Annotated[int, Field(ge=0, le=MAX_SEED)] | None,
        Opt(
            "What each row's own seed is made from; the run folder's job.yaml has it.",
            flag="--run-seed",
            group=SamplingParams.GROUP,
            shown="drawn",
        ),
    ] = None
    generation_len: Annotated[
        PositiveInt | None, Opt("Most tokens of an answer.", group=ANSWER_END, shown="context")
    ] = None
    drafts: Annotated[
        Literal["auto", "none", "prompt-lookup"],
        Opt(
            "What drafts tokens; auto: the draft QPC where there is one, else prompt lookup. The "
            "text is the same.",
            flag="--speculate",
            group=DRAFTS,
        ),
    ] = "auto"
    draft_qpc: Annotated[
        PathText | None,
        Opt("Folder of a smaller model's QPC, to run beside the other.", group=DRAFTS),
    ] = None
    max_stall_s: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False),
        Opt("Seconds that running rows may wait for other rows' prefill.", flag=None),
    ] = 1.0
    prefix_reuse: Annotated[
        bool, Opt("Start a prompt from what a slot's cache holds of it already.", flag=None)
    ] = True
    input_len: Annotated[
        PositiveInt | None, Opt("Must be what the QPC was compiled for.", group=CHECKS)
    ] = None
    ctx_len: Annotated[
        PositiveInt | None, Opt("Must be what the QPC was compiled for.", group=CHECKS)
    ] = None

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

    @property
    def chat_options(self) -> ChatOptions:
        """For prompts that bring none; their template variables are for all."""
        return ChatOptions(
            self.add_generation_prompt, self.continue_final_message, self.chat_template_kwargs
        )


class CardOptions(Section):
    """Which cards, and how they are shared out."""

    GROUP: ClassVar[str] = CARDS

    devices: Annotated[Devices, Opt("0,1,2,3 or all.", flag="--device-id", free=True)] = "all"
    partitions: Annotated[
        PositiveInt,
        Opt("Workers of one card, each with as many of its NSPs; the QPC is compiled for so few."),
    ] = 1
    group_size: Annotated[PositiveInt, Opt("Cards of one worker, for a tensor-sliced QPC.")] = 1


class RunOptions(CardOptions, Generation, PromptOptions):
    """What is answered, by what, how."""

    variant: VariantChoice = VariantChoice()
    output: Annotated[PathText, Opt("Folder that gets one folder a run.", group=FOLDER)] = "runs"
    output_formats: Annotated[
        Words[Literal["openai", "parquet"]],
        Opt(
            "Beside outputs.jsonl: openai, parquet; may be repeated.",
            flag="--output-format",
            group=FOLDER,
            repeated=True,
        ),
    ] = ()


class EmulatorOptions(Section):
    """What the emulated SDK is asked to be, where it takes the vendor's place."""

    cards: Annotated[
        Annotated[int, Field(ge=1, le=LIMITS["max_cards"])], Opt("How many cards.")
    ] = 4
    sku: Annotated[Annotated[str, one_of(LIMITS["skus"])], Opt(f"{', '.join(LIMITS['skus'])}.")] = (
        "standard"
    )
    apps_version: Annotated[
        Annotated[str, one_of(LIMITS["apps_versions"])],
        Opt(f"{', '.join(LIMITS['apps_versions'])}."),
    ] = "1.20"


class RayOptions(Section):
    """The cluster."""

    address: Annotated[
        str | None,
        Opt("A running Ray cluster, in place of a local one for the command's time.", free=True),
    ] = None
    dashboard: Annotated[bool, Opt("Start the dashboard of a local Ray.", flag=None)] = False


class SdkOptions(Section):
    """Which SDK."""

    sdk: Annotated[
        PathText,
        Opt("auto, real, emulated, or an SDK folder.", environment="QAIC_RAY_SDK", free=True),
    ] = "auto"


class Job(SdkOptions):
    """One runnable scenario: a job file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    model: ModelOptions
    export: ExportOptions = ExportOptions()
    compile: CompileOptions = CompileOptions()
    run: RunOptions = RunOptions()
    emulator: EmulatorOptions = EmulatorOptions()
    ray: RayOptions = RayOptions()


ENVIRONMENT = {
    "QAIC_RAY_SDK": "The SDK where --sdk, or a job's sdk, is auto: a name or a folder.",
    "QAIC_RAY_CACHE": "Folder of what is kept between commands.",
    "QAIC_RAY_LOCKS": "Folder of the locks by which processes of a machine share its cards.",
}
"""The variables that change what is done."""
