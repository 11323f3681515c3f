"""Rotary position embedding: read from a config.json of transformers, and as tables.

A config.json may be old or new style; where it says a thing twice, what wins is what wins in
transformers. The tables are cosine and sine of every position, as transformers computes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.errors import CheckpointError
from qaic_ray.model.checkpoint import MAX_SIZE, Fields

FloatArray = npt.NDArray[np.float32]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
THETA = 10000.0
LARGEST_THETA = 1e30
LARGEST_FACTOR = 1e6

_ROWS = 4096
"""Of a table that are computed at once."""

_KNOWN = frozenset(
    {
        "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings",
        "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "short_factor",
        "long_factor", "finetuned",
    }
)  # fmt: skip
"""Keys of any kind; a kind ignores those of the others, as transformers does."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `kind` is one of `ROPE_TYPES`, `options` its own numbers."""

    kind: str
    theta: float
    options: Mapping[str, Any]


def read_rope(config: Fields, head_dim: int, max_position: int) -> Rope:
    """`rope_scaling` of older files, else `rope_parameters`; `rope_theta` inside, else outside.

    Args:
        config: the fields of config.json.
        head_dim: width of a head; all of it is rotated.
        max_position: `max_position_embeddings`.

    Raises:
        CheckpointError: a kind or a number is unknown, missing or without meaning.
    """
    rope = config.fields("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
    # What loses must make sense too, and a value of another type may not count as nothing.
    for key in ("rope_scaling", "rope_parameters"):
        config.fields(key)
    for key in rope.values:
        if key not in _KNOWN:
            raise rope.error(key, "left out, since it is not supported")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"rope type {kind[:80]!r} of the model is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}."
        )
    if rope.number("partial_rotary_factor", 1.0, least=0, most=1) != 1:
        raise rope.error("partial_rotary_factor", "1, since nothing else is supported")
    # A base of 1 has no logarithm to divide by.
    bounds = {"least": 1.001 if kind == "yarn" else 1e-6, "most": LARGEST_THETA}
    theta = THETA
    if "rope_theta" in config or "rope_theta" not in rope.values:
        theta = config.number("rope_theta", THETA, **bounds)
    theta = rope.number("rope_theta", theta, **bounds)
    reader = _Options(rope, config, max_position)
    options: dict[str, Any] = {}
    if kind in ("linear", "dynamic"):
        options = {"factor": reader.factor("factor")}
    elif kind == "llama3":
        options = reader.llama3()
    elif kind == "yarn":
        options = reader.yarn()
    elif kind == "longrope":
        options = reader.longrope(head_dim // 2)
    return Rope(kind=kind, theta=theta, options=options)


class _Options:
    def __init__(self, rope: Fields, config: Fields, max_position: int) -> None:
        self._rope = rope
        self._config = config
        self._max_position = max_position

    def factor(self, key: str) -> float:
        return self._rope.number(key, least=1 / LARGEST_FACTOR, most=LARGEST_FACTOR)

    def original(self) -> float:
        """The context of the training; outside the rope it has the last word."""
        key = "original_max_position_embeddings"
        for holder in (self._config, self._rope):
            if key in holder:
                return holder.number(key, least=2, most=MAX_SIZE)
        return self._max_position

    def llama3(self) -> dict[str, Any]:
        low, high = self.factor("low_freq_factor"), self.factor("high_freq_factor")
        if low >= high:
            raise self._rope.error("high_freq_factor", f"above low_freq_factor, {low:g}")
        return {
            "factor": self.factor("factor"),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": self.original(),
        }

    def yarn(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "factor": self.factor("factor"),
            "original_max_position_embeddings": self.original(),
            "truncate": self._rope.flag("truncate", default=True),
        }
        for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if key in self._rope:
                options[key] = self.factor(key)
        return options

    def longrope(self, length: int) -> dict[str, Any]:
        """One table, where transformers would change it in the middle of a long answer."""
        rope = self._rope
        short = rope.get("short_factor")
        if short != rope.get("long_factor"):
            raise rope.error("long_factor", "equal to short_factor: one table for every length")
        divisors = short if isinstance(short, list) else []
        if len(divisors) != length or not all(_is_divisor(item) for item in divisors):
            raise rope.error("short_factor", f"a list of {length} numbers above 0")
        options: dict[str, Any] = {
            "short_factor": [float(item) for item in divisors],
            "original_max_position_embeddings": self.original(),
        }
        for key in ("factor", "attention_factor"):
            if key in rope:
                options[key] = self.factor(key)
        options.setdefault("factor", self._max_position / self.original())
        return options


def _is_divisor(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 1e-9 <= value <= 1e9  # type: ignore[operator]


def table_blocks(
    rope: Rope, head_dim: int, max_position: int, *, sine: bool
) -> Iterator[FloatArray]:
    """Rows of the float32 [max_position, head_dim] table in order, a few thousand at a time."""
    frequencies, scale = inverse_frequencies(rope, head_dim)
    function = np.sin if sine else np.cos
    for start in range(0, max_position, _ROWS):
        stop = min(start + _ROWS, max_position)
        positions = np.arange(start, stop, dtype=np.float32)
        # The angle is rounded to float32 as in transformers; its cosine then is exact.
        angles = (positions[:, None] * frequencies).astype(np.float64)
        half = (function(angles) * scale).astype(np.float32)
        yield np.concatenate([half, half], axis=1)


def inverse_frequencies(rope: Rope, dim: int) -> tuple[FloatArray, float]:
    """Angles per position of each pair of a head, and the factor on cosine and sine."""
    frequencies = _plain_frequencies(rope.theta, dim)
    scale = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / float(rope.options["factor"])
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope.options)
    elif rope.kind == "yarn":
        frequencies, scale = _yarn(rope, dim)
    elif rope.kind == "longrope":
        frequencies = _plain_frequencies(rope.theta, dim, rope.options["short_factor"])
        scale = _longrope_scale(rope.options)
    # "dynamic" departs from the plain frequencies only beyond max_position.
    return frequencies.astype(np.float32), scale


def _plain_frequencies(
    theta: float, dim: int, divisors: Sequence[float] = (1.0,)
) -> npt.NDArray[np.float64]:
    """In the float32 steps of transformers, each of them rounded exactly."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers: FloatArray = np.power(np.float64(theta), exponents.astype(np.float64)).astype(
        np.float32
    )
    inverse: FloatArray = np.reciprocal(powers * np.asarray(divisors, np.float32))
    return inverse.astype(np.float64)


def _llama3(
    frequencies: npt.NDArray[np.float64], options: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    factor = float(options["factor"])
    low, high = float(options["low_freq_factor"]), float(options["high_freq_factor"])
    context = float(options["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / factor, between)
    return np.where(wavelengths < context / high, frequencies, scaled)


def _yarn(rope: Rope, dim: int) -> tuple[npt.NDArray[np.float64], float]:
    """YaRN (arXiv 2309.00071): a ramp from interpolated to plain frequencies, and its scale."""
    theta, options = rope.theta, rope.options
    factor = float(options["factor"])
    original = float(options["original_max_position_embeddings"])
    plain = _plain_frequencies(theta, dim)

    def dimension_of(rotations: float) -> float:
        """The dimension that turns this many times over the original context."""
        turns = math.log(original / (rotations * 2 * math.pi))
        return (dim * turns) / (2 * math.log(theta))

    low = dimension_of(float(options.get("beta_fast") or 32))
    high = dimension_of(float(options.get("beta_slow") or 1))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_scale(options, factor)


def _longrope_scale(options: Mapping[str, Any]) -> float:
    given, factor = options.get("attention_factor"), float(options["factor"])
    if given is not None:
        return float(given)
    original = float(options["original_max_position_embeddings"])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_scale(options: Mapping[str, Any], factor: float) -> float:
    given = options.get("attention_factor")
    if given is not None:
        return float(given)

    def magnitude(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    mscale, all_dim = options.get("mscale"), options.get("mscale_all_dim")
    if mscale and all_dim:
        return magnitude(float(mscale)) / magnitude(float(all_dim))
    return magnitude(1.0)
