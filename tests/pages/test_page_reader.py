"""The reader of pages: what it types, what it compares, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_blocks import ROOT, parse
from page_reader import PageReader
from page_terminal import ShellGone
from shown_output import difference, normal

PAGE = ROOT / "docs" / "page.md"


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[PageReader]:
    (tmp_path / "models").mkdir()
    with PageReader(tmp_path / "home", tmp_path / "models") as one:
        yield one


def read(reader: PageReader, text: str) -> None:
    for block in parse(text, PAGE):
        reader.read(block)


def test_one_shell_reads_a_page(reader: PageReader) -> None:
    read(
        reader,
        "```sh\nmkdir inner\ncd inner\nNAME=you\n```\n"
        "Save this as `a.txt`:\n```text\nfirst\n```\n"
        "```console\n$ pwd\n/home/you/try/inner\n$ echo $NAME 41 and 2.5 ms; tput cols\n"
        "you 7 and 1,000 s\n100\n$ cat ../a.txt | tr f F\nFirst\n```\n",
    )


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfalse\ntrue\n```\n",
        "```sh\nfalse | cat\n```\n",
        "```console\n$ echo one\ntwo\n```\n",
        "```console\n$ echo one; echo two\none\n```\n",
        "```console\n$ echo one; echo two\ntwo\n```\n",
        "```console\n$ echo one; exit 3\none\n```\n",
        "<!-- exit code: 2 -->\n```console\n$ echo one\none\n```\n",
        "```python\nraise SystemExit(1)\n```\n",
    ],
)
def test_what_fails_or_differs_is_found(reader: PageReader, text: str) -> None:
    with pytest.raises((AssertionError, ShellGone)):
        read(reader, text)


def test_an_exit_code_that_the_page_says_is_right(reader: PageReader) -> None:
    read(reader, "<!-- exit code: 2 -->\n```console\n$ echo wrong; (exit 2)\nwrong\n```\n")


def test_ctrl_c_is_pressed_when_the_lines_before_it_are_there(reader: PageReader) -> None:
    program = "trap 'echo stopped; exit 130' INT; echo ready; sleep 60"
    read(
        reader,
        f"<!-- exit code: 130 -->\n```console\n$ bash -c \"{program}\"\nready\n^C\nstopped\n```\n"
        "```console\n$ echo next\nnext\n```\n",
    )  # fmt: skip


def test_what_stays_is_ended_with_the_page(reader: PageReader, tmp_path: Path) -> None:
    program = "trap 'touch ended; exit 0' INT; echo ready at 8000; while :; do sleep 0.1; done"
    read(reader, f'<!-- stays -->\n```console\n$ bash -c "{program}"\nready at 8000\n```\n')
    reader.finish()
    assert (reader.folder / "ended").exists()


def test_a_block_that_is_not_run_does_nothing(reader: PageReader) -> None:
    read(reader, "<!-- not run: a card -->\n```sh\nfalse\n```\n<!-- part -->\n```python\nx\n```\n")


LINES = ["a", "b", "c", "d 1", "d 2"]


@given(st.lists(st.sampled_from(LINES), max_size=8), st.data())
def test_what_is_left_out_at_the_mark_may_be_anything(
    printed: list[str], data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, len(printed)))
    end = data.draw(st.integers(begin, len(printed)))
    shown = [*printed[:begin], "...", *printed[end:]]
    assert difference(shown, printed) is None
    assert difference(printed, printed) is None
    if end > begin:
        assert difference([*printed[:begin], *printed[end:]], printed) is not None
    assert difference([*printed, "never"], printed) is not None
    assert difference(["...", *printed[begin:end], "..."], printed) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("✓ Ray 9.5 s", "✓  Ray 850 ms"),
        (
            "run folder /home/you/try/runs/run-20261129-174012",
            "run folder /home/you/try/runs/run-1",
        ),
        ("mine-20261129-183508-08a6 done", "mine-20261130-080000-ffff done"),
        ("key 1f2e3d4c5b", "key 0a9b8c7d6e5f"),
        ("───── 1.2 GiB", "── 800 MiB"),
        ("at 2026-11-29T17:40:12Z", "at 2025-01-02T03:04:05Z"),
    ],
)
def test_numbers_units_digests_and_gaps_do_not_count(one: str, other: str) -> None:
    assert normal(one) == normal(other)


@pytest.mark.parametrize(
    ("one", "other"), [("8 rows", "8 slots"), ("decade", "facade"), ("a 1", "a")]
)
def test_words_count(one: str, other: str) -> None:
    assert normal(one) != normal(other)
