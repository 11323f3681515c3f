"""A config.json means to us what it means to transformers, or it is one sentence."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_models import export_untouched
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qaic_ray.errors import CheckpointError, QaicRayError
from qaic_ray.export.architecture import inverse_frequencies, read_architecture
from qaic_ray.export.graph import author
from qaic_ray.model.checkpoint import Checkpoint, Fields, open_checkpoint
from qaic_ray.options import ExportOptions

KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite")
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 32,
    "vocab_size": 30,
    "max_position_embeddings": 4096,
}
FACTOR = st.sampled_from([1, 1.5, 4.0, 32])
ORIGINAL = st.sampled_from([16, 64, 1024, 8192])
LLAMA3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": FACTOR,
        "low_freq_factor": st.sampled_from([1, 1.0, 2.0]),
        "high_freq_factor": st.sampled_from([4, 4.0, 2.5]),
        "original_max_position_embeddings": ORIGINAL,
    }
)
YARN = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": FACTOR},
    optional={
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": st.sampled_from([0.5, 1.3, None]),
        "beta_fast": st.sampled_from([16, 32.0, 64, None]),
        "beta_slow": st.sampled_from([1, 2.0, None]),
        "mscale": st.sampled_from([0.7, 1.0]),
        "mscale_all_dim": st.sampled_from([0.9, 1.0]),
        "truncate": st.booleans(),
    },
)
LONGROPE = st.builds(
    lambda divisors, more: {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "original_max_position_embeddings": 64,
        **more,
    },
    st.lists(st.sampled_from([1, 1.0, 2.5, 8.0]), min_size=8, max_size=8),
    st.sampled_from([{}, {"factor": 4.0}, {"attention_factor": 1.0}]),
)
PLAIN = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic"]), "factor": FACTOR}
)
ROPE = st.one_of(PLAIN, LLAMA3, YARN, LONGROPE)


@st.composite
def spellings(draw: st.DrawFn) -> dict[str, Any]:
    """What a config.json may say of positions: inside, outside, twice, by old and new names."""
    config: dict[str, Any] = {"head_dim": 16}
    for key in ("rope_parameters", "rope_scaling"):
        if draw(st.booleans()):
            rope = dict(draw(ROPE))
            if draw(st.booleans()):
                rope["rope_theta"] = draw(st.sampled_from([100.0, 5e5, 10000]))
            if draw(st.booleans()):
                rope["type"] = rope["rope_type"]
                if draw(st.booleans()):
                    del rope["rope_type"]
            config[key] = rope
        elif draw(st.booleans()):
            config[key] = draw(st.sampled_from([None, {}]))
    if draw(st.booleans()):
        config["rope_theta"] = draw(st.sampled_from([1000.0, 1000000]))
    if draw(st.integers(0, 3)) == 0:
        config["original_max_position_embeddings"] = draw(ORIGINAL)
    return config


@given(changes=spellings())
def test_rope_is_read_as_transformers_reads_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | SIZES | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    rotary = LlamaRotaryEmbedding(theirs)
    architecture = read_architecture(config)
    frequencies, scale = inverse_frequencies(architecture.rope, architecture.head_dim)
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=2e-6)
    assert scale == pytest.approx(rotary.attention_scaling, rel=1e-6)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A kind, and a config.json that leaves out or gives what decides its tensors."""
    kind = draw(st.sampled_from(KINDS))
    config: dict[str, Any] = {}
    for key, values in {
        "num_key_value_heads": [8, 32, None],
        "head_dim": [2, 4, 6] if kind == "Qwen3" else [2, 4, 6, None],
        "tie_word_embeddings": [True, False],
        "attention_bias": [True, False],
        "mlp_bias": [True, False],
    }.items():
        if draw(st.booleans()):
            config[key] = draw(st.sampled_from(values))
    # A null that transformers cannot read.
    unreadable = {"Mistral": "num_key_value_heads", "Qwen2": "head_dim", "Granite": "head_dim"}
    if config.get(unreadable.get(kind, ""), 0) is None:
        del config[unreadable[kind]]
    return kind, config


@given(drawn=shapes())
def test_tensors_are_those_of_transformers(drawn: tuple[str, dict[str, Any]]) -> None:
    kind, changes = drawn
    config = {"architectures": [f"{kind}ForCausalLM"]} | SIZES | changes
    try:
        architecture = read_architecture(config)
    except CheckpointError as error:
        # Biases that the class has not.
        assert {"attention_bias", "mlp_bias"} & set(str(error).split())  # noqa: PT017
        assume(False)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(**config)
        )
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    specs = author(architecture, ExportOptions(continuous_batching=False)).weights
    assert {s.source: s.source_shape for s in specs if s.source is not None} == expected


WINDOWS: list[tuple[str, dict[str, Any], int]] = [
    ("Llama", {}, 4096),
    ("Llama", {"sliding_window": None}, 4096),
    ("Mistral", {}, 4096),
    ("Mistral", {"max_position_embeddings": 8192}, 4096),
    ("Mistral", {"max_position_embeddings": 8192, "sliding_window": None}, 8192),
    ("Mistral", {"sliding_window": 64}, 64),
    ("Qwen2", {"sliding_window": 64}, 4096),
    ("Qwen2", {"sliding_window": 64, "use_sliding_window": True}, 4096),
    ("Qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 64),
    (
        "Qwen3",
        {
            "sliding_window": 64,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        64,
    ),
    ("Qwen3", {"layer_types": ["full_attention"] * 2}, 4096),
]


@pytest.mark.parametrize(("kind", "changes", "longest"), WINDOWS)
def test_context_ends_where_a_window_begins_to_hide(
    kind: str, changes: dict[str, Any], longest: int
) -> None:
    config = {"architectures": [f"{kind}ForCausalLM"]} | SIZES | changes
    assert read_architecture(config).max_position == longest
    theirs = getattr(transformers, f"{kind}Config")(**config)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"]
    window = getattr(theirs, "sliding_window", None) if "sliding_attention" in types else None
    assert min(theirs.max_position_embeddings, window or longest) == longest


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("rope_theta", {"rope_theta": "x"}),
    ("rope_theta", {"rope_theta": 0}),
    ("rope_theta", {"rope_theta": -1.0}),
    ("rope_theta", {"rope_theta": float("nan")}),
    ("rope_theta", {"rope_theta": float("inf")}),
    ("rope_theta", {"rope_theta": None}),
    ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": True}}),
    ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
    ("rms_norm_eps", {"rms_norm_eps": 0}),
    ("rms_norm_eps", {"rms_norm_eps": -1e-5}),
    ("rms_norm_eps", {"rms_norm_eps": "1e-5"}),
    ("factor", {"rope_scaling": {"rope_type": "yarn", "factor": 0}}),
    ("factor", {"rope_scaling": {"rope_type": "yarn"}}),
    ("factor", {"rope_scaling": {"type": "linear", "factor": float("inf")}}),
    ("beta_fast", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": "x"}}),
    ("truncate", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": "no"}}),
    (
        "high_freq_factor",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 4,
            }
        },
    ),
    ("rope_scaling", {"rope_scaling": "x"}),
    ("rope_scaling", {"rope_scaling": 0}),
    ("rope_parameters", {"rope_parameters": [1]}),
    ("full_attention", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("mrope_section", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("rope_type", {"rope_scaling": {"rope_type": 7}}),
    ("layer_types", {"layer_types": 5}),
    ("layer_types", {"layer_types": ["full_attention"]}),
    ("layer_types", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("hidden_act", {"hidden_act": {"a": 1}}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("hidden_size", {"hidden_size": 10**12}),
    ("hidden_size", {"hidden_size": 10**400}),
    ("hidden_size", {"hidden_size": 63}),
    ("max_position_embeddings", {"max_position_embeddings": 10**9}),
    ("num_hidden_layers", {"num_hidden_layers": 2.0}),
    ("tie_word_embeddings", {"tie_word_embeddings": "false"}),
    ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
    ("query_pre_attn_scalar", {"query_pre_attn_scalar": 256}),
    ("attention_multiplier", {"attention_multiplier": 0.2}),
    ("logits_scaling", {"logits_scaling": 2.0}),
    ("clip_qkv", {"clip_qkv": 8.0}),
    ("qk_norm", {"qk_norm": True}),
    ("num_local_experts", {"num_local_experts": 8}),
    ("no_rope_layers", {"no_rope_layers": [1, 0]}),
    ("text_config", {"text_config": {"hidden_size": 4}}),
]


@pytest.mark.parametrize(("key", "changes"), REFUSED)
def test_what_means_nothing_is_named(key: str, changes: dict[str, Any]) -> None:
    config = {"architectures": ["LlamaForCausalLM"]} | SIZES | changes
    with pytest.raises(CheckpointError) as caught:
        read_architecture(config)
    said = str(caught.value)
    assert key.replace("_type", "") in said.replace("_type", "")
    assert "config.json" in said or key in ("rope_type", "hidden_act")
    assert "\n" not in said
    assert len(said) < 300


ODD = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2, 3, 10**12, 10**400, 1.5, -0.0, float("nan"), float("inf"),
        1e300, 1e-300, "", "x", "1", "\ud800", [], [1], ["x"], [None], [[]], {}, {"a": 1},
        {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": {}}, {"type": ["linear"]},
        ["full_attention"] * 3, {"quant_method": 5}, [2, "x"], {"factor": 1e-300},
    ]
)  # fmt: skip
EXTRA = (
    "rope_scaling", "rope_theta", "quantization_config", "layer_types", "head_dim",
    "sliding_window", "original_max_position_embeddings", "transformers_weights", "eos_token_id",
    "partial_rotary_factor", "num_experts", "use_sliding_window", "torch_dtype",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of an object and of the objects inside."""
    if not isinstance(value, dict):
        return []
    found = [(*path, key) for key in value]
    return found + [p for key, inner in value.items() for p in places(inner, (*path, key))]


@st.composite
def mutations(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([*places(config), *((key,) for key in EXTRA)]))
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        if draw(st.integers(0, 4)) == 0:
            inner.pop(place[-1], None)
        else:
            inner[place[-1]] = copy.deepcopy(draw(ODD))
    return config


@pytest.fixture
def good(make_checkpoint: Callable[..., Checkpoint]) -> tuple[Path, dict[str, Any]]:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    checkpoint = make_checkpoint(num_hidden_layers=1, rope_parameters=rope)
    return checkpoint.folder, dict(checkpoint.config)


def mutate(good: tuple[Path, dict[str, Any]], tmp_path: Path, data: st.DataObject) -> None:
    folder, config = good
    (folder / "config.json").write_text(json.dumps(data.draw(mutations(config))))
    name = data.draw(st.sampled_from(["generation_config.json", ""]))
    if name:
        (folder / name).write_text(json.dumps({"eos_token_id": data.draw(ODD)}))
    said = ""
    try:
        export_untouched(open_checkpoint(str(folder)), output=tmp_path / "kv", verify="off")
    except QaicRayError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500


@given(data=st.data())
def test_any_config_is_exported_or_one_sentence(
    good: tuple[Path, dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    mutate(good, tmp_path, data)


@pytest.mark.slow
@settings(max_examples=2000)
@given(data=st.data())
def test_2000_configs(
    good: tuple[Path, dict[str, Any]], tmp_path: Path, data: st.DataObject
) -> None:
    mutate(good, tmp_path, data)


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("inf"), float("nan"), "x", None, True]
)
def test_a_number_that_no_float_can_hold_is_named(value: object) -> None:
    fields = Fields({"factor": value}, "config.json")
    with pytest.raises(CheckpointError, match=r"^factor in config\.json is .* it must be a number"):
        fields.number("factor", least=0, most=math.inf)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "", "{", "[]", "\x00", "NaN"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_document_that_is_none(good: tuple[Path, dict[str, Any]], name: str, text: str) -> None:
    folder, _ = good
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        open_checkpoint(str(folder))
    assert len(str(caught.value)) < 400
