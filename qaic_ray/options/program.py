"""The part of the option tree that says what a program is: model, export, the grid of variants.

`qaic_ray.options` has it too.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from qaic_ray.contract import COMP_CTX_LENGTHS, NUM_LOGITS_TO_KEEP, IoContract
from qaic_ray.option_types import (
    Count,
    Layout,
    Listed,
    NumCores,
    PathText,
    PositiveInt,
    Precision,
    PrecisionName,
    PromptLen,
    Section,
    Words,
    opt,
)

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

    name: PathText = opt(..., MODEL_HELP, argument="[MODEL]", **MODEL_NAMES, sample="smollm2-135m")
    model_class: Literal["LlamaForCausalLM"] = opt(
        "LlamaForCausalLM", "The model's class, as in the published recipe."
    )
    trust_remote_code: bool = opt(
        False, "Let transformers run code that the checkpoint brings.", flag=None
    )


class ExportOptions(Section):
    """How the graph is made."""

    output: PathText | None = opt(
        None,
        "Folder to write; its name is the model's.",
        short="-o",
        shown="<base>-kv",
        sample="my-llama-kv",
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

    RULES: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "if": {
                "required": ["io"],
                "properties": {"io": {"const": IoContract.CACHE_INDEX.value}},
            },
            "then": {
                "required": ["continuous_batching"],
                "properties": {
                    "continuous_batching": {"const": False},
                    "logits": {"not": {"const": NUM_LOGITS_TO_KEEP}},
                    COMP_CTX_LENGTHS: {"const": False},
                },
            },
        },
        {
            "if": {
                "required": [COMP_CTX_LENGTHS],
                "properties": {COMP_CTX_LENGTHS: {"const": True}},
            },
            "then": {"properties": {"opset": {"not": {"const": 13}}}},
        },
        {
            "if": {"required": ["weights"], "properties": {"weights": {"const": "reference"}}},
            "then": {"properties": {"replicate_kv_heads": {"const": 1}}},
        },
    )
    """What `_fit_together` refuses."""

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
        0, "Tokens guessed ahead in a decode step; of an export with num_logits_to_keep.", sample=3
    )
    comp_ctx_lengths: Words[PositiveInt] = opt(
        (),
        "Contexts to compute with, beside ctx_len; of an export that has them.",
        example="512,1024",
    )
    output: PathText = opt("qpc", "Folder that gets one folder a variant.", short="-o")
    parallel: PositiveInt | None = opt(
        None, "Compiles at once.", flag="--jobs", shown="one a CPU", sample=2
    )
    layout: Layout = opt(
        Layout.RECIPE, "qefficient: also a folder qpc in each, which QEfficient's commands take."
    )


class VariantChoice(Section):
    """Which variant is run; what is absent must have one value in a job's grid."""

    precision: PrecisionName | None = opt(None, "One of the grid's.", flag=None)
    num_cores: NumCores | None = opt(None, "One of the grid's.", flag=None, sample=14)
    batch_size: PositiveInt | None = opt(None, "One of the grid's.", flag=None, sample=8)
    prompt_len: PromptLen | None = opt(None, "One of the grid's.", flag=None, sample=64)
    ctx_len: PositiveInt | None = opt(None, "One of the grid's.", flag=None, sample=512)
