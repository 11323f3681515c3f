"""From timings to figures: medians, ratios, the machine's limits, and what was promised. Pure.

A result is a plain dict, as it is in the JSON: `contender`, `part`, `batch`, `prompt_tokens`,
`ctx_len`, `beside_busy`, and `rounds`, each with `tokens_per_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Result = dict[str, Any]

PEER = "llama.cpp Q8_0"
"""Whom ratios are to."""
BLOCK = 32
"""Weights of an MXFP6 block, which share a byte."""

DECODE_FLOORS: Mapping[str, Mapping[int, float]] = {
    "fast": {1: 1.0, 2: 1.0, 4: 1.2, 8: 1.6, 16: 2.2, 32: 2.2},
    "exact": {1: 0.8, 2: 0.9, 4: 1.0, 8: 1.1, 16: 1.4, 32: 1.4},
}
"""x `PEER`, by numerics and batch."""
PREFILL_FLOORS = {"fast": 2.0, "exact": 1.3}
TOLERANCE = 0.05
"""Of the promises on a step's time by batch, and on ctx_len."""


@dataclass(frozen=True)
class ModelSize:
    """What a decode step has to read and compute.

    Args:
        weights: of all MatMuls, the LM head's with them.
        cache_values: keys and values of a token, over all layers.
    """

    weights: int
    cache_values: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSize:
        """Of a model of llama's kind, from its config.json."""
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
        layers = config["num_hidden_layers"]
        weights = layers * (attention + 3 * hidden * inner) + hidden * config["vocab_size"]
        return cls(weights, layers * 2 * kv_heads * head_dim)


@dataclass(frozen=True)
class Limits:
    """Of decode on this machine: memory read bandwidth, and float32 matrix products."""

    read_gb_s: float
    gemm_gflop_s: float

    def read_tokens_per_s(self, size: ModelSize, batch: int, context: int) -> float:
        """Where weights of a byte each, with one a block, and a float16 cache are read once."""
        num_bytes = size.weights * (1 + 1 / BLOCK) + batch * context * size.cache_values * 2
        return batch * self.read_gb_s * 1e9 / num_bytes

    def gemm_tokens_per_s(self, size: ModelSize) -> float:
        """Where every weight costs a float32 multiplication and addition a token."""
        return self.gemm_gflop_s * 1e9 / (2 * size.weights)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range of a figure's rounds."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def speed(results: Iterable[Result], contender: str, **fields: Any) -> float | None:
    """The median tokens/s of the one result with these fields; None where there is none."""
    for result in results:
        if result["contender"] == contender and fields.items() <= result.items():
            return median(each["tokens_per_s"] for each in result["rounds"])
    return None


def ratio(results: Sequence[Result], contender: str, to: str = PEER, **fields: Any) -> float | None:
    """Tokens/s of a contender over another's, in the same case: the median of all rounds.

    The rounds of a case alternate, so that each is compared with its own neighbour.
    """
    ours = _rounds(results, contender, fields)
    theirs = _rounds(results, to, fields)
    pairs = list(zip(ours, theirs, strict=False))
    return median(a / b for a, b in pairs) if pairs else None


def _rounds(results: Iterable[Result], contender: str, fields: Mapping[str, Any]) -> list[float]:
    for result in results:
        if result["contender"] == contender and fields.items() <= result.items():
            return [each["tokens_per_s"] for each in result["rounds"]]
    return []


@dataclass(frozen=True)
class Promise:
    """What is said of a figure, and what it is."""

    about: str
    figure: float
    floor: float

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return self.figure >= self.floor

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "about": self.about,
            "figure": self.figure,
            "floor": self.floor,
            "holds": self.holds,
        }


def promises(
    results: Sequence[Result], numerics_of: Mapping[str, str], *, cores: int, threads: int
) -> list[Promise]:
    """Every promise that was measured.

    Args:
        results: of one run.
        numerics_of: contenders of ours on mx6, and `exact` or `fast` of each.
        cores: of the machine.
        threads: that each contender had.
    """
    found = []
    for name, numerics in numerics_of.items():
        found += _decode_promises(results, name, DECODE_FLOORS[numerics])
        for tokens in sorted({r["prompt_tokens"] for r in results if r["part"] == "prefill"}):
            value = ratio(results, name, part="prefill", prompt_tokens=tokens)
            about = f"{name}: prefill of {tokens} tokens, x {PEER}"
            found += _promise(about, value, PREFILL_FLOORS[numerics])
        found += _steadiness(results, name)
        found += _context_promises(results, name)
        found += _busy_promises(results, name, min(1.0, (cores - 1) / threads))
    return found


def _promise(about: str, value: float | None, floor: float) -> list[Promise]:
    return [] if value is None else [Promise(about, value, floor)]


def _decode_promises(
    results: Sequence[Result], name: str, floors: Mapping[int, float]
) -> list[Promise]:
    found = []
    for batch, floor in floors.items():
        value = ratio(results, name, part="decode", batch=batch)
        found += _promise(f"{name}: decode at batch {batch}, x {PEER}", value, floor)
    return found


def _steadiness(results: Sequence[Result], name: str) -> list[Promise]:
    """A step of b rows costs no more than one of 2b, and tokens/s at 2b are no less than at b."""
    found = []
    batches = sorted({r["batch"] for r in results if r["part"] == "decode"})
    for batch in batches:
        some = speed(results, name, part="decode", batch=batch)
        double = speed(results, name, part="decode", batch=2 * batch)
        if some is None or double is None:
            continue
        more, steps = f"{name}: tokens/s at batch {2 * batch}", 2 * some / double
        found += _promise(f"{more}, x those at {batch}", double / some, 1 - TOLERANCE)
        about = f"{name}: a step at batch {2 * batch}, x one at {batch}"
        found += _promise(about, steps, 1 - TOLERANCE)
    return found


def _context_promises(results: Sequence[Result], name: str) -> list[Promise]:
    lengths = sorted({r["ctx_len"] for r in results if r["part"] == "context"})
    about = f"{name}: decode at ctx_len {lengths[-1]}, x at {lengths[0]}" if lengths else ""
    return _promise(about, context_ratio(results, name), 1 - TOLERANCE)


def context_ratio(results: Sequence[Result], name: str) -> float | None:
    """Tokens/s at the longest ctx_len over those at the shortest, of neighbouring rounds."""
    lengths = sorted({r["ctx_len"] for r in results if r["part"] == "context"})
    if len(lengths) < 2:
        return None
    short = _rounds(results, name, {"part": "context", "ctx_len": lengths[0]})
    long = _rounds(results, name, {"part": "context", "ctx_len": lengths[-1]})
    values = [b / a for a, b in zip(short, long, strict=False)]
    return median(values) if values else None


def _busy_promises(results: Sequence[Result], name: str, floor: float) -> list[Promise]:
    found = []
    for batch in sorted({r["batch"] for r in results if r["part"] == "busy"}):
        about = f"{name}: decode at batch {batch} beside a busy process, x alone"
        found += _promise(about, kept_share(results, name, batch), floor)
    return found


def kept_share(results: Sequence[Result], name: str, batch: int) -> float | None:
    """Tokens/s beside a busy process over those alone, of neighbouring rounds."""
    case = {"part": "busy", "batch": batch}
    alone = _rounds(results, name, {**case, "beside_busy": False})
    beside = _rounds(results, name, {**case, "beside_busy": True})
    values = [b / a for a, b in zip(alone, beside, strict=False)]
    return median(values) if values else None
