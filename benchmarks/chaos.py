"""A run under fire: everything that holds cards is killed again and again, and no row is lost.

`python benchmarks/chaos.py` answers 1,000 prompts of a tiny model on four emulated cards over two
Ray nodes, once undisturbed and once disturbed: an actor is SIGKILLed twenty times, one card
turns to Error, one hangs, one node is killed, and the driver itself is SIGKILLed five times and
started again into the same run folder. Then both `outputs.jsonl` must hold every row once, in order
and with the same text. Prints a table, and one JSON object as its last line; exit code 1 where a
row is lost, twice or different.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 24
FINGERPRINT = {"run": "chaos"}
RUN_TIMEOUT_S = 900.0
SLOW = {"kind": "slow", "factor": 10}
"""So that a run lasts. A row alone still takes far less than the time between two kills, or some
would be given up as rows that kill."""
NODE = {"num_cpus": 2, "resources": {"QAIC": 2}, "object_store_memory": 100 * 2**20}


def prompts(count: int) -> Iterator[Any]:
    from qaic_ray.rows import Prompt

    return (Prompt(i, f"{i} " + "tell me more " * (i * i % 3)) for i in range(count))


# -- the driver, a process of its own


def drive(folder: Path, address: str, count: int) -> None:
    """One session of the run: until it is done, or this process is killed."""
    from qaic_ray.cards.inventory import place
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.dispatch.policy import Policy
    from qaic_ray.options import EmulatorOptions, Generation
    from qaic_ray.runs.delivery import RowWriter
    from qaic_ray.runs.driver import Audience
    from qaic_ray.runs.journal import Journal
    from qaic_ray.sampling_params import SamplingParams
    from qaic_ray.timeouts import Timeouts
    from qaic_ray.worker.worker import CardWorker, WorkerInfo, WorkerSpec

    # An hour of trouble in a minute.
    policy = Policy(min_stall_s=6.0, first_stall_s=6.0)
    made = json.loads((folder.parent / "made.json").read_text())
    generation = Generation(sampling=SamplingParams(max_tokens=NUM_TOKENS))

    def note(info: WorkerInfo) -> None:
        with (folder / "pids").open("a") as file:
            file.write(f"{info.pid}\n")

    with (
        Cluster(0, address=address, timeouts=Timeouts(steps_s=0.5)) as cluster,
        Journal(folder, FINGERPRINT) as journal,
        RowWriter(folder, resumed=True) as write,
    ):
        found = cluster.inventory(
            made["sdk"], EmulatorOptions(cards=4, sku="standard", apps_version="1.22")
        )
        specs = [
            WorkerSpec(qpc=made["qpc"], model=made["model"], generation=generation, **vars(where))
            for where in place(found)
        ]
        result = cluster.run_prompts(
            prompts(count),
            specs,
            worker_class=CardWorker,
            policy=policy,
            journal=journal,
            audience=Audience(on_row=write, on_earlier_row=write.rewrite, on_worker_ready=note),
        )
    proof = write.proof(result.rows_in, result.inputs_sha256)
    summary = {
        "error": result.broken_off and result.broken_off.error,
        "proof_holds": proof.holds,
        "workers": {worker.name: worker.error for worker in result.workers},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


# -- the fire


@dataclass
class Deeds:
    """What was done to the run."""

    actors_killed: int = 0
    drivers_killed: int = 0
    nodes_killed: int = 0
    sessions: int = 0
    seconds: float = 0.0


class Run:
    """A run of the driver in a folder, until it is done however often it is killed."""

    def __init__(self, folder: Path, address: str, count: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.count = count
        self.deeds = Deeds()
        self._command = [sys.executable, __file__, "--drive", str(folder), "--address", address]
        self._command += ["--prompts", str(count)]
        self._driver: subprocess.Popen[bytes] | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are final."""
        outputs = self.folder / "outputs.jsonl"
        return outputs.read_bytes().count(b"\n") if outputs.exists() else 0

    @property
    def num_safe(self) -> int:
        """Rows that are in the journal."""
        from qaic_ray.runs.journal import safe_rows

        return safe_rows(self.folder)

    def begin(self) -> None:
        """Start the driver, again."""
        self.deeds.sessions += 1
        with (self.folder / "driver.log").open("ab") as log:
            self._driver = subprocess.Popen(self._command, stderr=log, stdout=log)

    def goes_on(self) -> bool:
        """Whether the driver still has to work; one that failed is an error."""
        assert self._driver is not None
        code = self._driver.poll()
        if code not in (None, 0):
            raise SystemExit((self.folder / "driver.log").read_text()[-3000:])
        return code is None

    def kill_driver(self) -> None:
        assert self._driver is not None
        self._driver.kill()
        self._driver.wait()
        self.deeds.drivers_killed += 1
        self.begin()

    def kill_actor(self, chance: random.Random) -> bool:
        """SIGKILL one of the processes that hold cards; whether there was one."""
        pids = (self.folder / "pids").read_text().split() if (self.folder / "pids").exists() else []
        alive = [int(pid) for pid in pids if is_actor(int(pid))]
        if alive:
            os.kill(chance.choice(alive), signal.SIGKILL)
            self.deeds.actors_killed += 1
        return bool(alive)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "outputs.jsonl").open()]


def is_actor(pid: int) -> bool:
    """Whether a process that this run started is still one of Ray's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def quietly(run: Run) -> None:
    """The undisturbed run."""
    start_s = time.monotonic()
    run.begin()
    while run.goes_on():
        time.sleep(0.1)
    run.deeds.seconds = time.monotonic() - start_s


def trouble(count: int) -> list[dict[str, Any]]:
    """What befalls two of the cards in a run of so many prompts, in one of their inferences."""
    return [
        {"kind": "hang", "device": 0, "at": 15 * count // 100},
        {"kind": "error", "device": 1, "at": 30 * count // 100},
    ]


def under_fire(run: Run, nodes: Any, faults: Path, args: argparse.Namespace) -> None:
    """Disturb it by how far it is, however fast that goes."""
    chance = random.Random(args.seed)
    start_s = time.monotonic()
    kill_at = [(k + 1) / (args.actor_kills + 1) for k in range(args.actor_kills)]
    steps = [(k + 1) / (args.driver_kills + 1) for k in range(args.driver_kills)]
    faults.write_text(json.dumps({"faults": [SLOW, *trouble(run.count)]}))
    run.begin()
    while run.goes_on():
        now_s = time.monotonic()
        if now_s - start_s > RUN_TIMEOUT_S:
            raise SystemExit(f"not done after {RUN_TIMEOUT_S:.0f} s: {run.deeds}")
        share = run.num_safe / run.count
        if kill_at and share >= kill_at[0] and run.kill_actor(chance):
            kill_at.pop(0)
        if steps and share >= steps[0]:
            steps.pop(0)
            run.kill_driver()
        if not run.deeds.nodes_killed and share > 0.5:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            run.deeds.nodes_killed = 1
        time.sleep(0.05)
    run.deeds.seconds = time.monotonic() - start_s


def verdict(quiet: Run, fired: Run) -> list[str]:
    """What is wrong with the disturbed run; nothing where all is well."""
    expected, rows = quiet.rows(), fired.rows()
    wrong = []
    for run, some in ((quiet, expected), (fired, rows)):
        if [row["index"] for row in some] != list(range(run.count)):
            wrong.append(f"{run.folder.name}: {len(some)} rows, not each of {run.count} in order")
        summary = json.loads((run.folder / "summary.json").read_text())
        if summary["error"] or not summary["proof_holds"]:
            wrong.append(f"{run.folder.name}: {summary}")
    for row, other in zip(rows, expected, strict=False):
        if (row["text"], row["token_ids"]) != (other["text"], other["token_ids"]):
            said = row.get("error") or f"{row['text']!r} for {other['text']!r}"
            wrong.append(f"row {row['index']}: {said}")
    return wrong


def spared(cards: Path, faults: Path, count: int) -> list[str]:
    """Cards that never came to the inference in which they were to fail: the run was too short.

    The emulated cards number their inferences in their state folder, anew for each text of faults.
    """
    digest = hashlib.sha256(faults.read_bytes()).hexdigest()[:12]
    missing = []
    for fault in trouble(count):
        numbered = cards / f"events-{digest}-{fault['device']}-inference"
        if not numbered.exists() or int(numbered.read_text()) < fault["at"]:
            missing.append(f"card {fault['device']} had no {fault['kind']}")
    return missing


# -- the stage


def make(folder: Path) -> None:
    """A tiny model with a byte tokenizer, and its QPC."""
    sys.path.append(str(ROOT / "tests"))
    from byte_tokens import with_byte_tokenizer
    from tiny_qpcs import TinyQpcs

    tiny = TinyQpcs(folder)
    model = with_byte_tokenizer(tiny.checkpoint, folder / "model")
    made = {"sdk": str(tiny.sdk.root), "qpc": str(tiny.qpc(ctx_len=96)), "model": str(model)}
    (folder / "made.json").write_text(json.dumps(made))


def main() -> int:
    """Set the stage, let both runs play, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--actor-kills", type=int, default=20)
    parser.add_argument("--driver-kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    if args.drive is not None:
        drive(args.drive, args.address, args.prompts)
        return 0
    with tempfile.TemporaryDirectory() as name:
        return play(Path(name), args)


def play(folder: Path, args: argparse.Namespace) -> int:
    """Both runs in a folder; 0 where the second gave what the first did."""
    from ray.cluster_utils import Cluster as Nodes

    faults = folder / "faults.json"
    faults.write_text(json.dumps({"faults": [SLOW]}))
    os.environ["QAIC_EMULATOR_FAULTS"] = str(faults)
    os.environ["QAIC_EMULATOR_STATE"] = str(folder / "cards")  # nobody else's cards
    os.environ["QAIC_RAY_LOCKS"] = str(folder / "locks")
    make(folder)
    nodes = Nodes(
        initialize_head=True,
        head_node_args=NODE
        | {
            "include_dashboard": False,
            "_system_config": {
                "health_check_period_ms": 500,
                "health_check_failure_threshold": 6,
                "health_check_initial_delay_ms": 0,
            },
        },
    )
    try:
        nodes.add_node(**NODE)
        quiet = Run(folder / "undisturbed", nodes.address, args.prompts)
        quietly(quiet)
        fired = Run(folder / "under-fire", nodes.address, args.prompts)
        under_fire(fired, nodes, faults, args)
    finally:
        nodes.shutdown()
    wrong = verdict(quiet, fired) + spared(folder / "cards", faults, args.prompts)
    summary = json.loads((fired.folder / "summary.json").read_text())
    print(f"undisturbed  {quiet.deeds.seconds:6.1f} s  {quiet.num_rows} rows")
    print(f"under fire   {fired.deeds.seconds:6.1f} s  {fired.num_rows} rows, {fired.deeds}")
    for worker, error in summary["workers"].items():
        print(f"  {worker}: {error or 'no error in the last session'}")
    print("\n".join(wrong[:20]) or "every row once, in order, with the same text")
    report = {"ok": not wrong, "wrong": wrong, "undisturbed_s": quiet.deeds.seconds}
    print(json.dumps(report | asdict(fired.deeds)))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
