"""The command `report`: one run drawn anew, several beside each other, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import FolderMaker
from typer.testing import CliRunner

from qaic_ray.cli.commands import app
from qaic_ray.errors import UsageError


def ran(*words: str) -> list[str]:
    result = CliRunner().invoke(app, ["report", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output.splitlines()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in range(2):
        FolderMaker(tmp_path / "runs" / f"job-{number}", cards=1 + number).session(40)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_a_run_is_drawn_into_its_folder_and_the_page_named_last(runs: Path) -> None:
    lines = ran(str(runs / "job-0"))
    assert lines[-1].split() == ["report", str(runs / "job-0" / "report.html")]
    assert any("is not done" in line for line in lines)
    document = json.loads((runs / "job-0" / "report.json").read_text())
    assert document["rows"] == 40
    assert document == json.loads("".join(ran("job-0", "--json")))  # by its name in `runs`


def test_runs_are_put_beside_each_other(runs: Path) -> None:
    lines = ran("job-0", "job-1", "-o", "both.html")
    assert lines[-1].split() == ["comparison", "both.html"]
    assert any(line.split()[:1] == ["tokens/s"] for line in lines)
    assert "job-1" in Path("both.html").read_text(encoding="utf-8")
    assert not (runs / "job-0" / "report.html").exists()
    compared = json.loads("".join(ran("job-0", "job-1", "job-0", "job-1", "--json")))
    assert [run["name"] for run in compared["runs"]] == ["job-0", "job-1"] * 2


def test_what_is_no_run_or_cannot_be_written_is_one_sentence(runs: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a run"):
        ran(str(runs))
    with pytest.raises(UsageError, match="cannot be written"):
        ran("job-0", "--html", "nowhere/page.html")
