"""Answers on stdout: which way, and what is written of each."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from qaic_ray.cli.answers import Answers, Streaming, chosen
from qaic_ray.cli.screen import Screen
from qaic_ray.rows import FinishReason, Prompt, Row, Sample
from qaic_ray.runs.token_streams import TokenDelta


@pytest.mark.parametrize(
    ("asked", "prompt", "is_terminal", "way"),
    [
        ("auto", "one", True, "tokens"),
        ("auto", r"one|two", True, "rows"),
        ("auto", None, True, "rows"),
        ("auto", "one", False, "ordered"),
        ("auto", None, False, "ordered"),
        ("rows", "one", False, "rows"),
        ("tokens", None, False, "tokens"),
        ("none", "one", True, "none"),
    ],
)
def test_what_is_meant(asked: str, prompt: str | None, is_terminal: bool, way: str) -> None:
    assert chosen(Streaming(asked), prompt=prompt, is_terminal=is_terminal).value == way


def row(index: int, text: str) -> Row:
    return Row(index, f"prompt {index}", text, FinishReason.STOP)


def answers(way: str) -> Answers:
    return Answers(Console(soft_wrap=True, highlight=False), Streaming(way))


def test_rows_as_they_end_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    as_they_end, ordered, none = answers("rows"), answers("ordered"), answers("none")
    for printer in (as_they_end, ordered, none):
        printer.saved(row(1, "b"))
        printer.saved(row(0, "a"))
        printer.answered(row(0, "a"))
        printer.answered(row(1, "b"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *("1 prompt 1", "b", "", "0 prompt 0", "a", ""),
        *("0 prompt 0", "a", "", "1 prompt 1", "b", ""),
    ]


def test_tokens_as_they_are_generated(capsys: pytest.CaptureFixture[str]) -> None:
    printer = answers("tokens")
    printer.generated([TokenDelta(0, 0, "Once "), TokenDelta(1, 0, "later")])
    assert capsys.readouterr().out == "0 Once "
    printer.generated([TokenDelta(0, 0, "upon\x07")])
    assert capsys.readouterr().out == "upon"
    printer.generated([TokenDelta(0, 0, " a", row=row(0, "Once upon a"))])
    printer.answered(row(0, "Once upon a"))
    assert capsys.readouterr().out == " a\n\n1 later"
    printer.generated([TokenDelta(1, 0, "now", restarted=True)])
    assert capsys.readouterr().out == "\n(begun again, with another answer)\nnow"
    printer.answered(row(1, "now"))
    assert capsys.readouterr().out == "\n\n"


def test_what_is_said_while_a_text_is_written_waits_for_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one terminal it would stand in the middle of the text."""
    screen = Screen()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen.show_answers(Streaming.TOKENS)
    screen.remark("before")
    assert capsys.readouterr().err == "before\n"
    screen.generated([TokenDelta(0, 0, "Once ")])
    screen.remark("card 1 is ready")
    screen.generated([TokenDelta(0, 0, "upon", row=row(0, "Once upon"))])
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("0 Once upon", "")
    screen.answered(row(0, "Once upon"))
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("\n\n", "card 1 is ready\n")
    # A text that never ends, as the run is interrupted.
    screen.generated([TokenDelta(1, 0, "And")])
    screen.remark("stopped")
    with screen:
        pass
    assert capsys.readouterr().err == "stopped\n"


def test_rows_without_tokens_and_rows_of_several_answers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = answers("tokens")
    printer.answered(Row.failed(Prompt(0, "p"), "[no]"))
    assert capsys.readouterr().out == "0 p\n[no]\n\n"
    printer.generated([TokenDelta(1, 0, "a"), TokenDelta(1, 1, "b")])
    assert capsys.readouterr().out == "1 a"
    choices = tuple(Sample(text, (1,), FinishReason.STOP) for text in "ab")
    printer.answered(Row(1, "p", "a", FinishReason.STOP, choices=choices))
    assert capsys.readouterr().out == "\n1 of 2 a\n2 of 2 b\n\n"
    printer.generated([TokenDelta(2, 0, "half")])
    printer.answered(Row.failed(Prompt(2, "p"), "lost"))
    assert capsys.readouterr().out == "2 half\nlost\n\n"
