"""Host work between a card's steps, in microseconds, and QEfficient's beside it.

    python benchmarks/host_overhead.py [--peer-python PYTHON] [--steps N] [--step-ms MS] [KIND ...]

The real session and engine run decode steps, all rows running, on the card of `instant_card.py`,
which takes no time: `a step` is from one start of the card to the next, `waits` the part of it in
which the card has nothing to do. Both are medians; `p90` is of the steps, too.
With `--step-ms` the card takes so long, asleep, a step is what it waits, and the host's caches are
as cold as beside a real card. Kinds of rows: `greedy`, `next_tokens` (the program picks the token),
`sampling` and other settings of it, `stop strings`, grammars (whose masks are made while the card
works: see them with `--step-ms`); `by numpy` is without the compiled kernels.
Each line goes in turns with greedy rows of its batch and vocabulary, and `x greedy` is the median
ratio of the turns, so that a machine that does other things as well slows both. Our session
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
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from qaic_ray.engine.compiled.loader import KERNELS, KernelLoader
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.limits.grammars import Grammars
from qaic_ray.engine.sampler import Selector
from qaic_ray.engine.session import Session
from qaic_ray.engine.steps import Sequence
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.model.detokenizer import StopFinder
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import EmulatorOptions
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sampling_params.structured_outputs import StructuredOutputs
from qaic_ray.sdk import install_emulated, open_sdk

HERE = Path(__file__).resolve().parent
DOORS = {"buffers": "1.17", "arrays": "1.22"}
"""Our session's two ways to a card, and an SDK that has each."""

VOCABS = (49_152, 128_256)
BATCHES = (1, 16, 64)
PROMPT_LEN, CTX_LEN, NUM_LAYERS = 32, 4096, 32
PROMPT_TOKENS = 24
WARM_UP, TURNS = 40, 10
MODEL = "smollm2-135m"

GREEDY = SamplingParams()
SAMPLING = SamplingParams(temperature=0.8, top_k=50, top_p=0.95)
PENALTIES = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5)
FEW, MOST = StructuredOutputs(regex="[0-9]*"), StructuredOutputs(regex="(?s:.*)")


@dataclass(frozen=True)
class Kind:
    """What rows ask for, and in which programs it is measured."""

    params: SamplingParams = GREEDY
    output: str = "logits"
    one: SamplingParams | None = None
    """What the first row asks for in place of that."""
    by_numpy: bool = False
    batches: tuple[int, ...] = (16,)
    vocabs: tuple[int, ...] = VOCABS


KINDS = {
    "greedy": Kind(batches=BATCHES),
    "next_tokens": Kind(output="next_tokens", batches=BATCHES),
    "sampling": Kind(SAMPLING, batches=BATCHES),
    "sampling by numpy": Kind(SAMPLING, by_numpy=True),
    "temperature and top_p": Kind(SamplingParams(temperature=0.6, top_p=0.9)),
    "temperature alone": Kind(SamplingParams(temperature=1.0)),
    "min_p": Kind(SamplingParams(temperature=1.0, min_p=0.05)),
    "penalties": Kind(PENALTIES),
    "penalties by numpy": Kind(PENALTIES, by_numpy=True),
    "sampling with penalties": Kind(replace(PENALTIES, temperature=0.8, top_k=50, top_p=0.95)),
    "biases": Kind(SamplingParams(logit_bias=tuple((token, 0.5) for token in range(300)))),
    "grammar of few tokens": Kind(SamplingParams(structured_outputs=FEW)),
    "grammar of most tokens": Kind(SamplingParams(structured_outputs=MOST)),
    "beside one grammar": Kind(one=SamplingParams(structured_outputs=MOST)),
    # Its tokenizer is SmolLM2's, which knows no token from 49,152 on.
    "stop strings": Kind(SamplingParams(stop=("\nUser:", "<END>")), vocabs=VOCABS[:1]),
}
PROMISED = {
    name
    for name, kind in KINDS.items()
    if not (name == "greedy" or kind.by_numpy or kind.one or kind.params.has_limits)
}
"""Kinds that are held to the work of greedy rows."""


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
    def greedy(self) -> Case:
        """Greedy rows of the same shape."""
        return replace(self, name="greedy")

    @property
    def program(self) -> str:
        """Folder of its program."""
        return f"{self.kind.output}-{self.batch}-{self.vocab}"


def cases(names: Iterable[str]) -> list[Case]:
    """Every line of these kinds of rows."""
    return [Case(n, b, v) for n in names for v in KINDS[n].vocabs for b in KINDS[n].batches]


def lay_programs(folder: Path, wanted: list[Case], step_ms: float = 0.0) -> Path:
    """A folder with every program that the cases need, and with those of greedy rows beside."""
    for case in {*wanted, *(case.greedy for case in wanted)}:
        program = folder / case.program
        program.mkdir(parents=True, exist_ok=True)
        shape = {
            "batch_size": case.batch,
            "prompt_len": PROMPT_LEN,
            "ctx_len": CTX_LEN,
            "vocab_size": case.vocab,
            "num_layers": NUM_LAYERS,
            "output": case.kind.output,
            "step_ms": step_ms,
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


def step_times(started_ns: list[int], done_ns: list[int], step_ms: float) -> list[float]:
    """Microseconds of each step, or of what a card waits that takes a time of its own."""
    if step_ms:
        return waits(started_ns, done_ns)
    return [(b - a) / 1e3 for a, b in pairwise(started_ns)]


def waits(started_ns: list[int], done_ns: list[int]) -> list[float]:
    """Microseconds of each step in which the card has nothing to do."""
    return [(b - a) / 1e3 for a, b in zip(done_ns, started_ns[1:], strict=False)]


def figures(started_ns: list[int], done_ns: list[int], step_ms: float = 0.0) -> dict[str, float]:
    """Microseconds of a step, and those of it in which the card waits."""
    steps = step_times(started_ns, done_ns, step_ms)
    return {
        "step_us": median(steps),
        "p90_us": quantiles(steps, n=10)[-1],
        "waits_us": median(waits(started_ns, done_ns)),
    }


def measure(sdk: Path, programs: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ours, in this process: a process can load one SDK."""
    KERNELS.wait()
    results = {}
    for case in cases(options.kinds):
        line, greedy = (Line(sdk, programs, each) for each in (case, case.greedy))
        ratios = []
        for _ in range(TURNS):
            beside = median(greedy.turn(options.steps // TURNS, options.step_ms))
            ratios.append(median(line.turn(options.steps // TURNS, options.step_ms)) / beside)
        results[case.key] = figures(line.started, line.done, options.step_ms)
        results[case.key]["x_greedy"] = median(ratios)
        line.close()
        greedy.close()
    return results


class Line:
    """One line of the table while it is measured."""

    def __init__(self, sdk: Path, programs: Path, case: Case) -> None:
        self.case, self.started, self.done = case, [], []
        self._session = Session(open_sdk(sdk), programs / case.program, [0])
        loader = KernelLoader(sys.maxsize) if case.kind.by_numpy else KERNELS
        self._engine = Engine(self._session, selector=Selector(case.batch, loader=loader))
        asked = [case.kind.params] * case.batch
        asked[0] = case.kind.one or asked[0]
        self._rows = [
            new_row(self._engine, key, params, case.vocab) for key, params in enumerate(asked)
        ]
        for row in self._rows:
            self._engine.add(row, *readers(case.kind.params))
        while min(len(row.output_ids) for row in self._rows) < WARM_UP:
            self._engine.step()

    def turn(self, steps: int, step_ms: float) -> list[float]:
        """Run so many decode steps; their times."""
        card = importlib.import_module("qaicrt")
        card.ENQUEUED_NS.clear()
        card.COMPLETED_NS.clear()
        for _ in range(steps + 1):
            self._engine.step()
        started, done = card.ENQUEUED_NS.copy(), card.COMPLETED_NS.copy()
        if len(started) != steps + 1 or any(row.finish_reason for row in self._rows):
            raise SystemExit("the engine did not run one decode step of all rows a call")
        self.started += started
        self.done += done
        return step_times(started, done, step_ms)

    def close(self) -> None:
        """Check the tokens of greedy rows, and give the card back."""
        if self.case.kind.params.is_plain and self.case.kind.one is None:
            card = importlib.import_module("qaicrt")
            logits = card.rows_of_logits(self.case.batch, self.case.vocab)
            tokens = logits.argmax(axis=1).tolist()
            if any(set(row.output_ids[1:]) != {tokens[row.key]} for row in self._rows):
                raise SystemExit("the engine's tokens are not those of the logits")
        self._session.close()


def new_row(engine: Engine, key: int, params: SamplingParams, vocab: int) -> Sequence:
    """A row that does not end by itself; row `key` comes to slot `key`."""
    prompt = tuple(range(100 + key, 100 + key + PROMPT_TOKENS))
    limit = engine.new_token_limit(PROMPT_TOKENS, None)
    form = params.structured_outputs
    guide = None if form is None else grammars(vocab).guide(form)
    return Sequence(key, prompt, limit, params=params, seed=key, guide=guide)


@cache
def grammars(vocab: int) -> Grammars:
    """Of SmolLM2's tokenizer, for logits of this width."""
    return Grammars(lambda: tokenizer().json_text, (), vocab)


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
    command += ["--step-ms", str(options.step_ms)]
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
    if case.name in PROMISED and case.batch == 16:
        return "x greedy", results[door][case.key]["x_greedy"], 2.0
    return None


def show(results: dict[str, Any], wanted: list[Case]) -> None:
    """The table for people."""
    title = "us of host work a decode step, all rows running, on a card that takes no time"
    if not results["qefficient"]:
        title += "\n(no --peer-python: QEfficient was not measured)"
    table = Table(title=title)
    table.add_column("rows", no_wrap=True)
    heads = [f"{door}{word}" for door in DOORS for word in ("", ": p90", ": x greedy")]
    for head in ("batch", "vocab", *heads, "QEfficient", *(f"{door} is" for door in DOORS)):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("at most", no_wrap=True)
    for case in wanted:
        cells = [case.name, str(case.batch), f"{case.vocab:,}"]
        for door in DOORS:
            figure = results[door][case.key]
            cells += [f"{figure['step_us']:,.1f}", f"{figure['p90_us']:,.1f}"]
            cells.append(f"{figure['x_greedy']:.2f}")
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
    parser.add_argument(
        "--steps", type=int, default=200, help="decode steps of each line, in turns"
    )
    parser.add_argument("--step-ms", type=float, default=0.0, help="what a step takes the card")
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
        print(json.dumps(measure(sdk, programs, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lay_programs(folder / "programs", wanted, options.step_ms)
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
