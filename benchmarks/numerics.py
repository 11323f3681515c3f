"""How near the compiled step's numbers are to the reference graph's, and `fast` ones to `exact`.

    python benchmarks/numerics.py [--tokens N] [--text FILE ...]

SmolLM2-135M as MXFP6 reads N tokens (2,000 by default) of real text, by default of this
repository's own pages, in windows of 256 that begin anew. Logits of every token come from four
ways to compute one program: the reference graph and the lowered graph on onnxruntime, and the
compiled step with `exact` and with `fast` numerics. An error is the largest difference of a logit,
relative to the largest logit of the reference graph. It is taken twice: as the program is compiled
for a card, where the KV cache is rounded to float16 and a last bit may push a number to its
neighbour, and with caches kept float32, where nothing but the order of sums is left.

Prints a table, and one JSON object as its last line; the exit code is 1 where something that must
hold does not. Nothing here is a speed, and nothing a card's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from qaic_ray.contract import Specializations
from qaic_ray.emulator.container.execution import Activation, CompiledProgram, LoadedProgram
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import Sdk, find_sdk

MODEL = "smollm2-135m"
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("dispatch.md", "running.md", "python.md", "cluster.md")

NUM_TOKENS, WINDOW, CHUNK, SLOTS = 2000, 256, 128, 4

REFERENCE, LOWERED, EXACT, FAST = "reference graph", "lowered graph", "step, exact", "step, fast"
CARD, FLOAT32 = "float16", "float32"
FLAGS = {CARD: ("-convert-to-fp16", "-mxfp6-matmul"), FLOAT32: ("-mxfp6-matmul",)}
"""Of the compiler, by how the KV cache is kept."""

LIMITS = {
    "exact_error_float32_caches": ("at most", 1e-4),
    "fast_top1_agreement": ("at least", 0.97),
    "fast_perplexity_ratio": ("at most", 1.01),
}


class Compared:
    """What is added up of one way to compute, beside the reference graph and the exact step."""

    def __init__(self) -> None:
        self.largest_difference = 0.0
        self.differences: list[float] = []
        self.top1: list[int] = []
        self.losses: list[float] = []

    def add(self, logits: Any, reference: Any, targets: Any) -> None:
        """Logits [tokens, vocab] of some tokens, and the token that follows each; -1 for none."""
        per_token = np.abs(logits - reference).max(axis=1)
        self.largest_difference = max(self.largest_difference, float(per_token.max()))
        self.differences += per_token.tolist()
        self.top1 += logits.argmax(axis=1).tolist()
        known = targets >= 0
        wide = logits[known].astype(np.float64)
        high = wide.max(axis=1)
        total = high + np.log(np.exp(wide - high[:, None]).sum(axis=1))
        self.losses += (total - wide[np.arange(len(wide)), targets[known]]).tolist()

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return float(np.exp(np.mean(self.losses)))


def exported(folder: Path) -> Path:
    """The model, exported with the logits of all tokens."""
    path = folder / f"{MODEL}-all-kv"
    command = [str(Path(sys.executable).with_name("qaic-ray")), "export", "--model-name", MODEL]
    command += ["--continuous-batching", "--verify", "off", "--logits", "all"]
    subprocess.run([*command, "--output", str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


def compiled(model: Path, sdk: Sdk, cache: str, folder: Path) -> CompiledProgram:
    """The program, by the SDK's own compiler; `cache` is how its KV cache is kept."""
    shapes = Specializations.build(
        batch_size=SLOTS, prompt_len=CHUNK, ctx_len=WINDOW, continuous=True
    )
    file = folder / f"{cache}.json"
    file.write_text(shapes.to_json(named=sdk.named_specializations))
    argv = [str(sdk.compiler), "-aic-hw", f"-aic-hw-version={sdk.hw_version}", "-retained-state"]
    argv += ["-compile-only"] if sdk.compile_only else []
    argv += [f"-m={next(model.glob('generatedModels/*.onnx'))}", "-aic-num-cores=14"]
    argv += [f"-network-specialization-config={file}", *FLAGS[cache]]
    if cache == CARD:
        argv.append(f"-custom-IO-list-file={model / 'custom_io.yaml'}")
    target = folder / f"qpc-{cache}"
    subprocess.run([*argv, f"-aic-binary-dir={target}"], check=True, stdout=subprocess.DEVNULL)
    return CompiledProgram.open(str(target))


def opened(qpc: CompiledProgram, num_threads: int) -> dict[str, Activation]:
    """An activation for each way to compute.

    Raises:
        SystemExit: where this machine has no compiled step.
    """
    programs = {
        REFERENCE: LoadedProgram(qpc, num_threads, use_lowered=False),
        LOWERED: LoadedProgram(qpc, num_threads, use_step=False),
        EXACT: LoadedProgram(qpc, num_threads, numerics="exact"),
        FAST: LoadedProgram(qpc, num_threads, numerics="fast"),
    }
    if programs[EXACT].step is None or programs[LOWERED].lowered is None:
        raise SystemExit("error: this machine has no compiled step to compare (see the line above)")
    return {name: program.activate() for name, program in programs.items()}


def chunks(ids: Sequence[int]) -> Iterator[tuple[dict[str, Any], int, npt.NDArray[np.int64]]]:
    """Inputs of each inference, how many of its tokens are real, and what follows each of those."""
    for begin in range(0, len(ids), WINDOW):
        window = list(ids[begin : begin + WINDOW])
        following = np.array([*window[1:], -1])
        for start in range(0, len(window), CHUNK):
            part = window[start : start + CHUNK]
            padded = np.zeros((1, CHUNK), np.int64)
            padded[0, : len(part)] = part
            steps = np.arange(CHUNK)
            positions = np.where(steps < len(part), start + steps, -1)[None]
            inputs = {"input_ids": padded, "position_ids": positions}
            inputs["batch_index"] = np.array([[begin // WINDOW % SLOTS]])
            yield inputs, len(part), following[start : start + len(part)]


def measured(ways: dict[str, Activation], ids: Sequence[int]) -> tuple[dict[str, Compared], float]:
    """Each way over the whole text, side by side; and the largest logit of the reference graph."""
    found = {name: Compared() for name in ways}
    vocab = next(b.dims[-1] for b in ways[REFERENCE]._qpc.bindings if b.name == "logits")
    largest = 0.0
    for inputs, length, targets in chunks(ids):
        wanted = {"logits": (1, CHUNK, vocab)}
        made = {n: a.run(inputs, wanted)["logits"][0, :length] for n, a in ways.items()}
        largest = max(largest, float(np.abs(made[REFERENCE]).max()))
        for name, logits in made.items():
            found[name].add(logits, made[REFERENCE], targets)
    return found, largest


def shown(found: dict[str, Compared], largest: float, cache: str) -> Table:
    """For people."""
    table = Table(title=f"KV cache {cache}: {len(found[EXACT].top1)} tokens")
    for heading in ("", "largest error", "median error", "top-1 as exact", "perplexity"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, one in found.items():
        table.add_row(
            name,
            f"{one.largest_difference / largest:.1e}",
            f"{np.median(one.differences) / largest:.1e}",
            f"{agreement(one, found[EXACT]):.2%}",
            f"{one.perplexity:.3f}",
        )
    return table


def agreement(one: Compared, other: Compared) -> float:
    """Share of tokens after which both find the same one the likeliest."""
    return float(np.mean(np.array(one.top1) == np.array(other.top1)))


def figures(found: dict[str, Compared], largest: float, cache: str) -> dict[str, float]:
    """For programs."""
    keys = {LOWERED: "lowered", EXACT: "exact", FAST: "fast"}
    made: dict[str, float] = {}
    for name, key in keys.items():
        made[f"{key}_error_{cache}_caches"] = found[name].largest_difference / largest
    if cache == CARD:
        made["fast_top1_agreement"] = agreement(found[FAST], found[EXACT])
        made["perplexity_reference"] = found[REFERENCE].perplexity
        made["perplexity_exact"] = found[EXACT].perplexity
        made["perplexity_fast"] = found[FAST].perplexity
        ratio = found[FAST].perplexity / found[EXACT].perplexity
        made["fast_perplexity_ratio"] = max(ratio, 1 / ratio)
    return made


def main() -> int:
    """Measure, print, and say whether what must hold does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, nargs="+", default=[DOCS / name for name in PAGES])
    arguments = parser.parse_args()
    text = "\n".join(path.read_text(encoding="utf-8") for path in arguments.text)
    sdk = find_sdk("emulated", EmulatorOptions(cards=1, sku="standard", apps_version="1.22"))
    console, result = Console(), {"benchmark": "numerics", "model": MODEL, "precision": "mx6"}
    result["text"] = [path.name for path in arguments.text]
    with tempfile.TemporaryDirectory(prefix="qaic-ray-numerics-") as name:
        model = exported(Path(name))
        ids = load_tokenizer(open_checkpoint(MODEL)).encode(text)[: arguments.tokens]
        result["num_tokens"] = len(ids)
        for cache in FLAGS:
            ways = opened(compiled(model, sdk, cache, Path(name)), arguments.threads)
            found, largest = measured(ways, ids)
            console.print(shown(found, largest, cache))
            result.update(figures(found, largest, cache))
    holds = True
    for key, (relation, limit) in LIMITS.items():
        value = float(result[key])
        held = value <= limit if relation == "at most" else value >= limit
        console.print(f"{'holds' if held else 'MISSED'}: {key} {value:.3g}, {relation} {limit}")
        holds = holds and held
    print(json.dumps(result | {"holds": holds}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
