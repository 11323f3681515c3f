"""The numbers of a decoder: from a checkpoint's configuration to one value, or a clear refusal.

Knows nothing of graphs and weights. A field that would change the computation and that we do not
compute is named in the error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qaic_ray.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `kind` is one of `ROPE_TYPES`, `options` its own numbers."""

    kind: str
    theta: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One Llama-like decoder. A weight's name and shape follow from these numbers alone.

    `max_position` is the longest context that the graph is right for. `attention_scale` multiplies
    q.k; the multipliers are Granite's and 1 elsewhere. `qkv_bias` and `output_bias` are the biases
    of attention, `qk_norm` Qwen3's norm of every head.
    """

    kind: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_scale: float
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @property
    def num_groups(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Weights of the checkpoint, without biases and norms."""
        heads = self.num_heads + self.num_kv_heads
        layer = 2 * heads * self.head_dim + 3 * self.intermediate_size
        embeddings = 1 if self.tied_embeddings else 2
        return self.hidden_size * (self.num_layers * layer + embeddings * self.vocab_size)


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a `config.json` of transformers, old or new style.

    Raises:
        CheckpointError: a number is missing or impossible, or a field asks for what we do not run.
    """
    kind = str((config.get("architectures") or [""])[0])
    _refuse_unknown_computation(config)
    num_heads = _size(config, "num_attention_heads")
    hidden_size = _size(config, "hidden_size")
    head_dim = _size(config, "head_dim", default=hidden_size // num_heads)
    num_kv_heads = _size(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads {num_heads} of the model is not a multiple of its "
            f"num_key_value_heads {num_kv_heads}."
        )
    if head_dim % 2:
        raise CheckpointError(f"head_dim {head_dim} of the model is odd; rotary needs it even.")
    attention_bias = bool(config.get("attention_bias", False))
    granite = kind == "GraniteForCausalLM"
    multiplier = float(config.get("attention_multiplier", 1.0))
    return Architecture(
        kind=kind,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size"),
        max_position=_read_max_position(config, kind),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or kind == "Qwen2ForCausalLM",
        output_bias=attention_bias and kind != "Qwen2ForCausalLM",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind == "Qwen3ForCausalLM",
        attention_scale=multiplier if granite else head_dim**-0.5,
        embedding_multiplier=float(config.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(config.get("residual_multiplier", 1.0)),
        logits_scaling=float(config.get("logits_scaling", 1.0)),
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json must give {key} as a whole number of at least 1, not {config.get(key)!r}."
        )
    return value


def _refuse_unknown_computation(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {activation!r} is not supported; supported: silu.")
    layer_types = set(config.get("layer_types") or ())
    if layer_types - {"full_attention"}:
        raise CheckpointError(
            f"layer_types {sorted(layer_types)} of config.json are not supported; supported: "
            "full_attention."
        )
    if config.get("partial_rotary_factor") not in (None, 1.0):
        raise CheckpointError("partial_rotary_factor of config.json is not supported.")


def _read_max_position(config: Mapping[str, Any], kind: str) -> int:
    """Positions that the graph is right for: a sliding window hides nothing until it is full.

    Qwen models carry a window that is switched off.
    """
    longest = _size(config, "max_position_embeddings")
    window = config.get("sliding_window")
    if window is None or (kind.startswith("Qwen") and not config.get("use_sliding_window", False)):
        return longest
    return min(longest, int(window))


def _read_rope(config: Mapping[str, Any]) -> Rope:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older ones."""
    options = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = options.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
    options.pop("type", None)
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"rope type {kind!r} of the model is not supported; supported: {', '.join(ROPE_TYPES)}."
        )
    if options.pop("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor of the model's rope is not supported.")
    if kind in ("yarn", "llama3"):
        original = config.get("original_max_position_embeddings") or config.get(
            "max_position_embeddings"
        )
        options.setdefault("original_max_position_embeddings", original)
    required = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    missing = [key for key in required.get(kind, ()) if options.get(key) is None]
    if missing:
        raise CheckpointError(f"The model's rope of type {kind} lacks {' and '.join(missing)}.")
    return Rope(kind=kind, theta=float(theta), options=options)
