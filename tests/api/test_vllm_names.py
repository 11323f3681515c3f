"""Parameters, arguments and prompts in vLLM's names: its defaults, what is refused, what passes."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy as np
import pytest

from qaic_ray.api.prompts import (
    chat_options,
    chat_prompt,
    conversations,
    one_prompt,
    paired,
    prompt_list,
)
from qaic_ray.api.sampling import RequestOutputKind, SamplingParams, StructuredOutputsParams
from qaic_ray.api.settings import NO_EFFECT, LlmSettings
from qaic_ray.errors import ParameterError, UsageError
from qaic_ray.option_types import Precision
from qaic_ray.sampling_params import SamplingParams as RunParams
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs

VLLM_DEFAULTS = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "extra_args": None,
    "bad_words": None,
}
"""Of `vllm/sampling_params.py` at 00388f6."""


@pytest.mark.parametrize("name", VLLM_DEFAULTS)
def test_a_default_is_that_of_vllm(name: str) -> None:
    assert getattr(SamplingParams(), name) == VLLM_DEFAULTS[name]


def test_parameters_are_those_of_a_run() -> None:
    params = SamplingParams(
        n=2, temperature=0.7, top_k=-1, stop="END", stop_token_ids=[5, 6], seed=-1, max_tokens=None
    )
    assert params.to_run() == RunParams(
        n=2, temperature=0.7, top_k=-1, stop=("END",), stop_token_ids=(5, 6)
    )
    assert SamplingParams().to_run() == RunParams(temperature=1.0, max_tokens=16)


def test_limits_of_an_answer_are_those_of_a_run() -> None:
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(choice=["a", "b"]),
        logit_bias={np.int64(7): np.float32(2), 3: -100},
        allowed_token_ids=[np.int64(4), 5],
        bad_words=["no"],
        prompt_logprobs=3,
        max_tokens=None,
    )
    assert params.to_run() == RunParams(
        temperature=1.0,
        structured_outputs=StructuredOutputs(choice=("a", "b")),
        logit_bias=((3, -100.0), (7, 2.0)),
        allowed_token_ids=(4, 5),
        bad_words=("no",),
        prompt_logprobs=3,
    )
    assert pickle.loads(pickle.dumps(params)) == params.clone()
    schema = {"type": "object"}
    of_object = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema)).to_run()
    assert of_object == SamplingParams(structured_outputs={"json": schema}).to_run()


def test_numbers_of_other_libraries_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(3), top_p=1)
    assert params.to_run() == RunParams(temperature=0.5, max_tokens=3)


def test_parameters_can_be_changed_and_are_checked_again() -> None:
    params = SamplingParams()
    params.temperature, params.max_tokens = 0.0, 4
    assert params.to_run().is_greedy
    copied = params.clone()
    params.max_tokens = 0
    assert copied.max_tokens == 4
    with pytest.raises(ParameterError, match="max_tokens is 0; allowed"):
        params.to_run()


def test_none_means_the_default_for_from_optional() -> None:
    assert SamplingParams.from_optional(temperature=None, top_k=5) == SamplingParams(top_k=5)
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None


def test_it_has_the_name_that_it_is_used_by() -> None:
    assert SamplingParams.__name__ == "SamplingParams"
    assert pickle.loads(pickle.dumps(SamplingParams(top_k=3))) == SamplingParams(top_k=3)


def test_it_shows_what_is_not_the_default() -> None:
    shown = repr(SamplingParams(temperature=0.5, stop=["a"]))
    assert shown == "SamplingParams(temperature=0.5, stop=['a'])"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"structured_outputs": object()}, "structured_outputs is .*; allowed is an object"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex cannot be followed"),
        (
            {"structured_outputs": StructuredOutputsParams(structural_tag="x")},
            "structural_tag is not offered",
        ),
        ({"structured_outputs": StructuredOutputsParams()}, "has none of its kinds"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; allowed"),
        ({"logit_bias": {1: 101.0}}, "logit_bias is .*; allowed"),
        ({"allowed_token_ids": []}, "allowed_token_ids is .*; allowed"),
        ({"guided_decoding": object()}, '"guided_decoding" is not offered'),
        ({"truncate_prompt_tokens": 5}, '"truncate_prompt_tokens" is not offered'),
        ({"flat_logprobs": True}, '"flat_logprobs" is not offered'),
        ({"logprob_token_ids": [1]}, '"logprob_token_ids" is not offered'),
        ({"thinking_token_budget": 9}, '"thinking_token_budget" is not offered'),
        ({"extra_args": {"a": 1}}, '"extra_args" is not offered'),
        ({"best_of": 3}, '"best_of" is not offered'),
        ({"logprobs": -1}, "logprobs is -1; allowed"),
        ({"logprobs": 21}, "logprobs is 21; allowed"),
        ({"temperature": -0.1}, "temperature is -0.1; allowed"),
        ({"temperature": "hot"}, "temperature is 'hot'; allowed"),
        ({"max_tokens": True}, "max_tokens is True; allowed"),
        ({"n": 2, "temperature": 0.0}, "n is 2; allowed is 1"),
        ({"min_tokens": 17}, "min_tokens is 17"),
    ],
)
def test_what_changes_the_answer_and_is_not_offered_is_refused_by_its_name(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        SamplingParams(**given)
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_logprobs": None, "bad_words": [], "logit_bias": {}},
        {"best_of": 1, "extra_args": {}, "thinking_token_budget": -1, "stream_interval": 4},
        {"spaces_between_special_tokens": False, "detokenize": False},
    ],
)
def test_what_changes_nothing_passes(given: dict[str, Any]) -> None:
    assert SamplingParams(**given).to_run() == SamplingParams().to_run()


# -- arguments of LLM


def test_arguments_are_options_of_a_run() -> None:
    settings = LlmSettings(
        model="m",
        devices=[0, 2],
        max_model_len=512,
        max_num_seqs=16,
        seed=3,
        dtype="float16",
        enable_prefix_caching=False,
        trust_remote_code=True,
        others={"system": "Be short.", "drafts": "none", "tokenizer": "m"},
    )
    shapes, run = settings.shapes, settings.run_options
    assert (shapes.ctx_len, shapes.batch_size, shapes.precision) == (512, 16, Precision.FP16)
    assert (run.devices, run.seed, run.prefix_reuse, run.drafts) == ((0, 2), 3, False, "none")
    assert run.system == "Be short."
    assert run.ctx_len is None
    assert settings.model_options.trust_remote_code
    assert LlmSettings(model="m", devices=1).run_options.devices == (1,)
    assert LlmSettings(model="m", devices="0,1").run_options.devices == (0, 1)
    assert LlmSettings(model="m", qpc="q", max_model_len=64).run_options.ctx_len == 64
    assert LlmSettings(model="m", quantization="mxfp6").shapes.precision is Precision.MX6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tensor_paralel_size": 1}, "did you mean tensor_parallel_size"),
        ({"max_modl_len": 1}, "did you mean max_model_len"),
        ({"sistem": "x"}, "did you mean system"),
        ({"zzz": 1}, "docs/how-to/python.md"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, .*group_size"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"enable_lora": True}, "merge the adapter"),
        ({"tokenizer": "other"}, "tokenizer is 'other'"),
        ({"revision": "main"}, "download that revision"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8'"),
        ({"task": "embed"}, "task is 'embed'"),
    ],
)
def test_an_argument_that_is_unknown_or_not_offered_is_refused_by_its_name(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ParameterError, match=words):
        LlmSettings(model="m", others=given)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ParameterError, match="precision and max_num_seqs"):
        LlmSettings(model="m", qpc="q", precision="mx6", max_num_seqs=4)
    with pytest.raises(ParameterError, match="dtype is 'int8'"):
        assert LlmSettings(model="m", dtype="int8").shapes
    with pytest.raises(ParameterError, match="quantization is 'awq'"):
        assert LlmSettings(model="m", quantization="awq").shapes
    with pytest.raises(ParameterError, match="devices"):
        assert LlmSettings(model="m", devices="first").run_options
    with pytest.raises(ParameterError, match="max_open is 0"):
        LlmSettings(model="m", max_open=0)
    with pytest.raises(ParameterError, match="emulator: cards"):
        assert LlmSettings(model="m", emulator={"cards": 0}).emulator_options


def test_what_has_no_effect_passes_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qaic_ray"):
        LlmSettings(
            model="m",
            others={
                **dict.fromkeys(NO_EFFECT, 1),
                "gpu_memory_utilization": 0.4,
                "enforce_eager": True,
                "tensor_parallel_size": 1,
                "task": "generate",
            },
        )
    (line,) = caplog.messages
    assert "enforce_eager, " in line
    assert line.endswith("of no effect on cards")


# -- prompts


def test_prompts_in_every_form() -> None:
    found = prompt_list(
        [
            *("text", {"prompt": "said"}, {"prompt_token_ids": [1, 2]}, [3, 4], (5,)),
            *({"prompt_token_ids": [6], "prompt": "shown"}, np.array([7, 8]).tolist()),
        ]
    )
    assert [(p.text, p.token_ids) for p in found] == [
        ("text", None),
        ("said", None),
        ("", (1, 2)),
        ("", (3, 4)),
        ("", (5,)),
        ("shown", (6,)),
        ("", (7, 8)),
    ]
    assert [p.text for p in prompt_list("one")] == ["one"]
    assert [p.token_ids for p in prompt_list([1, 2, 3])] == [(1, 2, 3)]
    assert [p.token_ids for p in prompt_list({"prompt_token_ids": [1]})] == [(1,)]
    assert prompt_list([]) == []


def test_the_older_parameter_of_token_ids() -> None:
    assert [p.token_ids for p in prompt_list(None, [1, 2])] == [(1, 2)]
    assert [p.token_ids for p in prompt_list(None, [[1], [2]])] == [(1,), (2,)]
    both = prompt_list(["a", "b"], [[1], [2]])
    assert [(p.text, p.token_ids) for p in both] == [("a", (1,)), ("b", (2,))]
    with pytest.raises(ParameterError, match="3 prompts and 1 lists"):
        prompt_list(["a", "b", "c"], [[1]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["fine", ""], "Prompt 1: The prompt is empty"),
        (["fine", []], "Prompt 1 has .* for its token ids"),
        ([[1, -2]], "Prompt 0 has .* for its token ids"),
        ([[1, 2.5]], "Prompt 0 has .* for its token ids"),
        ([{"prompt_token_ids": "ids"}], "Prompt 0 has 'ids' for its token ids"),
        ([{"prompt": "a", "multi_modal_data": {"image": 1}}], '"multi_modal_data"'),
        ([{"text": "a"}], 'Prompt 0 has "text"'),
        ([{}], "Prompt 0"),
        ([3.5], "Prompt 0 is float"),
        (7, "The prompts are int"),
        (["half \ud83d"], "Prompt 0: .*surrogate"),
    ],
)
def test_what_is_no_prompt_is_named(given: object, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        prompt_list(given)


def test_messages_in_every_form() -> None:
    one = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert len(conversations(one)) == 1
    assert len(conversations([one, one])) == 2
    prompt = chat_prompt(0, one, chat_options())
    assert prompt.messages == ({"role": "user", "content": "Hi"},)
    assert prompt.text == "Hi"
    with pytest.raises(ParameterError, match="Messages are a list"):
        conversations("hello")
    with pytest.raises(ParameterError, match="Prompt 3: Message 1"):
        chat_prompt(3, [{"role": "user", "content": [{"type": "image_url"}]}], chat_options())
    with pytest.raises(ParameterError, match="both true"):
        chat_options(continue_final_message=True)
    tools = chat_options(tools=[{"name": "f"}], chat_template_kwargs={"a": 1})
    assert tools.template_kwargs == {"a": 1, "tools": [{"name": "f"}]}


def test_parameters_for_all_or_one_for_each() -> None:
    one, two, default = SamplingParams(seed=1), SamplingParams(seed=2), SamplingParams()
    assert paired(2, None, default) == [default, default]
    assert paired(2, one, default) == [one, one]
    assert paired(2, [one, two], default) == [one, two]
    with pytest.raises(ParameterError, match="2 prompts and 1 sampling_params"):
        paired(2, [one], default)
    with pytest.raises(ParameterError, match="sampling_params is"):
        paired(1, {"temperature": 1}, default)  # type: ignore[arg-type]


def test_a_prompt_alone_is_no_list() -> None:
    with pytest.raises(ParameterError, match="Prompt 0 is int"):
        one_prompt(0, 3)
