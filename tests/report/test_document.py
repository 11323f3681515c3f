"""The figures of a report against formulas over the rows, and in every state of a run's folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from run_folders import ABOUT, BEGAN_AT, OPEN_S, FolderMaker
from run_summaries import make_summary

from qaic_ray.errors import UsageError
from qaic_ray.report.comparison import compare, comparison_tables
from qaic_ray.report.document import document_of, energy, redraw, stretches, write_report
from qaic_ray.report.folder import read_run
from qaic_ray.report.statistics import RowStatistics
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.intake import OPEN_SOURCE
from qaic_ray.runs.journal import LOCK_NAME, Journal
from qaic_ray.runs.report import is_finished

BINS = 0.002
"""Durations are kept to this share of themselves."""


def finished(maker: FolderMaker) -> Path:
    """The folder with the report of a run that is done, as the run itself writes it."""
    statistics = RowStatistics()
    for row in maker.rows:
        statistics.add(row)
    write_report(make_summary(maker.folder), statistics)
    return maker.folder


def test_percentiles_are_those_of_the_rows(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run", losses=1)
    rows = [row for row in maker.session(700) if row.ok]
    latency = redraw(maker.folder)["latency"]
    whole = [row.ended_at - row.started_at for row in rows]  # type: ignore[operator]
    seconds = {
        "end_to_end": whole,
        "ttft_queue": [e2e - row.decode_s for e2e, row in zip(whole, rows, strict=True)],
        "ttft_engine": [row.ttft_s for row in rows],
        "queue": [row.queue_s for row in rows],
        "time_per_output_token": [
            row.decode_s / (len(row.token_ids) - 1) for row in rows if len(row.token_ids) > 1
        ],
    }
    for name, values in seconds.items():
        assert latency[name]["count"] == len(values)
        for q in (50, 90, 99):
            truth = np.percentile(values, q, method="lower")
            assert latency[name][f"p{q}_s"] == pytest.approx(truth, rel=BINS), (name, q)


def test_the_time_axis_has_every_token_and_every_slot(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run", cards=3, losses=2)
    rows = [row for row in maker.session(400) if row.ok]
    timeline = redraw(maker.folder)["timeline"]
    for lane in timeline["workers"]:
        own = [row for row in rows if row.worker == lane["name"]]
        tokens = sum(len(row.token_ids) for row in own)
        assert math.fsum(lane["tokens"]) == pytest.approx(tokens, rel=1e-4)
        in_slots = math.fsum(
            row.ended_at - row.started_at - row.queue_s  # type: ignore[operator]
            for row in own
        )
        used_s = math.fsum(lane["slots_used"]) * timeline["bucket_s"]
        assert used_s == pytest.approx(in_slots, rel=1e-3)
        assert max(lane["slots_used"]) <= maker.slots + 1e-6
    (stretch,) = timeline["stretches"]
    assert BEGAN_AT < stretch[0] <= min(timeline["times"])
    assert stretch[1] >= max(row.ended_at or 0.0 for row in rows)


def test_a_killed_and_a_resumed_run_say_what_they_lack(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run", losses=1)
    maker.session(60, ends=False)
    killed = redraw(maker.folder)
    assert killed["state"] == "unfinished"
    assert not is_finished(maker.folder)
    assert killed["rows"] == 60
    assert killed["latency"]["inter_token"]["count"] == 0
    assert killed["tokens_per_s"] > 0
    assert any("--resume" in text for text in killed["missing"])
    maker.session(60, pause_s=5000.0)
    resumed = redraw(finished(maker))
    assert resumed["state"] == "done"
    assert resumed["latency"]["inter_token"]["count"] == 4 * 50 * 40
    assert any("session 1, which was killed" in text for text in resumed["missing"])
    assert len(resumed["sessions"]) == len(resumed["timeline"]["stretches"]) == 2
    assert resumed["started_at"] == BEGAN_AT
    assert resumed["ran"]["precision"] == "mx6"
    assert resumed["ran"]["resumed_with"] == ABOUT["command"]
    assert resumed["compiles"] == [{"name": ABOUT["qpc"], "seconds": 1312.5, "reused": False}]


def test_a_run_that_goes_on_is_drawn_and_not_called_done(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run")
    maker.session(40, ends=False)
    journal = max((maker.folder / "journal").glob("*.jsonl"))
    with journal.open("ab") as stream, (maker.folder / "events.jsonl").open("ab") as events:
        stream.write(b'01234567 {"input": 4, "row": {"in')
        events.write(b'{"at": 17')
    with FileLock(maker.folder / LOCK_NAME):
        document = redraw(maker.folder)
    assert document["state"] == "running"
    assert document["rows"] == 40
    assert document["missing"][0].startswith("The run goes on")
    assert not is_finished(maker.folder)


def test_what_a_done_run_said_of_itself_stays(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run", losses=0)
    maker.session(50)
    folder = finished(maker)
    before = json.loads((folder / "report.json").read_text())
    again = redraw(folder)
    changed = {key for key in before if before[key] != again[key]}
    # The summary of a test has other rows than the journal, which the report says.
    assert changed <= {"missing"}
    assert is_finished(folder)


def test_rows_of_an_earlier_version_have_no_times_and_no_events(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run", timed=False)
    maker.session(30)
    (maker.folder / "events.jsonl").unlink()
    # What that version knew of a row, and no more.
    assert b"started_at" not in (maker.folder / "journal" / "000000.jsonl").read_bytes()
    document = redraw(maker.folder)
    assert document["latency"]["ttft_engine"]["count"] > 0
    assert document["latency"]["end_to_end"]["count"] == 0
    assert document["timeline"]["times"] == []
    assert document["energy"] is None
    assert document["ran"] == {}
    assert any("no times of day" in text for text in document["missing"])
    assert any("Nothing is known of what happened to cards" in text for text in document["missing"])


def test_a_damaged_line_costs_its_row_alone(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run", losses=0)
    maker.session(20)
    journal = maker.folder / "journal" / "000000.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b"It is so", b"It is no")
    journal.write_bytes(b"".join(lines))
    run = read_run(maker.folder)
    assert run.tally.rows == 19
    assert document_of(run)["missing"][-1] == f"{journal} is damaged at line 6, which is left out."


def test_errors_that_a_later_session_retries_do_not_count(tmp_path: Path) -> None:
    from qaic_ray.runs.journal import Journal

    maker = FolderMaker(tmp_path / "run", losses=0)
    refused = Row.failed(Prompt(0, "p"), "no")
    answered = Row(0, "p", "t", FinishReason.STOP, token_ids=(1,), worker="card 0")
    for row, retry in ((refused, False), (answered, True)):
        with Journal(maker.folder, {}, retry_errors=retry) as journal:
            journal.append(row, 7, 0.0)
            journal.commit()
    document = redraw(maker.folder)
    assert (document["rows"], document["failed_rows"], document["errors"]) == (1, 0, [])


def test_errors_are_quoted_by_class(tmp_path: Path) -> None:
    statistics = RowStatistics()
    for index in range(500, 0, -1):
        statistics.add(Row.failed(Prompt(index, "p"), f"Row with {index % 5} faults."))
    (found,) = statistics.document()["errors"]
    assert (found["class"], found["rows"]) == ("refused", 500)
    assert found["sentences"] == [
        {"text": f"Row with {index} faults.", "first_row": index, "rows": 100}
        for index in (1, 2, 3)
    ]


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=40))
def test_the_slowest_rows_are_those_that_took_longest(seconds: list[float]) -> None:
    statistics = RowStatistics()
    for index, length in enumerate(seconds):
        row = Row(index, "p", "t", FinishReason.STOP, token_ids=(1, 2), worker="card 0")
        times: dict[str, Any] = {"started_at": 1.7e9, "ended_at": 1.7e9 + length, "queue_s": 0.0}
        statistics.add(Row(**(vars(row) | times)))
    slowest = [row["end_to_end_s"] for row in statistics.document()["slowest_rows"]]
    assert slowest == pytest.approx(sorted(seconds, reverse=True)[:10], abs=1e-5)


def test_energy_is_power_over_time_of_each_board() -> None:
    base = {"generated_tokens": 100, "emulated": True}
    watts = [(0, 10.0), (10, 20.0), (20, 20.0), (5000, 20.0), (5010, 40.0)]
    happenings: list[dict[str, Any]] = [
        {"at": at, "event": "power", "watts": {"A": power, "B": 5.0}} for at, power in watts
    ]
    found = energy(happenings, base)
    assert found is not None
    # The readings of two sessions have an hour between them, in which nothing is known.
    assert found["joules"] == 150 + 200 + 300 + 5 * 30
    assert (found["seconds"], found["boards"], found["simulated"]) == (30, 2, True)
    assert found["joules_per_token"] == 8.0
    # Nor between two sessions, however soon one follows the other.
    resumed = [*happenings[:2], {"at": 11, "event": "session_started"}, *happenings[2:3]]
    found = energy(resumed, base)
    assert found is not None
    assert found["joules"] == 150 + 50
    assert energy([], base) is None
    assert energy(happenings[:1], base) is None


def test_an_outage_is_drawn_and_a_pause_is_not() -> None:
    timeline = {"bucket_s": 1.0, "times": [10.0, 11.0, 500.0, 9000.0]}
    sessions = [(0.0, 600.0), (8990.0, 9010.0)]
    assert stretches(timeline, sessions, []) == [[10.0, 501.0], [9000.0, 9001.0]]
    assert stretches(timeline, [], []) == [[10.0, 501.0], [9000.0, 9001.0]]
    ready = [{"at": 5.0, "event": "worker_ready", "worker": "card 0"}]
    assert stretches(timeline, sessions, ready)[0] == [5.0, 501.0]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a run"):
        redraw(tmp_path)


def test_a_page_goes_where_it_is_asked_for(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run")
    maker.session(10)
    redraw(maker.folder, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000
    assert not (maker.folder / "report.html").exists()
    with pytest.raises(UsageError, match="cannot be written"):
        redraw(maker.folder, tmp_path / "none" / "page.html")


def test_runs_are_compared_with_the_first_one(tmp_path: Path) -> None:
    folders = []
    for number in range(4):
        maker = FolderMaker(tmp_path / f"run-{number}", cards=1 + number, losses=0)
        maker.session(60)
        folders.append(maker.folder)
    comparison = compare(folders)
    assert json.loads(json.dumps(comparison)) == comparison
    assert [run["name"] for run in comparison["runs"]] == [f"run-{n}" for n in range(4)]
    assert comparison["differences"] == {"cards": ["1", "2", "3", "4"]}
    assert len(list(comparison_tables(comparison))) >= 2
    rates = [run["figures"]["tokens_per_s"] for run in comparison["runs"]]
    assert rates == sorted(rates)
    assert OPEN_S > 0


def test_the_folder_of_a_program_says_who_gets_its_answers(tmp_path: Path) -> None:
    (tmp_path / "request.yaml").write_text("name: llm\nmodel: m\nqpc: q\n")
    with Journal(tmp_path, {"input": OPEN_SOURCE}) as journal:
        journal.append(Row(0, "Hi", "Well", FinishReason.STOP), 1, 0.5)
        journal.commit()
    document = document_of(read_run(tmp_path))
    (said,) = [text for text in document["missing"] if "safe" in text]
    assert "started again with this folder" in said
    assert "--resume" not in said
