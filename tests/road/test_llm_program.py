"""Programs that use `qaic_ray.LLM`, as a person starts them: a Ray and an export of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from marked_processes import MARK_VARIABLE, marked, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# No `if __name__ == "__main__"`, no `with`, no `close`.
PLAIN = """
from qaic_ray import LLM, SamplingParams
llm = LLM(MODEL, max_model_len=64, max_num_seqs=2, devices=(0,))
how = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
for output in llm.generate(["ab", "cd"], how):
    print(output.prompt, len(output.outputs[0].token_ids), flush=True)
"""
LOSES_RAY = """
import os, signal
from qaic_ray import LLM, FleetClosed, SamplingParams
llm = LLM(MODEL, max_model_len=64, max_num_seqs=2, devices=(0,))
endless = SamplingParams(max_tokens=None, ignore_eos=True)
rows = [llm.begin("ab", endless).pending for _ in range(2000)]
rows[0].row()
for pid in filter(str.isdecimal, os.listdir("/proc")):
    try:
        line = open(f"/proc/{pid}/cmdline").read()
        mine = MARK in open(f"/proc/{pid}/environ").read()
    except OSError:
        continue
    if mine and line.split("\\0")[0].endswith("/raylet"):
        os.kill(int(pid), signal.SIGKILL)
try:
    rows[-1].row(60.0)
except FleetClosed as error:
    print("ended:", error, flush=True)
try:
    llm.generate("ab")
except FleetClosed as error:
    print("closed:", error, flush=True)
"""
WAITS = """
from qaic_ray import LLM, SamplingParams
llm = LLM(MODEL, max_model_len=64, max_num_seqs=2, devices=(0,))
print("ready", flush=True)
llm.generate(["ab"] * 20000, SamplingParams(max_tokens=None, ignore_eos=True))
"""


class Program:
    """Runs programs with a mark of their own, and knows what is left of them."""

    def __init__(self, folder: Path, model: Path, cache: Path) -> None:
        self.mark = str(folder)
        self.folder = folder
        self.model = model
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"},
            "QAIC_RAY_SDK": "emulated",
            "QAIC_RAY_CACHE": str(cache),
            MARK_VARIABLE: self.mark,
        }

    def start(self, text: str) -> subprocess.Popen[str]:
        path = self.folder / "program.py"
        path.write_text(f"MODEL, MARK = {str(self.model)!r}, {self.mark!r}\n{text}")
        return subprocess.Popen(
            # As a terminal starts it: a job in the background ignores SIGINT.
            [
                sys.executable,
                "-c",
                "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
                "runpy.run_path('program.py', run_name='__main__')",
            ]
            if text is WAITS
            else [sys.executable, str(path)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first: the first program exports and compiles."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def program(tmp_path: Path, tiny_checkpoint: Path, cache: Path) -> Iterator[Program]:
    made = Program(tmp_path, tiny_checkpoint, cache)
    yield made
    until(lambda: not marked(made.mark))


def test_a_program_without_a_guard_or_an_end_makes_its_model_and_leaves_nothing(
    program: Program,
) -> None:
    for _ in range(2):  # the second one finds what the first has made
        done = program.start(PLAIN)
        out, err = done.communicate(timeout=300)
        assert done.returncode == 0, err
        assert out == "ab 4\ncd 4\n"
        assert "Traceback" not in err


def test_a_ray_that_dies_ends_every_row_with_its_reason(program: Program) -> None:
    done = program.start(LOSES_RAY)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    ended, closed = out.splitlines()
    assert ended.startswith("ended: The fleet has ended: The raylet of the Ray")
    assert "raylet" in closed


def test_an_interruption_ends_the_program_and_its_processes(program: Program) -> None:
    running = program.start(WAITS)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode not in (0, -signal.SIGKILL)
    assert err.rstrip().endswith("KeyboardInterrupt")
