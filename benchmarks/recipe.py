#!/usr/bin/env python3
"""The published recipe's own run on an emulated card: `cache-index`, 256 tokens of prompt, 2,048.

SmolLM2 is exported and compiled as the recipe's scripts do it, and its default prompt is answered
to the end of the context, as `runModel.py` does where no end of text comes: one row, 1,793 tokens.
Through all doors of the SDK, without Ray. Beside it the reference graph in the same process, which
runs where a graph cannot be lowered: its prefill, and steps at both ends of the context, from which
the whole is reckoned. Rounds alternate; medians. Prints a table, and one JSON object as its last
line; times are this machine's, no card's.

    .venv/bin/python benchmarks/recipe.py --rounds 3
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qaic_ray.contract import LOGITS
from qaic_ray.emulator.container.compiled import CompiledProgram
from qaic_ray.emulator.container.execution import (
    LoadedProgram,
    num_threads_of_environment,
)
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.session import Session
from qaic_ray.engine.steps import Sequence
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import Sdk, find_sdk

MODEL, PROMPT = "smollm2-135m", "My name is"
PROMPT_LEN, CTX_LEN, VOCAB = 256, 2048, 49152
NUM_STEPS = CTX_LEN - PROMPT_LEN
SPECIALIZATIONS = {
    "specializations": [
        {"batch_size": "1", "seq_len": str(length), "ctx_len": str(CTX_LEN)}
        for length in (PROMPT_LEN, 1)
    ]
}
Seconds = dict[str, float]


def command(folder: Path, *arguments: str) -> tuple[float, Any]:
    """Seconds that a command of ours takes, and the JSON object that it prints last."""
    line = [sys.executable, "-m", "qaic_ray", *arguments, "--json"]
    start_s = time.perf_counter()
    done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} ended with exit code {done.returncode}")
    return time.perf_counter() - start_s, json.loads(done.stdout.splitlines()[-1])


def built(folder: Path, sdk: Sdk, precision: str) -> tuple[Seconds, Path]:
    """Export and compile; the seconds of each, and the QPC."""
    (folder / "specializations.json").write_text(json.dumps(SPECIALIZATIONS))
    options = ("--io", "cache-index", "--verify", "off", "--output", "model-kv")
    export_s, _ = command(folder, "export", "--model-name", MODEL, *options)
    options = (precision, "14", "--sdk", str(sdk.root))
    compile_s, document = command(folder, "compile", "model-kv", *options)
    return {"export": export_s, "compile": compile_s}, Path(document["variants"][0]["path"])


def whole_run(sdk: Sdk, qpc: Path, prompt_ids: tuple[int, ...]) -> tuple[Seconds, list[int]]:
    """The run from its card's opening to the last slot of the context, and the tokens."""
    start_s = time.perf_counter()
    session = Session(sdk, qpc, [0])
    try:
        opened_s = time.perf_counter()
        engine = Engine(session)
        row = Sequence(0, prompt_ids, engine.new_token_limit(len(prompt_ids), NUM_STEPS + 1))
        engine.add(row)
        engine.step()
        prefilled_s = time.perf_counter()
        while engine.busy:
            engine.step()
        end_s = time.perf_counter()
    finally:
        session.close()
    if len(row.output_ids) != NUM_STEPS + 1:
        raise SystemExit(f"{len(row.output_ids)} tokens were generated, not {NUM_STEPS + 1}.")
    seconds = {
        "open": opened_s - start_s,
        "prefill": prefilled_s - opened_s,
        "decode": end_s - prefilled_s,
    }
    return seconds, list(row.output_ids)


def reference_run(
    qpc: Path, prompt_ids: tuple[int, ...], tokens: list[int], num_steps: int
) -> Seconds:
    """As `whole_run` on the reference graph, reckoned from `num_steps` steps at either end."""
    start_s = time.perf_counter()
    program = LoadedProgram(
        CompiledProgram.open(str(qpc)), num_threads_of_environment(), use_lowered=False
    )
    card = program.activate()
    opened_s = time.perf_counter()
    pad = PROMPT_LEN - len(prompt_ids)
    ids = np.array([[*[0] * pad, *prompt_ids]])
    mask = (np.arange(CTX_LEN) >= pad) & (np.arange(CTX_LEN) < PROMPT_LEN)

    def run(index: int, ids: Any, more: Mapping[str, Any]) -> int:
        where = np.maximum(index + np.arange(ids.shape[1]) - pad, 0)[None]
        inputs = {"input_ids": ids, "position_ids": where, "cache_index": np.array([index])}
        return int(card.run({**inputs, **more}, {LOGITS: (1, VOCAB)})[LOGITS].argmax())

    found = [run(0, ids, {"attention_mask": mask[None].astype(np.int8)})]
    prefilled_s = time.perf_counter()
    for step in range(num_steps):
        found.append(run(PROMPT_LEN + step, np.array([[found[-1]]]), {}))
    if found != tokens[: len(found)]:
        raise SystemExit("The reference graph's tokens are others than the card's.")
    for step in range(NUM_STEPS - num_steps, NUM_STEPS):
        run(PROMPT_LEN + step, np.array([[tokens[step]]]), {})
    step_s = (time.perf_counter() - prefilled_s) / (2 * num_steps)
    return {
        "open": opened_s - start_s,
        "prefill": prefilled_s - opened_s,
        "decode": step_s * NUM_STEPS,
    }


def medians(rounds: list[Seconds]) -> Seconds:
    """Of each figure, and what a run is in all: all that comes after the compile."""
    found = {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}
    return {**found, "run": statistics.median(sum(seconds.values()) for seconds in rounds)}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference-steps", type=int, default=8, help="at either end")
    parser.add_argument("--precision", choices=("mx6", "fp16"), default="mx6")
    options = parser.parse_args()
    sdk = find_sdk("emulated", EmulatorOptions(cards=1, sku="standard"))
    checkpoint = open_checkpoint(MODEL, weights=False)
    prompt_ids = tuple(load_tokenizer(checkpoint).encode(PROMPT))
    ours, reference = [], []
    with tempfile.TemporaryDirectory() as name:
        made, qpc = built(Path(name), sdk, options.precision)
        for _ in range(options.rounds):
            seconds, tokens = whole_run(sdk, qpc, prompt_ids)
            ours.append(seconds)
            reference.append(reference_run(qpc, prompt_ids, tokens, options.reference_steps))
    figures = {"card": medians(ours), "reference graph": medians(reference)}
    print(f"export {made['export']:.1f} s, compile {made['compile']:.1f} s")
    print(f"{'':16} {'open s':>8} {'prefill s':>9} {'decode s':>9} {'run s':>8} {'tokens/s':>9}")
    for who, of in figures.items():
        speed = NUM_STEPS / of["decode"]
        print(
            f"{who:16} {of['open']:8.2f} {of['prefill']:9.2f} {of['decode']:9.1f}"
            f" {of['run']:8.1f} {speed:9.1f}"
        )
    facts = {"model": MODEL, "precision": options.precision, "cpus": os.cpu_count()}
    ratio = figures["reference graph"]["run"] / figures["card"]["run"]
    rounds = {"card": ours, "reference graph": reference}
    print(json.dumps({**facts, **made, "median_s": figures, "times": ratio, "rounds": rounds}))


if __name__ == "__main__":
    main()
