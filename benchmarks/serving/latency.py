"""Tokens under load on simulated card time, what the server adds to a run, and the picture."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu import machine
from serving.load import Plan
from serving.servers import Server, Stage, a_run, load, make_stage, ours, timed, word

CARDS, SLOTS, STEP_MS = 4, 8, 20.0
PROMPT_LEN, CTX_LEN = 32, 512
PROMPT_WORDS = 24
SHORTEST, LONGEST, SHAPE = 32, 384, 1.5
"""Answers' tokens: Pareto, cut."""
LOADS = (0.2, 0.4, 0.6, 0.8, 0.95)
SETTLE_S = 3.0
COMPLETIONS = "/v1/completions"
MOST_US = 150.0
LEAST_SHARE = 0.97


def body(number: int, max_tokens: int) -> dict[str, Any]:
    """A greedy request whose prompt is nobody else's."""
    chance = random.Random(number)
    words = [word(chance.randrange(300)) for _ in range(PROMPT_WORDS)]
    return {
        "prompt": " ".join(words),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }


def length(chance: random.Random) -> int:
    """Of an answer."""
    return min(LONGEST, int(SHORTEST * chance.paretovariate(SHAPE)))


def card_s(tokens: int, step_ms: float = STEP_MS) -> float:
    """Seconds of a card, with all slots taken, that a request costs: a prefill step, which gives
    the first token and in which all other rows wait, and its share of decode steps."""
    return step_ms / 1e3 * (1 + (tokens - 1) / SLOTS)


def arrivals(
    share: float, seconds: float, seed: int = 0
) -> tuple[list[dict[str, Any]], list[float]]:
    """Requests that come at random and take this share of what the cards can give."""
    chance = random.Random(seed)
    mean_s = sum(card_s(length(chance)) for _ in range(20_000)) / 20_000
    rate = share * CARDS / mean_s
    bodies, at_s = [], []
    now_s = chance.expovariate(rate)
    while now_s < seconds:
        bodies.append(body(len(bodies), length(chance)))
        at_s.append(now_s)
        now_s += chance.expovariate(rate)
    return bodies, at_s


def under_load(server: Server, share: float, seconds: float) -> dict[str, Any]:
    """The figures at a share of the cards' token rate."""
    bodies, at_s = arrivals(share, seconds)
    with machine.others_watched(server.pids) as others:
        found = load(server, Plan(COMPLETIONS, bodies, at_s=at_s, quiet_s=SETTLE_S))
    offered = sum(one["max_tokens"] for one in bodies)
    return {"load": share, "offered_tokens": offered, **found, **others}


def in_full(server: Server, bodies: Sequence[dict[str, Any]], clients: int) -> dict[str, Any]:
    """The figures of requests that so many clients ask one after the other."""
    return load(server, Plan(COMPLETIONS, bodies, clients=clients))


def measure(loads: Sequence[float], seconds: float, tokens: int) -> dict[str, Any]:
    """Everything of the part `latency`."""
    with tempfile.TemporaryDirectory(prefix="qaic-ray-serve-") as name:
        stage = make_stage(
            Path(name),
            cards=CARDS,
            step_ms=STEP_MS,
            slots=SLOTS,
            prompt_len=PROMPT_LEN,
            ctx_len=CTX_LEN,
        )
        return measured_on(stage, loads, seconds, tokens)


def measured_on(
    stage: Stage, loads: Sequence[float], seconds: float, tokens: int
) -> dict[str, Any]:
    """The same on a stage that is there."""
    rows = CARDS * SLOTS
    same = [body(10_000 + number, tokens) for number in range(2 * rows)]
    chance = random.Random(1)
    mixed = [body(20_000 + number, length(chance)) for number in range(8 * rows)]
    begun_s = time.monotonic()
    with ours(
        stage.folder, [stage.qpc, "-m", stage.model, *stage.arguments(CARDS)], env=timed(stage)
    ) as server:
        ready_s = time.monotonic() - begun_s
        in_full(server, same[:rows], rows)  # what is made at the first request is made
        found = [under_load(server, share, seconds) for share in loads]
        full = in_full(server, same, rows)
        served = in_full(server, mixed, len(mixed))
    run = a_run(stage, same, CARDS)
    mixed_run = a_run(stage, mixed, CARDS)
    ours_us = 1e6 * full["server_cpu_s"] / full["tokens"]
    run_us = 1e6 * run["driver_cpu_s"] / run["tokens"]
    return {
        "cards": CARDS,
        "slots": SLOTS,
        "step_ms": STEP_MS,
        "ready_s": ready_s,
        "loads": found,
        "rows_running": rows,
        "server_us_a_token": ours_us,
        "run_us_a_token": run_us,
        "beyond_run_us_a_token": ours_us - run_us,
        "client_us_a_token": 1e6 * full["client_cpu_s"] / full["tokens"],
        "full": full,
        "served_tokens_per_s": full["tokens_per_s"],
        "run_tokens_per_s": run["tokens_per_s"],
        "share_of_run": full["tokens_per_s"] / run["tokens_per_s"],
        # A run begins with the longest, a server with the first: the end of these tells them apart.
        "mixed_served_tokens_per_s": served["tokens_per_s"],
        "mixed_run_tokens_per_s": mixed_run["tokens_per_s"],
        "errors": sum(one["errors"] for one in (*found, full, served)),
    }


def promises(figures: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """What is promised of them: in words, the figure, the limit, and whether it holds."""
    step_ms = figures["step_ms"]
    at_80 = [one for one in figures["loads"] if one["load"] == 0.8]
    found: list[tuple[str, float, float, bool]] = []
    for one in at_80:
        for quantile, most in (("p50", 1.1), ("p99", 2.2)):
            value, limit = one["inter_token_ms"][quantile], most * step_ms
            found.append((f"inter-token {quantile} at 80 %, ms", value, limit, value <= limit))
    beyond, share = figures["beyond_run_us_a_token"], figures["share_of_run"]
    return [
        *found,
        ("CPU us a streamed token beyond a run's driver", beyond, MOST_US, beyond <= MOST_US),
        ("tokens/s, share of a run's", share, LEAST_SHARE, share >= LEAST_SHARE),
        ("errors", figures["errors"], 0, figures["errors"] == 0),
    ]
