"""The main job as a user starts it: wall time, memory of all its processes, and a peer beside it.

`python benchmarks/main_job.py` runs `qaic-ray launch jobs/smollm2.yaml` in an empty folder with the
model in the user's cache, then lets transformers' `generate` answer every fourth of the same
prompts in batches of eight in one process. Prints a table, and one JSON object as its last line.
The rates are this machine's, through the emulated SDK: never a card's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "jobs" / "smollm2.yaml"
SAMPLE_S = 0.25


def tree_bytes(root: psutil.Process) -> int:
    """Memory of a process and everything below it, shared pages counted once (PSS)."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it ended while we looked
    return total


def measure(command: list[str], cwd: Path) -> tuple[str, float, int]:
    """Run a command; stdout, wall seconds, and peak PSS of its process tree in bytes."""
    with tempfile.TemporaryFile("w+") as output:
        start_s = time.monotonic()
        process = psutil.Popen(command, cwd=cwd, stdout=output, text=True)
        peak = 0
        while process.poll() is None:
            try:
                peak = max(peak, tree_bytes(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(SAMPLE_S)
        wall_s = time.monotonic() - start_s
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
        output.seek(0)
        return output.read(), wall_s, peak


def ours(cwd: Path) -> dict[str, Any]:
    """The job, from the command line."""
    command = [str(Path(sys.executable).with_name("qaic-ray")), "launch", str(JOB), "--json"]
    output, wall_s, peak = measure(command, cwd)
    report = json.loads(output.splitlines()[-1])
    return {
        "wall_s": round(wall_s, 1),
        "peak_pss_gb": round(peak / 1e9, 2),
        "generated_tokens": report["generated_tokens"],
        "tokens_per_s": report["tokens_per_s"],
        "sdk": report["sdk"],
    }


PEER = """
import json, sys, time
import torch
from qaic_ray.pipeline.job import load_job
from qaic_ray.model.checkpoint import load_tokenizer, load_torch_model, open_checkpoint
from pathlib import Path
job = load_job(Path(sys.argv[1]))
checkpoint = open_checkpoint(job.model.name)
model, tokenizer = load_torch_model(checkpoint), load_tokenizer(checkpoint)
lines = Path(job.run.prompts).read_text(encoding="utf-8").splitlines()
texts = [json.loads(line)["prompt"] for line in lines[::4]]
chats = (tokenizer.chat([{"role": "user", "content": text}]) for text in texts)
prompts = sorted(chats if job.run.chat else map(tokenizer.encode, texts), key=len)
start_s, tokens = time.monotonic(), 0
for at in range(0, len(prompts), 8):
    rows = prompts[at : at + 8]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=job.run.generation_len, do_sample=False
        )[:, width:].tolist()
    for row in output:
        ends = [row.index(eos) + 1 for eos in checkpoint.eos_ids if eos in row]
        tokens += min(ends, default=len(row))
seconds = time.monotonic() - start_s
print(json.dumps({"generated_tokens": tokens, "tokens_per_s": round(tokens / seconds, 3)}))
"""


def peer(cwd: Path) -> dict[str, Any]:
    """transformers, float32, every fourth prompt, in one process."""
    output, wall_s, peak = measure([sys.executable, "-c", PEER, str(JOB)], cwd)
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {"wall_s": round(wall_s, 1), "peak_pss_gb": round(peak / 1e9, 2), **figures}


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {"qaic_ray": ours(Path(folder))}
        if not arguments.no_peer:
            results["transformers"] = peer(Path(folder))
    table = Table(title="64 prompts, 32 new tokens each, SmolLM2-135M-Instruct")
    for column in ("", "wall s", "peak memory GB", "generated", "tokens/s while answering"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in results.items():
        keys = ("wall_s", "peak_pss_gb", "generated_tokens", "tokens_per_s")
        table.add_row(name, *(str(figures[key]) for key in keys))
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
