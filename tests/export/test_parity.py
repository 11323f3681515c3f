"""Every architecture and option as a tiny random model: the exported graph equals transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import export_untouched, write_checkpoint
from safetensors.torch import load_file, save_file

from qaic_ray.contract import NUM_LOGITS_TO_KEEP, IoContract
from qaic_ray.errors import ExportError
from qaic_ray.export.architecture import inverse_frequencies, read_architecture, table_blocks
from qaic_ray.export.check.verify import NUM_DECODE_STEPS, VerifyReport, compare, verify_export
from qaic_ray.export.conversion import FLOAT16_MAX
from qaic_ray.model.checkpoint import Checkpoint, load_torch_model
from qaic_ray.options import ExportOptions

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": YARN,
    "yarn, untruncated": YARN | {"truncate": False, "beta_fast": 16, "mscale": 0.7},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn, factor": YARN | {"attention_factor": 1.3},
    "llama3": LLAMA3,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("Llama", {}),
    "one kv head": ("Llama", {"num_key_value_heads": 1}),
    "every head its own": ("Llama", {"num_key_value_heads": 4}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "attention bias": ("Llama", {"attention_bias": True}),
    "mlp bias": ("Llama", {"mlp_bias": True}),
    "own head_dim": ("Llama", {"head_dim": 20}),
    "two layers": ("Llama", {"num_hidden_layers": 2}),
    "Mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "Mistral, window": ("Mistral", {"sliding_window": 64}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "Granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}
ROPE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"rope {name}": ("Llama", {"rope_parameters": rope}) for name, rope in ROPES.items()
}


DTYPES = ("float32", "float16")
LOGITS = ("last", "all", "num_logits_to_keep")
OPSETS = (13, 17)
STATIC = ExportOptions(continuous_batching=False)
CONTINUOUS = ExportOptions(continuous_batching=True)
CACHE_INDEX = ExportOptions(io=IoContract.CACHE_INDEX, opset=13, continuous_batching=False)
CONTRACTS = {"static": STATIC, "continuous": CONTINUOUS, "cache-index": CACHE_INDEX}


def check(report: VerifyReport | None, options: ExportOptions) -> None:
    assert report is not None
    names = ["prefill", "decode", "chunked prefill", "mixed batch"]
    names += ["slot reuse"] * options.continuous_batching
    names += ["speculation"] * (options.logits == NUM_LOGITS_TO_KEEP)
    assert [s.scenario for s in report.scenarios] == names
    for scenario in report.scenarios:
        assert scenario.logits < 1e-4
        assert scenario.past_keys < 1e-4
        assert scenario.past_values < 1e-4
        assert scenario.num_top1_equal == scenario.num_rows > 0


@pytest.mark.parametrize(
    ("name", "which"),
    [*product(MODELS, CONTRACTS), *((name, "static") for name in ROPE_MODELS)],
)
def test_equals_transformers(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, name: str, which: str
) -> None:
    kind, changes = (MODELS | ROPE_MODELS)[name]
    options = CONTRACTS[which]
    result = export_untouched(
        make_checkpoint(kind, **changes), options, output=tmp_path / "out-kv", verify="full"
    )
    check(result.verification, options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """One of every architecture."""
    folder = tmp_path_factory.mktemp("checkpoints")
    names = ("grouped heads", "Mistral", "Qwen2", "Qwen3", "Granite")
    return [
        write_checkpoint(folder / str(i), MODELS[name][0], **MODELS[name][1])
        for i, name in enumerate(names)
    ]


OPTIONS = st.one_of(
    st.builds(
        ExportOptions,
        continuous_batching=st.booleans(),
        opset=st.sampled_from(OPSETS),
        logits=st.sampled_from(LOGITS),
        next_tokens=st.booleans(),
        replicate_kv_heads=st.sampled_from([1, 2]),
    ),
    st.builds(
        ExportOptions,
        continuous_batching=st.booleans(),
        logits=st.sampled_from(LOGITS),
        next_tokens=st.booleans(),
        comp_ctx_lengths=st.just(True),
    ),
    st.builds(
        ExportOptions,
        io=st.just(IoContract.CACHE_INDEX),
        continuous_batching=st.just(False),
        opset=st.sampled_from(OPSETS),
        logits=st.sampled_from(["last", "all"]),
        next_tokens=st.booleans(),
        replicate_kv_heads=st.sampled_from([1, 2]),
    ),
)


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data(), which=st.integers(0, 4), options=OPTIONS)
def test_any_shape_and_option_equals_transformers(
    checkpoints: list[Checkpoint],
    tmp_path: Path,
    data: st.DataObject,
    which: int,
    options: ExportOptions,
) -> None:
    """Batches of 1 to 3 rows of mixed lengths, each of 1 to 4 chunks."""
    chunk_len = data.draw(st.sampled_from([1, 2, 4, 8]))
    lengths = data.draw(st.lists(st.integers(1, 4 * chunk_len), min_size=1, max_size=3))
    least = 4 * chunk_len + NUM_DECODE_STEPS
    ctx_len = data.draw(st.integers(least, least + 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    prompts = [rng.integers(0, 300, length).tolist() for length in lengths]
    out = tmp_path / "out-kv"
    export_untouched(checkpoints[which], options, output=out, verify="off")
    report = compare(out, checkpoints[which], prompts, ctx_len=ctx_len, chunk_len=chunk_len)
    check(report, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", CONTRACTS)
def test_card_runs_out_of_float16(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, which: str, dtype: str
) -> None:
    """The report names what a card cannot hold, and the layers that it reaches."""
    checkpoint = make_checkpoint()
    tensors = load_file(checkpoint.weight_files[0])
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2e4
    save_file(tensors, checkpoint.weight_files[0], metadata={"format": "pt"})
    options = CONTRACTS[which].model_copy(update={"dtype": dtype})
    export_untouched(checkpoint, options, output=tmp_path / "out-kv", verify="off")
    report = verify_export(tmp_path / "out-kv", checkpoint)
    assert report.largest.largest > FLOAT16_MAX
    layers = [activation.layer for activation in report.overflows]
    assert layers[0] == 1
    first = {a.name for a in report.overflows if a.layer == 1}
    assert "/model/layers.1/mlp/down_proj/MatMul_output_0" in first
    assert not any("self_attn" in name for name in first)


def test_an_ordinary_model_has_headroom(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    result = export_untouched(make_checkpoint(), output=tmp_path / "out-kv", verify="full")
    assert result.verification is not None
    assert result.verification.overflows == ()
    assert 1 < result.verification.largest.largest < 1e3


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}},
        {"rms_norm_eps": 1e-2},
        {"head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
    ],
)
def test_a_wrong_graph_is_found(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, wrong: dict[str, Any]
) -> None:
    """The logits are large enough that the check can fail."""
    checkpoint = make_checkpoint()
    misread = replace(checkpoint, config={**checkpoint.config, **wrong})
    out = tmp_path / "out" / "tiny-kv"
    with pytest.raises(ExportError, match="differs from PyTorch"):
        export_untouched(misread, output=out, verify="full")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("continuous", [False, True])
def test_quick_looks_at_the_first_and_last_layers(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, continuous: bool
) -> None:
    checkpoint = make_checkpoint("Qwen3", num_hidden_layers=7, max_shard_size="20KB")
    assert len(checkpoint.weight_files) > 3
    options = ExportOptions(continuous_batching=continuous)
    result = export_untouched(checkpoint, options, output=tmp_path / "out-kv", verify="quick")
    report = result.verification
    assert report is not None
    assert report.layers == (0, 1, 5, 6)
    assert max(s.logits for s in report.scenarios) < 1e-4


def test_half_precision_files(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    whole = export_untouched(checkpoint, output=tmp_path / "whole-kv", verify="full")
    half = export_untouched(
        checkpoint,
        ExportOptions(dtype="float16", continuous_batching=False),
        output=tmp_path / "half-kv",
        verify="full",
    )
    sizes = [
        r.onnx_path.with_name(f"{r.onnx_path.name}.data").stat().st_size for r in (whole, half)
    ]
    assert sizes[1] < sizes[0]
    assert half.verification is not None
    assert 1e-4 < max(s.logits for s in half.verification.scenarios) < 0.2


def test_weights_beyond_float16_are_clipped_and_counted(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    tensors = load_file(checkpoint.weight_files[0])
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -7e4
    save_file(tensors, checkpoint.weight_files[0], metadata={"format": "pt"})
    result = export_untouched(checkpoint, output=tmp_path / "out-kv", verify="full")
    assert result.manifest.num_clipped == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(
    make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = make_checkpoint().folder
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(folder)
    from qaic_ray.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(folder))
    assert str(dtype).endswith(json.loads((folder / "config.json").read_text())["dtype"])
    result = export_untouched(checkpoint, output=tmp_path / "out-kv", verify="full")
    assert result.verification is not None
    assert max(s.logits for s in result.verification.scenarios) < 1e-4


@pytest.mark.parametrize("name", ROPES)
def test_rotary_tables_are_transformers_own(
    make_checkpoint: Callable[..., Checkpoint], name: str
) -> None:
    checkpoint = make_checkpoint(
        rope_parameters=ROPES[name], head_dim=32, max_position_embeddings=5000
    )
    architecture = read_architecture(checkpoint.config)
    rotary = load_torch_model(checkpoint).model.rotary_emb
    frequencies, scale = inverse_frequencies(architecture.rope, 32)
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=3e-7)
    assert scale == pytest.approx(rotary.attention_scaling)
    positions = torch.arange(5000)[None]
    tables = rotary(torch.zeros(1), positions)
    for sine, truth in zip((False, True), tables, strict=True):
        table = np.concatenate(list(table_blocks(architecture.rope, 32, 5000, sine=sine)))
        assert table.shape == (5000, 32)
        # A float32 angle of thousands is uncertain by its own rounding.
        np.testing.assert_allclose(table, truth[0].numpy(), atol=2e-3)
        np.testing.assert_allclose(table[:64], truth[0, :64].numpy(), atol=2e-5)


def test_old_and_new_spellings_of_rope_are_one(
    make_checkpoint: Callable[..., Checkpoint],
) -> None:
    config = dict(make_checkpoint(rope_parameters=LLAMA3).config)
    new = read_architecture(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    assert read_architecture(config) == new
