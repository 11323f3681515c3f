"""Memory of the emulated card: one and several on one QPC, activation, and the peak of `make demo`.

    .venv/bin/python benchmarks/cpu_memory.py [--cards 1 4] [--numerics fast] [--no-demo]

Each emulated card is a process of its own with the engine of a run, as a worker of a fleet is. All
open one QPC of SmolLM2-135M (mx6, 8 slots, ctx_len 512) one after the other and answer the same
prompts; then memory is counted as PSS, in which a page that n processes share is a share of each.
`make demo` is `qaic-ray demo`; all processes that it starts, Ray's with them, are sampled every
half second. Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cpu import preparation
from cpu.contender import Contender, script
from cpu.memory import PeakWatch, marked_processes, pss_bytes
from rich.console import Console
from rich.table import Table

from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.options import EmulatorOptions
from qaic_ray.pipeline.request import SdkChoice
from qaic_ray.sdk import find_sdk

MODEL = "smollm2-135m"
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
SHAPE = {"precision": "mx6", "batch_size": 8, "prompt_len": 64, "ctx_len": 512}
PROMPT_TOKENS, NEW_TOKENS = 64, 16
MARK_VARIABLE = "QAIC_RAY_BENCHMARK_MARK"
MOST_RATIO, MOST_ACTIVATION_S, MOST_DEMO_BYTES = 1.6, 0.3, 3e9
"""Of four cards beside one; of each activation after the first; of the demo's processes."""


def cards(count: int, qpc: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """So many cards open one QPC, answer, and are weighed."""
    sdk = find_sdk("emulated", EmulatorOptions(cards=count))
    opened, command = [], [sys.executable, script("ours.py")]
    with ExitStack() as stack:
        started = [
            stack.enter_context(Contender(f"card {number}", command, os.environ))
            for number in range(count)
        ]
        for number, card in enumerate(started):
            opened.append(card.open(sdk=str(sdk.root), qpc=str(qpc), device=number))
        for card in started:
            card.ask("decode", prompts=prompts, new_tokens=NEW_TOKENS)
        sizes = [pss_bytes(card.pid) for card in started]
    return {
        "cards": count,
        "pss_bytes": sum(sizes),
        "pss_bytes_of_each": sizes,
        "activation_s": [each["seconds"] for each in opened],
        "import_s": [each["import_s"] for each in opened],
    }


def demo() -> dict[str, Any]:
    """Peak memory of the demo's processes."""
    mark = secrets.token_hex(8)
    environment = {**os.environ, MARK_VARIABLE: mark}
    begun_s = time.monotonic()
    with PeakWatch(partial(marked_processes, MARK_VARIABLE, mark)) as watch:
        done = subprocess.run(
            [sys.executable, "-m", "qaic_ray", "demo", "--json"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise SystemExit(f"The demo failed:\n{done.stderr[-2000:]}")
    return {
        "seconds": time.monotonic() - begun_s,
        "peak_bytes": watch.peak_bytes,
        "at_peak": dict(sorted(watch.at_peak.items(), key=lambda item: -item[1])),
        "samples": watch.samples,
    }


def promises(document: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What is said of a figure: the figure, and the most that it may be."""
    found = []
    by_count = {each["cards"]: each for each in document["cards"]}
    if {1, 4} <= by_count.keys():
        ratio = by_count[4]["pss_bytes"] / by_count[1]["pss_bytes"]
        found.append(("memory of 4 cards, x that of 1", ratio, MOST_RATIO))
    later = [s for each in document["cards"] for s in each["activation_s"][1:]]
    if later:
        found.append(("slowest activation after the first, s", max(later), MOST_ACTIVATION_S))
    if document["demo"] is not None:
        peak_gb = document["demo"]["peak_bytes"] / 1e9
        found.append(("peak memory of the demo, GB", peak_gb, MOST_DEMO_BYTES / 1e9))
    return found


def show(document: dict[str, Any]) -> None:
    """The tables for people."""
    table = Table(title="emulated cards on one QPC", title_justify="left")
    for name in ("cards", "PSS, MB", "of each, MB", "activation, s", "import of the runtime, s"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in document["cards"]:
        table.add_row(
            str(each["cards"]),
            f"{each['pss_bytes'] / 1e6:,.0f}",
            " ".join(f"{size / 1e6:,.0f}" for size in each["pss_bytes_of_each"]),
            " ".join(f"{seconds:.2f}" for seconds in each["activation_s"]),
            " ".join(f"{seconds:.2f}" for seconds in each["import_s"]),
        )
    console = Console(width=max(120, Console().width))
    console.print(table)
    if document["demo"] is not None:
        title = f"make demo: {document['demo']['seconds']:.0f} s; processes at the peak, PSS"
        table = Table("", "MB", title=title, title_justify="left")
        for name, size in document["demo"]["at_peak"].items():
            table.add_row(name, f"{size / 1e6:,.0f}")
        table.add_row("all", f"{document['demo']['peak_bytes'] / 1e6:,.0f}")
        console.print(table)
    for about, figure, most in promises(document):
        verdict = "holds" if figure <= most else "MISSED"
        console.print(f"{about}: {figure:.2f}, at most {most:g}: {verdict}", highlight=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 4], help="1 4")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="exact", help="exact")
    parser.add_argument("--no-demo", action="store_true", help="without `make demo`")
    options = parser.parse_args()
    if min(options.cards) < 1:
        parser.error("--cards are at least 1")
    emulated = EmulatorOptions()
    choice = SdkChoice(find_sdk("emulated", emulated), "emulated", emulated)
    qpc = preparation.program(choice, MODEL, SHAPE)
    tokens = load_tokenizer(open_checkpoint(MODEL, weights=False)).encode(TEXT.read_text("utf-8"))
    starts = range(0, SHAPE["batch_size"] * PROMPT_TOKENS, PROMPT_TOKENS)
    prompts = [tokens[start : start + PROMPT_TOKENS] for start in starts]
    # The demo's cards are those of a user, and read their own job's numerics.
    of_demo = None if options.no_demo else demo()
    os.environ["QAIC_EMULATOR_NUMERICS"] = options.numerics
    with tempfile.TemporaryDirectory() as state:
        os.environ["QAIC_EMULATOR_STATE"] = state
        found = [cards(count, qpc, prompts) for count in options.cards]
    document = {
        "benchmark": "cpu_memory",
        "model": MODEL,
        "shape": SHAPE,
        "numerics": options.numerics,
        "cards": found,
        "demo": of_demo,
    }
    show(document)
    kept = [
        {"about": about, "figure": figure, "at_most": most, "holds": figure <= most}
        for about, figure, most in promises(document)
    ]
    print(json.dumps({**document, "promises": kept}))


if __name__ == "__main__":
    main()
