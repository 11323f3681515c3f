"""Reads a checkpoint's config.json into one `Architecture`, or refuses it.

A field that would change the computation and that we do not compute is named in the error, never
ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qaic_ray.errors import CheckpointError
from qaic_ray.export.rope import Rope, read_rope
from qaic_ray.model.checkpoint import Fields

MAX_POSITION = 1 << 24
"""Rows of a rotary table at most: more than any model has."""


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


@dataclass(frozen=True)
class _Kind:
    """Defaults of one model class of transformers, for keys that config.json lacks.

    `reads` names the fields of `_NEUTRAL` that the class computes or may ignore.
    """

    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    reads: frozenset[str] = frozenset()


_GRANITE_SCALES = (
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
_KINDS = {
    "LlamaForCausalLM": _Kind(reads=frozenset({"attention_bias", "mlp_bias"})),
    "MistralForCausalLM": _Kind(num_kv_heads=8, window=4096),
    # Its q, k and v have biases whatever is said.
    "Qwen2ForCausalLM": _Kind(num_kv_heads=32, reads=frozenset({"attention_bias", "qkv_bias"})),
    "Qwen3ForCausalLM": _Kind(
        num_kv_heads=32,
        head_dim=128,
        reads=frozenset({"attention_bias", "use_qk_norm", "qk_norm", "qk_layernorm"}),
    ),
    "GraniteForCausalLM": _Kind(reads=frozenset({"attention_bias", "mlp_bias", *_GRANITE_SCALES})),
}
_WITH_LAYER_TYPES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "bias", "use_bias"), (False,)),
    **dict.fromkeys(("use_qkv_bias", "attention_out_bias", "alibi", "parallel_attn"), (False,)),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "rope_interleave"), (False,)),
    **dict.fromkeys(("use_parallel_residual", "attn_temperature_tuning"), (False,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), (0,)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, 1)),
    **dict.fromkeys((*_GRANITE_SCALES[1:], "logit_scale", "scale_emb", "rotary_pct"), (1,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(("rope_local_base_freq", "llama_4_scaling_beta"), ()),
    "hidden_activation": ("silu", "swish"),
    "no_rope_layers": ([],),
    "partial_rotary_factor": (1,),
    "text_config": ({},),
}
"""Fields that change the computation in some model family, and their values that change nothing;
null changes nothing either. To ignore such a field would give another model."""


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a `config.json` of transformers, old or new style, as transformers reads it.

    Raises:
        CheckpointError: a number is missing or impossible, or a field asks for what we do not run.
    """
    fields = Fields(config, "config.json")
    name = next(iter(fields.texts("architectures")), "")
    kind = _KINDS.get(name, _Kind())
    _refuse_unknown_computation(fields, kind)
    num_layers = fields.size("num_hidden_layers")
    num_heads, hidden_size = fields.size("num_attention_heads"), fields.size("hidden_size")
    head_dim = _read_head_dim(fields, name, kind.head_dim)
    max_position = fields.size("max_position_embeddings", most=MAX_POSITION)
    attention_bias = fields.flag("attention_bias")
    scales = {key: _read_scale(fields, key) for key in _GRANITE_SCALES}
    granite = name == "GraniteForCausalLM"
    return Architecture(
        kind=name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_read_kv_heads(fields, num_heads, kind.num_kv_heads),
        head_dim=head_dim,
        vocab_size=fields.size("vocab_size"),
        max_position=min(max_position, _read_window(fields, name, num_layers) or max_position),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, least=1e-30, most=1.0),
        rope=read_rope(fields, head_dim, max_position),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or name == "Qwen2ForCausalLM",
        output_bias=attention_bias and name != "Qwen2ForCausalLM",
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=name == "Qwen3ForCausalLM",
        attention_scale=scales["attention_multiplier"] if granite else head_dim**-0.5,
        embedding_multiplier=scales["embedding_multiplier"],
        residual_multiplier=scales["residual_multiplier"],
        logits_scaling=scales["logits_scaling"],
    )


def _read_scale(fields: Fields, key: str) -> float:
    return fields.number(key, 1.0, least=1e-6, most=1e6) if key in fields else 1.0


def _read_head_dim(fields: Fields, name: str, default: int | None) -> int:
    num_heads, hidden_size = fields.size("num_attention_heads"), fields.size("hidden_size")
    given = "head_dim" in fields or default is not None
    if hidden_size % num_heads and (not given or name == "LlamaForCausalLM"):
        raise fields.error("hidden_size", f"a multiple of num_attention_heads, {num_heads}")
    head_dim = fields.size("head_dim", default or hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"even, for rotary; {head_dim} is not")
    return head_dim


def _read_kv_heads(fields: Fields, num_heads: int, default: int | None) -> int:
    # transformers tells a missing key, which has the class's default, from null.
    absent = default is not None and "num_key_value_heads" not in fields.values
    num_kv_heads = fields.size("num_key_value_heads", default if absent else num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    return num_kv_heads


def _refuse_unknown_computation(fields: Fields, kind: _Kind) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {activation!r} is not supported; supported: silu.")
    for key, neutral in _NEUTRAL.items():
        if key in fields and key not in kind.reads and fields.get(key) not in neutral:
            must = " or ".join(json.dumps(value) for value in (*neutral, None))
            raise fields.error(key, f"{must}, since nothing else is supported in this architecture")


def _read_window(fields: Fields, name: str, num_layers: int) -> int | None:
    """Tokens of the sliding window, None without one; a context up to it is computed exactly.

    Qwen models carry a window that is switched off.
    """
    types = fields.texts("layer_types")
    known = {"full_attention"} | ({"sliding_attention"} if name in _WITH_LAYER_TYPES else set())
    if set(types) - known or (types and len(types) != num_layers):
        raise fields.error("layer_types", f"{num_layers} times {' or '.join(sorted(known))}")
    if name not in _WITH_LAYER_TYPES:
        default = _KINDS.get(name, _Kind()).window
        if "sliding_window" not in fields.values:
            return default
        return fields.size("sliding_window") if "sliding_window" in fields else None
    slides = fields.flag("use_sliding_window")
    if "sliding_attention" in types and not slides:
        raise fields.error("use_sliding_window", "true where layer_types has sliding_attention")
    if not types:
        slides = slides and fields.size("max_window_layers", 28) < num_layers
    if not slides or "sliding_attention" not in (types or ["sliding_attention"]):
        return None
    return fields.size("sliding_window", 4096)
