"""Servers as the benchmark has them: `qaic-ray serve` on simulated cards, and llama.cpp's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from serving.load import Plan

ROOT = Path(__file__).resolve().parents[2]
LOAD = Path(__file__).with_name("load.py")
READY_S = 180.0
END_S = 60.0
COMMAND = (sys.executable, "-m", "qaic_ray")


class ServerFailed(Exception):
    """A server did not come up, or ended."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        address: without a path.
        pid: of the process that has the port.
        log: what it wrote.
    """

    address: str
    pid: int
    log: Path

    @property
    def process(self) -> psutil.Process:
        """Its process."""
        return psutil.Process(self.pid)

    @property
    def pids(self) -> list[int]:
        """Of its process, and of all that it started."""
        return [self.pid, *(child.pid for child in self.process.children(recursive=True))]

    @property
    def cpu_s(self) -> float:
        """CPU seconds of its process so far, all threads together."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a command whose cards, locks and Ray are nobody else's."""
    return {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "QAIC_EMULATOR_STATE": str(folder / "cards"),
        "QAIC_RAY_LOCKS": str(folder / "locks"),
        **more,
    }


@contextmanager
def ours(
    folder: Path, arguments: Sequence[str], *, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`qaic-ray serve` on a free port, until the block ends.

    Args:
        folder: of its cards, its log and its batches.
        arguments: what is served, and how.
        env: of the command; that of `environment` where nothing is said.

    Raises:
        ServerFailed: it did not come up.
    """
    log = Path(tempfile.mkstemp(dir=folder, prefix="serve-", suffix=".log")[1])
    command = [*COMMAND, "serve", *arguments, "--port", "0", "--json"]
    with log.open("w") as said:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(env or environment(folder)),
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise ServerFailed(log.read_text()[-2000:])
        told = json.loads(line)
        yield Server(told["address"].removesuffix("/v1"), told["pid"], log)
    finally:
        end(child)


def end(child: subprocess.Popen[str]) -> None:
    """Ask a server to end, and end it where it does not."""
    child.terminate()
    try:
        child.wait(END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def load(server: Server, plan: Plan) -> dict[str, Any]:
    """The figures of a load, made by a process of its own; the server's CPU beside them.

    Raises:
        ServerFailed: the load's process ended with an error.
    """
    before_s = server.cpu_s
    done = subprocess.run(
        [sys.executable, str(LOAD), server.address],
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ServerFailed(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "server_cpu_s": server.cpu_s - before_s}


# -- a program whose steps take a stated time


@dataclass(frozen=True)
class Stage:
    """A tiny model, its program and an SDK whose cards take simulated time."""

    folder: Path
    model: str
    qpc: str
    sdk: str
    step_ms: float
    slots: int
    prompt_len: int
    ctx_len: int

    def arguments(self, cards: int) -> list[str]:
        """What `serve` and `run` are told."""
        devices = ",".join(map(str, range(cards)))
        return ["--sdk", self.sdk, "--device-id", devices]


WORDS = 300


def word(number: int) -> str:
    """The text of a token of the stage's model, but for the space before it."""
    return chr(97 + number // 26) + chr(97 + number % 26)


def make_stage(
    folder: Path, *, cards: int, step_ms: float, slots: int, prompt_len: int, ctx_len: int
) -> Stage:
    """A stage in a folder; every word of two letters is a token."""
    options = {"cards": cards, "slots": slots, "prompt_len": prompt_len, "ctx_len": ctx_len}
    # By another process: torch and the compiler are not the benchmark's own memory.
    command = [sys.executable, str(Path(__file__)), str(folder), json.dumps(options)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")})
    made = json.loads((folder / "made.json").read_text())
    return Stage(
        folder,
        **made,
        step_ms=step_ms,
        slots=slots,
        prompt_len=prompt_len,
        ctx_len=ctx_len,
    )


def _lay_stage(folder: Path, options: dict[str, int]) -> None:
    import shutil

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    sys.path.append(str(ROOT / "tests"))
    from tiny_qpcs import TinyQpcs

    from qaic_ray.options import EmulatorOptions

    tiny = TinyQpcs(
        folder, EmulatorOptions(cards=options["cards"]), max_position=options["ctx_len"]
    )
    qpc = tiny.qpc(
        batch_size=options["slots"], prompt_len=options["prompt_len"], ctx_len=options["ctx_len"]
    )
    model = folder / "model"
    shutil.copytree(tiny.checkpoint.name, model)
    vocabulary = {f"\u0120{word(number)}": number for number in range(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({}))
    made = {"sdk": str(tiny.sdk.root), "qpc": str(qpc), "model": str(model)}
    (folder / "made.json").write_text(json.dumps(made))


def timed(stage: Stage, **more: str) -> dict[str, str]:
    """The environment in which the stage's cards take `step_ms` a step, and compute nothing."""
    path = stage.folder / "timing.json"
    path.write_text(json.dumps({"mode": "replace", "base_ms": stage.step_ms}))
    return environment(stage.folder, QAIC_EMULATOR_TIMING=str(path), **more)


# -- the same requests as a run


def a_run(stage: Stage, bodies: Sequence[dict[str, Any]], cards: int) -> dict[str, Any]:
    """`qaic-ray run` on the same requests: seconds, tokens, CPU of its driver and the texts.

    CPU and seconds are counted from when every card was ready.
    """
    folder = Path(tempfile.mkdtemp(dir=stage.folder, prefix="run-"))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    command = [
        *(*COMMAND, "run", "--model-name", stage.model, "--qpc", stage.qpc),
        *("--prompts-file", str(prompts), "--output", str(folder / "out"), "--no-stream"),
        *stage.arguments(cards),
    ]
    with (folder / "said").open("w") as said:
        child = subprocess.Popen(command, cwd=folder, env=timed(stage), stdout=said, stderr=said)
    process = psutil.Process(child.pid)
    ready_cpu_s = last_cpu_s = None
    while child.poll() is None:
        with suppress(psutil.Error):
            times = process.cpu_times()
            last_cpu_s = times.user + times.system
        if ready_cpu_s is None and _num_ready(folder) >= cards:
            ready_cpu_s = last_cpu_s
        time.sleep(0.02)
    reports = list(folder.glob("out/*/report.json"))
    if child.returncode != 0 or not reports or ready_cpu_s is None or last_cpu_s is None:
        raise ServerFailed((folder / "said").read_text()[-2000:])
    rows = [
        json.loads(line)
        for path in folder.glob("out/*/outputs.jsonl")
        for line in path.read_text().splitlines()
    ]
    begun = min(row["started_at"] for row in rows)
    ended = max(row["ended_at"] for row in rows)
    tokens = sum(len(row["token_ids"]) for row in rows)
    return {
        "seconds": ended - begun,
        "tokens": tokens,
        "tokens_per_s": tokens / (ended - begun),
        "driver_cpu_s": last_cpu_s - ready_cpu_s,
        "texts": [row["text"] for row in sorted(rows, key=lambda row: row["index"])],
    }


def _num_ready(folder: Path) -> int:
    return sum(
        path.read_text().count('"worker_ready"') for path in folder.glob("out/*/events.jsonl")
    )


if __name__ == "__main__":
    _lay_stage(Path(sys.argv[1]), json.loads(sys.argv[2]))
