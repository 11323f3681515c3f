"""A job handed to a real cluster through its dashboard: sent, run, watched, read, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from awaited import said
from byte_tokens import with_byte_tokenizer

from qaic_ray.cli import main
from qaic_ray.errors import UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.pipeline.submit_step import JobStatus, job_statuses

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

DEADLINE_S = 120.0

# A Ray with a dashboard, which the session's own has not; it lives as long as its stdin. Its agent
# takes any port: where another Ray's has 52365, a head takes no jobs. Its address is in its folder:
# Ray would send its jobs to any of the machine otherwise.
HEAD = """
import functools, json, ray, sys
from ray._private.parameter import RayParams
from ray._private.utils import write_ray_address
RayParams.__init__ = functools.partialmethod(RayParams.__init__, dashboard_agent_listen_port=0)
context = ray.init(
    address="local", _node_ip_address="127.0.0.1", num_cpus=4, resources={"QAIC": 4},
    _temp_dir=sys.argv[1],
    include_dashboard=True, dashboard_port=0,
    log_to_driver=False, logging_level="ERROR", object_store_memory=100 * 2**20,
)
write_ray_address(context.address_info["gcs_address"], sys.argv[1])
print(json.dumps([context.dashboard_url, context.address_info["gcs_address"]]), flush=True)
sys.stdin.read()
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Of the dashboard and of the head."""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        CACHE_VARIABLE: str(tmp_path_factory.mktemp("cache")),
    }
    with (
        tempfile.TemporaryDirectory() as folder,  # of a short name: sockets are in it
        subprocess.Popen(
            [sys.executable, "-c", HEAD, folder],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as head,
    ):
        assert head.stdout is not None
        dashboard, gcs = json.loads(head.stdout.readline())
        yield f"http://{dashboard}", gcs
        said(head)


@pytest.fixture
def qaic_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run a command in a folder of its own, on a terminal that is wide enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qaic-ray", *arguments])
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def job(tiny: TinyQpcs, tmp_path: Path) -> Path:
    """A job whose file and prompts have names that no shell may see."""
    folder = tmp_path / "jobs; 'of' $HOME"
    folder.mkdir()
    (folder / "a prompt's.txt").write_text("ab\ncd\n" + "x" * 100 + "\n")
    document = {
        "name": "tiny",
        "model": {"name": str(with_byte_tokenizer(tiny.checkpoint, tmp_path / "tiny"))},
        "export": {"verify": "off"},
        "compile": {"precision": "fp32", "batch_size": 2, "prompt_len": 8, "ctx_len": 64},
        "run": {"prompts": "a prompt's.txt", "generation_len": 4, "devices": [1]},
        "sdk": str(tiny.sdk.root),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def ended(address: str, submission_id: str) -> JobStatus:
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        (status,) = job_statuses(address, submission_id)
        if status.ended_s is not None:
            return status
        time.sleep(0.2)
    raise AssertionError(f"{submission_id} did not end")


def test_a_job_runs_by_itself_and_can_be_looked_at(
    qaic_ray: Command, addresses: tuple[str, str], job: Path, tmp_path: Path
) -> None:
    dashboard, head = addresses
    folder = tmp_path / "it's; here"
    detach = ("--detach", "--address", dashboard, "--folder", str(folder), "--json")
    code, out, err = qaic_ray("launch", str(job), *detach)
    assert code == 0, err
    told = json.loads(out)
    submission_id = told["id"]
    assert set(told["sent"]) == {"job.yaml", "prompts/a prompt's.txt"}
    assert told["expected"] == [str(tmp_path / "tiny")]
    assert "must be there" in err

    _, log, _ = qaic_ray("logs", submission_id, "--address", head, "--follow")  # until it ends
    report = json.loads(log.splitlines()[-1])
    assert (report["rows"], report["failed_rows"]) == (3, 1)
    assert Path(report["folder"]).parent == folder / "runs"
    assert len(Path(report["folder"], "outputs.jsonl").read_text().splitlines()) == 3

    status = ended(dashboard, submission_id)
    assert (status.job, status.state, status.rows, status.failed_rows) == ("tiny", "done", 3, 1)
    assert status.folder == report["folder"]
    _, table, _ = qaic_ray("status", "--address", head)
    assert submission_id in table
    assert report["folder"] in table
    code, out, _ = qaic_ray("stop", submission_id, "--address", head, "--json")  # it has ended
    assert (code, json.loads(out)["jobs"][0]["state"]) == (0, "done")


def test_a_job_is_stopped_and_one_that_cannot_run_says_why(
    qaic_ray: Command, addresses: tuple[str, str], job: Path, tmp_path: Path
) -> None:
    dashboard, _ = addresses
    detach = ("launch", str(job), "--detach", "--address", dashboard, "--json")
    (tmp_path / "file").touch()
    _, no_folder, _ = qaic_ray(*detach, "--folder", str(tmp_path / "file"))
    _, no_python, _ = qaic_ray(*detach, "--python", "/no/such/python")
    # A Python that never comes to its program.
    sleeper = tmp_path / "sleeper"
    sleeper.write_text(f"#!{sys.executable}\nimport time\nprint('up', flush=True)\ntime.sleep(600)")
    sleeper.chmod(0o755)
    _, sleeping, _ = qaic_ray(*detach, "--python", str(sleeper))

    for out, words in ((no_folder, "name one there with --folder"), (no_python, "--python")):
        status = ended(dashboard, json.loads(out)["id"])
        assert status.state == "failed"
        assert words in (status.error or "")
    submission_id = json.loads(sleeping)["id"]
    while job_statuses(dashboard, submission_id)[0].state == "waiting":
        time.sleep(0.1)
    _, out, _ = qaic_ray("stop", submission_id, "--address", dashboard, "--json")
    assert json.loads(out)["jobs"][0]["state"] == "stopped"


def test_an_unknown_job_is_named(addresses: tuple[str, str]) -> None:
    for address in addresses:
        with pytest.raises(UsageError, match="knows no job gone-1"):
            job_statuses(address, "gone-1")
