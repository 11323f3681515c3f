"""Reads a checkpoint's config.json into one `Architecture`, or refuses it; and its rotary tables.

A field that would change the computation and that we do not compute is named in the error, never
ignored. A config.json may be old or new style; where it says a thing twice, what wins is what wins
in transformers. The tables are cosine and sine of every position, as transformers computes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError
from qaic_ray.model.checkpoint import MAX_SIZE, Fields

FloatArray = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

MAX_POSITION = 1 << 24
"""Rows of a rotary table at most: more than any model has."""
_TABLE_ROWS = 4096
"""Of a table that are computed at once."""
_THETA = 10000.0
_LARGEST_THETA = 1e30
_LARGEST_FACTOR = 1e6


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `kind` is a key of `_FACTORS`, `options` its own numbers."""

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


_ORIGINAL = "original_max_position_embeddings"
_FACTORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
    "llama3": (("low_freq_factor", "high_freq_factor", "factor"), ()),
    "longrope": ((), ("factor", "attention_factor")),
}
"""The kinds of rotary embedding: factors that one needs, and factors that it may have."""
_ROPE_KEYS = {"rope_theta", "rope_type", "type", "truncate", "partial_rotary_factor", "finetuned"}
_ROPE_KEYS |= {"short_factor", "long_factor", _ORIGINAL}
_ROPE_KEYS |= {key for kind in _FACTORS.values() for keys in kind for key in keys}
"""Keys of any kind; a kind ignores those of the others, as transformers does."""


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
    attention_scale, *scales = (_read_scale(fields, key) for key in _GRANITE_SCALES)
    granite, qwen2 = name == "GraniteForCausalLM", name == "Qwen2ForCausalLM"
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
        rope=_read_rope(fields, head_dim // 2, max_position),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or qwen2,
        output_bias=attention_bias and not qwen2,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=name == "Qwen3ForCausalLM",
        attention_scale=attention_scale if granite else head_dim**-0.5,
        **dict(zip(_GRANITE_SCALES[1:], scales, strict=True)),
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


def _read_rope(config: Fields, num_pairs: int, max_position: int) -> Rope:
    """`rope_scaling` of older files, else `rope_parameters`; `rope_theta` inside, else outside."""
    rope = config.fields("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
    # What loses must make sense too, and a value of another type may not count as nothing.
    for key in ("rope_scaling", "rope_parameters"):
        config.fields(key)
    for key in rope.values:
        if key not in _ROPE_KEYS:
            raise rope.error(key, "left out, since it is not supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _FACTORS:
        raise CheckpointError(
            f"rope type {kind[:80]!r} of the model is not supported; supported: "
            f"{', '.join(_FACTORS)}."
        )
    if rope.number("partial_rotary_factor", 1.0, least=0, most=1) != 1:
        raise rope.error("partial_rotary_factor", "1, since nothing else is supported")
    # A base of 1 has no logarithm to divide by.
    bounds = {"least": 1.001 if kind == "yarn" else 1e-6, "most": _LARGEST_THETA}
    theta = _THETA
    if "rope_theta" in config or "rope_theta" not in rope.values:
        theta = config.number("rope_theta", _THETA, **bounds)
    theta = rope.number("rope_theta", theta, **bounds)
    options: dict[str, Any] = {}
    if kind == "longrope":
        options["short_factor"] = _read_divisors(rope, num_pairs)
    needed, optional = _FACTORS[kind]
    for key in (*needed, *filter(rope.__contains__, optional)):
        options[key] = rope.number(key, least=1 / _LARGEST_FACTOR, most=_LARGEST_FACTOR)
    if kind in ("yarn", "llama3", "longrope"):
        # The context of the training; outside the rope it has the last word.
        holder = config if _ORIGINAL in config else rope
        given = holder.number(_ORIGINAL, least=2, most=MAX_SIZE) if _ORIGINAL in holder else None
        options[_ORIGINAL] = given or max_position
        options.setdefault("factor", max_position / options[_ORIGINAL])
    if kind == "llama3" and options["low_freq_factor"] >= options["high_freq_factor"]:
        must = f"above low_freq_factor, {options['low_freq_factor']:g}"
        raise rope.error("high_freq_factor", must)
    if kind == "yarn":
        options["truncate"] = rope.flag("truncate", default=True)
    return Rope(kind=kind, theta=theta, options=options)


def _read_divisors(rope: Fields, num_pairs: int) -> list[float]:
    """One table, where transformers would change it in the middle of a long answer."""
    short = rope.get("short_factor")
    if short != rope.get("long_factor"):
        raise rope.error("long_factor", "equal to short_factor: one table for every length")
    divisors = short if isinstance(short, list) else []
    if len(divisors) != num_pairs or not all(
        type(item) in (int, float) and 1e-9 <= item <= 1e9 for item in divisors
    ):
        raise rope.error("short_factor", f"a list of {num_pairs} numbers above 0")
    return [float(item) for item in divisors]


def table_blocks(
    rope: Rope, head_dim: int, max_position: int, *, sine: bool
) -> Iterator[FloatArray]:
    """Rows of the float32 [max_position, head_dim] table in order, a few thousand at a time."""
    frequencies, scale = inverse_frequencies(rope, head_dim)
    function = np.sin if sine else np.cos
    for start in range(0, max_position, _TABLE_ROWS):
        stop = min(start + _TABLE_ROWS, max_position)
        positions = np.arange(start, stop, dtype=np.float32)
        # The angle is rounded to float32 as in transformers; its cosine then is exact.
        angles = (positions[:, None] * frequencies).astype(np.float64)
        half = (function(angles) * scale).astype(np.float32)
        yield np.concatenate([half, half], axis=1)


def inverse_frequencies(rope: Rope, dim: int) -> tuple[FloatArray, float]:
    """Angles per position of each pair of a head, and the factor on cosine and sine."""
    options = rope.options
    frequencies = _plain_frequencies(rope.theta, dim, options.get("short_factor", (1.0,)))
    if rope.kind == "linear":
        frequencies = frequencies / options["factor"]
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, options)
    elif rope.kind == "yarn":
        frequencies = _yarn(frequencies, rope)
    # "dynamic" departs from the plain frequencies only beyond max_position.
    return frequencies.astype(np.float32), _scale(rope)


def _plain_frequencies(theta: float, dim: int, divisors: Sequence[float]) -> Doubles:
    """In the float32 steps of transformers, each of them rounded exactly."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    inverse: FloatArray = np.reciprocal(powers * np.asarray(divisors, np.float32))
    return inverse.astype(np.float64)


def _llama3(frequencies: Doubles, options: Mapping[str, Any]) -> Doubles:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor, context = options["factor"], options[_ORIGINAL]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / factor, between)
    return np.where(wavelengths < context / high, frequencies, scaled)


def _yarn(frequencies: Doubles, rope: Rope) -> Doubles:
    """YaRN (arXiv 2309.00071): a ramp from interpolated to plain frequencies."""
    options, dim = rope.options, 2 * frequencies.size

    def dimension_of(rotations: float) -> float:
        """The dimension that turns this many times over the original context."""
        turns = math.log(options[_ORIGINAL] / (rotations * 2 * math.pi))
        return (dim * turns) / (2 * math.log(rope.theta))

    low = dimension_of(options.get("beta_fast") or 32)
    high = dimension_of(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0, 1)
    factor = float(options["factor"])
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def _scale(rope: Rope) -> float:
    options = rope.options
    if "attention_factor" in options:
        return float(options["attention_factor"])
    logarithm = math.log(max(options.get("factor", 1.0), 1.0))
    if rope.kind == "longrope" and logarithm:
        return math.sqrt(1 + logarithm / math.log(options[_ORIGINAL]))
    if rope.kind != "yarn":
        return 1.0
    mscale, all_dim = 1.0, 0.0
    if options.get("mscale") and options.get("mscale_all_dim"):
        mscale, all_dim = options["mscale"], options["mscale_all_dim"]
    return (0.1 * mscale * logarithm + 1.0) / (0.1 * all_dim * logarithm + 1.0)
