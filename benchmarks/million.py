"""A million short prompts through one driver: its memory over time, and prompts a second.

    python benchmarks/million.py [--prompts 1000000] [--workers 2]

The whole road of a run but for the model: prompts are read from a JSONL file, go through the
dispatcher to Ray actors, are tokenized there and run in the engine on emulated cards that compute
nothing and take no time, come back as rows, are journaled and written. Answers have one to four
tokens. Prints a table, and one JSON object as its last line: rates are this machine's, never a
card's. `driver` is the process that a user starts; workers and Ray's own processes are beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SLOTS, PROMPT_LEN, CTX_LEN = 64, 16, 64
NUM_SAMPLES = 20
MOST_MB, LEAST_RATE = 600.0, 1500.0
FLAT_MB = 60.0
"""What the driver may have at the end over what it had at a quarter of the way."""


def lay_prompts(path: Path, count: int) -> None:
    """A JSONL file of so many rows."""
    with path.open("w") as file:
        for index in range(count):
            row = {"id": f"row-{index}", "prompt": f"Item {index}", "max_tokens": index % 4 + 1}
            file.write(json.dumps(row) + "\n")


@dataclass
class Watch:
    """Looks at this process each time that another part of the rows is there."""

    count: int
    done: int = 0
    start_s: float = field(default_factory=time.monotonic)
    first_row_s: float = 0.0
    samples: list[tuple[int, float, float]] = field(default_factory=list)
    """Rows, seconds since the first row, MB of this process."""

    def row(self) -> None:
        """Another one is written."""
        if not self.done:
            self.first_row_s = time.monotonic()
        self.done += 1
        if self.done * NUM_SAMPLES // self.count > len(self.samples):
            seconds = time.monotonic() - self.first_row_s
            rss_mb = psutil.Process().memory_info().rss / 1e6
            self.samples.append((self.done, seconds, rss_mb))


def make(folder: Path) -> dict[str, str]:
    """A tiny model, its QPC and an SDK; by another process, so that its memory is not counted."""
    subprocess.run([sys.executable, __file__, "--make", str(folder)], check=True)
    made: dict[str, str] = json.loads((folder / "made.json").read_text())
    return made


def lay_stage(folder: Path) -> None:
    """What `make` leaves behind."""
    sys.path.append(str(ROOT / "tests"))
    from byte_tokens import with_byte_tokenizer
    from tiny_qpcs import TinyQpcs

    tiny = TinyQpcs(folder)
    qpc = tiny.qpc(batch_size=SLOTS, prompt_len=PROMPT_LEN, ctx_len=CTX_LEN)
    model = with_byte_tokenizer(tiny.checkpoint, folder / "model")
    made = {"sdk": str(tiny.sdk.root), "qpc": str(qpc), "model": str(model)}
    (folder / "made.json").write_text(json.dumps(made))


def drive(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run, as `qaic-ray run` makes it."""
    from qaic_ray.cards.inventory import place
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.formats.prompts import prompts_from_file
    from qaic_ray.options import EmulatorOptions, Generation
    from qaic_ray.runs.delivery import RowWriter
    from qaic_ray.runs.driver import Audience
    from qaic_ray.runs.journal import Journal
    from qaic_ray.sampling_params import SamplingParams
    from qaic_ray.worker.worker import CardWorker, WorkerSpec

    made = make(folder)
    (folder / "timing.json").write_text(json.dumps({"mode": "replace"}))
    os.environ["QAIC_EMULATOR_TIMING"] = str(folder / "timing.json")
    source = folder / "prompts.jsonl"
    lay_prompts(source, options.prompts)
    watch = Watch(options.prompts)
    generation = Generation(sampling=SamplingParams(max_tokens=4))
    run_folder = folder / "run"
    run_folder.mkdir()
    with (
        Cluster(options.workers) as cluster,
        Journal(run_folder, {"run": "million"}) as journal,
        RowWriter(run_folder) as write,
    ):
        found = cluster.inventory(
            made["sdk"], EmulatorOptions(cards=4, sku="standard", apps_version="1.20")
        )
        specs = [
            WorkerSpec(qpc=made["qpc"], model=made["model"], generation=generation, **vars(where))
            for where in place(found, devices=range(options.workers))
        ]

        def on_row(row: Any) -> None:
            write(row)
            watch.row()

        before_s = psutil.Process().cpu_times()
        result = cluster.run_prompts(
            prompts_from_file(source),
            specs,
            worker_class=CardWorker,
            audience=Audience(on_row=on_row),
            journal=journal,
        )
        after_s = psutil.Process().cpu_times()
    if not result.ok or result.total.rows != options.prompts or result.span is None:
        raise SystemExit(f"not every row was answered: {result.broken_off}, {result.total}")
    quarter = watch.samples[len(watch.samples) // 4][2]
    used_s = after_s.user + after_s.system - before_s.user - before_s.system
    return {
        "prompts": options.prompts,
        "workers": options.workers,
        "seconds": result.span.seconds,
        "prompts_per_s": options.prompts / result.span.seconds,
        "driver_cpu_us_a_prompt": used_s / options.prompts * 1e6,
        "driver_peak_mb": max(rss_mb for _, _, rss_mb in watch.samples),
        "driver_growth_mb": watch.samples[-1][2] - quarter,
        "samples": watch.samples,
    }


def show(figures: dict[str, Any]) -> None:
    """A table for people."""
    table = Table(title=f"{figures['prompts']:,} prompts, {figures['workers']} workers")
    for column in ("rows", "after s", "rows/s since", "driver MB"):
        table.add_column(column, justify="right")
    last = (0, 0.0)
    for rows, seconds, rss_mb in figures["samples"]:
        rate = (rows - last[0]) / max(seconds - last[1], 1e-9)
        table.add_row(f"{rows:,}", f"{seconds:.1f}", f"{rate:,.0f}", f"{rss_mb:.0f}")
        last = (rows, seconds)
    Console().print(table)
    rate, peak_mb = figures["prompts_per_s"], figures["driver_peak_mb"]
    growth_mb = figures["driver_growth_mb"]
    for words, value, holds in (
        ("prompts a second", rate, rate >= LEAST_RATE),
        ("MB at most in the driver", peak_mb, peak_mb < MOST_MB),
        ("MB more at the end than at a quarter", growth_mb, growth_mb < FLAT_MB),
    ):
        print(f"{value:,.1f} {words}: {'holds' if holds else 'MISSED'}")
    print(f"{figures['driver_cpu_us_a_prompt']:.0f} us of CPU a prompt in the driver")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2, help="up to 4 emulated cards")
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
        figures = drive(folder, options)
    show(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
