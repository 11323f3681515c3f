"""`qaic-ray init` and `qaic-ray demo`, up to the step that they call."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qaic_ray import __version__
from qaic_ray.cli import main
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.options import Job
from qaic_ray.pipeline import job as job_module
from qaic_ray.pipeline.job import beside_prepared, load_job
from qaic_ray.pipeline.prepare_step import program_folder
from qaic_ray.sdk import find_sdk


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv("QAIC_RAY_SDK", raising=False)
    return tmp_path


def run(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qaic-ray", *words])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_init_ends_with_commands_that_run_as_they_stand(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("init", "mine", "--model", "org/m") == 0
    said = capsys.readouterr().out
    assert load_job(Path("mine.yaml")).model.name == "org/m"
    commands = [shlex.split(line, comments=True) for line in said.split("\n") if line[:1] == " "]
    assert commands == [["qaic-ray", w, "mine.yaml"] for w in ("plan", "launch", "schema")]
    assert run(*commands[0][1:]) == 0
    assert "org/m" in capsys.readouterr().out
    assert run(*commands[2][1:]) == 0
    assert load_job(Path("mine.yaml")).model.name == "org/m"
    assert Path("job.schema.json").exists()


def test_init_says_for_programs_what_it_wrote(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("init", "mine", "--from", "chat", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "job": "mine.yaml",
        "prompts": "mine-prompts.jsonl",
        "model": "smollm2-135m",
    }


def test_init_refuses_in_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init", "a/b") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("qaic-ray: A job cannot be called 'a/b'")
    assert said.err.count("\n") == 1


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    jobs: list[Job] = []

    def launch_job(job: Job, *_: Any, **__: Any) -> Any:
        jobs.append(job)
        return SimpleNamespace(
            renderables=list, document=dict, error=None, result=SimpleNamespace(ok=True)
        )

    monkeypatch.setattr(job_module, "launch_job", launch_job)
    return jobs


def test_demo_is_the_job_smollm2_in_a_folder_of_the_cache(
    here: Path, launched: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "smollm2").write_text("not the job that is meant")
    assert run("demo") == 0
    (job,) = launched
    cache = here / "cache"
    assert job.run.output == str(cache / "demo" / "runs")
    # Where `run smollm2-135m` has them too.
    place = program_folder(job.model, find_sdk("emulated", job.emulator))
    assert place.is_relative_to(cache)
    assert job.export.output == str(place / "smollm2-135m-kv")
    assert job.compile.output == str(place / "qpc")
    shipped = load_job(Path(__file__).parents[2] / "jobs" / "smollm2.yaml")
    for part, names in {"export": "output", "compile": "output", "run": "output"}.items():
        job = job.changed(part, **{names: getattr(getattr(shipped, part), names)})
    assert job == shipped
    assert f"All of it is in {cache}" in " ".join(capsys.readouterr().err.split())


def test_demo_takes_cards_an_sdk_a_ray_and_a_folder(here: Path, launched: list[Job]) -> None:
    assert run("demo", "--folder", "there", "--device-id", "1,2", "--sdk", "emulated") == 0
    assert run("demo", "--keep-ray", "--no-dashboard") == 0
    first, second = launched
    assert (first.run.devices, first.sdk) == ((1, 2), "emulated")
    assert first.run.output == str(here / "there" / "runs")
    assert first.export.output == str(here / "there" / "smollm2-135m-kv")
    old = load_job(Path(__file__).parents[2] / "jobs" / "smollm2.yaml")
    old = old.changed("emulator", apps_version="1.14.2")
    assert beside_prepared(old) == old  # whose SDK has another interface
    assert (second.ray.keep_ray, second.ray.dashboard, second.sdk) == (True, False, "auto")


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "qaic_ray", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"qaic-ray {__version__}\n"
