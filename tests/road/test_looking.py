"""A run looked at from another window: its status, a row of it, its end, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from awaited import ended

pytestmark = pytest.mark.cluster

COMMAND = [sys.executable, "-c", "from qaic_ray.cli import main; main()"]
NUM_ROWS = 200


class Window:
    """A folder in which commands are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "QAIC_RAY_SDK": "emulated"}
        self.environment.pop("COLUMNS", None)

    def slow_down(self) -> None:
        file = self.folder / "slow.json"
        file.write_text(json.dumps({"faults": [{"kind": "slow", "factor": 40}]}))
        self.environment["QAIC_EMULATOR_FAULTS"] = str(file)

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / "said").open("w") as said:
            return subprocess.Popen(
                [*COMMAND, *words], cwd=self.folder, env=self.environment, stdout=said, stderr=said
            )

    def ask(self, *words: str, code: int = 0) -> dict[str, Any]:
        done = subprocess.run(
            [*COMMAND, *words, "--json"], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def status(self) -> dict[str, Any]:
        (run,) = self.ask("status", "runs")["runs"]
        assert isinstance(run, dict)
        return run


@pytest.fixture
def window(tmp_path: Path) -> Window:
    lines = (
        {"prompt": f"number {i}", "id": f"row-{i}", "ignore_eos": True} for i in range(NUM_ROWS)
    )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Window(tmp_path)


def test_a_run_in_another_window(window: Window, tiny_checkpoint: Path, tiny_qpc: Path) -> None:
    window.slow_down()
    what = ("--model-name", str(tiny_checkpoint), "--qpc", str(tiny_qpc))
    how = ("--prompts-file", "p.jsonl", "--generation-len", "30", "--device-id", "0,1")
    chat = ("--chat", "--chat-template", "[{{ messages[0].content }}]", "--no-stream")
    run = window.begin("run", *what, *how, *chat)
    try:
        deadline_s = time.monotonic() + 120
        while not list(window.folder.glob("runs/*/journal/*.jsonl")) or not window.status()["rows"]:
            assert run.poll() is None, (window.folder / "said").read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        going = window.status()
        assert (going["state"], going["pid"], going["total_rows"]) == ("running", run.pid, NUM_ROWS)
        assert 0 < going["rows"] < NUM_ROWS
        assert going["eta_s"] > 0
        assert going["tokens_per_s"] > 0
        view = window.ask("show", going["name"], _answered(window))
        assert view["rendered_prompt"] == f"[{view['row']['prompt']}]"
        assert len(view["prompt_token_ids"]) == view["row"]["prompt_tokens"]
        assert view["remark"] == ""
        (stopped,) = window.ask("stop", going["name"])["runs"]
        assert run.wait(60) == 143
    finally:
        run.kill()
        ended(run)
    assert (stopped["state"], stopped["pid"]) == ("unfinished", None)
    assert going["rows"] <= stopped["rows"] < NUM_ROWS
    assert window.status()["state"] == "unfinished"
    assert window.ask("runs")["runs"][0]["state"] == "unfinished"

    window.environment.pop("QAIC_EMULATOR_FAULTS")
    window.ask("run", "--resume", f"runs/{going['name']}", "--no-stream")
    done = window.status()
    assert (done["state"], done["rows"], done["failed_rows"]) == ("done", NUM_ROWS, 0)
    assert done["generated_tokens"] == NUM_ROWS * 30
    view = window.ask("show", f"runs/{going['name']}", "row-7")
    assert (view["row"]["index"], view["rendered_prompt"]) == (7, "[number 7]")


def _answered(window: Window) -> str:
    """The id of a row that is in the journal."""
    (path, *_) = window.folder.glob("runs/*/journal/*.jsonl")
    line = path.read_text().splitlines()[1]
    return str(json.loads(line[9:])["row"]["id"])
