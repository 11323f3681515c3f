"""The live line on terminals and off them: drawn, erased, and never mixed with what is printed."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from terminal import Screenful

from qaic_ray.cli.live import live_line
from qaic_ray.cli.live.grid_watch import GridWatch
from qaic_ray.cli.live.live_line import LiveLine
from qaic_ray.cli.live.live_text import Stage, View
from qaic_ray.cli.screen import Screen
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.run_view import CardView, RunView

RUN = RunView(rows_total=50, is_exact=False, rows_done=7, cards=(CardView("card 0", "busy", 4, 4),))


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Terminal]:
    """One terminal for stdout and stderr."""

    def make(columns: int, **environment: str) -> Terminal:
        for name, value in {
            "TERM": "xterm-256color",
            "COLUMNS": str(columns),
            **environment,
        }.items():
            monkeypatch.setenv(name, value)
        made = Terminal()
        monkeypatch.setattr(sys, "stderr", made)
        monkeypatch.setattr(sys, "stdout", made)
        monkeypatch.setattr(live_line, "DRAW_EVERY_S", 1000.0)  # only when a test draws
        return made

    return make


def seen(text: str, columns: int = 80) -> list[str]:
    screen = Screenful(columns)
    screen.write(text)
    assert screen.widest <= columns
    return [line.rstrip() for line in screen.lines]


@pytest.mark.parametrize("columns", [20, 60, 80, 160])
@pytest.mark.parametrize("verbose", [False, True])
def test_it_is_drawn_in_place_and_leaves_nothing(
    terminal: Callable[..., Terminal], columns: int, verbose: bool
) -> None:
    out = terminal(columns)
    live = LiveLine(verbose=verbose)
    live._ask = lambda: RUN
    for _ in range(3):
        live.draw()
    lines = seen(out.getvalue(), columns)
    assert len(lines) == (2 if verbose else 1)
    assert "7 of ~50 rows" in lines[0]
    live.stop()
    assert seen(out.getvalue(), columns) == [""] * len(lines)


def test_answers_stand_whole_above_it(terminal: Callable[..., Terminal]) -> None:
    out = terminal(80, NO_COLOR="1")
    screen = Screen(stream=True, verbose=True)
    with screen:
        screen._live._ask = lambda: RUN
        for index in range(3):
            screen._live.draw()
            screen.answered(Row(index, f"prompt {index}", f"answer {index}", FinishReason.STOP))
            screen.remark(f"remark {index}")
        screen._live.draw()
        lines = seen(out.getvalue())
        answers = [f"{i} prompt {i}\nanswer {i}\n\nremark {i}" for i in range(3)]
        assert "\n".join(lines[:-2]) == "\n".join(answers)
        assert lines[-1].startswith("  card 0  busy")
    assert [line for line in seen(out.getvalue()) if line] == [line for line in lines[:-2] if line]


def test_it_is_not_drawn_within_a_text_that_is_generated(
    terminal: Callable[..., Terminal],
) -> None:
    from qaic_ray.cli.answers import Streaming
    from qaic_ray.runs.token_streams import TokenDelta

    out = terminal(80, NO_COLOR="1")
    screen = Screen()
    screen.show_answers(Streaming.TOKENS)
    with screen:
        screen._live._ask = lambda: RUN
        screen._live.draw()
        for text in ("Once ", "upon "):
            screen.generated([TokenDelta(0, 0, text)])
            screen._live.draw()
        assert seen(out.getvalue()) == ["0 Once upon"]
        screen.answered(Row(0, "p", "Once upon ", FinishReason.STOP))
        screen._live.draw()
        assert seen(out.getvalue())[:2] == ["0 Once upon", ""]
        assert "7 of ~50 rows" in seen(out.getvalue())[2]


def test_no_colour_means_none(terminal: Callable[..., Terminal]) -> None:
    out = terminal(80, NO_COLOR="1")
    live = LiveLine()
    live._ask = lambda: RUN
    live.draw()
    assert "\x1b[3" not in out.getvalue()


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}])
def test_a_dumb_terminal_gets_log_lines(
    terminal: Callable[..., Terminal], environment: dict[str, str]
) -> None:
    out = terminal(80, **environment)
    live = LiveLine()
    live.show(lambda: RUN)
    live.stop()
    assert out.getvalue().startswith("qaic-ray: 7 rows done, 0 failed; of ~50; ")
    assert "\x1b" not in out.getvalue()


def test_a_log_has_a_line_at_times_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 100.0
    monkeypatch.setattr(
        live_line,
        "time",
        SimpleNamespace(monotonic=lambda: now_s, sleep=time.sleep, thread_time=time.thread_time),
    )
    live = LiveLine(as_json=True)
    view: View = Stage("export m", 0.0)
    live._ask, live._logged_s = (lambda: view), now_s
    for now_s in (101.0, 105.0, 110.0, 111.0, 119.0, 120.0):  # noqa: B007  # read by the clock
        live.draw()
    view = RUN
    live.draw()
    live.draw()
    live.stop()
    documents = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [document["event"] for document in documents] == ["stage", "stage", "progress"]
    assert documents[-1]["rows_done"] == 7
    live.show(lambda: RUN)
    live.stop()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_fault_of_the_view_is_said_once_and_ends_nothing(
    terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = terminal(80)
    monkeypatch.setattr(live_line, "DRAW_EVERY_S", 0.01)
    asked = threading.Event()

    def ask() -> View:
        asked.set()
        raise KeyError("a bug")

    live = LiveLine()
    live.show(ask)
    assert asked.wait(30)
    deadline_s = time.monotonic() + 30
    while "the run goes on" not in out.getvalue():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    live.stop()
    assert out.getvalue().count("a bug") == 1


def test_the_thread_draws_at_once_and_again(
    terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(80)
    monkeypatch.setattr(live_line, "DRAW_EVERY_S", 0.01)
    drawn = threading.Semaphore(0)

    def ask() -> View:
        drawn.release()
        return RUN

    live = LiveLine()
    live.show(ask)
    for _ in range(3):
        assert drawn.acquire(timeout=30)
    live.stop()


def test_notes_are_json_where_the_log_is(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(log_json=True)
    screen.began("export m")
    screen.remark("[odd]")
    screen.going(RunView(by_reason={"stop": 20}))
    screen.ended("export m written")
    documents = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {document["event"] for document in documents} == {"note"}
    assert [document["text"] for document in documents][:2] == ["… export m", "[odd]"]


def test_a_grid_is_counted(tmp_path: Path) -> None:
    class Clock:
        now_s = 0.0

        def __call__(self) -> float:
            return self.now_s

    clock = Clock()

    def request(label: str) -> object:
        target = tmp_path / label
        return SimpleNamespace(variant=SimpleNamespace(label=label), target=target)

    watch = GridWatch(3, clock=clock)
    watch.began(request("a"))  # type: ignore[arg-type]
    clock.now_s = 5.0
    watch.began(request("b"))  # type: ignore[arg-type]
    assert watch.view().building == {"a": 5.0, "b": 0.0}
    assert not watch.ended("a", ok=False)
    assert not watch.ended("b", ok=True)
    assert watch.ended("c", ok=True)  # it was there
    view = watch.view()
    assert (view.done, view.failed, view.building, view.log) == (3, 1, {}, "")


def test_failed_rows_are_answers_too(terminal: Callable[..., Terminal]) -> None:
    out = terminal(80, NO_COLOR="1")
    Screen(stream=True).answered(Row.failed(Prompt(0, "p"), "no"))
    assert seen(out.getvalue())[:2] == ["0 p", "no"]
