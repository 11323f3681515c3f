"""What processes print, as files of a run folder: named, bounded, said once where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qaic_ray.cluster import worker_logs
from qaic_ray.cluster.worker_logs import WorkerLogs, file_stem


def said(
    *lines: str, actor: str = "card 3", task: str = "", job: str = "01000000"
) -> dict[str, Any]:
    """As Ray's log monitor sends it."""
    return {"actor_name": actor, "task_name": task, "job": job, "lines": list(lines)}


def refused(text: str) -> None:
    raise AssertionError(text)


def test_each_actor_and_task_has_a_file_and_what_came_early_is_there(tmp_path: Path) -> None:
    logs = WorkerLogs()
    logs.hear(said("compiles fp16 c14", actor="", task="compile fp16 c14"))
    logs.write_to(tmp_path, refused)
    logs.hear(said("opens device 3", "", "ready"))
    logs.hear(said("of Ray itself", actor="", job=""))
    logs.hear(said("again"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "compile-fp16-c14.log": "compiles fp16 c14\n",
        "card-3.log": "opens device 3\n\nready\nagain\n",
    }


def test_a_log_keeps_its_end_and_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_logs, "MAX_LOG_BYTES", 1000)
    logs = WorkerLogs()
    logs.write_to(tmp_path, refused)
    for number in range(1000):
        logs.hear(said(f"line {number}"))
    assert {path.name for path in tmp_path.iterdir()} == {"card-3.log", "card-3.log.1"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2100
    assert (tmp_path / "card-3.log").read_text().endswith("line 999\n")


def test_a_folder_that_is_gone_is_said_once(tmp_path: Path) -> None:
    told: list[str] = []
    logs = WorkerLogs()
    logs.write_to(tmp_path / "gone", told.append)
    logs.hear(said("one"))
    logs.hear(said("two"))
    (sentence,) = told
    assert sentence.endswith("gone/card-3.log cannot be written (No such file or directory).")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("card 3", "card-3"),
        ("cards 0+1 on 10.0.0.2", "cards-0-1-on-10.0.0.2"),
        ("../../etc/passwd", "etc-passwd"),
        ("compile fp16 b1 p32+64", "compile-fp16-b1-p32-64"),
        ("///", "unnamed"),
        ("x" * 300, "x" * 150),
    ],
)
def test_a_name_is_a_file_in_the_folder(name: str, stem: str) -> None:
    assert file_stem(name) == stem
