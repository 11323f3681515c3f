"""A run whose driver is killed, and what `--resume` makes of it: the same outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from awaited import ended
from marked_processes import MARK_VARIABLE, marked, until

pytestmark = pytest.mark.cluster

COMMAND = [sys.executable, "-c", "from qaic_ray.cli import main; main()"]
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "QAIC_RAY_SDK": "emulated"}
NUM_ROWS = 240
SLOW = {"faults": [{"kind": "slow", "factor": 20}]}
"""So that a run is still at work when it is killed."""


def qaic_ray(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=ENVIRONMENT,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts of which some cannot be answered."""
    folder = tmp_path_factory.mktemp("resume")
    lines: list[dict[str, Any]] = [
        {"prompt": f"number {i}", "temperature": 0.7} for i in range(NUM_ROWS)
    ]
    lines[7] = {"no prompt": True}
    lines[200] = {"prompt": "x" * 500}
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(checkpoint: Path, qpc: Path, output: str, *more: str) -> list[str]:
    return [
        *("run", "--model-name", str(checkpoint), "--prompts-file", "p.jsonl", "--no-stream"),
        *("--qpc", str(qpc), "--generation-len", "40"),
        *("--run-seed", "3", "--output", output, "--output-format", "parquet", *more),
    ]


def answers(run: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "outputs.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(NUM_ROWS))
    return [(row["token_ids"], row["finish_reason"], row.get("error")) for row in rows]


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(
    work: Path, tiny_checkpoint: Path, tiny_qpc: Path, address: str
) -> None:
    run = partial(command, tiny_checkpoint, tiny_qpc)
    # Half of each of two cards, against all of it on one: where a row is answered changes nothing.
    whole = qaic_ray(*run("whole", "--device-id", "2", "--address", address), cwd=work)
    assert whole.returncode == 1, whole.stderr  # two rows cannot be answered
    (undisturbed,) = (work / "whole").iterdir()
    (work / "slow.json").write_text(json.dumps(SLOW))
    slow = {**ENVIRONMENT, "QAIC_EMULATOR_FAULTS": str(work / "slow.json")}
    slow[MARK_VARIABLE] = mark = str(work)
    with (work / "said").open("w") as said:
        running = subprocess.Popen(
            [*COMMAND, *run("cut", "--device-id", "0,1", "--partitions", "2")],
            cwd=work,
            env=slow,
            stdout=said,
            stderr=said,
        )
    journals = "cut/*/journal/*.jsonl"
    until(
        lambda: (
            running.poll() is not None
            or any(path.stat().st_size > 8_000 for path in work.glob(journals))
        ),
        240,
    )
    assert running.poll() is None, (work / "said").read_text()
    assert len(marked(mark)) > 1
    running.send_signal(signal.SIGKILL)
    ended(running)
    until(lambda: not marked(mark))
    (cut,) = (work / "cut").iterdir()
    assert not (cut / "report.json").exists()

    changed = qaic_ray("run", "--resume", str(cut), "--temperature", "1", cwd=work)
    assert changed.returncode == 2
    assert "--temperature cannot be changed" in changed.stderr

    resume = ("run", "--resume", str(cut), "--no-stream", "--address", address)
    resumed = qaic_ray(*resume, "--json", cwd=work)
    assert resumed.returncode == 1, resumed.stderr
    assert answers(cut) == answers(undisturbed)
    report = json.loads(resumed.stdout)
    before = json.loads((undisturbed / "report.json").read_text())
    assert report["proof"]["inputs_sha256"] == before["proof"]["inputs_sha256"]
    assert (report["proof"]["rows_ok"], report["proof"]["rows_error"]) == (NUM_ROWS - 2, 2)
    assert report["generated_tokens"] == before["generated_tokens"]
    assert any("part 2/2, 7 NSPs" in worker["name"] for worker in report["workers"])
    assert (cut / "outputs.parquet").exists()

    again = qaic_ray(*resume, cwd=work)
    assert again.returncode == 1, again.stderr
    assert answers(cut) == answers(undisturbed)
