"""The arguments of `qaic_ray.LLM`: vLLM's names and ours, into the options of a run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaic_ray.api.quiet import log
from qaic_ray.errors import ParameterError
from qaic_ray.files.documents import checked, shown
from qaic_ray.option_types import Precision
from qaic_ray.options import (
    EmulatorOptions,
    Generation,
    ModelOptions,
    RayOptions,
    RunOptions,
    VariantChoice,
)

NO_EFFECT = frozenset({
    "allow_deprecated_quantization", "async_scheduling", "block_size", "calculate_kv_scales",
    "collect_detailed_traces", "compilation_config", "cpu_offload_gb", "cuda_graph_sizes",
    "disable_async_output_proc", "disable_cascade_attn", "disable_custom_all_reduce",
    "disable_log_requests", "disable_log_stats", "disable_sliding_window", "device",
    "distributed_executor_backend", "download_dir", "enable_chunked_prefill", "enable_log_requests",
    "enable_sleep_mode", "enforce_eager", "gpu_memory_utilization", "hf_token",
    "kv_cache_memory_bytes", "load_format", "long_prefill_token_threshold",
    "max_cpu_loras", "max_logprobs", "max_long_partial_prefills", "max_num_batched_tokens",
    "max_num_partial_prefills", "max_parallel_loading_workers", "max_seq_len_to_capture",
    "num_gpu_blocks_override", "num_scheduler_steps", "observability_config", "optimization_level",
    "performance_mode", "preemption_mode", "ray_workers_use_nsight", "safetensors_load_strategy",
    "scheduling_policy", "served_model_name", "show_hidden_metrics_for_version", "swap_space",
    "usage_context", "use_tqdm_on_load", "use_v2_block_manager", "worker_cls", "worker_use_ray",
})  # fmt: skip
"""Arguments of vLLM that say how a GPU is used: they change no answer here."""

_CARDS_BY_NAME = "every card answers already: choose them by devices"
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "tensor_parallel_size": (
        (1,),
        "a program for a group of cards is compiled first, with the model's KV heads replicated: "
        "then give its folder by qpc, and group_size",
    ),
    "pipeline_parallel_size": ((1,), "a program is on one card, or one group of cards"),
    "data_parallel_size": ((1,), _CARDS_BY_NAME),
    "tokenizer_mode": (("auto", "hf"), "the checkpoint's own tokenizer is used"),
    "skip_tokenizer_init": ((False,), "cards make texts of tokens"),
    "revision": ((), "download that revision, and give its folder"),
    "code_revision": ((), "download that revision, and give its folder"),
    "tokenizer_revision": ((), "download that revision, and give its folder"),
    "kv_cache_dtype": (("auto",), "export with kv_dtype mxint8, compile, and give qpc"),
    "logprobs_mode": (("raw_logprobs",), "logprobs are of the model's own logits"),
    "hf_overrides": (({},), "change config.json of a copy of the checkpoint"),
    "hf_config_path": ((), "put config.json into the checkpoint's folder"),
    "rope_scaling": (({},), "change config.json of a copy of the checkpoint"),
    "rope_theta": ((), "change config.json of a copy of the checkpoint"),
    "enable_lora": ((False,), "one model answers: merge the adapter into it"),
    "logits_processors": (([],), "tokens are chosen by SamplingParams alone"),
    "speculative_config": (({},), "say drafts, or draft_qpc"),
    "speculative_model": ((), "say drafts, or draft_qpc"),
    "override_generation_config": (({},), "give SamplingParams"),
    "limit_mm_per_prompt": (({},), "only text can be answered"),
    "mm_processor_kwargs": (({},), "only text can be answered"),
    "task": (("auto", "generate"), "answers are texts"),
    "runner": (("auto", "generate"), "answers are texts"),
    "convert": (("auto", "none"), "answers are texts"),
    "model_impl": (("auto", "vllm"), "the model is exported"),
    "reasoning_parser": (("",), "answers are given as they are"),
    "allowed_local_media_path": (("",), "only text can be answered"),
}
"""Arguments of vLLM that would change the answers: the values that do not, and what to do."""

_GENERATION = tuple(
    sorted(
        Generation.model_fields.keys()
        - {"sampling", "seed", "ctx_len", "input_len", "generation_len", "prefix_reuse", "chat"}
        - {"continue_final_message", "add_generation_prompt"}
    )
)
"""Options of a run, by their names in a job, that an LLM takes too."""

_DTYPES = {
    "auto": None,
    "half": Precision.FP16,
    "float16": Precision.FP16,
    "bfloat16": None,
    "float": Precision.FP32,
    "float32": Precision.FP32,
}
_QUANTIZATIONS = {None: None, "mxfp6": Precision.MX6, "mx6": Precision.MX6}


@dataclass(frozen=True, kw_only=True)
class LlmSettings:
    """What an LLM was asked to be; arguments as those of `LLM`.

    Raises:
        ParameterError: for one that is unknown, not offered, or does not fit another one.
    """

    model: str
    qpc: str | Path | None = None
    folder: str | Path | None = None
    devices: str | int | Sequence[int] = "all"
    partitions: int = 1
    group_size: int = 1
    precision: str | None = None
    num_cores: int | None = None
    prompt_len: int | str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    dtype: str = "auto"
    quantization: str | None = None
    seed: int | None = None
    enable_prefix_caching: bool | None = None
    trust_remote_code: bool = False
    generation_config: str = "auto"
    sdk: str | Path = "auto"
    emulator: Mapping[str, Any] | None = None
    address: str | None = None
    keep_ray: bool = False
    dashboard: bool = False
    metrics: bool = True
    max_open: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        passed = []
        for name, value in self.others.items():
            if name in NO_EFFECT:
                passed.append(name)
            elif name in _REFUSED:
                self._refuse(name, value)
            elif name == "tokenizer":
                if value not in (None, self.model):
                    raise ParameterError(
                        f"tokenizer is {shown(value)}: the model's own is used; put other "
                        "tokenizer files into a copy of its folder."
                    )
            elif name not in _GENERATION:
                raise ParameterError(_unknown(name))
        if passed:
            log.info("%s: of no effect on cards", ", ".join(sorted(passed)))
        if self.max_open is not None and self.max_open < 1:
            raise ParameterError(f"max_open is {shown(self.max_open)}: it is at least 1.")
        if self.qpc is not None:
            self._refuse_shapes()

    @property
    def model_options(self) -> ModelOptions:
        """Which checkpoint."""
        said = {"name": self.model, "trust_remote_code": self.trust_remote_code}
        return checked(ModelOptions, said, "LLM", raises=ParameterError)

    @property
    def run_options(self) -> RunOptions:
        """How answers are made, and on which cards."""
        said = {
            "devices": _devices(self.devices),
            "partitions": self.partitions,
            "group_size": self.group_size,
            "seed": self.seed,
            "ctx_len": self.max_model_len if self.qpc is not None else None,
            "metrics": self.metrics,
            **{name: value for name, value in self.others.items() if name in _GENERATION},
        }
        if self.enable_prefix_caching is not None:
            said["prefix_reuse"] = self.enable_prefix_caching
        return checked(RunOptions, said, "LLM", raises=ParameterError)

    @property
    def shapes(self) -> VariantChoice:
        """Of a program that is made; None is chosen."""
        said = {
            "precision": self._precision(),
            "num_cores": self.num_cores,
            "batch_size": self.max_num_seqs,
            "prompt_len": self.prompt_len,
            "ctx_len": self.max_model_len,
        }
        return checked(VariantChoice, said, "LLM", raises=ParameterError)

    @property
    def ray_options(self) -> RayOptions:
        """Which Ray."""
        said = {"address": self.address, "keep_ray": self.keep_ray, "dashboard": self.dashboard}
        return checked(RayOptions, said, "LLM", raises=ParameterError)

    @property
    def emulator_options(self) -> EmulatorOptions:
        """What the emulated SDK is to be, where it is the one."""
        return checked(
            EmulatorOptions, dict(self.emulator or {}), "LLM: emulator", raises=ParameterError
        )

    def _precision(self) -> str | None:
        if self.dtype not in _DTYPES:
            raise ParameterError(
                f"dtype is {shown(self.dtype)}: cards compute in float16, so auto or float16; "
                "precision says how weights are kept."
            )
        if self.quantization not in _QUANTIZATIONS:
            raise ParameterError(
                f"quantization is {shown(self.quantization)}: cards keep weights by precision, "
                "mx6 (MXFP6) or fp16; give a checkpoint that is not quantized."
            )
        found = self.precision or _QUANTIZATIONS[self.quantization] or _DTYPES[self.dtype]
        return found.value if isinstance(found, Precision) else found

    def _refuse(self, name: str, value: object) -> None:
        neutral, instead = _REFUSED[name]
        if value is not None and value not in neutral:
            raise ParameterError(f"{name} is {shown(value)}, which is not offered: {instead}.")

    def _refuse_shapes(self) -> None:
        names = ("precision", "num_cores", "prompt_len", "max_num_seqs", "quantization")
        said = [name for name in names if getattr(self, name) is not None]
        if said:
            raise ParameterError(
                f"A program is given by qpc, and {' and '.join(said)} would choose another one: "
                "leave out one or the other."
            )


def _devices(given: str | int | Sequence[int]) -> str | tuple[int, ...]:
    if isinstance(given, int):
        return (given,)
    if isinstance(given, str):
        words = given.split(",")
        return tuple(map(int, words)) if all(map(str.isdecimal, words)) else given
    return tuple(given)


def _unknown(name: str) -> str:
    own = [known for known in LlmSettings.__dataclass_fields__ if known != "others"]
    known = sorted({*own, *_GENERATION, *_REFUSED, *NO_EFFECT, "tokenizer"})
    near = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {near[0]}?" if near else "docs/how-to/python.md lists what LLM takes."
    return f"LLM has no argument {shown(name)}: {hint}"
