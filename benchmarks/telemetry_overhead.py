"""What metrics and the report's data cost: merged tokens/s with them and without, in turns.

    python benchmarks/telemetry_overhead.py [--cards 8] [--pairs 5] [--seconds 15]

The product's driver, dispatcher, journal, actors, engines and sessions, on the cards of
`instant_card.py` as in `scaling.py`: every step takes 20 ms, asleep, so that two cores carry eight
cards of 8 slots. A run with metrics records each request, looks at its engines every second and at
the cards every ten, and Ray exports all of it; its driver keeps what happens and adds rows up for
the report, and the power of the boards is asked for. Times of rows and tokens are in both:
`host_overhead.py` has what they cost a step. Each pair goes once in either order, and its ratio
is of the tokens/s with metrics to those without; the median of the ratios is what counts. Prints a
table, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from scaling import SLOTS, STEP_MS, AllOpen, host_cpu, make, num_tokens, prompts, verdict

FLOOR = 0.99


def one_run(folder: Path, specs: Sequence[Any], some: Sequence[Any], name: str) -> dict[str, float]:
    """Tokens/s and host CPU of one run; metrics where its specs say so."""
    from qaic_ray.cluster.actors import CardActors
    from qaic_ray.cluster.monitoring.ray_metrics import recorded_run
    from qaic_ray.report.statistics import RowStatistics
    from qaic_ray.runs.delivery import RowWriter
    from qaic_ray.runs.driver import Audience, Driver
    from qaic_ray.runs.history import PowerWatch, RunHistory
    from qaic_ray.runs.journal import Journal
    from qaic_ray.runs.metering import metered
    from qaic_ray.sdk import open_sdk
    from qaic_ray.telemetry.card_lines import board_watts
    from qaic_ray.telemetry.recorder import NoSink, RunRecorder
    from qaic_ray.worker.worker import CardWorker

    def fault(text: str) -> None:
        raise SystemExit(text)

    run_folder = Path(tempfile.mkdtemp(dir=folder))
    is_recorded = specs[0].metrics
    with (
        CardActors(specs, CardWorker) as cards,
        Journal(run_folder, {"run": name}) as journal,
        RowWriter(run_folder) as write,
        recorded_run(name, fault)
        if is_recorded
        else nullcontext(RunRecorder(NoSink())) as recorder,
        ExitStack() as stack,
    ):
        ready = AllOpen(cards)
        audience = Audience(on_row=write)
        if is_recorded:
            statistics, history = (
                RowStatistics(),
                stack.enter_context(RunHistory(run_folder, fault)),
            )
            lines, qids = open_sdk(Path(specs[0].sdk_root)).card_lines, range(len(specs))
            every_s = specs[0].timeouts.power_s
            stack.enter_context(
                PowerWatch(lambda: board_watts(lines(), qids), history, every_s, fault)
            )

            def on_row(row: Any) -> None:
                write(row)
                statistics.add(row)

            audience = Audience(on_row=on_row, on_event=history.happened)
            audience = metered(audience, recorder)
        with host_cpu() as cpu_s:
            result = Driver(ready, some, audience, journal=journal).run()
    if not result.ok or result.span is None or result.total.generated_tokens != num_tokens(some):
        raise SystemExit(f"not every row was answered in full: {result.broken_off}")
    return {
        "tokens_per_s": num_tokens(some) / result.span.seconds,
        "cpu_s_per_1000_prompts": cpu_s[0] / len(some) * 1000,
    }


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both runs of each pair."""

    from qaic_ray.cards.inventory import place
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.worker.worker import WorkerSpec

    stage = make(folder, options.cards)
    some = prompts(options.cards, options.seconds)
    found = []
    with Cluster(options.cards) as cluster:
        nodes = cluster.inventory(stage["sdk"], EmulatorOptions(cards=options.cards))
        plain = [
            WorkerSpec(qpc=stage["qpc"], model=stage["model"], **vars(where))
            for where in place(nodes)
        ]
        recorded = [replace(spec, metrics=True) for spec in plain]
        one_run(folder, plain, some[: options.cards], "warm-up")
        for number in range(options.pairs):
            pair: dict[str, Any] = {}
            ways = [("with", recorded), ("without", plain)]
            for way, specs in ways if number % 2 else reversed(ways):
                pair[way] = one_run(folder, specs, some, f"{way}-{number}")
            pair["ratio"] = pair["with"]["tokens_per_s"] / pair["without"]["tokens_per_s"]
            found.append(pair)
    return found


def show(pairs: Sequence[dict[str, Any]], ratio: float, num_cards: int) -> None:
    """The table for people."""
    title = f"{num_cards} simulated cards, {STEP_MS:g} ms a step, {SLOTS} slots"
    table = Table(title=title, title_justify="left")
    table.add_column("pair")
    for column in ("tokens/s with", "without", "ratio", "host CPU s/1,000 with", "without"):
        table.add_column(column, justify="right")
    for number, pair in enumerate(pairs):
        table.add_row(
            str(number + 1),
            f"{pair['with']['tokens_per_s']:,.1f}",
            f"{pair['without']['tokens_per_s']:,.1f}",
            f"{pair['ratio']:.4f}",
            f"{pair['with']['cpu_s_per_1000_prompts']:.2f}",
            f"{pair['without']['cpu_s_per_1000_prompts']:.2f}",
        )
    Console(width=max(100, Console().width)).print(table)
    print(f"median ratio {ratio:.4f}, {FLOOR:.2f} promised: {verdict(ratio >= FLOOR)}")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="of work for every card")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QAIC_EMULATOR_STATE"] = str(folder / "cards")
        os.environ["QAIC_RAY_LOCKS"] = str(folder / "locks")
        pairs = measure(folder, options)
    ratio = median(pair["ratio"] for pair in pairs)
    show(pairs, ratio, options.cards)
    print(json.dumps({"cards": options.cards, "pairs": pairs, "median_ratio": ratio}))


if __name__ == "__main__":
    main()
