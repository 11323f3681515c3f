#!/usr/bin/env python3
"""What the live line costs: CPU time of its thread, as a share of one core, by the number of cards.

A run is simulated in which rows end and engines tell their steps; the line is drawn on a terminal
that nobody reads, as often as in a run. The last line of stdout is one JSON document.
Usage: benchmarks/live_view.py [--seconds 10] [--cards 8,64,1000]
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import threading
import time

from qaic_ray.cli.live import live_line
from qaic_ray.cli.live.live_line import LiveLine
from qaic_ray.dispatch.dispatcher import (
    DeliverRows,
    RowsFinished,
    RunShard,
    RunStarted,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.metrics import EngineState
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.run_view import RunFollower

ROWS_PER_S = 200


class Terminal(io.StringIO):
    """A terminal that keeps nothing."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        """It is one."""
        return True

    def write(self, text: str) -> int:
        """Take it."""
        return len(text)


def main() -> None:
    """Measure, and print a table and a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--cards", default="8,64,1000")
    asked = parser.parse_args()
    found = []
    for number in map(int, asked.cards.split(",")):
        for verbose in (False, True):
            line_share, watch_share = measure(number, asked.seconds, verbose=verbose)
            found.append(
                {
                    "cards": number,
                    "verbose": verbose,
                    "line_percent": round(100 * line_share, 3),
                    "watch_percent": round(100 * watch_share, 3),
                }
            )
            print(
                f"{number:>6} cards{' -v' if verbose else '   '}  line {line_share:7.3%} of a core"
                f"  watch {watch_share:7.3%} at {ROWS_PER_S} rows/s"
            )
    print(json.dumps({"benchmark": "live_view", "seconds": asked.seconds, "found": found}))


def measure(num_cards: int, seconds: float, *, verbose: bool) -> tuple[float, float]:
    """The shares of a core of the line's thread, and of keeping up what it shows."""
    watch = RunFollower(1_000_000)
    names = tuple(f"card {i}" for i in range(num_cards))
    watch.change(RunStarted(names))
    prompt = Prompt(0, "p")
    for number, name in enumerate(names):
        watch.change(WorkerReady(name, 16))
        watch.change(RunShard(name, number, (prompt,) * 64, 1))
    cpu: list[float] = []

    class Measured(LiveLine):
        def draw(self) -> None:
            before = time.thread_time()
            super().draw()
            cpu.append(time.thread_time() - before)

    stderr, sys.stderr = sys.stderr, Terminal()
    try:
        live = Measured(verbose=verbose)
        begun_s = time.monotonic()
        live.show(watch.view)
        watch_s, tokens = 0.0, 0
        row = Row(0, "p", "text", FinishReason.STOP, token_ids=(1,) * 64)
        while time.monotonic() < begun_s + seconds:
            before = time.thread_time()
            for name in names[: min(num_cards, 100)]:
                tokens += 1
                watch.change(WorkerProgress(name, tokens, 0, tokens, EngineState(running=16)))
            for number in range(ROWS_PER_S):
                name = names[number % num_cards]
                watch.change(RowsFinished(name, number % num_cards, (row,)))
                watch.change(DeliverRows((row,)))
            watch_s += time.thread_time() - before
            threading.Event().wait(1.0)
        live.stop()
    finally:
        sys.stderr = stderr
    lasted_s = time.monotonic() - begun_s
    assert len(cpu) >= 0.5 * seconds / live_line.DRAW_EVERY_S, "it was drawn too seldom"
    return sum(cpu) / lasted_s, watch_s / lasted_s


if __name__ == "__main__":
    main()
