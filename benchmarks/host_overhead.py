"""Host work between a card's steps, in microseconds, and QEfficient's beside it.

    python benchmarks/host_overhead.py [--peer-python PYTHON] [--steps N] [KIND ...]

The real session and engine run decode steps, all rows running, on the card of `instant_card.py`,
which takes no time: `a step` is from one start of the card to the next, `waits` the part of it in
which the card has nothing to do. Both are medians over blocks of steps. Kinds of rows: `greedy`,
`next_tokens` (the program picks the token), `sampling`, `penalties`, `stop strings`. Our session
has two doors: buffers for every binding (any SDK), and arrays for those that change (from 1.20 on).
PYTHON has QEfficient installed; without it there is no peer, and the table says so. Prints a table,
and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from qaic_ray.engine.engine import Engine
from qaic_ray.engine.session import Session
from qaic_ray.engine.steps import Sequence
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.model.detokenizer import StopFinder
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import EmulatorOptions
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sdk import install_emulated, open_sdk

HERE = Path(__file__).resolve().parent
DOORS = {"buffers": "1.17", "arrays": "1.22"}
"""Our session's two ways to a card, and an SDK that has each."""

VOCABS = (49_152, 128_256)
BATCHES = (1, 16, 64)
PROMPT_LEN, CTX_LEN, NUM_LAYERS = 32, 4096, 32
PROMPT_TOKENS = 24
WARM_UP, BLOCK = 40, 20
MODEL = "smollm2-135m"

GREEDY = SamplingParams()


@dataclass(frozen=True)
class Kind:
    """What rows ask for, and in which programs it is measured."""

    params: SamplingParams = GREEDY
    output: str = "logits"
    batches: tuple[int, ...] = (16,)
    vocabs: tuple[int, ...] = VOCABS


KINDS = {
    "greedy": Kind(batches=BATCHES),
    "next_tokens": Kind(output="next_tokens", batches=BATCHES),
    "sampling": Kind(SamplingParams(temperature=0.8, top_k=50, top_p=0.95), batches=BATCHES),
    "penalties": Kind(
        SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5)
    ),
    # Its tokenizer is SmolLM2's, which knows no token from 49,152 on.
    "stop strings": Kind(SamplingParams(stop=("\nUser:", "<END>")), vocabs=VOCABS[:1]),
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    batch: int
    vocab: int

    @property
    def kind(self) -> Kind:
        """What its rows ask for."""
        return KINDS[self.name]

    @property
    def key(self) -> str:
        """Its name in the JSON object."""
        return f"{self.name}, batch {self.batch}, vocab {self.vocab}"

    @property
    def program(self) -> str:
        """Folder of its program."""
        return f"{self.kind.output}-{self.batch}-{self.vocab}"


def cases(names: Iterable[str]) -> list[Case]:
    """Every line of these kinds of rows."""
    return [Case(n, b, v) for n in names for v in KINDS[n].vocabs for b in KINDS[n].batches]


def lay_programs(folder: Path, wanted: list[Case]) -> Path:
    """A folder with every program that the cases need."""
    for case in wanted:
        program = folder / case.program
        program.mkdir(parents=True, exist_ok=True)
        shape = {
            "batch_size": case.batch,
            "prompt_len": PROMPT_LEN,
            "ctx_len": CTX_LEN,
            "vocab_size": case.vocab,
            "num_layers": NUM_LAYERS,
            "output": case.kind.output,
        }
        (program / "program.json").write_text(json.dumps(shape))
    return folder


def lay_sdk(folder: Path, apps_version: str, num_cards: int = 1) -> Path:
    """An SDK folder whose cards take no time of their own."""
    install_emulated(
        folder, EmulatorOptions(cards=num_cards, sku="standard", apps_version=apps_version)
    )
    shutil.copy(HERE / "instant_card.py", open_sdk(folder).python_paths[0] / "qaicrt.py")
    return folder


def figures(started_ns: list[int], done_ns: list[int]) -> dict[str, float]:
    """Microseconds of a step, and those of it in which the card waits."""
    marks = started_ns[::BLOCK]
    return {
        "step_us": median((b - a) / BLOCK / 1e3 for a, b in pairwise(marks)),
        "waits_us": median((b - a) / 1e3 for a, b in zip(done_ns, started_ns[1:], strict=False)),
    }


def measure(sdk: Path, programs: Path, steps: int, wanted: list[Case]) -> dict[str, Any]:
    """Ours, in this process: a process can load one SDK."""
    results = {}
    for case in wanted:
        session = Session(open_sdk(sdk), programs / case.program, [0])
        results[case.key] = figures(*run(Engine(session), case, steps))
        session.close()
    return results


def run(engine: Engine, case: Case, steps: int) -> tuple[list[int], list[int]]:
    """When each of `steps` decode steps was started and done, after the warm-up."""
    card = importlib.import_module("qaicrt")
    rows = [new_row(engine, key, case.kind.params) for key in range(case.batch)]
    for row in rows:
        engine.add(row, *readers(case.kind.params))
    while min(len(row.output_ids) for row in rows) < WARM_UP:
        engine.step()
    card.ENQUEUED_NS.clear()
    card.COMPLETED_NS.clear()
    for _ in range(steps + 1):
        engine.step()
    started, done = card.ENQUEUED_NS, card.COMPLETED_NS
    if len(started) != steps + 1 or any(row.finish_reason for row in rows):
        raise SystemExit("the engine did not run one decode step of all rows a call")
    if case.kind.params.is_plain:
        tokens = card.rows_of_logits(case.batch, case.vocab).argmax(axis=1).tolist()
        if any(set(row.output_ids[1:]) != {tokens[row.key]} for row in rows):
            raise SystemExit("the engine's tokens are not those of the logits")
    return started, done


def new_row(engine: Engine, key: int, params: SamplingParams) -> Sequence:
    """A row that does not end by itself; row `key` comes to slot `key`."""
    prompt = tuple(range(100 + key, 100 + key + PROMPT_TOKENS))
    limit = engine.new_token_limit(PROMPT_TOKENS, None)
    return Sequence(key, prompt, limit, params=params, seed=key)


def readers(params: SamplingParams) -> list[StopFinder]:
    """What reads a row's text while it runs: nothing, where there is no stop string."""
    return [StopFinder(tokenizer(), params)] if params.stop else []


@cache
def tokenizer() -> Tokenizer:
    """SmolLM2's."""
    return load_tokenizer(open_checkpoint(MODEL, weights=False))


def ours(folder: Path, door: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ours through one door, in a process of its own."""
    sdk = lay_sdk(folder / door, DOORS[door])
    command = [sys.executable, __file__, *options.kinds, "--steps", str(options.steps)]
    return child([*command, "--measure", str(sdk), str(folder / "programs")], os.environ.copy())


def peer(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """QEfficient's loop on the programs that give logits; figures by name of the program."""
    sdk = open_sdk(lay_sdk(folder / "peer", DOORS["arrays"]))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sdk.python_paths))}
    script = HERE / "peers" / "qefficient_overhead.py"
    command = [str(options.peer_python), str(script), str(folder / "programs")]
    command += [str(options.peer_tokenizer or "-"), str(options.steps), str(WARM_UP)]
    return {name: figures(*times) for name, times in child(command, environment).items()}


def child(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The JSON object that a command prints last."""
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with exit code {result.returncode}")
    figures_: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures_


def promise(case: Case, door: str, results: dict[str, Any]) -> tuple[str, float, float] | None:
    """What the project promises of a line: of what, the figure, and the most it may be."""
    step = results[door][case.key]["step_us"]
    if case.name == "next_tokens" and case.batch == 16:
        return "us", step, 60.0
    if case.name == "greedy" and case.key in results["qefficient"]:
        return "x QEfficient", step / results["qefficient"][case.key]["step_us"], 0.5
    greedy = results[door].get(Case("greedy", case.batch, case.vocab).key)
    if case.name == "sampling" and case.batch == 16 and greedy is not None:
        return "x greedy", step / greedy["step_us"], 2.0
    return None


def show(results: dict[str, Any], wanted: list[Case]) -> None:
    """The table for people."""
    title = "us of host work a decode step, all rows running, on a card that takes no time"
    if not results["qefficient"]:
        title += "\n(no --peer-python: QEfficient was not measured)"
    table = Table(title=title)
    table.add_column("rows", no_wrap=True)
    heads = [f"{door}{word}" for door in DOORS for word in ("", ": waits", ": a row")]
    for head in ("batch", "vocab", *heads, "QEfficient", *(f"{door} is" for door in DOORS)):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("at most", no_wrap=True)
    for case in wanted:
        cells = [case.name, str(case.batch), f"{case.vocab:,}"]
        for door in DOORS:
            figure = results[door][case.key]
            values = (figure["step_us"], figure["waits_us"], figure["step_us"] / case.batch)
            cells += [f"{value:,.1f}" for value in values]
        theirs = results["qefficient"].get(case.key)
        cells.append(f"{theirs['step_us']:,.1f}" if theirs else "")
        promises = [promise(case, door, results) for door in DOORS]
        for found in promises:
            missed = " MISSED" if found and found[1] > found[2] else ""
            cells.append(f"{found[1]:.2f}{missed}" if found else "")
        cells.append(f"{promises[0][2]:g} {promises[0][0]}" if promises[0] else "")
        table.add_row(*cells)
    Console(width=max(190, Console().width)).print(table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--steps", type=int, default=200, help="decode steps of each line")
    parser.add_argument("--peer-python", type=Path, help="a Python that has QEfficient")
    parser.add_argument(
        "--peer-tokenizer", type=Path, help="a tokenizer for it, where not a plain object"
    )
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        parser.error(f"there is no kind {', '.join(sorted(unknown))}; kinds: {', '.join(KINDS)}")
    options.kinds = options.kinds or list(KINDS)
    return options


def main() -> None:
    """Measure both doors and the peer, and print."""
    options = arguments()
    wanted = cases(options.kinds)
    if options.measure:
        sdk, programs = options.measure
        print(json.dumps(measure(sdk, programs, options.steps, wanted)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lay_programs(folder / "programs", wanted)
        results: dict[str, Any] = {door: ours(folder, door, options) for door in DOORS}
        of_program = peer(folder, options) if options.peer_python else {}
    results["qefficient"] = {
        case.key: of_program[case.program]
        for case in wanted
        if case.program in of_program and case.name == "greedy"
    }
    show(results, wanted)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
