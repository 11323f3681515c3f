"""How far a run is, read from its folder while it is written, killed, resumed and done."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from awaited import ended
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import json_text
from qaic_ray.inspect.holder import RunHolder, holder_of, stop_driver
from qaic_ray.inspect.row_history import row_history
from qaic_ray.inspect.run_status import JournalCounts, RunStatus, RunWatch, eta_s, run_folders
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.journal import RECORD, Journal, JournalRecord, line_of

RUN = {"input": {"name": "-"}, "qpc": "q"}
REQUEST = "request.yaml"

_HINTS = typing.get_type_hints(Row)
_FIELDS = {field.name: st.from_type(_HINTS[field.name]) for field in dataclasses.fields(Row)}
_FIELDS["messages"] = st.none() | st.lists(st.dictionaries(st.text(), st.text())).map(tuple)
ROWS = st.builds(Row, **_FIELDS)

HOLDS = """
import sys, time
from pathlib import Path
from qaic_ray.runs.journal import Journal
journal = Journal(Path(sys.argv[1]), {"input": {"name": "-"}, "qpc": "q"})
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(os, "fdatasync", lambda fd: None)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run-20260101-000000"
    folder.mkdir()
    (folder / REQUEST).write_text("name: run\nmodel: smollm2-135m\nqpc: /q\nprompt: a\n")
    (folder / "job.yaml").write_text("name: run\n")
    return folder


@pytest.fixture
def driver(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works on the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    ended(process)
    process.stdout.close()


def row_line(row: Row, digest: int, span_s: float) -> bytes:
    record = JournalRecord(digest, span_s, row)
    return line_of(RECORD.dump_json(record, exclude_defaults=True))


def answered(index: int, tokens: int = 3, **more: object) -> Row:
    return Row(  # type: ignore[arg-type]
        index, "prompt", "text", FinishReason.STOP, token_ids=tuple(range(tokens)), **more
    )


def failed(index: int) -> Row:
    return Row.failed(Prompt(index, "prompt"), "no")


def write(folder: Path, *rows: Row, span_s: float = 2.0, **options: typing.Any) -> None:
    with Journal(folder, RUN, **options) as journal:
        for row in rows:
            journal.append(row, row.index + 1, span_s)
        journal.commit()


def look(folder: Path, total: int | None = None) -> RunStatus:
    return RunWatch(folder, REQUEST, lambda _: total).look()


@given(st.lists(ROWS, max_size=5))
def test_counts_are_those_of_the_rows_whatever_they_hold(rows: list[Row]) -> None:
    """By a look at bytes: no prompt, answer or id can be taken for a key of the row."""
    counts = JournalCounts(Path("/nowhere"))
    counts._session = 0
    for row in rows:
        counts._add(row_line(row, 1, 1.5))
    assert counts.ok_rows == sum(row.ok for row in rows)
    assert counts.failed_rows == sum(not row.ok for row in rows)
    assert counts.generated_tokens == sum(row.generated_tokens for row in rows)
    assert set(counts.spans_s.values()) <= {1.5}


def test_a_run_that_was_killed(run: Path) -> None:
    write(run, answered(0), answered(1, 5), failed(2))
    status = look(run, 9)
    assert (status.state, status.rows, status.failed_rows, status.total_rows) == (
        "unfinished",
        3,
        1,
        9,
    )
    assert (status.generated_tokens, status.seconds, status.tokens_per_s) == (8, 2.0, 4.0)
    assert (status.job, status.model, status.qpc) == ("run", "smollm2-135m", "/q")
    assert status.eta_s is None
    assert status.pid is None
    assert status.sessions == 1


def test_a_run_that_was_resumed_counts_each_session_s_time_once(run: Path) -> None:
    write(run, answered(0), span_s=2.0)
    write(run, answered(1), answered(2), span_s=3.0)
    status = look(run)
    assert (status.rows, status.sessions, status.seconds) == (3, 2, 5.0)


def test_errors_that_are_tried_again_are_not_counted(run: Path) -> None:
    write(run, answered(0), failed(1), failed(2))
    write(run, answered(1), retry_errors=True, segment_bytes=1)
    status = look(run)
    assert (status.rows, status.failed_rows) == (2, 0)


def test_a_look_reads_what_is_new(run: Path) -> None:
    watch = RunWatch(run, REQUEST, lambda _: 4)
    with Journal(run, RUN, segment_bytes=1) as journal:
        assert watch.look().rows == 0
        for index in range(3):
            journal.append(answered(index), 1, 1.0)
            journal.commit()
            status = watch.look()
            assert (status.state, status.rows, status.pid) == ("running", index + 1, os.getpid())
            assert status.eta_s is not None
            assert status.eta_s >= (3 - index) * 1.0 / (index + 1) - 0.1
    assert watch.look().state == "unfinished"


def test_half_a_line_is_counted_when_it_is_whole(run: Path) -> None:
    write(run, answered(0))
    segment = run / "journal" / "000000.jsonl"
    line = row_line(answered(1), 1, 2.5)
    watch = RunWatch(run, REQUEST, lambda _: None)
    with segment.open("ab") as stream:
        stream.write(line[:30])
        stream.flush()
        assert watch.look().rows == 1
        stream.write(line[30:])
    assert watch.look().rows == 2
    with segment.open("ab") as stream:
        stream.write(b"00000000 {}\n" + line)
    status = watch.look()
    assert status.rows == 3
    assert "damaged" in status.problem


def test_a_run_that_is_done_is_read_from_its_report(run: Path) -> None:
    write(run, answered(0))
    report = {"rows": 7, "failed_rows": 1, "generated_tokens": 30, "seconds": 3.0}
    document = {**report, "tokens_per_s": 10.0, "goes_on": False, "error": None}
    (run / "report.json").write_text(json_text(document))
    status = look(run)
    assert (status.state, status.rows, status.total_rows) == ("done", 7, 7)
    assert status.tokens_per_s == 10.0
    assert status.to_json()["name"] == run.name
    (run / "report.json").write_text(json_text({**document, "goes_on": True}))
    assert look(run).state == "unfinished"


def test_a_folder_of_another_version_is_said(run: Path) -> None:
    write(run, answered(0))
    (run / REQUEST).write_text("- 1\n")
    (run / "journal" / "000000.jsonl").write_text("x\n")
    status = look(run)
    assert status.job == ""
    assert "damaged at line 1" in status.problem


def test_the_driver_is_the_process_that_holds_the_lock(
    run: Path, driver: subprocess.Popen[str]
) -> None:
    assert holder_of(run) == RunHolder(driver.pid)
    assert look(run).pid == driver.pid
    assert stop_driver(run, 20.0)
    assert ended(driver) == -signal.SIGTERM
    assert holder_of(run) is None
    assert look(run).state == "unfinished"


def test_nothing_is_stopped_where_nobody_works(run: Path) -> None:
    with pytest.raises(UsageError, match="nothing to stop"):
        stop_driver(run, 0.0)
    write(run, answered(0))
    with pytest.raises(UsageError, match="nothing to stop"):
        stop_driver(run, 0.0)


def test_a_process_that_has_the_file_open_is_not_the_driver(run: Path) -> None:
    write(run, answered(0))
    with (run / ".lock").open():
        assert holder_of(run) is None


def test_looking_does_not_keep_a_driver_from_beginning(run: Path) -> None:
    write(run, answered(0))
    looks = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from qaic_ray.inspect.holder import holder_of\n"
            "print(1, flush=True)\nwhile True: holder_of(Path(sys.argv[1]))",
            str(run),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert looks.stdout is not None
        looks.stdout.readline()
        until_s = time.monotonic() + 1.0
        while time.monotonic() < until_s:
            write(run)
    finally:
        looks.kill()
        ended(looks)
        looks.stdout.close()


@pytest.mark.parametrize(
    ("rows", "total", "seconds", "expected"),
    [(5, 10, 20.0, 20.0), (10, 10, 20.0, 0.0), (0, 10, 2.0, None), (5, None, 2.0, None)],
)
def test_eta(rows: int, total: int | None, seconds: float, expected: float | None) -> None:
    assert eta_s(rows, total, seconds) == expected


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / REQUEST).touch()
        (folder / "job.yaml").touch()
        os.utime(folder / "job.yaml", (number, number))
    (tmp_path / "other").mkdir()
    assert [folder.name for folder in run_folders(tmp_path, REQUEST)] == ["c", "b", "a"]


def test_a_row_s_history_by_index_and_by_id(run: Path) -> None:
    write(run, answered(0, id='a"b'), failed(1), answered(2, id="1"))
    write(run, answered(1, id=None), retry_errors=True)
    first, second = row_history(run, "1")
    assert (first.row.ok, first.is_final, first.session) == (False, False, 0)
    assert (second.row.ok, second.is_final, second.session) == (True, True, 1)
    assert row_history(run, 'a"b')[0].row.index == 0
    (run / "journal" / "000002.jsonl").write_bytes(b"0000")  # a segment that is being begun
    assert [record.row.index for record in row_history(run, "2")] == [2]
    with pytest.raises(UsageError, match=r"no answer to row 7: 3 rows are answered"):
        row_history(run, "7")
