"""The same requests on our server and on llama.cpp's, on one CPU model, by turns."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpu import machine, preparation
from cpu.kinds import NUMERICS_VARIABLE
from cpu.preparation import PeerMissing
from serving.load import Plan
from serving.servers import Server, ServerFailed, environment, load, ours

MODEL = "smollm2-135m"
TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
PROMPT_CHARS = 500
SLOTS, CTX_LEN, PROMPT_LEN = 32, 512, 128
OURS, PEER = "qaic-ray serve", "llama.cpp's server"
COMPLETIONS = "/v1/completions"
REQUESTS_A_CLIENT = 2


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the part `peers`: of each server and number of clients the median round."""
    notes: list[str] = []
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    # One server at a time has the machine: an idle one of llama.cpp's keeps no core busy, but
    # both have their weights in the same caches.
    for number in range(options.rounds):
        order = (OURS, PEER) if number % 2 == 0 else (PEER, OURS)
        for name in order:
            try:
                with tempfile.TemporaryDirectory(prefix="qaic-ray-peers-") as scratch:
                    _round(name, options, Path(scratch), found)
            except PeerMissing as error:
                notes.append(f"{name} is left out: {error}")
    results = [
        {
            "server": name,
            "clients": clients,
            **sorted(rounds, key=lambda one: one["tokens_per_s"])[len(rounds) // 2],
            "rounds_tokens_per_s": [one["tokens_per_s"] for one in rounds],
        }
        for (name, clients), rounds in sorted(found.items(), key=lambda each: each[0][1])
    ]
    for clients in options.clients:
        speeds = {
            one["server"]: statistics.median(one["rounds_tokens_per_s"])
            for one in results
            if one["clients"] == clients
        }
        if len(speeds) == 2:
            ratio = speeds[OURS] / speeds[PEER]
            notes.append(f"{clients} clients: {ratio:.2f} x llama.cpp's tokens/s")
    return {"results": results, "notes": notes, "numerics": options.numerics}


def _round(
    name: str,
    options: argparse.Namespace,
    scratch: Path,
    found: dict[tuple[str, int], list[dict[str, Any]]],
) -> None:
    start = _ours if name == OURS else _llama_cpp
    with start(options, scratch) as server:
        load(server, Plan(COMPLETIONS, _bodies(1, options.new_tokens, 99), clients=1))
        for clients in options.clients:
            bodies = _bodies(clients * REQUESTS_A_CLIENT, options.new_tokens, clients)
            machine.wait_until_quiet(options.wait)
            with machine.others_watched(server.pids) as others:
                figures = load(server, Plan(COMPLETIONS, bodies, clients=clients))
            if figures["errors"]:
                raise ServerFailed(f"{name}: {figures['first_error']}")
            found.setdefault((name, clients), []).append({**figures, **others})


def _bodies(count: int, new_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of different pieces of one text, so that no two begin alike."""
    text = TEXT.read_text()
    step = (len(text) - PROMPT_CHARS) // (count + 1)
    starts = [seed + number * step for number in range(count)]
    return [
        {
            "prompt": text[start : start + PROMPT_CHARS],
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        for start in starts
    ]


@contextmanager
def _ours(options: argparse.Namespace, scratch: Path) -> Iterator[Server]:
    shape = ["--batch-size", str(SLOTS), "--ctx-len", str(CTX_LEN), "--input-len", str(PROMPT_LEN)]
    env = environment(scratch, QAIC_RAY_SDK="emulated")
    env[NUMERICS_VARIABLE] = options.numerics
    with ours(scratch, [MODEL, "--device-id", "0", *shape], env=env) as server:
        yield server


@contextmanager
def _llama_cpp(options: argparse.Namespace, scratch: Path) -> Iterator[Server]:
    from qaic_ray.model.checkpoint import open_checkpoint

    python = preparation.peer_python(options.folder / "llama.cpp", preparation.LLAMA_CPP)
    gguf = preparation.q8_0_file(options.folder, open_checkpoint(MODEL))
    threads = len(os.sched_getaffinity(0))
    given = {"gguf": str(gguf), "slots": SLOTS, "ctx_len": CTX_LEN, "threads": threads}
    log = scratch / "llama.log"
    with log.open("w") as said:
        child = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("llama_server.py")), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        line = child.stdout.readline()
        if not line:
            raise ServerFailed(log.read_text()[-2000:])
        yield Server(json.loads(line)["address"], child.pid, log)
    finally:
        child.stdin.close()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
