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
Doubles = npt.NDArray[np.float64]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
THETA = 10000.0
LARGEST_THETA = 1e30
LARGEST_FACTOR = 1e6

_ROWS = 4096
"""Of a table that are computed at once."""

_ORIGINAL = "original_max_position_embeddings"

_KNOWN = frozenset(
    {
        "rope_theta", "rope_type", "type", "factor", _ORIGINAL,
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
    for key in rope.names():
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
    if "rope_theta" in config or rope.absent("rope_theta"):
        theta = config.number("rope_theta", THETA, **bounds)
    theta = rope.number("rope_theta", theta, **bounds)
    reader = _Options(rope, config, max_position)
    options: dict[str, Any] = {}
    if kind in ("linear", "dynamic"):
        options = reader.factors("factor")
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

    def factors(self, *keys: str) -> dict[str, Any]:
        bounds = {"least": 1 / LARGEST_FACTOR, "most": LARGEST_FACTOR}
        return {key: self._rope.number(key, **bounds) for key in keys}

    def given(self, *keys: str) -> dict[str, Any]:
        """Those of the factors that are there."""
        return self.factors(*(key for key in keys if key in self._rope))

    def original(self) -> dict[str, Any]:
        """The context of the training; outside the rope it has the last word."""
        for holder in (self._config, self._rope):
            if _ORIGINAL in holder:
                return {_ORIGINAL: holder.number(_ORIGINAL, least=2, most=MAX_SIZE)}
        return {_ORIGINAL: self._max_position}

    def llama3(self) -> dict[str, Any]:
        options = self.factors("low_freq_factor", "high_freq_factor")
        low, high = options.values()
        if low >= high:
            raise self._rope.error("high_freq_factor", f"above low_freq_factor, {low:g}")
        return self.factors("factor") | options | self.original()

    def yarn(self) -> dict[str, Any]:
        options = self.factors("factor") | self.original()
        options["truncate"] = self._rope.flag("truncate", default=True)
        return options | self.given(
            "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"
        )

    def longrope(self, length: int) -> dict[str, Any]:
        """One table, where transformers would change it in the middle of a long answer."""
        rope = self._rope
        short = rope.get("short_factor")
        if short != rope.get("long_factor"):
            raise rope.error("long_factor", "equal to short_factor: one table for every length")
        divisors = short if isinstance(short, list) else []
        if len(divisors) != length or not all(_is_divisor(item) for item in divisors):
            raise rope.error("short_factor", f"a list of {length} numbers above 0")
        options = {"short_factor": [float(item) for item in divisors]} | self.original()
        options |= self.given("factor", "attention_factor")
        options.setdefault("factor", self._max_position / options[_ORIGINAL])
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
