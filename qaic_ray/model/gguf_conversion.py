"""Converts a GGUF file to the folder of a checkpoint: config, float32 weights, tokenizer files.

Each key that begins with the file's architecture is used, or changes nothing at its value, or is
named in an error; keys with other prefixes do not change what the model computes. What is said of a
key here is what llama.cpp does with it. A tensor that is unknown or missing is named in an error.
Weights are written some rows at a time, so memory stays small.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError
from qaic_ray.files.documents import shown
from qaic_ray.model.gguf_file import GgufFile, GgufKeys, GgufTensor, read_gguf, read_values
from qaic_ray.model.gguf_tokenizer import end_ids, write_tokenizer

ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor of Llama 3.1's scaling, which has no key: a divisor for each inverse frequency."""

_BLOCK_VALUES = 1 << 24
_QKV = ("attn_q", "attn_k", "attn_v")
_QKVO = (*_QKV, "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF, by its `model_type`, and the class that computes the same.

    `permuted`: rows of q and k are stored for pairs of neighbours instead of halves of a head.
    `biases`: projections that may have a bias, by their switch in config.json; those under no name
    always have one.
    """

    kind: str
    permuted: bool
    biases: Mapping[str, tuple[str, ...]]
    qk_norm: bool = False


_BIASES = {"attention_bias": _QKVO, "mlp_bias": _MLP}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", True, _BIASES),
    "qwen2": Family("Qwen2ForCausalLM", False, {"": _QKV}),
    "qwen3": Family("Qwen3ForCausalLM", False, {"attention_bias": _QKVO}, qk_norm=True),
    "granite": Family("GraniteForCausalLM", True, _BIASES),
}

_NEUTRAL_AT_0 = (
    *("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"),
    *("attention.temperature_length", "attention.temperature_scale", "attn_logit_softcapping"),
    *("expert_count", "expert_shared_count", "expert_used_count", "final_logit_softcapping"),
    *("leading_dense_block_count", "nextn_predict_layers", "rope.scaling.alpha"),
    *("rope.scaling.yarn_log_multiplier",),
)
_NEUTRAL_SCALES = (
    *("attention.output_scale", "attention.value_scale", "embedding_scale", "logit_scale"),
    *("residual_scale",),
)
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(_NEUTRAL_AT_0, (0,)),
    **dict.fromkeys(_NEUTRAL_SCALES, (0, 1)),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "attention.layer_norm_epsilon": None,  # of the other kind of norm
    "pooling_type": None,  # of embeddings
    "rope.scaling.finetuned": None,  # but for Granite's, see `_scales`
    "tensor_data_layout": None,  # all these files have the one that `permuted` undoes
}
"""Keys that llama.cpp does not read in these families, or that change nothing at these values."""

_ORIGINAL = "rope.scaling.original_context_length"
_YARN_NEUTRAL: dict[str, tuple[float, ...]] = {
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (-1, 0, 1),
    "rope.scaling.yarn_beta_fast": (-1, 32),
    "rope.scaling.yarn_beta_slow": (-1, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
}
"""llama.cpp reads these for some architectures only, so any other value is ambiguous."""


def write_conversion(path: Path, folder: Path) -> None:
    """Convert a GGUF file, with all its parts, into an empty folder.

    Raises:
        CheckpointError: it is damaged, or holds something that we do not know.
    """
    gguf = read_gguf(path)
    family = family_of(gguf)
    config = read_config(gguf, family)
    # First, because it checks the vocabulary.
    write_tokenizer(gguf, folder)
    ids = {
        "eos_token_id": list(end_ids(gguf)) or None,
        "bos_token_id": gguf.keys.get("tokenizer.ggml.bos_token_id"),
    }
    for name, fields in (("config.json", config | ids), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n")
    write_weights(gguf, family, config, folder / "model.safetensors")


def family_of(gguf: GgufFile) -> Family:
    """The family of a file.

    Raises:
        CheckpointError: we do not run its architecture, or it is no model.
    """
    name = gguf.keys.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{gguf.name} is of the architecture {shown(name)} (general.architecture); supported: "
            f"{', '.join(FAMILIES)}."
        )
    kind = gguf.keys.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{gguf.name} holds no model but {shown(kind)} (general.type).")
    return FAMILIES[name]


def read_config(gguf: GgufFile, family: Family) -> dict[str, Any]:
    """The config.json of a file.

    Raises:
        CheckpointError: a key is missing, impossible, or asks for what we do not compute.
    """
    keys = GgufKeys(gguf, f"{gguf.keys['general.architecture']}.")
    heads = keys.size("attention.head_count")
    hidden = keys.size("embedding_length")
    head_dim = _head_dim(keys, hidden, heads)
    longest = keys.size("context_length")
    if keys.get("attention.sliding_window"):  # it changes nothing until it is full
        longest = min(longest, keys.size("attention.sliding_window"))
    theta = keys.number("rope.freq_base", default=10000.0)
    config: dict[str, Any] = {
        "architectures": [family.kind],
        "model_type": gguf.keys["general.architecture"],
        "num_hidden_layers": keys.size("block_count"),
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "vocab_size": _vocab_size(gguf, keys),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "dtype": "float32",
        "max_position_embeddings": longest,
        "rope_parameters": {**_rope(gguf, keys, head_dim), "rope_theta": theta},
    }
    # A bias that is missing in a group that has others is written as zeros.
    biased = {name.split(".")[-2] for name in gguf.tensors if name.endswith(".bias")}
    for switch, stems in family.biases.items():
        if switch:
            config[switch] = not biased.isdisjoint(stems)
    if family.kind == "GraniteForCausalLM":
        config |= _scales(keys, head_dim)
    keys.refuse_the_rest(_NEUTRAL)
    return config


def _head_dim(keys: GgufKeys, hidden: int, heads: int) -> int:
    default = None if hidden % heads else hidden // heads
    head_dim = keys.size("attention.key_length", default=default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, default=head_dim) != head_dim:
            raise keys.error(key, f"as large as a head, {head_dim}")
    return head_dim


def _vocab_size(gguf: GgufFile, keys: GgufKeys) -> int:
    """The number of rows of the embedding, with which the keys must agree."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{gguf.name} has no tensor token_embd.weight of two dimensions.")
    rows = embedding.shape[0]
    if keys.size("vocab_size", default=rows) != rows:
        raise keys.error("vocab_size", f"{rows}, the rows of token_embd.weight")
    tokens = gguf.keys.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise CheckpointError(
            f"{gguf.name} has {len(tokens)} tokens (tokenizer.ggml.tokens) and {rows} rows of "
            "token_embd.weight."
        )
    return rows


def _rope(gguf: GgufFile, keys: GgufKeys, head_dim: int) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", "linear")
    # The second key is of older files.
    factor = keys.scale("rope.scaling.factor", keys.scale("rope.scale_linear", 1.0))
    if kind == "none":
        kind, factor = "linear", 1.0
    for key, neutral in _YARN_NEUTRAL.items():
        if keys.get(key, neutral[-1]) not in neutral:
            raise keys.error(key, f"{neutral[-1]}, since nothing else is supported")
    original = keys.size(_ORIGINAL, default=keys.size("context_length"))
    divisors = gguf.tensors.get(ROPE_DIVISORS)
    if kind == "yarn" and divisors is None:
        place = {"original_max_position_embeddings": original}
        return {"rope_type": "yarn", "factor": factor, **place}
    if kind != "linear":
        known = "none, linear or yarn"
        beside = f"none or linear beside the tensor {ROPE_DIVISORS}"
        raise keys.error("rope.scaling.type", known if divisors is None else beside)
    if divisors is not None:
        return _divided(gguf, divisors, head_dim, factor)
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


def _divided(gguf: GgufFile, tensor: GgufTensor, head_dim: int, factor: float) -> dict[str, Any]:
    """Divisors as transformers takes them: longrope with two equal tables."""
    if len(tensor.shape) != 1 or prod(tensor.shape) > 4096:
        raise CheckpointError(
            f"{gguf.name} has {ROPE_DIVISORS} of the shape {list(tensor.shape)}; it must have one "
            "dimension, half a head."
        )
    divisors = [float(value) * factor for value in read_values(tensor)]
    if len(divisors) != head_dim // 2 or not all(0 < d < 1e9 for d in divisors):
        raise CheckpointError(
            f"The tensor {ROPE_DIVISORS} must hold {head_dim // 2} divisors above 0, not "
            f"{shown(divisors)}."
        )
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 2**31 - 1,  # which text is long does not matter
    }


def _scales(keys: GgufKeys, head_dim: int) -> dict[str, Any]:
    """Granite's scales, of which 0 means none. Granite switches rotary off by `finetuned`."""
    if keys.get("rope.scaling.finetuned") is False:
        raise keys.error("rope.scaling.finetuned", "true: Granite without rotary is not supported")
    return {
        "embedding_multiplier": keys.scale("embedding_scale", 1.0),
        "residual_multiplier": keys.scale("residual_scale", 1.0),
        "logits_scaling": keys.scale("logit_scale", 1.0),
        "attention_multiplier": keys.scale("attention.scale", head_dim**-0.5),
    }


# -- the weights


@dataclass(frozen=True)
class _Source:
    """What the tensor `name` of the checkpoint must be made of.

    `heads` is above 0 where the rows of each head are stored for pairs of neighbours.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0


def write_weights(gguf: GgufFile, family: Family, config: Mapping[str, Any], path: Path) -> None:
    """Write the model's tensors as one safetensors file; `config` is from `read_config`.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or of an unreadable type.
    """
    needed = _needed(gguf, family, config)
    for name in gguf.tensors:
        if name not in needed and name != ROPE_DIVISORS:
            raise CheckpointError(
                f"{gguf.name} has a tensor {shown(name)} that a {family.kind} of "
                f"{config['num_hidden_layers']} layers does not have."
            )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, source in needed.items():
        tensor = gguf.tensors.get(name)
        if tensor is None and not name.endswith(".bias"):
            raise CheckpointError(f"{gguf.name} has no tensor {name}.")
        if tensor is not None and tensor.shape != source.shape:
            raise CheckpointError(
                f"The tensor {name} of {gguf.name} has the shape {list(tensor.shape)}; its keys "
                f"say {list(source.shape)}."
            )
        end = offset + 4 * prod(source.shape)
        header[source.name] = {
            "dtype": "F32", "shape": list(source.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, source in needed.items():
            for block in _blocks(source, gguf.tensors.get(name)):
                file.write(np.ascontiguousarray(block, dtype="<f4").data)


def _needed(gguf: GgufFile, family: Family, config: Mapping[str, Any]) -> dict[str, _Source]:
    """The tensors that the checkpoint needs, by their names in the file."""
    num_layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    if num_layers > len(gguf.tensors):
        raise CheckpointError(
            f"{gguf.name} says that it has {num_layers} layers; it has {len(gguf.tensors)} tensors."
        )
    table = (config["vocab_size"], hidden)
    needed = {
        "token_embd.weight": _Source("model.embed_tokens.weight", table),
        "output_norm.weight": _Source("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        needed["output.weight"] = _Source("lm_head.weight", table)
    layer = _needed_of_layer(family, config)
    for number in range(num_layers):
        for name, source in layer.items():
            target = f"model.layers.{number}.{source.name}"
            needed[f"blk.{number}.{name}"] = replace(source, name=target)
    return needed


def _needed_of_layer(family: Family, config: Mapping[str, Any]) -> dict[str, _Source]:
    hidden, inner, dim = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    modules: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (heads * dim, hidden)),
        "attn_k": ("self_attn.k_proj", (kv_heads * dim, hidden)),
        "attn_v": ("self_attn.v_proj", (kv_heads * dim, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, heads * dim)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }
    if family.qk_norm:
        modules |= {"attn_q_norm": ("self_attn.q_norm", (dim,))}
        modules |= {"attn_k_norm": ("self_attn.k_norm", (dim,))}
    permuted = {"attn_q": heads, "attn_k": kv_heads} if family.permuted else {}
    switched_on = [stems for switch, stems in family.biases.items() if config.get(switch, True)]
    layer = {}
    for stem, (module, shape) in modules.items():
        of_heads = permuted.get(stem, 0)
        layer[f"{stem}.weight"] = _Source(f"{module}.weight", shape, of_heads)
        if any(stem in stems for stems in switched_on):
            layer[f"{stem}.bias"] = _Source(f"{module}.bias", shape[:1], of_heads)
    return layer


def _blocks(source: _Source, tensor: GgufTensor | None) -> Iterator[npt.NDArray[np.float32]]:
    """The values of a tensor of the checkpoint, some rows at a time."""
    if tensor is None:
        yield np.zeros(source.shape, np.float32)
        return
    order = np.arange(source.shape[0])
    if source.heads:
        order = order.reshape(source.heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if len(source.shape) == 1:
        yield read_values(tensor)[order]
        return
    step = max(1, _BLOCK_VALUES // source.shape[1])
    for start in range(0, len(order), step):
        yield read_values(tensor, order[start : start + step])
