"""What the token loop makes of a card: full slots, shared prefixes, drafted tokens.

    python benchmarks/engine.py [PART ...]

`occupancy`: 256 prompts whose prompt and answer lengths have a heavy tail, on 16 slots of an
emulated card that computes nothing and takes the stated time on a clock of its own; beside it what
static batches of the same rows would reach. `prefix`: SmolLM2 on an emulated card, 64 prompts with
the same 300 tokens first, with and without prefix reuse. `speculation`: SmolLM2 plain, with prompt
lookup, and with a draft of its own weights as MXFP6. `rows`: SmolLM2, the main job's chat prompts
with 1, 4 and 8 rows a prefill, in alternating runs. Real session, no Ray. Prints a table, and one
JSON object as its last line; times are simulated or this machine's, no card's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from qaic_ray.contract import Specialization
from qaic_ray.engine.batching.stalls import MAX_STALL_S
from qaic_ray.engine.drafts import DraftProgram, PromptLookup
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.session import Session
from qaic_ray.engine.steps import Sequence
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import find_sdk

TIMING = "QAIC_EMULATOR_TIMING"
MODEL = "smollm2-135m"
PROMPTS = Path(__file__).resolve().parents[1] / "jobs" / "prompts" / "english.jsonl"

# What a step of a card is said to take: reading 7B weights as MXFP6, and its tokens' computing.
STEP_S, TOKEN_S = 0.060, 0.002
TIME_MODEL = f"simulated: {STEP_S} s a step and {TOKEN_S} s a token of it"
NUM_ROWS, NUM_SLOTS = 256, 16
MEDIAN_PROMPT, MEDIAN_ANSWER, SIGMA = 100, 64, 1.0

NUM_SHARING, PREFIX_TOKENS, OWN_TOKENS, ANSWER_TOKENS = 64, 300, 24, 16

NUM_DRAFTED, NUM_DRAFTED_ROWS, DRAFTED_ANSWER_TOKENS = 4, 8, 48
PREFILL_ROWS, ROUNDS, SHARED_ANSWER_TOKENS = (1, 4, 8), 3, 32

DRAFT_SHARE = 0.1
"""What a step of the draft program is said to take of a step of the other."""

LIMITS = {
    "occupancy": ("at least", 0.95),
    "longest_stall_s": ("at most", MAX_STALL_S),
    "texts_identical": ("at least", True),
}


def qaic_ray(*arguments: str) -> dict[str, Any]:
    """A command of ours; the JSON object that it prints last."""
    command = [str(Path(sys.executable).with_name("qaic-ray")), *arguments, "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with exit code {result.returncode}")
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


@dataclass(frozen=True)
class Shape:
    """A QPC of the model; with `num_speculative_tokens` it checks so many drafted ones a step."""

    batch_size: int
    prompt_len: int
    ctx_len: int
    precision: str = "mx6"
    num_cores: int = 14
    num_speculative_tokens: int = 0
    prefill_rows: int = 1


def build(folder: Path, root: Path, shape: Shape) -> Path:
    """Export the model, once for each form, and compile it."""
    logits = "num_logits_to_keep" if shape.num_speculative_tokens else "last"
    exported = folder / f"{MODEL}-{logits}-kv"
    if not exported.exists():
        options = ("--continuous-batching", "--verify", "off", "--logits", logits)
        qaic_ray("export", "--model-name", MODEL, *options, "--output", str(exported))
    named = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(shape).items()]
    where = ("--sdk", str(root), "--output", str(folder / "qpc"))
    document = qaic_ray("compile", str(exported), *named, *where)
    return Path(document["variants"][0]["path"])


@contextmanager
def opened(
    folder: Path, shape: Shape, *, computes: bool = True, numerics: str = "exact"
) -> Iterator[Session]:
    """A session on an emulated card, or on one that answers at once by a rule."""
    card = EmulatorOptions(cards=1, sku="standard", apps_version="1.22", numerics=numerics)
    sdk = find_sdk("emulated", card)
    qpc = build(folder, sdk.root, shape)
    os.environ.pop(TIMING, None)
    if not computes:
        (folder / "timing.json").write_text(json.dumps({"mode": "replace"}))
        os.environ[TIMING] = str(folder / "timing.json")
    session = Session(sdk, qpc, [0])
    try:
        yield session
    finally:
        session.close()


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class SimulatedCard:
    """A session whose steps take the stated time, or a share of it, on a simulated clock."""

    def __init__(self, session: Session, clock: Clock, share: float = 1.0) -> None:
        self._session, self._clock, self._share = session, clock, share
        self.contract, self.specializations = session.contract, session.specializations
        self.emits_tokens, self.input_dtype = session.emits_tokens, session.input_dtype

    def run(
        self,
        shape: Specialization,
        inputs: Mapping[str, Any],
        meanwhile: Callable[[], None] | None = None,
    ) -> Any:
        """Execute once."""
        num_tokens = shape.batch_size * shape.seq_len
        self._clock.now_s += self._share * (STEP_S + TOKEN_S * num_tokens)
        return self._session.run(shape, inputs, meanwhile)


class Watch:
    """Counts, from outside, what an engine's rows get; a row stalls between two of its tokens."""

    def __init__(self, engine: Engine, rows: list[Sequence], clock: Callable[[], float]) -> None:
        self._engine, self._rows, self._clock = engine, rows, clock
        self._last_s: dict[Sequence, float] = {}
        self.tokens_while_queued = self.steps_while_queued = 0
        self.longest_stall_s = 0.0

    def step(self) -> None:
        """One step of the engine."""
        start_s = self._clock()
        num_decoded = self._engine.measurement.decode_steps
        before = [len(row.output_ids) for row in self._rows]
        self._engine.step()
        after = [len(row.output_ids) for row in self._rows]
        grown = [row for row, a, b in zip(self._rows, before, after, strict=True) if b > a]
        if self._engine.measurement.decode_steps > num_decoded and self._engine.batcher.waiting:
            self.steps_while_queued += 1
            self.tokens_while_queued += len(grown)
        for row in grown:
            stall_s = start_s - self._last_s.get(row, start_s)
            self.longest_stall_s = max(self.longest_stall_s, stall_s)
            self._last_s[row] = self._clock()


def heavy_tailed(rng: np.random.Generator, median: int, most: int) -> npt.NDArray[np.int64]:
    """Lengths of `NUM_ROWS` rows, log-normal, from 1 to `most`."""
    drawn = rng.lognormal(np.log(median), SIGMA, NUM_ROWS).astype(np.int64)
    return np.clip(drawn, 1, most)


def occupancy(folder: Path) -> dict[str, Any]:
    """Every row is there from the start; answers end by length alone."""
    rng, ctx_len = np.random.default_rng(0), 1024
    prompts = heavy_tailed(rng, MEDIAN_PROMPT, ctx_len - 1)
    wanted = heavy_tailed(rng, MEDIAN_ANSWER, ctx_len)
    with opened(folder, Shape(NUM_SLOTS, 128, ctx_len), computes=False) as session:
        clock = Clock()
        engine = Engine(SimulatedCard(session, clock), clock, max_stall_s=MAX_STALL_S)
        rows = []
        for key, (length, answer) in enumerate(zip(prompts.tolist(), wanted.tolist(), strict=True)):
            ids = tuple(rng.integers(100, 40_000, length).tolist())
            rows.append(Sequence(key, ids, engine.new_token_limit(length, answer)))
            engine.add(rows[-1])
        watch = Watch(engine, rows, clock)
        while engine.busy:
            watch.step()
    work = engine.measurement
    answers = [row.max_new_tokens for row in rows]
    if [len(row.output_ids) for row in rows] != answers:
        raise SystemExit("a row did not get as many tokens as it was to get")
    waves = [answers[at : at + NUM_SLOTS] for at in range(0, NUM_ROWS, NUM_SLOTS)]
    return {
        "time_model": TIME_MODEL,
        "decode_steps": work.decode_steps,
        "prefill_steps": work.prefill_steps,
        "occupancy": watch.tokens_while_queued / (NUM_SLOTS * watch.steps_while_queued),
        "occupancy_to_the_end": work.occupancy,
        "occupancy_of_static_batches": sum(answers) / (NUM_SLOTS * sum(map(max, waves))),
        "longest_stall_s": watch.longest_stall_s,
        "ttft_median_s": work.ttft_median_s,
        "simulated_s": clock.now_s,
        "tokens_per_s": sum(answers) / clock.now_s,
    }


def prompt_texts() -> list[str]:
    """The main job's prompts."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def run_all(engine: Engine, rows: list[Sequence]) -> float:
    """Wall seconds to answer the rows, all there from the start."""
    start_s = time.perf_counter()
    for row in rows:
        engine.add(row)
    while engine.busy:
        engine.step()
    return time.perf_counter() - start_s


def prefix(folder: Path) -> dict[str, Any]:
    """The same rows twice on one card, greedy: every token must be the same."""
    tokenizer = load_tokenizer(open_checkpoint(MODEL, weights=False))
    texts = prompt_texts()[:NUM_SHARING]
    shared = tokenizer.encode("\n\n".join(texts))[:PREFIX_TOKENS]
    prompts = [(*shared, *tokenizer.encode(text)[:OWN_TOKENS]) for text in texts]
    results: dict[str, Any] = {}
    answers = []
    with opened(folder, Shape(8, 64, 512)) as session:
        for name, reuse in (("without", False), ("with", True)):
            engine = Engine(session, prefix_reuse=reuse)
            rows = [Sequence(key, ids, ANSWER_TOKENS) for key, ids in enumerate(prompts)]
            wall_s = run_all(engine, rows)
            work = engine.measurement
            results[name] = {
                "wall_s": wall_s,
                "prefill_steps": work.prefill_steps,
                "prefill_s": work.prefill_s,
                "decode_steps": work.decode_steps,
                "reused_tokens": work.reused_tokens,
                "ttft_median_s": work.ttft_median_s,
            }
            answers.append([row.output_ids for row in rows])
    keys = ("wall_s", "prefill_steps", "prefill_s", "ttft_median_s")
    ratios = {f"{key}_ratio": results["without"][key] / results["with"][key] for key in keys}
    return {**results, **ratios, "texts_identical": answers[0] == answers[1]}


def speculation(folder: Path) -> dict[str, Any]:
    """Chat prompts one at a time, greedy: every token must be that of plain decoding."""
    # Half of the card's NSPs each; the draft is the same model with coarser weights.
    plain = Shape(1, 64, 512, precision="fp16", num_cores=7)
    drafting = replace(plain, num_speculative_tokens=NUM_DRAFTED)
    results: dict[str, Any] = {}
    with opened(folder, plain) as session:
        clock = Clock()
        results["plain"] = decoded(Engine(SimulatedCard(session, clock), clock), clock)
    with (
        opened(folder, drafting) as session,
        opened(folder, replace(plain, precision="mx6")) as draft,
    ):
        clock = Clock()
        engine = Engine(SimulatedCard(session, clock), clock, proposer=PromptLookup())
        results["prompt lookup"] = decoded(engine, clock)
        clock = Clock()
        proposer = DraftProgram(SimulatedCard(draft, clock, DRAFT_SHARE), num_rows=1)
        engine = Engine(SimulatedCard(session, clock), clock, proposer=proposer)
        results["draft"] = decoded(engine, clock)
    answers = [figures.pop("answers") for figures in results.values()]
    for figures in results.values():
        figures["times_plain"] = figures["tokens_per_s"] / results["plain"]["tokens_per_s"]
    return {
        "time_model": f"{TIME_MODEL}; of the draft {DRAFT_SHARE} of it",
        **results,
        "texts_identical": all(answer == answers[0] for answer in answers),
    }


def rows_together(folder: Path) -> dict[str, Any]:
    """Chat prompts on a card of eight slots, greedy: every token must be the same."""
    texts = prompt_texts()
    every: dict[int, list[dict[str, float]]] = {count: [] for count in PREFILL_ROWS}
    answers = []
    with ExitStack() as stack:
        # All programs are on one card, each on NSPs of its own.
        sessions = {
            count: stack.enter_context(
                opened(folder, Shape(8, 64, 512, num_cores=4, prefill_rows=count), numerics="fast")
            )
            for count in PREFILL_ROWS
        }
        for session in sessions.values():  # the first run compiles kernels and reads weights
            run_all(Engine(session), chats(texts[:8], 2))
        for number in range(ROUNDS):
            turn = PREFILL_ROWS if number % 2 == 0 else PREFILL_ROWS[::-1]
            for count in turn:
                engine, rows = Engine(sessions[count]), chats(texts, SHARED_ANSWER_TOKENS)
                wall_s = run_all(engine, rows)
                work = engine.measurement
                figures = {
                    "wall_s": wall_s,
                    "prefill_s": work.prefill_s,
                    "decode_s": work.decode_s,
                    "prefill_steps": work.prefill_steps,
                    "decode_steps": work.decode_steps,
                    "ttft_median_s": work.ttft_median_s,
                }
                every[count].append(figures)
                answers.append([row.output_ids for row in rows])
    medians = {
        count: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for count, runs in every.items()
    }
    results: dict[str, Any] = {f"{count} a prefill": found for count, found in medians.items()}
    for count in PREFILL_ROWS[1:]:
        results[f"{count} a prefill"] |= {
            f"{key}_ratio": statistics.median(
                one[key] / many[key] for one, many in zip(every[1], every[count], strict=True)
            )
            for key in ("wall_s", "prefill_s", "ttft_median_s")
        }
    return {**results, "texts_identical": all(answer == answers[0] for answer in answers)}


def chats(texts: list[str], num_tokens: int) -> list[Sequence]:
    """Rows of chat prompts, each with as many tokens of an answer at most."""
    checkpoint = open_checkpoint(MODEL, weights=False)
    tokenizer, eos_ids = load_tokenizer(checkpoint), frozenset(checkpoint.eos_ids)
    every = (tokenizer.chat([{"role": "user", "content": text}]) for text in texts)
    return [Sequence(key, tuple(ids), num_tokens, eos_ids) for key, ids in enumerate(every)]


def decoded(engine: Engine, clock: Clock) -> dict[str, Any]:
    """Figures and answers of some chat prompts."""
    texts = prompt_texts()
    rows = chats(texts[:: len(texts) // NUM_DRAFTED_ROWS], DRAFTED_ANSWER_TOKENS)
    wall_s = run_all(engine, rows)
    work = engine.measurement
    return {
        "decode_steps": work.decode_steps,
        "acceptance": work.acceptance,
        "tokens_per_step": work.decode_tokens / work.decode_steps,
        "tokens_per_s": work.generated_tokens / clock.now_s,
        "wall_s": wall_s,
        "answers": [row.output_ids for row in rows],
    }


PARTS = {
    "occupancy": occupancy,
    "prefix": prefix,
    "speculation": speculation,
    "rows": rows_together,
}


def flat(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """One line a figure."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from ((f"{key}: {name}", inner) for name, inner in value.items())
        else:
            yield key, value


def verdict(key: str, value: Any) -> str:
    """Whether a figure is what the project promises."""
    if key not in LIMITS:
        return ""
    word, limit = LIMITS[key]
    holds = value >= limit if word == "at least" else value <= limit
    return f"{word} {limit}: {'holds' if holds else 'MISSED'}"


def main() -> None:
    """Run the parts and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.parts or PARTS:
            results[part] = PARTS[part](Path(scratch))
    table = Table(title="the token loop on an emulated card")
    for column in ("part", "figure", "", "promise"):
        is_value = not column
        table.add_column(column, justify="right" if is_value else "left", no_wrap=not is_value)
    for part, figures in results.items():
        for key, value in flat(figures):
            shown = f"{value:,.3f}" if isinstance(value, float) else str(value)
            table.add_row(part, key, shown, verdict(key, value))
    Console(width=max(140, Console().width)).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
