"""Rotary tables as numbers: cosine and sine of every position, as transformers computes them.

Knows nothing of graphs. Positions beyond `max_position` are outside the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray.export.architecture import Architecture

FloatArray = npt.NDArray[np.float32]

_ROWS = 4096


def table_blocks(architecture: Architecture, *, sine: bool) -> Iterator[FloatArray]:
    """Rows of the [max_position, head_dim] table in order, a few thousand at a time."""
    frequencies, scale = inverse_frequencies(architecture)
    function = np.sin if sine else np.cos
    for start in range(0, architecture.max_position, _ROWS):
        stop = min(start + _ROWS, architecture.max_position)
        positions = np.arange(start, stop, dtype=np.float32)
        # The angle is rounded to float32 as in transformers; its cosine then is exact.
        angles = (positions[:, None] * frequencies).astype(np.float64)
        half = (function(angles) * scale).astype(np.float32)
        yield np.concatenate([half, half], axis=1)


def inverse_frequencies(architecture: Architecture) -> tuple[FloatArray, float]:
    """Angles per position of each pair of a head, and the factor on cosine and sine."""
    rope, dim = architecture.rope, architecture.head_dim
    frequencies = _plain_frequencies(rope.theta, dim)
    scale = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / float(rope.options["factor"])
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope.options)
    elif rope.kind == "yarn":
        frequencies, scale = _yarn(rope.theta, architecture)
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


def _yarn(theta: float, architecture: Architecture) -> tuple[npt.NDArray[np.float64], float]:
    """YaRN (arXiv 2309.00071): a ramp from interpolated to plain frequencies, and its scale."""
    options, dim = architecture.rope.options, architecture.head_dim
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
