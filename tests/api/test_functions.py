"""Jobs as files, mappings and values; options as keyword arguments; steps that are passed on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qaic_ray
from qaic_ray.api.functions import read_job
from qaic_ray.api.quiet import LogListener
from qaic_ray.errors import CompileError, JobError, ParameterError, UsageError
from qaic_ray.option_types import Precision
from qaic_ray.pipeline import compile_step, export_step, job

JOB: dict[str, Any] = {
    "name": "days",
    "model": {"name": "smollm2-135m"},
    "compile": {"precision": ["mx6", "fp16"]},
    "run": {"prompt": "a|b", "variant": {"precision": "mx6"}},
}


def test_a_job_is_a_mapping_a_file_or_a_value(tmp_path: Path) -> None:
    read = read_job(JOB, {})
    assert read.compile.precision == (Precision.MX6, Precision.FP16)
    assert read_job(read, {}) == read
    path = tmp_path / "days.yaml"
    path.write_text("name: days\nmodel: {name: smollm2-135m}\nrun: {prompts: lines.txt}\n")
    assert read_job(path, {}).run.prompts == str(tmp_path / "lines.txt")
    assert read_job(str(path), {"run": {"generation_len": 4}}).run.prompts == str(
        tmp_path / "lines.txt"
    )


def test_overrides_change_a_part_key_by_key_and_leave_what_was_given() -> None:
    changed = read_job(JOB, {"run": {"generation_len": 4, "variant": {"precision": "fp16"}}})
    assert (changed.run.prompt, changed.run.generation_len) == ("a|b", 4)
    assert changed.run.variant.precision is Precision.FP16
    assert JOB["run"] == {"prompt": "a|b", "variant": {"precision": "mx6"}}
    assert read_job(JOB, {"run": {"devices": (0, 1)}}).run.devices == (0, 1)


def test_a_key_that_is_none_is_named() -> None:
    with pytest.raises(JobError, match="did you mean 'prompts'"):
        qaic_ray.plan(JOB, run={"promts": "x"})


def test_a_plan_compiles_nothing() -> None:
    plan = qaic_ray.plan(JOB)
    assert [chosen for _, _, chosen in plan.compiles] == [True, False]
    assert "compile 2 variant(s)" in plan.text


def test_launch_passes_the_job_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heard: dict[str, Any] = {}

    def launched(read: object, listener: object, **how: object) -> str:
        heard.update(job=read, listener=listener, **how)
        return "summary"

    monkeypatch.setattr(job, "launch_job", launched)
    summary: object = qaic_ray.launch(JOB, resume=str(tmp_path), run={"generation_len": 3})
    assert summary == "summary"
    assert heard["job"].run.generation_len == 3
    assert heard["resume"] == tmp_path
    assert isinstance(heard["listener"], LogListener)


def test_export_takes_options_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(export_step, "export_step", lambda *given: heard.extend(given[:2]))
    qaic_ray.export("m", output=Path("m-kv"), verify="quick")
    assert (heard[0].name, heard[1].output, heard[1].verify) == ("m", "m-kv", "quick")
    with pytest.raises(ParameterError, match="verfy"):
        qaic_ray.export("m", verfy="quick")


def test_compile_gives_the_programs_or_the_first_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from qaic_ray.compile.store import Build

    fine = Build(tmp_path, "fine", False, 1.0, 1)
    results: list[Any] = [fine]
    grids: list[Any] = []

    def requested(folder: Path, grid: object, *_: object) -> list[object]:
        grids.append(grid)
        return [SimpleNamespace()]

    monkeypatch.setattr(compile_step, "requested_builds", requested)
    monkeypatch.setattr(compile_step, "compile_step", lambda *_: [(None, r) for r in results])
    built = qaic_ray.compile(tmp_path, precision="mx6", batch_size=[1, 4], sdk="emulated")
    assert built == [fine]
    assert grids[0].batch_size == (1, 4)
    results.append(CompileError("It did not fit."))
    with pytest.raises(CompileError, match="did not fit"):
        qaic_ray.compile(tmp_path, sdk="emulated")
    with pytest.raises(UsageError, match="precision"):
        qaic_ray.compile(tmp_path, precision="int4", sdk="emulated")
