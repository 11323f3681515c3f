"""An hour's worth of requests of all kinds on one server, in minutes: its memory and its files."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serving import rude
from serving.latency import COMPLETIONS, body
from serving.servers import Server, make_stage, ours, timed

CARDS, SLOTS, STEP_MS = 2, 8, 1.0
TURN = 500
AT_ONCE = 40
FLAT_MB = 20.0
"""What the server may grow by in an hour: a line through its second half, as tables fill before."""
IDLE_S = 10.0


def measure(requests: int) -> dict[str, Any]:
    """The figures of the part `hour`."""
    with tempfile.TemporaryDirectory(prefix="qaic-ray-serve-") as name:
        stage = make_stage(
            Path(name), cards=CARDS, step_ms=STEP_MS, slots=SLOTS, prompt_len=32, ctx_len=128
        )
        arguments = [stage.qpc, "-m", stage.model, *stage.arguments(CARDS), "--max-body-mib", "1"]
        with ours(stage.folder, arguments, env=timed(stage)) as server:
            return _hour(server, requests)


def _hour(server: Server, requests: int) -> dict[str, Any]:
    where = urlsplit(server.address)
    counts: Counter[str] = Counter()
    samples: list[tuple[int, float]] = []
    files: list[int] = []
    begun_s = time.monotonic()
    for turn in range(requests // TURN):
        bodies = [body(turn * TURN + number, 4 + number % 8) for number in range(TURN)]
        found, _ = asyncio.run(
            rude.crowd(
                str(where.hostname),
                where.port or 0,
                path=COMPLETIONS,
                bodies=bodies,
                at_once=AT_ONCE,
                seed=turn,
                is_quick=turn % 8 > 0,
            )
        )
        counts += found
        _wait_idle(server)
        if turn % 8:  # bodies of those that send too much are still in the allocator
            samples.append(((turn + 1) * TURN, server.process.memory_info().rss / 1e6))
        files.append(server.process.num_fds())
    kept = samples[len(samples) // 2 :]
    slope = statistics.linear_regression([x for x, _ in kept], [y for _, y in kept]).slope
    return {
        "requests": sum(counts.values()),
        "seconds": time.monotonic() - begun_s,
        "kinds": dict(counts),
        "mb_more_an_hour": slope * requests,
        "mb_first_and_last": [samples[0][1], samples[-1][1]],
        "files_first_and_last": [files[0], files[-1]],
        "samples": samples,
    }


def _wait_idle(server: Server) -> None:
    """Wait until nothing runs or waits.

    Raises:
        TimeoutError: something is left.
    """
    deadline_s = time.monotonic() + IDLE_S
    while (left := _open_rows(server)) > 0:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{left:g} rows are left in the cards after {IDLE_S:g} s.")
        time.sleep(0.05)


def _open_rows(server: Server) -> float:
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))


def promises(figures: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """What is promised of them: in words, the figure, the limit, and whether it holds."""
    more_mb = figures["mb_more_an_hour"]
    first, last = figures["files_first_and_last"]
    return [
        ("MB more in the hour, by a line", more_mb, FLAT_MB, more_mb <= FLAT_MB),
        ("open files at the end", last, first + 2, last <= first + 2),
    ]
