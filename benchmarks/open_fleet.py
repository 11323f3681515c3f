"""What an open fleet adds: milliseconds to a request that comes alone, CPU while idle, memory.

    python benchmarks/open_fleet.py [--prompts 100000] [--workers 2] [--alone 300] [--idle-s 20]

The whole road but for the model: prompts go from this process through the dispatcher to Ray actors,
are tokenized and run in the engine on emulated cards that compute nothing and take no time, and
come back. Answers have one to four tokens. Prints a table, and one JSON object as its last line:
figures are this machine's, never a card's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil
from million import lay_stage, make
from rich.console import Console
from rich.table import Table

MOST_ALONE_MS, MOST_IDLE, FLAT_MB = 10.0, 0.05, 60.0
"""Median of a request that comes alone, share of a core while nothing goes on, and what this
process may have at the end over what it had at a quarter of the way."""
OPEN_AT_ONCE = 2000
NUM_SAMPLES = 20


def serve(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """An LLM's fleet under three loads: alone, none, and as much as it takes."""
    from qaic_ray.api.quiet import LogListener
    from qaic_ray.fleet.folder_fleet import FolderFleet
    from qaic_ray.options import EmulatorOptions, RayOptions, RunOptions
    from qaic_ray.pipeline.request import RunRequest, choose_sdk

    made = make(folder)
    (folder / "timing.json").write_text(json.dumps({"mode": "replace"}))
    os.environ["QAIC_EMULATOR_TIMING"] = str(folder / "timing.json")
    listener = LogListener()
    run = RunOptions(devices=tuple(range(options.workers)), metrics=False)
    request = RunRequest(
        "open fleet", made["model"], Path(made["qpc"]), run, ray=RayOptions(dashboard=False)
    )
    own = FolderFleet(request, choose_sdk(made["sdk"], EmulatorOptions(), listener), listener)
    try:
        own.fleet.wait_ready()
        while len(own.fleet.workers) < options.workers:
            time.sleep(0.05)
        alone = one_by_one(own.fleet, options.alone)
        return {
            "workers": options.workers,
            **alone,
            "idle_cpu_share": idle(options.idle_s),
            **in_a_stream(own.fleet, options.prompts),
        }
    finally:
        own.close(drain=False)


def prompt(number: int, *, stream: bool = False) -> Any:
    """A short one, whose answer has one to four tokens."""
    from qaic_ray.rows import Prompt
    from qaic_ray.sampling_params import SamplingParams

    how = SamplingParams(max_tokens=number % 4 + 1)
    return Prompt(0, f"Item {number}", sampling=how, stream=stream)


def one_by_one(fleet: Any, count: int) -> dict[str, float]:
    """Each is asked for when the fleet has been idle for a little; milliseconds."""
    rows_ms, tokens_ms = [], []
    for number in range(count):
        time.sleep(0.01)
        begun_s = time.perf_counter()
        fleet.submit(prompt(4 * number)).row()
        rows_ms.append(1e3 * (time.perf_counter() - begun_s))
        time.sleep(0.01)
        begun_s = time.perf_counter()
        pending = fleet.submit(prompt(4 * number + 3, stream=True))
        next(pending.deltas())
        tokens_ms.append(1e3 * (time.perf_counter() - begun_s))
        pending.row()
    return {
        "alone_row_ms": statistics.median(rows_ms),
        "alone_row_p99_ms": sorted(rows_ms)[int(0.99 * count)],
        "alone_first_token_ms": statistics.median(tokens_ms),
        "alone_first_token_p99_ms": sorted(tokens_ms)[int(0.99 * count)],
    }


def idle(seconds: float) -> float:
    """The share of a core that this process uses while nothing goes on."""
    before, begun_s = psutil.Process().cpu_times(), time.monotonic()
    time.sleep(seconds)
    after = psutil.Process().cpu_times()
    used_s = after.user + after.system - before.user - before.system
    return used_s / (time.monotonic() - begun_s)


def in_a_stream(fleet: Any, count: int) -> dict[str, Any]:
    """Many, with no more than so many open at once."""
    process = psutil.Process()
    waiting: deque[Any] = deque()
    samples: list[tuple[int, float]] = []
    begun_s = time.monotonic()
    for number in range(count):
        waiting.append(fleet.submit(prompt(number)))
        if len(waiting) >= OPEN_AT_ONCE:
            waiting.popleft().row()
        if number * NUM_SAMPLES // count >= len(samples):
            samples.append((number, process.memory_info().rss / 1e6))
    while waiting:
        waiting.popleft().row()
    seconds = time.monotonic() - begun_s
    samples.append((count, process.memory_info().rss / 1e6))
    return {
        "prompts": count,
        "prompts_per_s": count / seconds,
        "peak_mb": max(rss_mb for _, rss_mb in samples),
        "growth_mb": samples[-1][1] - samples[len(samples) // 4][1],
    }


def show(figures: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title=f"An open fleet of {figures['workers']} cards that take no time")
    for column in ("what", "figure", ""):
        table.add_column(column)
    for words, name, form, most in (
        ("a row that comes alone, median ms", "alone_row_ms", ".1f", MOST_ALONE_MS),
        ("  99th of 100", "alone_row_p99_ms", ".1f", None),
        ("its first token, median ms", "alone_first_token_ms", ".1f", MOST_ALONE_MS),
        ("  99th of 100", "alone_first_token_p99_ms", ".1f", None),
        ("share of a core while idle", "idle_cpu_share", ".3f", MOST_IDLE),
        (f"rows a second, of {figures['prompts']:,}", "prompts_per_s", ",.0f", None),
        ("MB of this process at most", "peak_mb", ",.0f", None),
        ("MB more at the end than at a quarter", "growth_mb", ",.1f", FLAT_MB),
    ):
        value = figures[name]
        verdict = "" if most is None else "holds" if value <= most else f"MISSED ({most:g})"
        table.add_row(words, format(value, form), verdict)
    Console().print(table)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2, help="up to 4 emulated cards")
    parser.add_argument("--alone", type=int, default=300, help="requests that come alone")
    parser.add_argument("--idle-s", type=float, default=20.0)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    if options.make is not None:
        lay_stage(options.make)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QAIC_EMULATOR_STATE"] = str(folder / "cards")
        os.environ["QAIC_RAY_LOCKS"] = str(folder / "locks")
        figures = serve(folder, options)
    show(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
