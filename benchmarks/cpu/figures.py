"""From timings to figures: medians, ratios, the machine's limits, and what was promised. Pure.

A result is a plain dict, as it is in the JSON: `contender`, `part`, `batch`, `prompt_tokens`,
`ctx_len`, `beside_busy`, and `rounds`, each with `tokens_per_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

Result = dict[str, Any]

PEER = "llama.cpp Q8_0"
"""Whom ratios are to."""
NOISY_CORES = 0.25
"""A timing is disturbed where others used more than this share of one core meanwhile."""
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


def is_quiet(one_round: Mapping[str, Any]) -> bool:
    """Whether others left the machine to a timing."""
    return bool(one_round.get("others_cores", 0.0) <= NOISY_CORES)


def is_disturbed(result: Result) -> bool:
    """Whether no round of a result was quiet."""
    return not any(map(is_quiet, result["rounds"]))


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median and range of tokens/s, of the quiet rounds where there are some."""
    chosen = [each for each in rounds if is_quiet(each)] or rounds
    values = [each["tokens_per_s"] for each in chosen]
    return {"median": median(values), "least": min(values), "most": max(values)}


def find(results: Iterable[Result], contender: str, **fields: Any) -> Result | None:
    """The one result of a contender with these fields."""
    for result in results:
        if result["contender"] == contender and fields.items() <= result.items():
            return result
    return None


def speed(results: Iterable[Result], contender: str, **fields: Any) -> float | None:
    """Its median tokens/s; None where there is no result."""
    found = find(results, contender, **fields)
    return None if found is None else summary(found["rounds"])["median"]


@dataclass(frozen=True)
class Quotient:
    """The median of each round's quotient; `disturbed` where no round of both was quiet."""

    value: float
    disturbed: bool


def quotient(over: Result | None, under: Result | None) -> Quotient | None:
    """Tokens/s of one result over another's.

    Their rounds alternated, so that each is compared with its own neighbour. Rounds that others
    disturbed are left out where some remain.
    """
    if over is None or under is None:
        return None
    pairs = list(zip(over["rounds"], under["rounds"], strict=False))
    quiet = [pair for pair in pairs if all(map(is_quiet, pair))]
    values = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in quiet or pairs]
    return Quotient(median(values), not quiet)


def ratio(results: Sequence[Result], contender: str, **fields: Any) -> Quotient | None:
    """Tokens/s of a contender over those of `PEER` in the same case."""
    return quotient(find(results, contender, **fields), find(results, PEER, **fields))


def alike(texts: Sequence[str], ours: Sequence[str]) -> float | None:
    """The share of rows whose text begins with the first word of ours; None without texts."""
    if not texts or not ours:
        return None
    firsts = [our[:1] + our[1:].partition(" ")[0] for our in ours]
    same = [text.startswith(first) for text, first in zip(texts, firsts, strict=True)]
    return sum(same) / len(same)


@dataclass(frozen=True)
class Promise:
    """What is said of a figure, and what it is."""

    about: str
    figure: float
    floor: float
    disturbed: bool

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return self.figure >= self.floor

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "holds": self.holds}


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
        for batch, floor in DECODE_FLOORS[numerics].items():
            about = f"{name}: decode at batch {batch}, x {PEER}"
            found += _promise(about, ratio(results, name, part="decode", batch=batch), floor)
        for tokens in values_of(results, "prefill", "prompt_tokens"):
            about = f"{name}: prefill of {tokens} tokens, x {PEER}"
            value = ratio(results, name, part="prefill", prompt_tokens=tokens)
            found += _promise(about, value, PREFILL_FLOORS[numerics])
        found += _steadiness(results, name)
        lengths = values_of(results, "context", "ctx_len")
        about = f"{name}: decode at ctx_len {lengths[-1]}, x at {lengths[0]}" if lengths else ""
        found += _promise(about, context_ratio(results, name), 1 - TOLERANCE)
        for batch in values_of(results, "busy", "batch"):
            about = f"{name}: decode at batch {batch} beside a busy process, x alone"
            floor = min(1.0, (cores - 1) / threads)
            found += _promise(about, kept_share(results, name, batch), floor)
    return found


def values_of(results: Iterable[Result], part: str, name: str) -> list[int]:
    """The values of a field in the results of a part, by size."""
    return sorted({result[name] for result in results if result["part"] == part})


def _promise(about: str, value: Quotient | None, floor: float) -> list[Promise]:
    return [] if value is None else [Promise(about, value.value, floor, value.disturbed)]


def _steadiness(results: Sequence[Result], name: str) -> list[Promise]:
    """A step of b rows costs no more than one of 2b, and tokens/s at 2b are no less than at b."""
    found = []
    for batch in values_of(results, "decode", "batch"):
        some = find(results, name, part="decode", batch=batch)
        double = find(results, name, part="decode", batch=2 * batch)
        if some is None or double is None:
            continue
        disturbed = is_disturbed(some) or is_disturbed(double)
        growth = summary(double["rounds"])["median"] / summary(some["rounds"])["median"]
        about = f"{name}: tokens/s at batch {2 * batch}, x those at {batch}"
        found.append(Promise(about, growth, 1 - TOLERANCE, disturbed))
        about = f"{name}: a step at batch {2 * batch}, x one at {batch}"
        found.append(Promise(about, 2 / growth, 1 - TOLERANCE, disturbed))
    return found


def context_ratio(results: Sequence[Result], name: str) -> Quotient | None:
    """Tokens/s at the longest ctx_len over those at the shortest."""
    lengths = values_of(results, "context", "ctx_len")
    if len(lengths) < 2:
        return None
    short, long = (
        find(results, name, part="context", ctx_len=at) for at in (lengths[0], lengths[-1])
    )
    return quotient(long, short)


def kept_share(results: Sequence[Result], name: str, batch: int) -> Quotient | None:
    """Tokens/s beside a busy process over those alone."""
    beside, alone = (
        find(results, name, part="busy", batch=batch, beside_busy=is_beside)
        for is_beside in (True, False)
    )
    return quotient(beside, alone)
