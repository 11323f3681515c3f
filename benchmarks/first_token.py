#!/usr/bin/env python3
"""Seconds from `qaic-ray run MODEL "prompt"` to the first token on a terminal.

Three cases, each by its own command: nothing is made (export with its check, compile, Ray, card),
all is made, and a Ray is up too. The model is fetched before, outside the clock; the cache is one
of its own. Prints a table, and last one line of JSON.

    .venv/bin/python benchmarks/first_token.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL, PROMPT, FIRST = "smollm2-135m", "The capital of France is", b"Paris"
COMMAND = [sys.executable, "-m", "qaic_ray"]


def environment(folder: Path) -> dict[str, str]:
    """That of a user with a cache of their own, whose Ray asks for its token."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return {**kept, "QAIC_RAY_CACHE": str(folder / "cache"), "QAIC_RAY_SDK": "emulated"}


def first_token_s(folder: Path, *more: str) -> float:
    """Run the command on a terminal; raises where its answer never came."""
    began_s, first_s, seen = time.monotonic(), None, b""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "run", MODEL, PROMPT, *more],
        cwd=folder, env=environment(folder), stdin=theirs, stdout=theirs, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        while True:
            try:
                piece = os.read(ours, 2**16)
            except OSError:  # the terminal's other end is closed
                break
            seen += piece
            if first_s is None and FIRST in seen:
                first_s = time.monotonic() - began_s
    os.close(ours)
    if process.returncode or first_s is None:
        raise SystemExit(f"The command failed:\n{seen.decode(errors='replace')}")
    return first_s


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by case."""
    seconds: dict[str, list[float]] = {"nothing made": [], "all made": [], "a Ray is up": []}
    first_token_s(folder)  # fetches the model
    for _ in range(rounds):
        shutil.rmtree(folder / "cache" / "programs")
        seconds["nothing made"].append(first_token_s(folder))
        seconds["all made"].append(first_token_s(folder))
    try:
        first_token_s(folder, "--keep-ray")
        for _ in range(rounds):
            seconds["a Ray is up"].append(first_token_s(folder, "--keep-ray"))
    finally:
        subprocess.run([*COMMAND, "ray", "stop"], env=environment(folder), check=False)
    return seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        seconds = measure(Path(name), options.rounds)
    print(f"{'first token after':20} {'median s':>9}  rounds")
    for case, values in seconds.items():
        rounds = " ".join(f"{value:.1f}" for value in values)
        print(f"{case:20} {statistics.median(values):9.1f}  {rounds}")
    print(json.dumps({"model": MODEL, "cpus": os.cpu_count(), "first_token_s": seconds}))


if __name__ == "__main__":
    main()
