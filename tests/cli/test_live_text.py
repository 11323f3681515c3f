"""What the live line says, at the widths of terminals that people have. Frames were looked at."""

from __future__ import annotations

import json

import pytest
from rich.text import Text

from qaic_ray.cli.live.live_text import (
    GridView,
    Stage,
    View,
    clock,
    live_lines,
    log_document,
    log_line,
    warning_line,
)
from qaic_ray.pipeline.submit_step import _ERROR, _PROGRESS
from qaic_ray.rows import FinishReason, Row
from qaic_ray.runs.run_view import BACKOFF, BUSY, LOST, OPENING, READY, CardView, RunView

CARDS = (
    CardView("card 0", BUSY, 4, 4, 133.4),
    CardView("card 1", BUSY, 4, 3, 98.6, restarts=2),
    CardView("card 2", OPENING),
    CardView("card 3", BACKOFF, error="its process died\n(ActorDiedError: killed by the kernel)"),
    CardView("card 4", LOST, restarts=5, error="DeviceError: no NSPs are free"),
    CardView("card 10", READY, 4),
)
ROW = Row(7, "p", "The  answer\nis " + "long " * 30, FinishReason.STOP)
RUN = RunView(
    rows_total=100_000,
    is_exact=False,
    rows_done=1204,
    rows_failed=3,
    tokens_per_s=1532.4,
    eta_s=7451.0,
    seconds=131.0,
    cards=CARDS,
    by_reason={"stop": 15, "length": 5, "error": 3},
    by_error={"refused": 2, "device": 1},
    sample=ROW,
)
GRID = GridView(
    8,
    done=3,
    failed=1,
    building={"mx6 14c pl32 cl512 bs1": 130.0, "fp16 14c pl32 cl512 bs1": 4.0},
    log="qpc/.m-kv-32pl.building-x/new/compile.log",
)


def shown(view: View, width: int, *, verbose: bool = False) -> list[str]:
    lines = live_lines(view, width=width, frame="|", verbose=verbose)
    assert all(line.cell_len <= width for line in lines)
    return [line.plain for line in lines]


@pytest.mark.parametrize(
    ("view", "width", "line"),
    [
        (RUN, 60, "| 1,204 of ~100,000 rows · 3 failed · 1,532 tokens/s"),
        (
            RUN,
            80,
            "| 1,204 of ~100,000 rows · 3 failed · 1,532 tokens/s · ETA 2:04:11",
        ),
        (
            RUN,
            160,
            "| 1,204 of ~100,000 rows · 3 failed · 1,532 tokens/s · ETA 2:04:11 · 2 of 6 cards busy"
            " · 1 opening · 2:11",
        ),
        (RunView(), 80, "| 0 rows · 0 tokens/s · 0:00"),
        (
            GRID,
            60,
            "| 3 of 8 compiled · 1 failed",
        ),
        (
            GRID,
            80,
            "| 3 of 8 compiled · 1 failed · building mx6 14c pl32 cl512 bs1 2:10",
        ),
        (
            GRID,
            160,
            "| 3 of 8 compiled · 1 failed · building mx6 14c pl32 cl512 bs1 2:10 · and 1 more · "
            "log at qpc/.m-kv-32pl.building-x/new/compile.log",
        ),
        (Stage("export m", 12.4), 60, "| export m · 0:12"),
        (Stage("export " + "m" * 80, 12.4), 20, "| export mmmmmmmmmm…"),
    ],
)
def test_a_line_has_what_there_is_room_for(view: View, width: int, line: str) -> None:
    assert shown(view, width) == [line]


def test_a_line_a_card() -> None:
    assert shown(RUN, 160, verbose=True)[1:] == [
        "  card 0   busy       4 of 4 slots      133 tokens/s",
        "  card 1   busy       3 of 4 slots       99 tokens/s  2 restarts",
        "  card 2   opening",
        "  card 3   backoff  its process died (ActorDiedError: killed by the kernel)",
        "  card 4   lost     5 restarts  DeviceError: no NSPs are free",
        "  card 10  ready      0 of 4 slots        0 tokens/s",
    ]
    assert shown(RUN, 60, verbose=True)[4] == (
        "  card 3   backoff  its process died (ActorDiedError: kille…"
    )


def test_many_cards_are_no_more_lines_than_a_terminal_has() -> None:
    view = RunView(cards=tuple(CardView(f"card {i}") for i in range(8000)))
    lines = shown(view, 80, verbose=True)
    assert len(lines) == 18
    assert lines[-1] == "  and 7984 more"


def test_a_log_line_is_read_by_status() -> None:
    line = log_line(RUN)
    assert line == (
        "qaic-ray: 1204 rows done, 3 failed; of ~100,000; 1,532 tokens/s; ETA 2:04:11; "
        "2 of 6 cards busy; 1 opening; 2:11"
    )
    assert _PROGRESS.findall(line) == [("1204", "3")]
    lines = [log_line(view, verbose=True) for view in (RUN, GRID, Stage("export m", 70))]
    assert not _ERROR.findall("\n".join(lines)), "it would be taken for the job's error"
    assert len(log_line(RUN, verbose=True).splitlines()) == 7
    assert log_line(Stage("export m", 70)) == "… export m, 1:10"
    assert log_line(GRID).startswith("… 3 of 8 compiled, 1 failed, building mx6 14c")


def test_a_log_of_json_has_the_numbers() -> None:
    document = json.loads(json.dumps(log_document(RUN, verbose=True)))
    assert document["event"] == "progress"
    assert (document["rows_done"], document["rows_total"], document["eta_s"]) == (
        1204,
        100_000,
        7451.0,
    )
    assert [card["state"] for card in document["card_states"]][:2] == ["busy", "busy"]
    assert json.loads(json.dumps(log_document(GRID)))["building"] == dict(GRID.building)
    assert log_document(Stage("export m", 1.26)) == {
        "event": "stage",
        "stage": "export m",
        "seconds": 1.3,
    }


def test_the_early_warning_is_one_line() -> None:
    assert warning_line(RUN) == (
        "after 23 rows: about 2:04:11 to go, 22% ended by length, errors: 1 device, 2 refused; "
        "row 7 answers: The answer is long long long long long long long long long …"
    )
    assert warning_line(RunView(by_reason={"stop": 20})) == (
        "after 20 rows: 0% ended by length, errors: none"
    )


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.4, 60, 3599.6, 36_000)] == [
        "0:00",
        "0:59",
        "1:00",
        "1:00:00",
        "10:00:00",
    ]


def test_a_spinner_alone_fits_a_terminal_of_ten_columns() -> None:
    assert Text("|").plain in shown(RUN, 10)[0]
