"""The config of a processor: the fields of `ray.data.llm`'s, and those of cards and their programs.

What `ray.data.llm` has and this has not is refused by its name, unless its value changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qaic_ray.errors import RowError, UsageError
from qaic_ray.files.documents import first_error, shown
from qaic_ray.option_types import NumCores, PositiveInt, PrecisionName, PromptLen
from qaic_ray.options import VariantChoice
from qaic_ray.sampling_params import SamplingParams

VLLM_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "max_tokens": 16}
"""What vLLM, and so `ray.data.llm`, takes where a row says nothing."""

_NOT_HERE = {
    "accelerator_type": (None, "cards are the resource QAIC; leave it out"),
    "dynamic_lora_loading_path": (None, "one model answers; leave it out"),
    "max_pending_requests": (None, "the card's slots take what they can; leave it out"),
    "placement_group_config": (None, "say how many cards a worker has by cards_per_worker"),
    "prepare_multimodal_stage": (False, "only text can be answered; leave it out"),
    "task_type": ("generate", "texts are generated, and nothing else; leave it out"),
}
"""Field of `ray.data.llm` -> its value that changes nothing, and what to do with any other."""

_ENGINE = {
    "max_model_len": "ctx_len",
    "max_num_seqs": "slots",
    "tensor_parallel_size": "cards_per_worker",
    "enable_prefix_caching": "prefix_reuse",
}
"""Key of `engine_kwargs` -> the field that it is here."""

_ENGINE_OF_NO_EFFECT = frozenset({
    "block_size", "disable_custom_all_reduce", "disable_log_stats", "distributed_executor_backend",
    "dtype", "enable_chunked_prefill", "enforce_eager", "gpu_memory_utilization", "load_format",
    "max_num_batched_tokens", "swap_space", "task_type", "tokenizer_mode",
})  # fmt: skip
"""Keys of `engine_kwargs` that say how a GPU computes, not what."""

_ENGINE_NEUTRAL = {"pipeline_parallel_size": 1, "trust_remote_code": False}


class QAICEngineProcessorConfig(BaseModel):
    """How a dataset is answered.

    Of `ray.data.llm`: `model_source`, `batch_size`, `concurrency`, `max_concurrent_batches`,
    `max_tasks_in_flight_per_actor`, `runtime_env`, `should_continue_on_error`,
    `log_engine_metrics`, the stages, and `engine_kwargs` in vLLM's names.

    Attributes:
        model_source: a folder, a hub id, a .gguf file or `smollm2-135m`; on every node.
        qpc: the folder of a compiled variant, at this path on every node. Without it one is made
            on this machine, in the user's cache, and found there the next time.
        batch_size: rows that a worker is given at a time.
        concurrency: workers; a tuple is the least and the most.
        max_concurrent_batches: batches that a worker answers at once.
        should_continue_on_error: a row that cannot be answered says why in `__inference_error__`,
            and does not end the whole.
        chat_template_stage: whether `messages` are put into the model's chat template; or a dict
            with `enabled`, `chat_template` and `chat_template_kwargs`.
        sampling: fields of `SamplingParams` for what a row's `sampling_params` does not say;
            vLLM's defaults are temperature 1 and 16 tokens.
        cards_per_worker: 1, more for a device group, or 1/2, 1/3, ... for a part of a card.
        precision, num_cores, prompt_len, ctx_len, slots: of the program that is made; with `qpc`
            prompt_len and ctx_len are checked.
        prefix_reuse: start a prompt from what a slot's cache holds of it already.
        sdk: auto, real, emulated, or an SDK folder.

    Raises:
        UsageError: one sentence that names the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_source: str
    qpc: str | None = None
    batch_size: PositiveInt = 32
    concurrency: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    max_concurrent_batches: PositiveInt = 8
    max_tasks_in_flight_per_actor: PositiveInt | None = None
    runtime_env: dict[str, Any] | None = None
    should_continue_on_error: bool = False
    log_engine_metrics: bool = True
    chat_template_stage: bool | dict[str, Any] = True
    tokenize_stage: bool | dict[str, Any] = True
    detokenize_stage: bool | dict[str, Any] = True
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    sampling: dict[str, Any] = Field(default_factory=lambda: dict(VLLM_DEFAULTS))
    cards_per_worker: float = Field(1, gt=0)
    precision: PrecisionName | None = None
    num_cores: NumCores | None = None
    prompt_len: PromptLen | None = None
    ctx_len: PositiveInt | None = None
    slots: PositiveInt | None = None
    prefix_reuse: bool = True
    sdk: str = "auto"

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UsageError(f"QAICEngineProcessorConfig: {first_error(error)}") from error

    @model_validator(mode="before")
    @classmethod
    def _without_others(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Take `ray.data.llm`'s fields, and `engine_kwargs`, for what they are here."""
        # Ray's stage configs are models of its own.
        own = {n: v.model_dump() if isinstance(v, BaseModel) else v for n, v in fields.items()}
        for name, (neutral, instead) in _NOT_HERE.items():
            if name in own and not _is_off(own[name], neutral):
                raise ValueError(f"{name} is not offered (given: {shown(own[name])}): {instead}")
            own.pop(name, None)
        for name, value in dict(own.get("engine_kwargs") or {}).items():
            if name in _ENGINE:
                if own.setdefault(_ENGINE[name], value) != value:
                    raise ValueError(f"{_ENGINE[name]} and engine_kwargs {name} differ: give one")
            elif name not in _ENGINE_OF_NO_EFFECT and value != _ENGINE_NEUTRAL.get(name, ...):
                known = ", ".join(_ENGINE)
                raise ValueError(
                    f"engine_kwargs {shown(name)} is not offered (given: {shown(value)}): leave it "
                    f"out; of vLLM's are known {known}, and those that change no answer"
                )
        return own

    @model_validator(mode="after")
    def _fit_together(self) -> QAICEngineProcessorConfig:
        if isinstance(self.concurrency, tuple) and self.concurrency[0] > self.concurrency[1]:
            raise ValueError("concurrency: the least is more than the most")
        if self.cards_per_worker != round(self.cards_per_worker) and not _is_part(
            self.cards_per_worker
        ):
            raise ValueError("cards_per_worker is a whole number, or 1/2, 1/3, ... of a card")
        of_program = ("precision", "num_cores", "slots")
        if self.qpc is not None and any(getattr(self, name) is not None for name in of_program):
            raise ValueError(
                f"{', '.join(of_program)} are of a program that is made: leave qpc out"
            )
        if self.qpc is None and self.cards_per_worker > 1:
            raise ValueError(
                "a program for a group of cards is not made by itself: compile one, and give qpc"
            )
        unknown = self.chat_stage.keys() - _CHAT_STAGE
        if unknown:
            raise ValueError(f"chat_template_stage has no {', '.join(sorted(map(shown, unknown)))}")
        try:
            SamplingParams().updated(self.sampling)
        except RowError as error:
            raise ValueError(f"sampling: {error}") from error
        return self

    @property
    def chat_stage(self) -> dict[str, Any]:
        """The chat template's stage as a dict."""
        stage = self.chat_template_stage
        return {"enabled": stage} if isinstance(stage, bool) else {"enabled": True, **stage}

    @property
    def pool(self) -> tuple[int, int]:
        """The least and the most of workers."""
        return self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency,) * 2

    @property
    def shapes(self) -> VariantChoice:
        """Of the program that is made."""
        return VariantChoice(
            precision=self.precision,
            num_cores=self.num_cores,
            batch_size=self.slots,
            prompt_len=self.prompt_len,
            ctx_len=self.ctx_len,
        )


_CHAT_STAGE = {
    "enabled", "chat_template", "chat_template_kwargs", "batch_size", "concurrency", "memory",
    "model_source", "num_cpus", "runtime_env",
}  # fmt: skip
"""Of the stage's config; those of a worker of its own are taken and have no effect: it has none."""


def _is_off(value: Any, neutral: Any) -> bool:
    return value is None or value == neutral or value == {"enabled": neutral}


def _is_part(share: float) -> bool:
    return share < 1 and abs(1 / share - round(1 / share)) < 0.01
