"""The ends of a run, through the command: signals, a Ray that dies, streams that nobody reads."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from awaited import ended
from marked_processes import MARK_VARIABLE, marked, until

pytestmark = pytest.mark.cluster

# As a terminal starts it: a shell's background job, as the tests may be in, ignores SIGINT, and
# what nohup starts ignores SIGHUP.
COMMAND = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "from qaic_ray.cli import main; main()",
]
NUM_ROWS = 400
SLOW = {"faults": [{"kind": "slow", "factor": 40}]}
LOOPBACK = re.compile(r"0100007F|0{24}01000000|0{16}FFFF00000100007F")


class Work:
    """A folder with prompts that take a while, and a QPC for them."""

    def __init__(self, folder: Path, checkpoint: Path, qpc: Path) -> None:
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"},
            "QAIC_RAY_SDK": "emulated",
            MARK_VARIABLE: str(folder),
        }
        lines = ({"prompt": f"number {i}", "ignore_eos": True} for i in range(NUM_ROWS))
        (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.checkpoint = checkpoint
        self.qpc = qpc

    def must(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*COMMAND, *arguments], cwd=self.folder, env=self.environment,
                              capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
        assert done.returncode == code, done.stderr
        return done

    def command(self, output: str, *more: str) -> list[str]:
        what = ("--prompts-file", "p.jsonl", "--qpc", str(self.qpc))
        how = ("--generation-len", "30", "--device-id", "0,1", "--output", output)
        return ["run", "--model-name", str(self.checkpoint), *what, *how, *more]

    @contextmanager
    def running(self, *arguments: str, **streams: int) -> Iterator[subprocess.Popen[str]]:
        """A slow run, whose stderr is read by `tell`."""
        slow = self.folder / "slow.json"
        slow.write_text(json.dumps(SLOW))
        environment = {**self.environment, "QAIC_EMULATOR_FAULTS": str(slow)}
        with (self.folder / "said").open("w") as said:
            process = subprocess.Popen([*COMMAND, *arguments], cwd=self.folder, env=environment,
                                       text=True, stdout=streams.get("stdout", said.fileno()),
                                       stderr=streams.get("stderr", said.fileno()))  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            ended(process)
            until(lambda: not self.left(), 60)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def rows(self, output: str) -> int:
        found = self.folder.glob(f"{output}/*/journal/*.jsonl")
        return sum(path.read_bytes().count(b"\n") - 1 for path in found)

    def left(self) -> dict[int, bytes]:
        """Processes of a command of ours, and what Ray started for it."""
        return marked(str(self.folder))

    def pid_of(self, part: bytes) -> int:
        return next(pid for pid, line in self.left().items() if part in line)


@pytest.fixture(scope="module")
def work(tiny_checkpoint: Path, tiny_qpc: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("ends"), tiny_checkpoint, tiny_qpc)


def sentence(said: str) -> tuple[int, Path]:
    """The rows that are safe, by the last line, and where."""
    last = said.splitlines()[-1]
    found = re.search(
        r"(\d+) rows are safe in (\S+); go on with `qaic-ray run --resume \2`\.$", last
    )
    assert found, said
    assert "Traceback" not in said
    assert "received" not in said
    return int(found[1]), Path(found[2])


def finishes(work: Work, run: Path, output: str) -> None:
    """`--resume` without a name goes on with it, and the next one finds nothing to do."""
    work.must("run", "--resume", "--output", output, "--no-stream")
    rows = [json.loads(line) for line in (run / "outputs.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(NUM_ROWS))
    again = work.must("run", "--output", output, "--resume")
    assert "No run in" in again.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [
        # What does not end, and is given up at the next one, is in test_interruption.py.
        (signal.SIGINT, -signal.SIGINT),
        # SIGTERM ends the last test of this file too.
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_in_a_sentence(work: Work, number: signal.Signals, code: int) -> None:
    output = f"by-{number.name}"
    with work.running(*work.command(output, "--no-stream")) as run:
        until(lambda: work.rows(output) > 20 or run.poll() is not None)
        run.send_signal(number)
        assert run.wait(120) == code, work.said()
        until(lambda: not work.left(), 60)
    rows, folder = sentence(work.said())
    assert f"stopped by {number.name}" in work.said()
    assert f"run folder {folder}" in work.said()
    assert rows == work.rows(output) > 20


@pytest.mark.slow
def test_a_run_that_was_stopped_is_finished_by_its_output(work: Work) -> None:
    with work.running(*work.command("stopped", "--no-stream")) as run:
        until(lambda: work.rows("stopped") > 20 or run.poll() is not None)
        run.terminate()
        assert run.wait(120) == 143, work.said()
    finishes(work, sentence(work.said())[1], "stopped")


@pytest.mark.parametrize(
    "part",
    [b"raylet/raylet", pytest.param(b"gcs/gcs_server", marks=pytest.mark.slow)],
)
def test_a_ray_that_dies_ends_a_run_in_a_sentence(work: Work, part: bytes) -> None:
    output = f"without-{part.decode().rpartition('/')[2]}"
    with work.running(*work.command(output, "--no-stream")) as run:
        until(lambda: work.rows(output) > 20 or run.poll() is not None)
        os.kill(work.pid_of(part), signal.SIGKILL)
        assert run.wait(120) == 75, work.said()
        until(lambda: not work.left(), 60)
    rows, _ = sentence(work.said())
    assert rows == work.rows(output) > 20
    assert "of the Ray that was started here died (SIGKILL)" in work.said()


# In the fast tier: test_resume_road.py.
@pytest.mark.slow
def test_a_killed_driver_leaves_nothing(work: Work) -> None:
    with work.running(*work.command("killed", "--no-stream")) as run:
        until(lambda: work.rows("killed") > 20 or run.poll() is not None)
        run.kill()
        ended(run)
        until(lambda: not work.left(), 60)


@pytest.mark.slow
def test_a_stderr_that_is_gone_changes_nothing(work: Work) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with work.running(
        *work.command("mute", "--no-stream", "--generation-len", "2"), stderr=writer
    ) as run:
        os.close(writer)
        assert run.wait(200) == 0
    assert work.rows("mute") == NUM_ROWS


def test_a_stdout_that_is_gone_ends_a_run_and_keeps_its_rows(work: Work) -> None:
    reader, writer = os.pipe()
    with work.running(*work.command("head", "--stream"), stdout=writer) as run:
        os.close(writer)
        os.read(reader, 64)
        os.close(reader)
        assert run.wait(100) == 128 + signal.SIGPIPE, work.said()
    rows, _ = sentence(work.said())
    assert rows == work.rows("head")


def test_a_ray_of_ours_is_this_machines_and_this_users(work: Work) -> None:
    with work.running(*work.command("alone", "--no-stream")) as run:
        until(lambda: work.rows("alone") > 0 or run.poll() is not None)
        foreign = {pid: ports for pid in work.left() if (ports := open_to_others(pid))}
        assert not foreign
        mark = (Path(f"/proc/{work.pid_of(b'raylet/raylet')}") / "environ").read_bytes()
        variables = dict(item.split(b"=", 1) for item in mark.split(b"\0") if b"=" in item)
        session = Path(os.fsdecode(variables[b"QAIC_RAY_SESSION"]))
        assert variables[b"RAY_AUTH_MODE"] == b"token"
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (session, session / "token")}
        assert modes == {session: 0o700, session / "token": 0o600}
        assert variables[b"RAY_AUTH_TOKEN_PATH"] == os.fsencode(session / "token")
        (folder,) = (work.folder / "alone").iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        run.terminate()
        assert run.wait(120) == 143, work.said()
        until(lambda: not session.exists() and not work.left(), 60)
    rows, _ = sentence(work.said())
    assert "stopped by SIGTERM" in work.said()
    assert rows == work.rows("alone") > 0


def open_to_others(pid: int) -> list[str]:
    """Addresses, as the kernel writes them, on which a process listens for other machines."""
    sockets = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(os.readlink(descriptor))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == "0A" and f"socket:[{fields[9]}]" in sockets:
                address = local.partition(":")[0]
                if not LOOPBACK.fullmatch(address):
                    found.append(local)
    return found
