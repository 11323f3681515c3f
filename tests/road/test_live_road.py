"""What a person sees of a run: recorded on terminals, and off them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import Recording, record

from qaic_ray.errors import ExitCode

pytestmark = pytest.mark.cluster
NUM_PROMPTS = 60


@pytest.fixture
def command(tiny_checkpoint: Path, tiny_qpc: Path, tmp_path: Path, address: str) -> list[str]:
    lines = (json.dumps({"prompt": "x" * (300 if i % 3 == 0 else 5)}) for i in range(NUM_PROMPTS))
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    return [
        *("run", "--model-name", str(tiny_checkpoint), "--qpc", str(tiny_qpc)),
        *("--device-id", "0,1", "--address", address, "--generation-len", "8"),
    ]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {**kept, "RAY_AUTH_MODE": "disabled", "QAIC_RAY_SDK": "emulated", **more}


def on_terminal(words: list[str], cwd: Path, columns: int, **more: str) -> Recording:
    env = environment(**{"TERM": "xterm-256color", **more})
    return record(words, columns=columns, cwd=str(cwd), env=env)


@pytest.mark.parametrize(
    ("columns", "verbose"), [(60, False), pytest.param(160, True, marks=pytest.mark.slow)]
)
def test_a_run_of_many_prompts(
    command: list[str], tmp_path: Path, columns: int, verbose: bool
) -> None:
    words = [*command, "--prompts-file", "p.jsonl", *(["-v"] if verbose else [])]
    seen = on_terminal(words, tmp_path, columns, NO_COLOR="1")
    assert seen.code == 1, seen.text  # a third of the rows is too long
    frames = seen.frames(columns)
    live = {line for frame in frames for line in frame if " rows · " in line}
    assert any(f"0 of {NUM_PROMPTS} rows" in line for line in live), live
    assert any("cards busy" in line or "opening" in line for line in live)
    assert all(len(line) < columns for line in live)
    cards = ("  card 0  ", "  card 1  ")  # one may be ready before the first picture
    assert verbose == any(line.startswith(cards) for frame in frames for line in frame)
    # Nothing of the line is left, every answer is whole, and each stands there once.
    last = [line for line in frames[-1] if line]
    assert not any(" rows · " in line for line in last)
    heads = [line.split()[0] for line in last if line.endswith((" xxxxx", "…"))]
    assert sorted(map(int, heads)) == list(range(NUM_PROMPTS))
    assert sum(line.startswith("after ") for line in last) == 1
    gaps = [b[0] - a[0] for a, b in zip(seen.pieces, seen.pieces[1:], strict=False)]
    ready_s = next(at for at, text in seen.pieces if "ready" in text)
    after = [gap for gap, (at, _) in zip(gaps, seen.pieces, strict=False) if at >= ready_s]
    assert max(after) < 2.0, "it stood still"  # twice what is promised, on a busy machine


def test_one_prompt_is_written_as_it_is_generated(command: list[str], tmp_path: Path) -> None:
    seen = on_terminal([*command, "--prompt", "My name is"], tmp_path, 80)
    assert seen.code == 0, seen.text
    (folder,) = (tmp_path / "runs").iterdir()
    (row,) = map(json.loads, (folder / "outputs.jsonl").read_text().splitlines())
    words = "".join(row["text"].split())
    assert words in "".join(seen.text.replace("\x1b[0m", "").split())


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--log-format", "json", "--stream", "rows"],
    ],
)
def test_off_a_terminal_there_are_lines(
    command: list[str], tmp_path: Path, more: list[str]
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from qaic_ray.cli import main; main()"),
            *(*command, "--prompts-file", "p.jsonl", *more),
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    heads = [int(line.split()[0]) for line in done.stdout.splitlines() if "xxxxx" in line]
    assert sorted(heads) == list(range(NUM_PROMPTS))
    if more:
        documents = [json.loads(line) for line in done.stderr.splitlines()]
        (*_, last) = (d for d in documents if d["event"] == "progress")
        assert 0 < last["rows_done"] <= NUM_PROMPTS
        assert any(d.get("text", "").startswith("after ") for d in documents)
    else:
        assert heads == sorted(heads)
        assert "rows done, " in done.stderr


def test_a_run_with_many_errors_ends_early_and_can_go_on(
    command: list[str], tmp_path: Path
) -> None:
    words = [*command, "--prompts-file", "p.jsonl", "--stop-if-errors", "20%"]
    seen = on_terminal(words, tmp_path, 160, TERM="dumb")
    assert seen.code == ExitCode.UNFINISHED, seen.text
    (folder,) = (tmp_path / "runs").iterdir()
    assert "rows failed, and --stop-if-errors ends a run at 20%" in seen.text
    assert f"rows are safe in {folder}; go on with `qaic-ray run --resume" in seen.text
    assert "\x1b" not in seen.text
