"""Makes the config.json of transformers from the keys of a GGUF file.

Each key that begins with the file's architecture is used, or changes nothing at its value, or is
named in an error. Keys with other prefixes do not change what the model computes. What is said of a
key here is what llama.cpp does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qaic_ray.errors import CheckpointError
from qaic_ray.files.documents import shown
from qaic_ray.model.gguf_file import GgufFile

ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor of Llama 3.1's scaling, which has no key: a divisor for each inverse frequency."""
NUMBER_MAX = 1 << 31


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF and the class of transformers that computes the same.

    `permuted`: rows of q and k are stored for pairs of neighbours instead of halves of a head.
    `attention_bias` and `mlp_bias`: the projections that may have a bias, or always have one.
    """

    kind: str
    model_type: str
    permuted: bool
    attention_bias: tuple[str, ...] = ()
    mlp_bias: tuple[str, ...] = ()
    always_biased: bool = False
    qk_norm: bool = False


_QKV = ("attn_q", "attn_k", "attn_v")
_QKVO = (*_QKV, "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", True, _QKVO, _MLP),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", False, _QKV, always_biased=True),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", False, _QKVO, qk_norm=True),
    "granite": Family("GraniteForCausalLM", "granite", True, _QKVO, _MLP),
}

_IRRELEVANT = {
    "attention.layer_norm_epsilon",  # of the other kind of norm
    "pooling_type",  # of embeddings
    "rope.scaling.finetuned",  # but for Granite's, see `_scales`
    "tensor_data_layout",  # all files of these architectures have the one that `permuted` undoes
    "vocab_size",  # held against the embedding in `read_config`
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
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_NEUTRAL_AT_0, (0,)),
    **dict.fromkeys(_NEUTRAL_SCALES, (0, 1)),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
}
"""Keys that llama.cpp does not read in these families, or that change nothing at these values."""


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


def read_config(gguf: GgufFile, divisors: Sequence[float] | None) -> dict[str, Any]:
    """The config.json of a file; `divisors` are the values of its tensor `ROPE_DIVISORS`, if any.

    Raises:
        CheckpointError: a key is missing, impossible, or asks for what we do not compute.
    """
    family = family_of(gguf)
    keys = _GgufKeys(gguf)
    heads = keys.size("attention.head_count")
    hidden = keys.size("embedding_length")
    head_dim = _head_dim(keys, hidden, heads)
    config: dict[str, Any] = {
        "architectures": [family.kind],
        "model_type": family.model_type,
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
    }
    config |= _positions(keys, head_dim, divisors)
    config |= _biases(gguf, family)
    if family.kind == "GraniteForCausalLM":
        config |= _scales(keys, head_dim)
    keys.refuse_the_rest()
    return config


class _GgufKeys:
    """The keys of a file's architecture; those that are read count as used."""

    def __init__(self, gguf: GgufFile) -> None:
        self._file = gguf.name
        self._prefix = f"{gguf.keys['general.architecture']}."
        self._keys = gguf.keys
        self._used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._used.add(key)
        return self._keys.get(self._prefix + key, default)

    def size(self, key: str, *, default: int | None = None) -> int:
        """A whole number of at least 1; of an array over the layers, the one value of all."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or not 1 <= value < NUMBER_MAX:
            raise self.error(key, "a whole number of at least 1, the same in all layers")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.error(key, "a number above 0")
        return float(value)

    def scale(self, key: str, default: float) -> float:
        """A number above 0; `default` where the key is missing or 0."""
        return self.number(key) if self.get(key) else default

    def error(self, key: str, must: str) -> CheckpointError:
        value = self._keys.get(self._prefix + key)
        given = "is missing" if value is None else f"is {shown(value)}"
        return CheckpointError(f"{self._prefix}{key} of {self._file} {given}; it must be {must}.")

    def refuse_the_rest(self) -> None:
        """Refuse the first key that is neither used nor known to change nothing."""
        for name, value in self._keys.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in self._used | _IRRELEVANT:
                continue
            if key not in _NEUTRAL or value not in _NEUTRAL[key]:
                raise CheckpointError(
                    f"{self._file} has {name} = {shown(value)}, which asks for what we do not "
                    "compute."
                )


def _head_dim(keys: _GgufKeys, hidden: int, heads: int) -> int:
    default = None if hidden % heads else hidden // heads
    head_dim = keys.size("attention.key_length", default=default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.size(key, default=head_dim) != head_dim:
            raise keys.error(key, f"as large as a head, {head_dim}")
    return head_dim


def _vocab_size(gguf: GgufFile, keys: _GgufKeys) -> int:
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


def _positions(keys: _GgufKeys, head_dim: int, divisors: Sequence[float] | None) -> dict[str, Any]:
    """`max_position_embeddings` and `rope_parameters`.

    A sliding window changes nothing until it is full, so it only shortens the context.
    """
    longest = keys.size("context_length")
    if keys.get("attention.sliding_window"):
        longest = min(longest, keys.size("attention.sliding_window"))
    return {
        "max_position_embeddings": longest,
        "rope_parameters": _rope(keys, head_dim, divisors)
        | {"rope_theta": keys.number("rope.freq_base", default=10000.0)},
    }


def _rope(keys: _GgufKeys, head_dim: int, divisors: Sequence[float] | None) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type")
    # The second key is of older files.
    factor = keys.scale("rope.scaling.factor", keys.scale("rope.scale_linear", 1.0))
    if kind is None:  # llama.cpp's default
        kind = "linear"
    if kind == "none":
        kind, factor = "linear", 1.0
    for key, neutral in _YARN_NEUTRAL.items():
        if (value := keys.get(key)) is not None and value not in neutral:
            raise keys.error(key, f"{neutral[-1]}, since nothing else is supported")
    original = keys.size(_ORIGINAL, default=keys.size("context_length"))
    if kind == "yarn" and divisors is None:
        place = {"original_max_position_embeddings": original}
        return {"rope_type": "yarn", "factor": factor, **place}
    if kind != "linear":
        known = "none, linear or yarn"
        beside = f"none or linear beside the tensor {ROPE_DIVISORS}"
        raise keys.error("rope.scaling.type", known if divisors is None else beside)
    if divisors is not None:
        return _divided([divisor * factor for divisor in divisors], head_dim)
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


_ORIGINAL = "rope.scaling.original_context_length"
_YARN_NEUTRAL: dict[str, tuple[float, ...]] = {
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (-1, 0, 1),
    "rope.scaling.yarn_beta_fast": (-1, 32),
    "rope.scaling.yarn_beta_slow": (-1, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
}
"""llama.cpp reads these for some architectures only, so any other value is ambiguous."""


def _divided(divisors: Sequence[float], head_dim: int) -> dict[str, Any]:
    """Divisors as transformers takes them: longrope with two equal tables."""
    if len(divisors) != head_dim // 2 or not all(0 < d < 1e9 for d in divisors):
        raise CheckpointError(
            f"The tensor {ROPE_DIVISORS} must hold {head_dim // 2} divisors above 0, not "
            f"{shown(list(divisors))}."
        )
    return {
        "rope_type": "longrope",
        "short_factor": list(divisors),
        "long_factor": list(divisors),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": NUMBER_MAX - 1,
    }


def _biases(gguf: GgufFile, family: Family) -> dict[str, Any]:
    """The switches of the groups of biases that the file has; a missing one is written as zeros."""

    attention = () if family.always_biased else family.attention_bias
    groups = {"attention_bias": attention, "mlp_bias": family.mlp_bias}
    found = {name.split(".")[-2] for name in gguf.tensors if name.endswith(".bias")}
    return {switch: not found.isdisjoint(stems) for switch, stems in groups.items() if stems}


def _scales(keys: _GgufKeys, head_dim: int) -> dict[str, Any]:
    """Granite's scales, of which 0 means none. Granite switches rotary off by `finetuned`."""
    if keys.get("rope.scaling.finetuned") is False:
        raise keys.error("rope.scaling.finetuned", "true: Granite without rotary is not supported")
    return {
        "embedding_multiplier": keys.scale("embedding_scale", 1.0),
        "residual_multiplier": keys.scale("residual_scale", 1.0),
        "logits_scaling": keys.scale("logit_scale", 1.0),
        "attention_multiplier": keys.scale("attention.scale", head_dim**-0.5),
    }
