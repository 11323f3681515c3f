"""Rotary position embedding as a config.json of transformers asks for it, old or new style.

What wins where a file says it twice is what wins in transformers. Knows nothing of tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qaic_ray.errors import CheckpointError
from qaic_ray.model.checkpoint import MAX_SIZE, Fields

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
THETA = 10000.0
LARGEST_THETA = 1e30
LARGEST_FACTOR = 1e6

_KNOWN = frozenset(
    {
        "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings",
        "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "short_factor",
        "long_factor", "finetuned",
    }
)  # fmt: skip
"""Keys of the one kind that the others are right to ignore, as transformers does."""


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
