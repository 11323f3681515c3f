"""N cards beside one: merged tokens/s, makespan and host CPU of a real run on simulated card time.

    python benchmarks/scaling.py [--cards 8 32] [--seconds 40] [--no-peers]

The product's driver, dispatcher, journal, Ray actors, engines and sessions, on the cards of
`instant_card.py`: every step of a program takes `STEP_MS`, asleep, so that two cores carry many. A
card has 8 slots; answers have a heavy-tailed length (Pareto, shape 1.5, 64 to 1,024 tokens), which
their rows say. All workers are open before the clock starts. Beside it, in the same minutes:

    one engine        a card's engine in this process, without Ray, on a card's share of the prompts
    static            the same actors, every prompt given to one of them beforehand
    ActorPool         ray.util.ActorPool over the same actors, CHUNK prompts a call
    Ray Data          Dataset.map_batches with qaic_ray.CardPredictor, CHUNK prompts a batch

`best possible` is the shortest makespan that cards of one engine's speed can have: all steps, with
every slot taken, over all cards, at the time that a step took the one engine; or the longest row.
`ideal` is the same with steps of exactly `STEP_MS`, and no host. Prints a table, and one JSON
object as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
STEP_MS = 20.0
SLOTS, PROMPT_LEN, CTX_LEN = 8, 32, 1088
SHORTEST, LONGEST, SHAPE = 64, 1024, 1.5
CHUNK = 4 * SLOTS
PROGRAM = {
    "batch_size": SLOTS,
    "prompt_len": PROMPT_LEN,
    "ctx_len": CTX_LEN,
    "vocab_size": 300,
    "num_layers": 2,
    "output": "logits",
    "step_ms": STEP_MS,
}
FLOORS = {8: 0.98, 32: 0.95}
BEST_FLOOR = 0.97


def prompts(num_cards: int, seconds: float) -> list[Any]:
    """As many as keep the cards busy for so long."""
    from qaic_ray.rows import Prompt
    from qaic_ray.sampling_params import SamplingParams

    chance = random.Random(0)
    found: list[Any] = []
    steps = 0.0
    while steps * STEP_MS / 1e3 < seconds * num_cards:
        length = min(LONGEST, int(SHORTEST * chance.paretovariate(SHAPE)))
        sampling = SamplingParams(max_tokens=length, ignore_eos=True)
        found.append(Prompt(len(found), f"Tell me about {len(found)}", sampling=sampling))
        steps += num_steps([found[-1]])
    return found


def num_steps(some: Sequence[Any]) -> float:
    """Of one card with all its slots taken: a prefill each, then a share of every decode step."""
    return sum(1 + (prompt.sampling.max_tokens - 1) / SLOTS for prompt in some)


def best_s(some: Sequence[Any], num_cards: int, step_s: float = STEP_MS / 1e3) -> float:
    """The shortest makespan."""
    longest = max(prompt.sampling.max_tokens for prompt in some)
    return max(num_steps(some) / num_cards, longest) * step_s


def num_tokens(some: Sequence[Any]) -> int:
    """Of all answers."""
    return sum(prompt.sampling.max_tokens for prompt in some)


# -- one engine, and the fleet


def one_engine(stage: dict[str, Any], some: Sequence[Any]) -> tuple[float, float]:
    """Seconds of an engine without Ray, longest first as the dispatcher hands them out; and of a
    step in the mean, its share of the host's work with it."""
    from qaic_ray.engine.engine import Engine
    from qaic_ray.engine.session import Session
    from qaic_ray.engine.steps import Sequence as Row
    from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
    from qaic_ray.sdk import open_sdk

    tokenizer = load_tokenizer(open_checkpoint(stage["model"], weights=False))
    session = Session(open_sdk(Path(stage["sdk"])), Path(stage["qpc"]), [0])
    engine = Engine(session)
    rows = [
        Row(p.index, tuple(tokenizer.encode(p.text)), p.sampling.max_tokens, params=p.sampling)
        for p in sorted(some, key=lambda p: -p.sampling.max_tokens)
    ]
    for row in rows:
        engine.add(row)
    start_s = time.perf_counter()
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - start_s
    session.close()
    work = engine.measurement
    return seconds, seconds / (work.prefill_steps + work.decode_steps)


class AllOpen:
    """The driver's cards, each of which has opened before it begins."""

    def __init__(self, cards: Any) -> None:
        from qaic_ray.dispatch.dispatcher import WorkerLost, WorkerReady

        self._cards = cards
        self._heard: deque[Any] = deque()
        num_open = 0
        while num_open < len(cards.names):
            event = cards.wait(None)
            if isinstance(event, WorkerLost):
                raise SystemExit(f"{event.worker}: {event.error}")
            num_open += isinstance(event, WorkerReady)
            self._heard.append(event)

    def wait(self, timeout_s: float | None) -> Any:
        """See `Cards.wait`."""
        return self._heard.popleft() if self._heard else self._cards.wait(timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cards, name)


def fleet(stage: dict[str, Any], some: Sequence[Any], specs: Sequence[Any]) -> dict[str, Any]:
    """The product, but for the workers' opening."""
    from qaic_ray.cluster.actors import CardActors
    from qaic_ray.runs.delivery import RowWriter
    from qaic_ray.runs.driver import Audience, Driver
    from qaic_ray.runs.journal import Journal
    from qaic_ray.worker.worker import CardWorker

    folder = Path(tempfile.mkdtemp(dir=stage["folder"]))
    with (
        CardActors(specs, CardWorker) as cards,
        Journal(folder, {"run": "scaling"}) as journal,
        RowWriter(folder) as write,
    ):
        ready = AllOpen(cards)
        with host_cpu() as cpu_s:
            result = Driver(ready, some, Audience(on_row=write), journal=journal).run()
    total = result.total
    if not result.ok or total.generated_tokens != num_tokens(some) or result.span is None:
        raise SystemExit(f"not every row was answered in full: {result.broken_off}, {total}")
    return {
        "makespan_s": result.span.seconds,
        "occupancy": total.occupancy,
        "cpu_s_per_1000_prompts": cpu_s[0] / len(some) * 1000,
    }


@contextmanager
def host_cpu() -> Iterator[list[float]]:
    """CPU seconds of this process and all below it, in the list when the block has ended."""
    me = psutil.Process()
    spent = [0.0]
    before = _cpu_s(me)
    yield spent
    after = _cpu_s(me)
    spent[0] = sum(after[key] - before.get(key, 0.0) for key in after)


def _cpu_s(me: psutil.Process) -> dict[tuple[int, float], float]:
    found = {}
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            continue  # it ended while we looked
    return found


# -- what others would do


@contextmanager
def plain_actors(specs: Sequence[Any]) -> Iterator[list[Any]]:
    """The same workers as actors that answer a list at a time, all open."""
    import ray

    from qaic_ray.worker.worker import CardWorker

    class Plain(CardWorker):  # type: ignore[misc]
        """Gives the rows of a call when all are there."""

        def rows(self, some: Sequence[Any]) -> int:
            """How many rows came."""
            return sum(len(part) for part in self.answer(some))

    actor_class = ray.remote(num_cpus=0.1, resources={"QAIC": 1}, max_concurrency=4)(Plain)
    actors = [actor_class.remote(spec) for spec in specs]
    ray.get([actor.open.remote() for actor in actors])
    try:
        yield actors
    finally:
        ray.get([actor.close.remote() for actor in actors])
        for actor in actors:
            ray.kill(actor)


def static(actors: Sequence[Any], some: Sequence[Any]) -> int:
    """Every n-th prompt to the n-th card."""
    import ray

    shares = [some[at :: len(actors)] for at in range(len(actors))]
    calls = [actor.rows.remote(share) for actor, share in zip(actors, shares, strict=True)]
    return sum(ray.get(calls))


def actor_pool(actors: Sequence[Any], some: Sequence[Any]) -> int:
    """Chunks in input order, the next one to whoever is free."""
    from ray.util import ActorPool

    chunks = [some[at : at + CHUNK] for at in range(0, len(some), CHUNK)]
    pool = ActorPool(list(actors))
    return sum(pool.map_unordered(lambda actor, chunk: actor.rows.remote(chunk), chunks))


def ray_data(stage: dict[str, Any], some: Sequence[Any], num_cards: int) -> float:
    """Seconds from the first batch's begin to the last one's end; opening is not counted."""
    import numpy as np
    import ray

    from qaic_ray import CardPredictor

    class Timed(CardPredictor):  # type: ignore[misc]
        """Notes when a batch began and ended."""

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            begun_s = time.monotonic()
            answers = super().__call__(batch)
            return {
                "tokens": answers["generated_tokens"],
                "begun_s": np.full(len(batch["prompt"]), begun_s),
                "ended_s": np.full(len(batch["prompt"]), time.monotonic()),
            }

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 900
    items = [
        {"prompt": p.text, "max_tokens": p.sampling.max_tokens, "ignore_eos": True} for p in some
    ]
    done = (
        ray.data.from_items(items, override_num_blocks=-(-len(items) // CHUNK))
        .map_batches(
            Timed,
            batch_size=CHUNK,
            concurrency=num_cards,
            num_cpus=0.1,
            resources={"QAIC": 1},
            fn_constructor_args=(stage["model"], stage["qpc"]),
            fn_constructor_kwargs={"sdk": stage["sdk"]},
        )
        .to_pandas()
    )
    if int(done["tokens"].sum()) != num_tokens(some):
        raise SystemExit("Ray Data did not answer every row in full")
    return float(done["ended_s"].max() - done["begun_s"].min())


# -- the stage


def make(folder: Path, num_cards: int) -> dict[str, Any]:
    """A tokenizer, a program that computes nothing, and an SDK of so many cards."""
    sys.path.append(str(ROOT / "tests"))
    from byte_tokens import with_byte_tokenizer
    from host_overhead import lay_sdk
    from random_models import write_checkpoint

    checkpoint = write_checkpoint(folder / "tiny", num_hidden_layers=2)
    model = with_byte_tokenizer(checkpoint, folder / "model")
    (folder / "qpc").mkdir()
    (folder / "qpc" / "program.json").write_text(json.dumps(PROGRAM))
    sdk = lay_sdk(folder / "sdk", "1.22", num_cards)
    return {
        "sdk": str(sdk),
        "qpc": str(folder / "qpc"),
        "model": str(model),
        "folder": str(folder),
    }


def measure(num_cards: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one number of cards."""
    from qaic_ray.cards.inventory import place
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.worker.worker import WorkerSpec

    stage = make(folder, num_cards)
    some = prompts(num_cards, options.seconds)
    share = some[::num_cards]
    engine_s, step_s = one_engine(stage, share)
    figures: dict[str, Any] = {
        "cards": num_cards,
        "prompts": len(some),
        "tokens": num_tokens(some),
        "step_ms": step_s * 1e3,
        "ideal_s": best_s(some, num_cards),
        "best_s": best_s(some, num_cards, step_s),
        "engine_tokens_per_s": num_tokens(share) / engine_s,
        "engine_of_best": best_s(share, 1, step_s) / engine_s,
    }
    with Cluster(num_cards) as cluster:
        found = cluster.inventory(stage["sdk"], EmulatorOptions(cards=num_cards))
        specs = [
            WorkerSpec(qpc=stage["qpc"], model=stage["model"], **vars(where))
            for where in place(found)
        ]
        ours = fleet(stage, some, specs)
        figures |= {f"qaic_ray_{name}": value for name, value in ours.items()}
        if not options.no_peers:
            with plain_actors(specs) as actors:
                figures["static_makespan_s"] = timed(lambda: static(actors, some), len(some))
                figures["actor_pool_makespan_s"] = timed(
                    lambda: actor_pool(actors, some), len(some)
                )
            figures["ray_data_makespan_s"] = ray_data(stage, some, num_cards)
    return figures


def timed(call: Callable[[], int], expected: int) -> float:
    """Seconds of a call that gives the number of rows it made."""
    start_s = time.monotonic()
    if call() != expected:
        raise SystemExit("a row is missing")
    return time.monotonic() - start_s


def show(figures: dict[str, Any]) -> None:
    """A table for one number of cards."""
    num_cards = figures["cards"]
    title = (
        f"{num_cards} simulated cards, {STEP_MS:g} ms a step, {SLOTS} slots; "
        f"{figures['prompts']:,} prompts, {figures['tokens']:,} tokens\n"
        f"ideal {figures['ideal_s']:.1f} s; best possible at one engine's {figures['step_ms']:.2f} "
        f"ms a step {figures['best_s']:.1f} s"
    )
    table = Table(title=title, title_justify="left")
    for column in (
        "",
        "makespan s",
        "tokens/s",
        f"of {num_cards} x one engine",
        "best possible/makespan",
    ):
        table.add_column(column, justify="right" if column else "left")
    engine = figures["engine_tokens_per_s"]
    table.add_row("one engine", "", f"{engine:,.1f}", "", f"{figures['engine_of_best']:.2%}")
    for name in ("qaic_ray", "static", "actor_pool", "ray_data"):
        makespan_s = figures.get(f"{name}_makespan_s")
        if makespan_s is None:
            continue
        rate = figures["tokens"] / makespan_s
        cells = (f"{makespan_s:.1f}", f"{rate:,.1f}", f"{rate / num_cards / engine:.2%}")
        table.add_row(name, *cells, f"{figures['best_s'] / makespan_s:.2%}")
    Console(width=max(110, Console().width)).print(table)
    rate = figures["tokens"] / figures["qaic_ray_makespan_s"]
    for what, value, floor in (
        (f"of {num_cards} x one engine", rate / num_cards / engine, FLOORS.get(num_cards)),
        (
            "of the best possible makespan",
            figures["best_s"] / figures["qaic_ray_makespan_s"],
            BEST_FLOOR,
        ),
    ):
        if floor is not None:
            print(f"{value:.2%} {what}, {floor:.0%} promised: {verdict(value >= floor)}")
    print(f"host CPU: {figures['qaic_ray_cpu_s_per_1000_prompts']:.2f} s for 1,000 prompts")


def verdict(holds: bool) -> str:
    """In a word."""
    return "holds" if holds else "MISSED"


def main() -> None:
    """Measure each number of cards, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seconds", type=float, default=40.0, help="of work for every card")
    parser.add_argument("--no-peers", action="store_true", help="leave the others out")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    results = []
    for num_cards in options.cards:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["QAIC_EMULATOR_STATE"] = str(folder / "cards")
            os.environ["QAIC_RAY_LOCKS"] = str(folder / "locks")
            results.append(measure(num_cards, options, folder))
        show(results[-1])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
