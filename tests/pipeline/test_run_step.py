"""A run's folder: whose it is, who may look into it, and when it may go."""

from __future__ import annotations

import stat
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qaic_ray.errors import UsageError
from qaic_ray.options import RunOptions
from qaic_ray.pipeline import run_step
from qaic_ray.pipeline.request import RunRequest, resolved
from qaic_ray.rows import FinishReason, Row
from qaic_ray.runs.delivery import RowWriter


@pytest.fixture
def request_(tmp_path: Path) -> RunRequest:
    output = str(tmp_path / "runs")
    options = RunOptions(devices=(0,), prompt="a|b", metrics=False, output=output)
    qpc = tmp_path / "qpc"
    qpc.mkdir()
    header = struct.pack("<4sBBHQQ", bytes.fromhex("7ccda100"), 0, 1, 1, 24, 0)
    (qpc / "programqpc.bin").write_bytes(header)
    return RunRequest("r", "tiny", qpc, resolved(options))


def run(request: RunRequest, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_step, "content_parts", lambda *_: {"qpc": "q", "model": {}})
    monkeypatch.setattr(run_step, "worker_specs", lambda *_: [])
    names = ["answered", "saved", "generated", "running", "card_ready", "remark", "run_folder"]
    listener: Any = SimpleNamespace(**{n: lambda _: None for n in names}, wants_tokens=False)
    here = SimpleNamespace(description="none", numerics=None, card_lines=dict)
    sdk: Any = SimpleNamespace(name="auto", here=here, tool=lambda name: [name])
    run_step.run_on(cluster, request, request.open_input(), sdk=sdk, listener=listener)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_a_late_usage_error_removes_no_answered_row(
    request_: RunRequest, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    def run_prompts(*_: object, journal: Any, **__: object) -> None:
        for index in range(num_rows):
            journal.append(Row(index, "a", "b", FinishReason.STOP), 1, 0.0)
        journal.commit()
        raise UsageError("The prompts file is not what it was.")

    cluster = SimpleNamespace(run_prompts=run_prompts, write_logs_to=lambda *_: None)
    with pytest.raises(UsageError, match="not what it was"):
        run(request_, cluster, monkeypatch)
    folders = list(Path(request_.run.output).iterdir())
    assert len(folders) == num_rows
    for folder in folders:
        assert len((folder / "journal" / "000000.jsonl").read_text().splitlines()) == 2


def test_a_run_s_folder_is_its_user_s(request_: RunRequest) -> None:
    folder = run_step._new_run_folder(request_)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    again = run_step._new_run_folder(request_)
    assert again.parent == folder.parent
    assert again != folder


def test_a_place_for_runs_that_is_a_file_is_said(request_: RunRequest) -> None:
    Path(request_.run.output).write_text("mine")
    with pytest.raises(UsageError, match="runs is not a folder"):
        run_step._new_run_folder(request_)


def test_a_link_beside_the_outputs_is_not_written_through(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    for name in (".outputs.jsonl.unfinished", ".errors.jsonl.unfinished"):
        (run_folder / name).symlink_to(mine)
    with RowWriter(run_folder, resumed=True) as write:
        write(Row(0, "a", "b", FinishReason.STOP))
    assert mine.read_text() == "precious"
    assert not (run_folder / "outputs.jsonl").is_symlink()
    assert '"b"' in (run_folder / "outputs.jsonl").read_text()
