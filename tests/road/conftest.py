"""A tiny random Llama with a byte tokenizer, made without torch and without a network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from byte_tokens import byte_tokenizer
from compiled_here import compile_here
from safetensors.numpy import save_file

from qaic_ray.compile import store
from qaic_ray.compile.compiler import Variant
from qaic_ray.contract import Specializations
from qaic_ray.export.export import export_model
from qaic_ray.model.checkpoint import open_checkpoint
from qaic_ray.option_types import Precision
from qaic_ray.options import EmulatorOptions, ExportOptions
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.sdk import find_sdk

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 32, 4, 2, 8, 48


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A LlamaForCausalLM checkpoint folder of a few hundred kilobytes."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer("<end>")
    vocab_size = tokenizer.get_vocab_size()
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": weight(vocab_size, HIDDEN) * 4,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": weight(vocab_size, HIDDEN) * 4,
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            tensors[f"{at}.{name}.weight"] = weight(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.token_to_id("<end>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@pytest.fixture(scope="session")
def tiny_qpc(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slots on 7 NSPs of a card; where the two steps before are not what a test is about."""
    folder = tmp_path_factory.mktemp("qpc")
    options = ExportOptions(continuous_batching=True)
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    exported = export_model(checkpoint, options, output=folder / "tiny-kv", verify="off")
    shapes = Specializations.build(batch_size=2, prompt_len=16, ctx_len=128, continuous=True)
    variant = Variant(open_folder(exported.folder).source, Precision.FP32, 7, shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "run_compiler", compile_here)
        sdk = find_sdk("emulated", EmulatorOptions())
        return store.build(store.BuildRequest(variant, sdk, folder)).path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
