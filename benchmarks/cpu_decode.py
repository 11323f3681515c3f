"""Decode and prefill of the emulated card beside llama.cpp and others, on this machine's CPU.

    .venv/bin/python benchmarks/cpu_decode.py [--quick] [--batches 1 8] [--peers llama.cpp]

SmolLM2-135M. Ours is the engine of a run on one emulated card with all its doors (qaicrt, bindings,
sampling), without Ray. The peers are llama.cpp's own server on Q8_0 (from the wheel xllamacpp),
transformers in float32, and OpenVINO with int8 weights by optimum-intel; those that need packages
get environments of their own in the folder `--folder`, and nothing is installed into this one.

All get the same token ids of real text and the same threads. The contenders of a case take turns,
each round in another order. A figure is the median of the rounds, a ratio the median of each
round's ratio. Decode is counted from the first token of all rows to the last; of llama.cpp, whose
prompts are in its slots already, the faster of its own `timings` and the wall clock.

Before each timing it waits for a quiet machine, at most `--wait` seconds, and a timing that others
disturbed is repeated; `--wait-in-all` bounds both together, and each case has a share of it. A
round that was disturbed all the same is left out where others remain. The machine's limits are the
best that was seen in the same run.

Environments, the Q8_0 file and programs are made once (2 GB, for fp16 2 GB more, in the cache of
`qaic-ray run` and in `--folder`). Prints tables, draws a picture, and prints one JSON object as its
last line. No figure here is a card's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cpu import figures, machine, preparation, shown
from cpu.contender import Contender, ContenderError, script
from cpu.kinds import ON_ONNXRUNTIME, PEERS, Kind, our_kinds, peer_kinds, peer_versions
from cpu.machine import Patience

from qaic_ray.files.folders import cache_folder, write_whole
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.options import EmulatorOptions
from qaic_ray.pipeline.request import SdkChoice
from qaic_ray.sdk import find_sdk

MODEL = "smollm2-135m"
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
PROMPT_TOKENS, PROMPT_LEN, CTX_LEN = 128, 128, 512
PREFILLS, PREFILL_CTX_LEN = (300, 512), 1024
CONTEXTS, CONTEXT_PROMPT = (512, 8192), 300
BUSY_BATCHES = (1, 8)
MOST_ROWS = 512
"""Different prompts that the text has room for."""
PARTS = ("decode", "prefill", "context", "busy")
MOST_REPEATS = 2
"""Of a timing beside which others were at work; the least disturbed one counts."""
SLOW_TOKENS = 16
"""Of the contenders that are timed token by token, and have no prompt in a cache."""


@dataclass(frozen=True)
class Case:
    """What is timed of each contender; `copy` tells processes of one contender apart."""

    part: str
    batch: int
    prompt_tokens: int
    ctx_len: int
    beside_busy: bool = False
    copy: int = 0


@dataclass
class Arena:
    """The contenders' processes, and what was measured of them."""

    kinds: list[Kind]
    tokenizer: Tokenizer
    tokens: list[int]
    options: argparse.Namespace
    patience: Patience
    stack: ExitStack
    scratch: Path
    processes: dict[tuple[str, int], Contender] = field(default_factory=dict)
    opened: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    def measure(self, part: str, cases: Sequence[Case]) -> None:
        """All rounds of cases that belong together, all contenders by turns."""
        kinds = [k for k in self.kinds if part in ("decode", "prefill") or not k.is_slow]
        entries = [(kind, case) for case in cases for kind in kinds]
        say(f"{part}: {', '.join(sorted({words(case) for case in cases}))}")
        ready = [(kind, case) for kind, case in entries if self._is_ready(kind, case)]
        found: list[list[dict[str, Any]]] = [[] for _ in ready]
        said: list[list[str]] = [[] for _ in ready]
        for number in range(self.options.rounds):
            order = list(range(len(ready)))
            shift = number % max(len(order), 1)
            for at in order[shift:] + order[:shift]:
                kind, case = ready[at]
                if kind.name in self.left_out:
                    continue
                with self._leaving_out(kind):
                    answer, said[at] = self._round(kind, case)
                    found[at].append(answer)
        for (kind, case), rounds, texts in zip(ready, found, said, strict=True):
            if len(rounds) < self.options.rounds:
                continue
            result = {"contender": kind.name, **vars(case), "rounds": rounds}
            del result["copy"]
            # Rounding may change a text; a peer that runs another model changes all of them.
            result["begin_as_ours"] = figures.alike(texts, said[0])
            self.results.append(result | {"tokens_per_s": figures.summary(rounds)})

    def _is_ready(self, kind: Kind, case: Case) -> bool:
        """Open what a case needs and run it once; False where a peer cannot."""
        if kind.name in self.left_out:
            return False
        with self._leaving_out(kind):
            self._open(kind, case)
            contender = self.processes[kind.name, case.copy]
            if case.part == "prefill":
                contender.ask("prefill", prompt=prompts_of(self.tokens, case)[0])
            else:
                contender.ask("decode", prompts=prompts_of(self.tokens, case), new_tokens=4)
        return kind.name not in self.left_out

    @contextmanager
    def _leaving_out(self, kind: Kind) -> Iterator[None]:
        """What a peer cannot do is noted, and it takes no further part; ours must be able to."""
        try:
            yield
        except ContenderError as error:
            if kind.precision:
                raise
            self.left_out.add(kind.name)
            self.notes.append(f"{kind.name} is left out: {error}")

    def _open(self, kind: Kind, case: Case) -> None:
        key = kind.name, case.copy
        if key not in self.processes:
            # Each has a machine of its own: cards of one share its threads and weights.
            state = self.scratch / f"cards-{len(self.processes)}"
            environment = {**kind.environment, "QAIC_EMULATOR_STATE": str(state)}
            contender = Contender(kind.name, kind.command, environment, **kind.opening)
            self.processes[key] = self.stack.enter_context(contender)
        shape = case.batch, case.ctx_len
        if self.opened.get(key) == shape:
            return
        if kind.precision:
            qpc = program_of(self.options.sdk_choice, kind.precision, case)
            sdk = str(self.options.sdk_choice.here.root)
            self.processes[key].open(sdk=sdk, qpc=str(qpc), device=0)
        elif kind.name == figures.PEER:
            self.processes[key].open(slots=case.batch, ctx_len=case.ctx_len)
        elif key not in self.opened:
            self.processes[key].open()
        self.opened[key] = shape

    def _round(self, kind: Kind, case: Case) -> tuple[dict[str, Any], list[str]]:
        """One timing, and the beginnings of the rows' texts; again where others disturbed it."""
        best = self._timing(kind, case)
        for _ in range(MOST_REPEATS):
            if best[0]["others_cores"] <= figures.NOISY_CORES or not self.patience.left_s:
                break
            begun_s = time.monotonic()
            best = min(best, self._timing(kind, case), key=lambda found: found[0]["others_cores"])
            self.patience.spend(time.monotonic() - begun_s)
        return best

    def _timing(self, kind: Kind, case: Case) -> tuple[dict[str, Any], list[str]]:
        contender, prompts = self.processes[kind.name, case.copy], prompts_of(self.tokens, case)
        seen = self.patience.wait()
        with ExitStack() as around:
            pids = [contender.pid]
            if case.beside_busy:
                pids.append(around.enter_context(busy_process()))
            others = around.enter_context(machine.others_watched(pids))
            if case.part == "prefill":
                answer = contender.ask("prefill", prompt=prompts[0])
            else:
                tokens = self.options.new_tokens
                if kind.is_slow:
                    tokens = min(SLOW_TOKENS, tokens)
                answer = contender.ask("decode", prompts=prompts, new_tokens=tokens)
        decoded = [self.tokenizer.decode(ids) for ids in answer.pop("ids", ())]
        texts = decoded or answer.pop("texts", [])
        speed = answer["tokens"] / answer["seconds"]
        return {"tokens_per_s": speed, **answer, **seen, **others}, texts


def prompts_of(tokens: Sequence[int], case: Case) -> list[list[int]]:
    """Token ids of as many pieces of the text as the batch has rows, all of one length."""
    stride = (len(tokens) - case.prompt_tokens) // case.batch
    starts = [row * stride for row in range(case.batch)]
    return [list(tokens[start : start + case.prompt_tokens]) for start in starts]


def words(case: Case) -> str:
    """A case in a line of progress."""
    if case.part == "prefill":
        return f"{case.prompt_tokens} tokens"
    if case.part == "context":
        return f"ctx_len {case.ctx_len}"
    return f"batch {case.batch}"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


BUSY = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
while True:
    pass
"""
"""Ends with its standard input, so with us."""


@contextmanager
def busy_process() -> Iterator[int]:
    """A process that keeps one core busy while the block runs; its pid."""
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE)
    try:
        time.sleep(0.2)
        yield child.pid
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()


def program_of(choice: SdkChoice, precision: str, case: Case) -> Path:
    """Our QPC for a case."""
    shape = {
        "precision": precision,
        "batch_size": case.batch,
        "prompt_len": PROMPT_LEN,
        "ctx_len": case.ctx_len,
    }
    return preparation.program(choice, MODEL, shape)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, list[Case]]]:
    """What is measured: cases that take turns, and the part that they belong to."""
    parts = options.parts
    if "decode" in parts:
        for batch in options.batches:
            yield "decode", [Case("decode", batch, PROMPT_TOKENS, CTX_LEN)]
    if "prefill" in parts:
        tokens = PREFILLS[:1] if options.quick else PREFILLS
        yield "prefill", [Case("prefill", 1, count, PREFILL_CTX_LEN) for count in tokens]
    if "context" in parts:
        pair = [
            Case("context", 1, CONTEXT_PROMPT, ctx_len, copy=copy)
            for copy, ctx_len in enumerate(CONTEXTS)
        ]
        yield "context", pair
    if "busy" in parts:
        for batch in BUSY_BATCHES[-1:] if options.quick else BUSY_BATCHES:
            both = [Case("busy", batch, PROMPT_TOKENS, CTX_LEN, beside) for beside in (False, True)]
            yield "busy", both


def limits(threads: int, patience: Patience) -> dict[str, float]:
    """The machine's, by a process of its own."""
    patience.wait()
    command = [sys.executable, script("machine.py"), str(threads)]
    environment = machine.limits_environment(threads)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


DEFAULTS = {
    "batches": ((1, 2, 4, 8, 16, 32), (1, 8, 16)),
    "peers": (PEERS, PEERS[:1]),
    "precision": (("mx6", "fp16"), ("mx6",)),
    "rounds": (3, 2),
    "new_tokens": (64, 32),
    "wait_in_all": (180.0, 60.0),
}
"""Of options that are not said: of a whole run, and of a quick one."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--batches", type=int, nargs="+", help="1 2 4 8 16 32; with --quick 1 8 16")
    add("--peers", nargs="*", choices=PEERS, help="all; with --quick llama.cpp")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all of them")
    add("--precision", nargs="+", choices=("mx6", "fp16"), help="both; with --quick mx6")
    add("--numerics", default="exact,fast", help="exact,fast")
    add("--onnxruntime", action="store_true", help="ours on onnxruntime's kernels, too")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each; all CPUs")
    add("--rounds", type=int, help="of each case: 3; with --quick 2")
    add("--new-tokens", type=int, help="of each row: 64; with --quick 32")
    add("--quick", action="store_true", help="fewer cases, peers and rounds")
    add("--wait", type=float, default=5.0, help="seconds before a timing, for a quiet machine")
    add("--wait-in-all", type=float, help="of waits and repeats: 180; with --quick 60")
    add("--folder", type=Path, help="of environments and files of the peers")
    add("--picture", type=Path, default=Path("cpu_decode.svg"), help="is written there")
    options = parser.parse_args()
    for name, (whole, quick) in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else whole)
    options.folder = options.folder or cache_folder() / "benchmarks"
    options.batches = sorted(set(options.batches))
    for name in ("peers", "precision"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    options.numerics = list(dict.fromkeys(options.numerics.split(",")))
    if not set(options.numerics) <= figures.DECODE_FLOORS.keys():
        parser.error("--numerics takes exact, fast, or both with a comma")
    if not 1 <= min(options.batches) <= max(options.batches) <= MOST_ROWS:
        parser.error(f"--batches are from 1 to {MOST_ROWS}")
    if min(options.threads, options.rounds) < 1:
        parser.error("--threads and --rounds are at least 1")
    if not 2 <= options.new_tokens <= CTX_LEN - PROMPT_TOKENS:
        parser.error(f"--new-tokens is from 2 to {CTX_LEN - PROMPT_TOKENS}")
    return options


def run(options: argparse.Namespace, stack: ExitStack, scratch: Path) -> dict[str, Any]:
    """Measure everything; the document that is printed."""
    begun_s = time.monotonic()
    checkpoint = open_checkpoint(MODEL)
    notes: list[str] = []
    options.folder.mkdir(parents=True, exist_ok=True)
    say(f"peers: {', '.join(options.peers) or 'none'}")
    peers = peer_kinds(options, checkpoint, notes)
    kinds = [*our_kinds(options), *peers]
    emulated = EmulatorOptions()
    options.sdk_choice = SdkChoice(find_sdk("emulated", emulated), "emulated", emulated)
    patience = Patience(options.wait)
    groups = list(cases(options))
    tokenizer = load_tokenizer(checkpoint)
    tokens = tokenizer.encode(TEXT.read_text("utf-8"))
    arena = Arena(kinds, tokenizer, tokens, options, patience, stack, scratch, notes=notes)
    prepared_s = time.monotonic() - begun_s
    measured = [limits(options.threads, patience)]
    for part, some in groups:
        patience.give(options.wait_in_all / len(groups))
        arena.measure(part, some)
        measured.append(limits(options.threads, patience))
    promised = [k for k in kinds if k.precision == "mx6" and k.name != ON_ONNXRUNTIME]
    numerics_of = {kind.name: kind.numerics for kind in promised}
    processor = machine.processor()
    kept = figures.promises(
        arena.results, numerics_of, cores=processor["cores"], threads=options.threads
    )
    return {
        "benchmark": "cpu_decode",
        "model": MODEL,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begun_s, 1),
        "prepared_s": round(prepared_s, 1),
        "processor": processor,
        "threads": options.threads,
        "contenders": [kind.name for kind in kinds],
        "versions": peer_versions(peers),
        "ratios_to": figures.PEER,
        "weights": figures.ModelSize.of(checkpoint.config).weights,
        "cache_values": figures.ModelSize.of(checkpoint.config).cache_values,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": options.new_tokens,
        "limits": {name: max(each[name] for each in measured) for name in measured[0]},
        "limits_measured": measured,
        "waited_s": round(patience.spent_s, 1),
        "results": arena.results,
        "promises": [promise.as_json() for promise in kept],
        "notes": arena.notes,
    }


def main() -> None:
    """Measure, print and draw."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        try:
            document = run(options, stack, Path(scratch))
        except ContenderError as error:
            sys.exit(str(error))
    shown.show(document)
    if any(result["part"] == "decode" for result in document["results"]):
        write_whole(options.picture, shown.picture_of(document))
        print(f"picture: {options.picture}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
