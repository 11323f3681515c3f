"""The config of a processor: Ray's fields by Ray's meaning, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from qaic_ray.data import QAICEngineProcessorConfig, build_processor
from qaic_ray.errors import UsageError
from qaic_ray.option_types import Precision


def config(**fields: Any) -> QAICEngineProcessorConfig:
    return QAICEngineProcessorConfig(**{"model_source": "m", **fields})


def test_the_builder_and_the_config_are_those_of_ray_data_llm() -> None:
    """Of the Ray that is installed: signature, fields and defaults; what differs is listed."""
    llm = pytest.importorskip("ray.data.llm")
    theirs = inspect.signature(llm.build_processor)
    ours = inspect.signature(build_processor)
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]
    fields = llm.vLLMEngineProcessorConfig.model_fields
    known = QAICEngineProcessorConfig.model_fields
    refused = {
        "accelerator_type", "dynamic_lora_loading_path", "max_pending_requests",
        "placement_group_config", "prepare_multimodal_stage", "task_type",
    }  # fmt: skip
    assert fields.keys() - known.keys() == refused
    for name in fields.keys() & known.keys():
        assert known[name].get_default(call_default_factory=True) == (
            fields[name].get_default(call_default_factory=True)
        ), name
    # A program that says Ray's defaults may keep them.
    defaults = {n: f.get_default(call_default_factory=True) for n, f in fields.items()}
    config(**{**defaults, "model_source": "m"})
    methods = {"__call__", "list_stage_names", "log_input_column_names"}
    from qaic_ray.data import Processor

    assert methods <= set(dir(Processor)) & set(dir(llm.Processor))


def test_ray_s_own_stage_configs_are_taken() -> None:
    llm = pytest.importorskip("ray.data.llm")
    stage = llm.ChatTemplateStageConfig(chat_template_kwargs={"enable_thinking": False})
    made = config(chat_template_stage=stage, tokenize_stage=llm.TokenizerStageConfig(batch_size=9))
    assert made.chat_stage["chat_template_kwargs"] == {"enable_thinking": False}
    assert made.chat_stage["enabled"]
    assert not config(chat_template_stage=False).chat_stage["enabled"]
    off = config(chat_template_stage=llm.ChatTemplateStageConfig(enabled=False))
    assert not off.chat_stage["enabled"]


def test_vllm_s_engine_arguments_are_fields_here_or_change_nothing() -> None:
    made = config(
        engine_kwargs={
            "max_model_len": 1024, "max_num_seqs": 4, "tensor_parallel_size": 1,
            "enable_prefix_caching": False, "enable_chunked_prefill": True, "dtype": "bfloat16",
            "max_num_batched_tokens": 4096, "pipeline_parallel_size": 1, "trust_remote_code": False,
        }
    )  # fmt: skip
    assert (made.ctx_len, made.slots, made.cards_per_worker) == (1024, 4, 1)
    assert not made.prefix_reuse
    shapes = config(precision="fp16", num_cores=7, prompt_len="32+64", slots=2).shapes
    assert (shapes.precision, shapes.num_cores, shapes.batch_size) == (Precision.FP16, 7, 2)
    assert config(concurrency=3).pool == (3, 3)
    assert config(concurrency=(1, 3)).pool == (1, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 0}, "batch_size: must be at least 1, not 0"),
        ({"concurrency": (3, 1)}, "the least is more than the most"),
        ({"concurency": 2}, "concurency"),
        ({"task_type": "embed"}, "task_type is not offered .* texts are generated"),
        ({"placement_group_config": {"bundles": []}}, "by cards_per_worker"),
        ({"prepare_multimodal_stage": True}, "only text can be answered"),
        ({"prepare_multimodal_stage": {"enabled": True}}, "only text can be answered"),
        ({"dynamic_lora_loading_path": "s3://x"}, "one model answers"),
        ({"engine_kwargs": {"quantization": "awq"}}, "'quantization' is not offered .* 'awq'"),
        ({"engine_kwargs": {"trust_remote_code": True}}, "'trust_remote_code' is not offered"),
        ({"engine_kwargs": {"pipeline_parallel_size": 2}}, "'pipeline_parallel_size' is not"),
        ({"engine_kwargs": {"max_model_len": 8}, "ctx_len": 9}, "max_model_len differ"),
        ({"qpc": "q", "precision": "fp16"}, "of a program that is made: leave qpc out"),
        ({"cards_per_worker": 2}, "compile one, and give qpc"),
        ({"cards_per_worker": 0.7}, "whole number, or 1/2"),
        ({"chat_template_stage": {"template": "x"}}, "chat_template_stage has no 'template'"),
        ({"sampling": {"temperature": -1}}, "sampling: temperature is -1"),
        ({"sampling": {"temprature": 1}}, "sampling: .*temprature"),
        ({"precision": "int4"}, "precision"),
    ],
)
def test_what_cannot_be_is_one_sentence_that_names_it(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        config(**fields)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_kind_and_unknown_builder_kwargs_are_refused() -> None:
    with pytest.raises(UsageError, match="takes a QAICEngineProcessorConfig, not a dict"):
        build_processor({"model_source": "m"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="builder_kwargs has 'preprocess'; known is chat_temp"):
        build_processor(config(qpc="q"), builder_kwargs={"preprocess": None})
