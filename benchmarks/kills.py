"""Everything that can die is killed at random moments, and nothing is lost or left behind.

`python benchmarks/kills.py` hits the installed command with `--kills` blows, by turns: SIGKILL to a
driver, a worker, a raylet, a GCS, a compiler and an export, SIGTERM and SIGINT (once, and three
times) to runs, resumes, compiles and exports. Each run that was hit is resumed by the command that
its sentence names, or hit again. It must end with the rows of an undisturbed run; no process, lock
or card of ours may be there 10 s after a command ended, nothing of its Ray after 60 s; what was hit
must have ended within 60 s; exports and compiles must succeed when they are given again. Prints a
table and, as its last line, one JSON object; exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from qaic_ray.cli import main; main()"]
MARK = "QAIC_RAY_KILLS"
NUM_ROWS = 240
SLOW = {"kind": "slow", "factor": 30}
"""So that a run lasts long enough to be hit."""
MAX_S = 60.0
OURS_S = 10.0
ENDED = (0, 1, 75, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)
VITAL = {"raylet": "raylet/raylet", "gcs": "gcs/gcs_server"}


@dataclass
class Blow:
    """One kill, and what came of it."""

    stage: str
    target: str
    signal: str
    at: str = ""
    ended_s: float = 0.0
    exit_code: int = 0
    wrong: list[str] = field(default_factory=list)


# -- looking


def processes() -> Iterator[tuple[int, bytes]]:
    """Living processes that carry our mark, and their command lines."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ")


def of_ray(line: bytes) -> bool:
    return any(word in line for word in (b"/ray/", b"ray::", b"ray_session.py"))


def locked(folder: Path) -> list[str]:
    """Lock files of cards that somebody holds."""
    held = []
    for path in folder.glob("*.lock"):
        with path.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path.name)
    return held


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def what_is_left(stage: Stage) -> list[str]:
    """What is there too long after a command has ended."""

    def ours() -> list[str]:
        found = [f"process {line[:60]!r}" for _, line in processes() if not of_ray(line)]
        cards = [f"{line[:60]!r} holds a card" for _, line in processes() if b"card" in line[:40]]
        return found + cards + [f"lock {name}" for name in locked(stage.folder / "locks")]

    def rays() -> list[str]:
        folders = [path.name for path in stage.folder.glob("qaic-ray-*-*")]
        return [f"process {line[:60]!r}" for _, line in processes() if of_ray(line)] + folders

    wrong = [] if until(lambda: not ours(), OURS_S) else [f"after 10 s: {ours()}"]
    return wrong if until(lambda: not rays(), MAX_S) else [*wrong, f"after 60 s: {rays()}"]


# -- the stage


class Stage:
    """A model, its QPC, prompts, and what an undisturbed run answers."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.folder = folder
        self.num_rows = num_rows
        self.environment = dict(os.environ)
        self._expected: list[Any] = []

    def make(self) -> None:
        sys.path[:0] = [str(ROOT / "tests" / "road"), str(ROOT / "tests")]
        from conftest import write_checkpoint

        write_checkpoint(self.folder / "tiny")
        lines = ({"prompt": f"number {i}", "temperature": 0.7} for i in range(self.num_rows))
        (self.folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for command in (self.export("tiny-kv"), self.compile("tiny-kv", "qpc")):
            self.must(command)
        slow = self.folder / "slow.json"
        slow.write_text(json.dumps({"faults": [SLOW]}))
        self.must(self.run("undisturbed"))
        (folder,) = (self.folder / "undisturbed").iterdir()
        self._expected = answers(folder)
        self.environment["QAIC_EMULATOR_FAULTS"] = str(slow)

    def export(self, output: str) -> list[str]:
        return ["export", "--model-name", "tiny", "--continuous-batching", "--output", output]

    def compile(self, model: str, output: str, precision: str = "fp32") -> list[str]:
        shape = ("--prompt-len", "16", "--ctx-len", "128", "--batch-size", "2")
        return ["compile", model, precision, "7", *shape, "--output", output]

    def run(self, output: str) -> list[str]:
        qpc = "qpc/tiny-kv-16pl-128cl-7c-2BS-fp32"
        what = ("--qpc", qpc, "--prompts-file", "p.jsonl", "--device-id", "0,1")
        how = ("--generation-len", "24", "--run-seed", "3", "--no-stream", "--output", output)
        return ["run", "--model-name", "tiny", *what, *how]

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as said:
            return subprocess.Popen(
                [*COMMAND, *command],
                cwd=self.folder,
                env=self.environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
                preexec_fn=hear_sigint,
            )

    def must(self, command: list[str]) -> None:
        log = self.folder / "log"
        if self.start(command, log).wait(300) != 0:
            raise SystemExit(f"{command}: {log.read_text()[-2000:]}")

    def verdict(self, run: Path) -> list[str]:
        """What is wrong with a run that is done."""
        found = answers(run)
        if found == self._expected:
            return []
        differing = sum(a != b for a, b in zip(found, self._expected, strict=False))
        return [f"{len(found)} rows for {len(self._expected)}, {differing} of them different"]


def hear_sigint() -> None:
    """A shell's background job has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def answers(run: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run / "outputs.jsonl").read_text().splitlines()]
    return [(row["index"], row["token_ids"], row["finish_reason"]) for row in rows]


# -- the blows


def victims(target: str, process: subprocess.Popen[bytes]) -> list[int]:
    if target == "command":
        return [process.pid]
    found = dict(processes())
    if target in VITAL:
        return [pid for pid, line in found.items() if VITAL[target].encode() in line]
    if target == "worker":
        return [pid for pid, line in found.items() if line.startswith(b"ray::")
                and b"CardWorker" in line]  # fmt: skip
    if target == "compiler":
        return [pid for pid, line in found.items() if b"qaic-exec" in line or b"-compile" in line]
    # Python's tracker of resources is Python's own: another takes its place, with a stack.
    others = [pid for pid, line in found.items() if pid != process.pid and not of_ray(line)
              and b"multiprocessing.resource_tracker" not in line]  # fmt: skip
    return others or [process.pid]


def strike(blow: Blow, process: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """Hit it, once it is there; whether it was."""

    def find() -> bool:
        return process.poll() is not None or bool(victims(blow.target, process))

    until(find, MAX_S)
    found = victims(blow.target, process)
    if process.poll() is not None or not found:
        return False
    times = 3 if blow.signal == "SIGINT x3" else 1
    pid = chance.choice(found)
    for _ in range(times):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.Signals[blow.signal.split()[0]])
        time.sleep(0.1 if times > 1 else 0)
    return True


def hit(
    stage: Stage, blow: Blow, command: list[str], *, wait: Callable[[], bool], chance: random.Random
) -> str:
    """Start a command, hit it at its moment, and see how it ends; returns what it said."""
    log = stage.folder / "log"
    process = stage.start(command, log)
    until(lambda: wait() or process.poll() is not None, 120)
    was_hit = strike(blow, process, chance)
    start_s = time.monotonic()
    if not was_hit:
        blow.at += " (too late)"
    survives = blow.target in ("worker", "compiler") or not was_hit
    try:
        blow.exit_code = process.wait(300 if survives else MAX_S)
    except subprocess.TimeoutExpired:
        blow.wrong.append("still there after 60 s")
        process.kill()
        process.wait()
    blow.ended_s = round(time.monotonic() - start_s, 1)
    said = log.read_text(errors="replace")
    blow.wrong += what_is_left(stage)
    if blow.exit_code not in ENDED:
        blow.wrong.append(f"exit code {blow.exit_code}: {said[-300:]}")
    if "Traceback" in said or "SIGTERM received" in said:
        blow.wrong.append(f"a stack: {said[-300:]}")
    return said


def journaled(stage: Stage, output: str) -> int:
    journals = (stage.folder / output).glob("*/journal/*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in journals)


def has_journaled(stage: Stage, output: str, rows: int) -> bool:
    return journaled(stage, output) > rows


def passed(moment_s: float) -> bool:
    return time.monotonic() > moment_s


RUN_BLOWS = [
    ("command", "SIGKILL"), ("worker", "SIGKILL"), ("raylet", "SIGKILL"), ("gcs", "SIGKILL"),
    ("command", "SIGTERM"), ("command", "SIGINT"), ("command", "SIGINT x3"),
]  # fmt: skip
BUILD_BLOWS = [
    ("export", "command", "SIGKILL"), ("compile", "compiler", "SIGKILL"),
    ("export", "child", "SIGKILL"), ("compile", "command", "SIGTERM"),
    ("export", "command", "SIGINT"), ("compile", "command", "SIGKILL"),
    ("export", "command", "SIGTERM"), ("compile", "command", "SIGINT x3"),
]  # fmt: skip


def hit_runs(stage: Stage, count: int, chance: random.Random) -> Iterator[Blow]:
    """A run, and its resumes, each hit; every few blows one is let through and compared."""
    number, left = 0, 0
    output, resumed = "", ""
    for index in range(count):
        target, name = RUN_BLOWS[index % len(RUN_BLOWS)]
        if not resumed:
            number += 1
            output, left = f"runs-{number}", chance.randint(1, 4)
        command = ["run", "--resume", resumed, "--no-stream"] if resumed else stage.run(output)
        before = journaled(stage, output) if resumed else 0
        rows = chance.randint(0, stage.num_rows // 4)
        blow = Blow("resume" if resumed else "run", target, name, f"{rows} rows on")
        early = chance.random() < 0.2 and target == "command"
        moment_s = time.monotonic() + chance.uniform(0.0, 8.0)
        if early:  # in the middle of getting ready
            blow.at = "getting ready"
            wait = partial(passed, moment_s)
        else:
            wait = partial(has_journaled, stage, output, before + rows)
        said = hit(stage, blow, command, wait=wait, chance=chance)
        resumed, left = check_run(stage, blow, said, output), left - 1
        if resumed and (left <= 0 or index == count - 1):
            stage.start(["run", "--resume", "--output", output, "--no-stream"],
                        stage.folder / "log").wait(300)  # fmt: skip
            blow.wrong += stage.verdict(Path(resumed)) + what_is_left(stage)
            resumed = ""
        yield blow


def check_run(stage: Stage, blow: Blow, said: str, output: str) -> str:
    """The folder of a run that goes on; none where it is done."""
    folders = list((stage.folder / output).glob("*"))
    if blow.exit_code == 0 and folders:
        blow.wrong += stage.verdict(folders[0])
        return ""
    if not folders:  # it had not begun
        return ""
    named = re.search(r"([\d,]+) rows are safe in (\S+); go on with `qaic-ray run --resume", said)
    has_begun = "… Ray" in said  # before that it is a command that has done nothing yet
    if (
        has_begun
        and blow.exit_code != -signal.SIGKILL
        and (not named or named[2] != str(folders[0]))
    ):
        blow.wrong.append(f"no sentence: {said[-300:]}")
    return str(folders[0])


def hit_builds(stage: Stage, count: int, chance: random.Random) -> Iterator[Blow]:
    """Exports and compiles, each hit and then given again."""
    for index in range(count):
        kind, target, name = BUILD_BLOWS[index % len(BUILD_BLOWS)]
        wait_s = chance.uniform(0.5, 9.0 if kind == "export" else 2.5)
        blow = Blow(kind, target, name, f"after {wait_s:.1f} s")
        output = f"{kind}-{index}"
        if kind == "export":
            command = stage.export(f"{output}-kv")
        else:
            command = stage.compile("tiny-kv", output, "mx6" if index % 2 else "fp16,mx6")
        moment_s = time.monotonic() + (0.0 if target == "compiler" else wait_s)
        hit(stage, blow, command, wait=partial(passed, moment_s), chance=chance)
        log = stage.folder / "log"
        code = stage.start(command, log).wait(300)
        if code != 0:
            blow.wrong.append(f"given again: {code}: {log.read_text()[-300:]}")
        blow.wrong += [f"left {path.name}" for path in stage.folder.glob(f".{output}*building*")]
        blow.wrong += [
            f"broken {path.parent}"
            for path in stage.folder.glob(f"{output}/*/specializations.json")
            if not (path.parent / "programqpc.bin").exists()
        ]
        for path in stage.folder.glob(f"{output}*"):
            shutil.rmtree(path)
        yield blow


def main() -> int:
    """Set the stage, strike, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Short, as Ray's sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp") as name:
        return play(Path(name), args)


def play(folder: Path, args: argparse.Namespace) -> int:
    """All blows in a folder; 0 where nothing is wrong."""
    os.environ |= {
        MARK: str(folder),
        "TMPDIR": str(folder),
        "QAIC_EMULATOR_STATE": str(folder / "cards"),  # nobody else's cards
        "QAIC_RAY_LOCKS": str(folder / "locks"),
        "QAIC_RAY_CACHE": str(folder / "cache"),
        "QAIC_RAY_SDK": "emulated",
    }
    stage = Stage(folder, args.rows)
    stage.make()
    chance = random.Random(args.seed)
    num_runs = (args.kills + 1) // 2
    blows: list[Blow] = []
    print(f"{'stage':8}{'hit':10}{'by':11}{'when':26}{'ended':>7}{'exit':>6}  wrong", flush=True)
    for make, count in ((hit_runs, num_runs), (hit_builds, args.kills - num_runs)):
        for blow in make(stage, count, chance):
            blows.append(blow)
            print(f"{blow.stage:8}{blow.target:10}{blow.signal:11}{blow.at:26}{blow.ended_s:6.1f}s"
                  f"{blow.exit_code:6}  {'; '.join(blow.wrong) or '-'}", flush=True)  # fmt: skip
    wrong = [blow for blow in blows if blow.wrong]
    report = {
        "ok": not wrong,
        "kills": len(blows),
        "seed": args.seed,
        "slowest_end_s": max(b.ended_s for b in blows if b.target not in ("worker", "compiler")),
        "exit_codes": Counter(str(blow.exit_code) for blow in blows),
        "wrong": [asdict(blow) for blow in wrong],
    }
    print(json.dumps(report))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
