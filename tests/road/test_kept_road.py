"""`--keep-ray` and the dashboard through the command: one Ray for several commands, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from awaited import ended
from marked_processes import MARK_VARIABLE, marked, until
from ray._private import services

pytestmark = pytest.mark.cluster

COMMAND = [sys.executable, "-c", "from qaic_ray.cli import main; main()"]
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
STAYS = "Ray, which stays: `qaic-ray ray stop` ends it"
AGENT_PORT = 52365  # Ray's default of `--dashboard-agent-listen-port`
SLOW = {"faults": [{"kind": "slow", "factor": 40}]}


class Desk:
    """A folder of a user who has a cache and a mark of their own."""

    def __init__(self, folder: Path, checkpoint: Path, qpc: Path) -> None:
        self.folder = folder
        # The token is asked for, as it is for users.
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | {
            "QAIC_RAY_SDK": "emulated",
            "QAIC_RAY_CACHE": str(folder / "cache"),
            "NO_COLOR": "1",
            "SSH_CONNECTION": "192.0.2.7 50000 192.0.2.8 2222",
            MARK_VARIABLE: str(folder),
        }
        slow = folder / "slow.json"
        slow.write_text(json.dumps(SLOW))
        self.environment["QAIC_EMULATOR_FAULTS"] = str(slow)
        rows = ({"prompt": f"number {i}", "ignore_eos": True} for i in range(100))
        (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.run = [
            *("run", "--model-name", str(checkpoint), "--qpc", str(qpc), "--no-stream"),
            *("--prompts-file", "p.jsonl", "--generation-len", "8", "--device-id", "0,1"),
        ]

    def does(self, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        command = words if words[0].startswith("/") else [*COMMAND, *words]
        done = subprocess.run(command, cwd=self.folder, env=self.environment | more,
                              capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
        assert done.returncode == code, done.stderr + done.stdout
        return done

    def rays(self) -> set[int]:
        """The raylets that are up."""
        return {pid for pid, line in marked(str(self.folder)).items() if b"raylet/raylet" in line}


@pytest.fixture(scope="module")
def desk(
    tiny_checkpoint: Path, tiny_qpc: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    made = Desk(tmp_path_factory.mktemp("kept"), tiny_checkpoint, tiny_qpc)
    yield made
    made.does("ray", "stop", "--force")
    until(lambda: not marked(str(made.folder)), 60)


@pytest.fixture(scope="module")
def kept(desk: Desk) -> str:
    """What the command said that began it, where another Ray has the port that agents take."""
    with socket.socket() as other:
        with suppress(OSError):  # another Ray has it indeed
            other.bind(("127.0.0.1", AGENT_PORT))
        return desk.does(*desk.run, "--keep-ray").stderr


def test_the_ways_into_the_dashboard_are_lines_of_their_own(desk: Desk, kept: str) -> None:
    lines = kept.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("http://")]
    url = re.fullmatch(r"http://127\.0\.0\.1:(\d+)", lines[at])
    assert url is not None
    forward = f"ssh -p 2222 -L {url[1]}:127.0.0.1:{url[1]} "
    assert lines[at + 1].startswith(forward)
    assert lines[at + 1].endswith("@192.0.2.8")
    show = re.fullmatch(r"It asks for a token: (cat \S+/token)", lines[at + 2])
    assert show is not None
    assert STAYS in lines[at - 1]
    assert desk.does("ray", "show").stdout.splitlines() == lines[at : at + 3]
    told = json.loads(desk.does("ray", "show", "--json").stdout)
    assert (told["dashboard"], told["ways_in"]) == (url[0], lines[at : at + 3])
    variables = json.loads(desk.does("ray", "env", "--json").stdout)
    assert variables["RAY_API_SERVER_ADDRESS"] == url[0]
    assert told["address"] == variables["RAY_ADDRESS"]
    token = Path(show[1].removeprefix("cat ")).read_text()
    assert token not in kept
    texts = (path.read_bytes() for path in desk.folder.rglob("*") if path.is_file())
    assert not any(token.encode() in text for text in texts)


def test_the_next_command_uses_it_and_rays_own_find_it(desk: Desk, kept: str) -> None:
    (raylet,) = desk.rays()
    again = desk.does(*desk.run)
    assert STAYS in again.stderr
    assert desk.rays() == {raylet}
    (log,) = {path.name for path in desk.folder.glob("runs/*/logs/*") if "1" in path.name}
    assert log == "card-1.log"
    assert desk.does("status").stderr == ""  # it asks this Ray for jobs that were handed to it
    assert "knows no job nobodys" in desk.does("logs", "nobodys", code=2).stderr
    shell = f"eval \"$({sys.executable} -c '{COMMAND[2]}' ray env)\"; {sys.executable} -c"
    said = desk.does("/bin/sh", "-c", f"{shell} '{RAY[2]}' status").stdout
    assert "2.0 QAIC" in said or "4.0 QAIC" in said
    jobs = desk.does("/bin/sh", "-c", f"{shell} '{RAY[2]}' job list").stdout
    assert len(re.findall(r"metadata=\{'job_name': 'run'\}", jobs)) >= 2


def test_one_that_does_not_fit_is_left_alone(desk: Desk, kept: str) -> None:
    (raylet,) = desk.rays()
    refused = desk.does(*desk.run, "--keep-ray", code=2, QAIC_RAY_LOCKS=str(desk.folder))
    assert "with another QAIC_RAY_LOCKS: `qaic-ray ray stop` ends it." in refused.stderr
    address = desk.does(*desk.run, "--keep-ray", "--address", "auto", code=2)
    assert "--keep-ray is for a Ray of this machine" in address.stderr
    assert desk.rays() == {raylet}


def test_jobs_are_sent_to_this_ray_where_there_are_others(
    desk: Desk, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's supervisor of a job asks this; without the answer it takes any Ray of the machine."""
    (raylet,) = (line for line in marked(str(desk.folder)).values() if b"raylet/raylet" in line)
    (temp_dir,) = re.findall(rb"--temp_dir=([^\x00 ]+)", raylet)
    (address,) = set(re.findall(rb"--gcs-address=([^\x00 ]+)", raylet))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = ["192.0.2.1:6379", address.decode()]
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: found)
    taken = services.get_ray_address_from_environment("auto", temp_dir.decode())
    assert taken == address.decode()


def test_a_detached_job_advises_what_ends_this_ray(
    desk: Desk, kept: str, tiny_checkpoint: Path
) -> None:
    (raylet,) = desk.rays()
    job = {
        "name": "more-cards",
        "model": {"name": str(tiny_checkpoint)},
        "export": {"verify": "off"},
        "compile": {"precision": "fp32", "batch_size": 1, "prompt_len": 8, "ctx_len": 32},
        "run": {"prompts": "p.jsonl", "generation_len": 2, "devices": [0], "max_prompts": 2},
        "emulator": {"cards": 6},  # more than this Ray offers
    }
    (desk.folder / "more-cards.yaml").write_text(json.dumps(job))  # JSON is YAML
    begun = desk.does("launch", "more-cards.yaml", "--detach")
    submission_id = begun.stdout.strip()
    assert f"qaic-ray status|logs|stop {submission_id}" in begun.stderr
    said = desk.does("logs", submission_id, "--follow").stdout
    assert re.search(r"has 6 cards and offers \d to Ray: `qaic-ray ray stop` ends this Ray", said)
    assert "`ray stop`" not in said
    told = json.loads(desk.does("status", submission_id, "--json").stdout)
    assert [job["state"] for job in told["jobs"]] == ["done"], said
    token = re.search(r"It asks for a token: cat (\S+)", said)  # what this user's shell can do
    assert token is not None
    assert Path(token[1]).is_file()
    assert desk.rays() == {raylet}


@pytest.mark.slow
def test_a_killed_driver_frees_its_cards_and_leaves_the_ray(desk: Desk, kept: str) -> None:
    (raylet,) = desk.rays()
    command = [*COMMAND, *desk.run, "--generation-len", "60", "--output", "killed"]
    driver = subprocess.Popen(command, cwd=desk.folder, env=desk.environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    until(lambda: any(desk.folder.glob("killed/*/journal/*.jsonl")) or driver.poll() is not None)
    refused = desk.does("ray", "stop", code=2)
    assert f"in use (process {driver.pid})" in refused.stderr
    driver.send_signal(signal.SIGKILL)
    ended(driver)
    done = desk.does("run", "--resume", "--output", "killed", "--no-stream")
    assert STAYS in done.stderr
    assert desk.rays() == {raylet}


@pytest.mark.slow
def test_one_that_died_is_noticed_and_its_note_removed(desk: Desk, kept: str) -> None:
    (raylet,) = desk.rays()
    os.kill(raylet, signal.SIGKILL)
    until(lambda: not marked(str(desk.folder)), 60)
    assert "No Ray is kept" in desk.does("ray", "stop").stderr
    assert not (desk.folder / "cache" / "kept-ray.json").exists()
    assert STAYS not in desk.does(*desk.run).stderr


def test_a_model_is_run_by_its_name_alone(desk: Desk, kept: str, tiny_checkpoint: Path) -> None:
    """The first command makes the program, the second finds it."""
    words = ["run", str(tiny_checkpoint), "a | b", "--generation-len", "3", "--json"]
    first = desk.does(*words)
    assert "export tiny-kv written" in first.stderr
    assert "Largest" not in first.stdout
    assert "1 of 4 cards" in first.stderr
    report = json.loads(first.stdout)
    assert (report["rows"], report["failed_rows"], report["cut_rows"]) == (1, 0, 1)
    (row,) = map(json.loads, Path(report["folder"], "outputs.jsonl").read_text().splitlines())
    assert row["prompt"] == "a | b"
    assert [worker["name"] for worker in report["workers"]] == ["card 0"]
    assert str(desk.folder / "cache" / "programs") in first.stderr

    second = desk.does(*words)
    assert "export tiny-kv kept" in second.stderr
    assert "bs1 kept" in second.stderr
    folder = Path(json.loads(second.stdout)["folder"])
    (again,) = map(json.loads, (folder / "outputs.jsonl").read_text().splitlines())
    assert again["token_ids"] == row["token_ids"]

    # Other shapes make another program beside it.
    third = desk.does(*words[:-1], "--precision", "fp16", "--ctx-len", "128", "--input-len", "8")
    assert "1 of 1 rows were cut" in third.stdout
    assert "kept" in third.stderr.partition("compile")[0]
    assert "compile fp16 14c pl8 cl128 bs1" in third.stderr
