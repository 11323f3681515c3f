"""With --json stdout is JSON and nothing else, in every command that has it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_lines import all_names, context_of, of_name
from run_folders import FolderMaker
from shard_drivers import drive, run_of

from qaic_ray.bundles.record import BundleWriter
from qaic_ray.cli import main
from qaic_ray.cli.answers import Answers, Streaming
from qaic_ray.cli.launching import streaming
from qaic_ray.cli.parameters import ShowOptions
from qaic_ray.cli.screen import Screen
from qaic_ray.compile.store import Build
from qaic_ray.errors import CompileError, UsageError
from qaic_ray.files.folders import CACHE_VARIABLE
from qaic_ray.options import Job
from qaic_ray.pipeline.submit_step import Parcel, SubmitRequest
from qaic_ray.reference.answers import ANSWERS
from qaic_ray.rows import FinishReason, Row

ROOT = Path(__file__).parents[2]

# Each with what its document has. `stop` ends with the document of `status`.
CHEAP: dict[str, tuple[str, ...]] = {
    "check specializations.json --sdk emulated": ("ok", "findings", "converted"),
    "compare bundle bundle": ("equal", "executions", "difference"),
    "devices --sdk emulated": ("sdk", "devices"),
    "doctor --sdk emulated": ("checks",),
    "init mine": ("job", "prompts", "model"),
    "key alice": ("name", "key", "line"),
    "emulator install sdk": ("sdk", "root", "cards"),
    "merge shards/* -o merged": ("rows_in", "outputs_sha256", "shards"),
    "monitoring m": ("folder", "files", "commands"),
    "plan job.yaml": ("job", "text", "compiles"),
    "ray stop": ("ended",),
    "report run-1": ("rows", "tokens_per_s"),
    "report run-1 run-2": ("runs",),
    "runs": ("runs",),
    "schema": ("$schema", "properties"),
    "schema job.yaml": ("job", "schema"),
    "show run-1 0": ("row",),
    "status": ("runs", "jobs"),
}
ELSEWHERE = {"export", "compile", "run", "serve", "launch", "demo", "stop", "ray show", "ray env"}
"""Commands that take a model or a Ray: the rest of this file, and tests/road."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    shutil.copy(ROOT / "jobs" / "smollm2.yaml", folder / "job.yaml")
    shapes = ROOT / "configs" / "specializations" / "pl128-cl1024-bs4.json"
    shutil.copy(shapes, folder / "specializations.json")
    for number in (1, 2):
        FolderMaker(folder / "runs" / f"run-{number}").session(3)
    (folder / "p.txt").write_text("a\nb\n")
    BundleWriter(folder / "bundle", 1, {}).add({"x": np.zeros(2)}, {"y": np.zeros(2)})
    for shard in ("1/2", "2/2"):
        made = drive(run_of(folder / "made", prompts=str(folder / "p.txt"), shard=shard)).folder
        shutil.copytree(made, folder / "shards" / made.name)
    return folder


def test_each_command_that_has_it_is_looked_at() -> None:
    having = {
        name
        for name in all_names()
        if any("--json" in p.opts for p in of_name(name).get_params(context_of(name)))
    }
    names = {line.split(" --")[0] for line in CHEAP}
    known = {max((n for n in having if line.startswith(n)), key=len, default="") for line in names}
    assert having == known | ELSEWHERE


Says = Callable[..., str]


@pytest.fixture
def stdout(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Says:
    """What a command that ends well prints there."""
    monkeypatch.chdir(here)
    monkeypatch.setenv(CACHE_VARIABLE, str(here / "cache"))

    def says(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["qaic-ray", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    return says


@pytest.mark.parametrize("line", CHEAP)
def test_stdout_is_one_object_on_one_line(line: str, stdout: Says) -> None:
    said = stdout(*line.split(), "--json")
    assert said.count("\n") == 1
    assert set(CHEAP[line]) <= set(json.loads(said))


TOLD = {
    "schema job.yaml": "schema JOB",
    "status": "status, stop",
    "devices --sdk emulated": "devices",
    "doctor --sdk emulated": "doctor",
    "init mine": "init",
    "key alice": "key",
    "emulator install sdk": "emulator install",
    "monitoring m": "monitoring",
    "plan job.yaml": "plan",
    "ray stop": "ray stop",
    "runs": "runs",
    "show run-1 0": "show",
}
"""Commands whose answers the reference tells, by their titles there."""


@pytest.mark.parametrize("line", TOLD)
def test_the_reference_tells_what_is_printed(line: str, here: Path, stdout: Says) -> None:
    for made in ("mine.yaml", "mine-prompts.jsonl"):
        (here / made).unlink(missing_ok=True)
    shutil.rmtree(here / "m", ignore_errors=True)
    document = json.loads(stdout(*line.split(), "--json"))
    _, told = ANSWERS[TOLD[line]]
    outer = {name.partition("[")[0].partition(".")[0] for name in told}
    assert set(document) == outer
    for name, value in document.items():
        if isinstance(value, list) and any(other.startswith(f"{name}[].") for other in told):
            assert all(f"{name}[].{key}" in told for item in value for key in item), name


def test_nothing_to_resume_is_an_object_too(stdout: Says) -> None:
    said = json.loads(stdout("run", "--resume", "-o", "elsewhere", "--json"))
    assert said == {"remark": "No run in elsewhere is unfinished."}


def test_a_plan_has_what_would_be_run(stdout: Says) -> None:
    plan = json.loads(stdout("plan", "job.yaml", "--device-id", "1", "--sdk", "emulated", "--json"))
    assert "run one on 1 cards" in plan["text"]
    (chosen,) = [compile for compile in plan["compiles"] if compile["is_run"]]
    assert any(word.startswith("-aic-num-cores=") for word in chosen["command"])


def row(index: int) -> Row:
    return replace(Row(index, "Why?", "[b] so\nit is", FinishReason.STOP), worker="card 0")


def summary(**more: Any) -> Any:
    return SimpleNamespace(
        document=lambda: {"rows": 2, "failed_rows": 0, "folder": "runs/a"},
        renderables=lambda: ["a table"],
        error=None,
        goes_on=False,
        result=SimpleNamespace(ok=True),
        **more,
    )


@pytest.mark.parametrize("streaming", [Streaming.ROWS, Streaming.ORDERED, Streaming.NONE])
def test_a_run_prints_its_report_and_rows_where_they_are_asked_for(
    streaming: Streaming, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(as_json=True)
    screen.show_answers(streaming)
    for index in (1, 0):
        screen.saved(row(index))
    for index in (0, 1):
        screen.answered(row(index))
    screen.finish(summary())
    out, err = capsys.readouterr()
    *rows, report = map(json.loads, out.splitlines())
    order = {Streaming.ROWS: [1, 0], Streaming.ORDERED: [0, 1], Streaming.NONE: []}[streaming]
    assert rows == [{"type": "row", **row(index).to_json()} for index in order]
    kind = {} if streaming is Streaming.NONE else {"type": "report"}
    assert report == kind | {"rows": 2, "failed_rows": 0, "folder": "runs/a"}
    assert err == ""


def shown(**options: Any) -> Streaming:
    return streaming(ShowOptions(as_json=True, **options), "one prompt")


def test_rows_are_printed_only_where_that_is_said() -> None:
    assert shown() is Streaming.NONE
    assert shown(stream="rows") is Streaming.ROWS
    assert shown(stream="ordered") is Streaming.ORDERED
    assert shown(stream="rows", no_stream=True) is Streaming.NONE
    with pytest.raises(UsageError, match="--stream tokens is for people"):
        shown(stream="tokens")


def test_rows_for_people_are_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Answers(Console(), Streaming.ROWS).saved(row(0))
    assert capsys.readouterr().out.startswith("0 Why?\n")


@pytest.mark.parametrize("fails", [False, True])
def test_a_grid_is_one_object(
    fails: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant: Any = SimpleNamespace(name="a", label="a")
    failed = CompileError("No room.", exit_code=3)
    outcomes: Any = [
        (variant, Build(tmp_path, "a", False, 1.0, 2**20)),
        *([(variant, failed)] if fails else []),
    ]
    with pytest.raises(SystemExit) if fails else nullcontext():
        Screen(as_json=True).compiled_all(outcomes)
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert [v["ok"] for v in variants] == ([True, False] if fails else [True])


def test_an_export_is_one_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overflow = SimpleNamespace(name="up", largest=1e6)
    line = SimpleNamespace(
        scenario="prefill", logits=0.0, past_keys=0.0, past_values=0.0, num_top1_equal=1, num_rows=1
    )
    report = SimpleNamespace(level="full", tolerance=0.1, scenarios=[line], overflows=[overflow])
    manifest = SimpleNamespace(next_tokens=True, to_json=lambda: '{"model": "m"}')
    result: Any = SimpleNamespace(
        folder=tmp_path, manifest=manifest, verification=report, reused=False
    )
    Screen(as_json=True).exported(result)
    document = json.loads(capsys.readouterr().out)
    assert document == {"folder": str(tmp_path), "reused": False, "model": "m"}


def test_a_detached_job_is_one_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job = Job.model_validate({"name": "tiny", "model": {"name": "m"}})
    request = SubmitRequest(job, tmp_path, "python")
    Screen(as_json=True).submitted(request, "tiny-1", Parcel({"job.yaml": 10}, ()))
    out, err = capsys.readouterr()
    assert json.loads(out)["id"] == "tiny-1"
    assert "sent job.yaml" in err
    Screen().submitted(request, "tiny-1", Parcel({"job.yaml": 10}, ()))
    assert capsys.readouterr().out == "tiny-1\n"
