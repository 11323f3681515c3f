"""The lines between the benchmark and its contenders, with children of a few lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from benchmark_modules import FOLDER, benchmark_module

contender = benchmark_module("cpu.contender")

CHILD = """
import os, sys
from answer_lines import answer_lines
kept = {}

def open_(**said):
    print("chatter on stdout")
    kept.update(said)
    return kept

def decode(prompts):
    if not prompts:
        raise ValueError("no prompts")
    return len(prompts)

def die():
    print("out of luck", file=sys.stderr, flush=True)
    os._exit(3)

answer_lines({"open": open_, "decode": decode, "die": die})
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "child.py").write_text(CHILD)
    return [sys.executable, str(tmp_path / "child.py")]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(FOLDER / "cpu")}


def test_what_is_printed_is_no_answer(command: list[str]) -> None:
    with contender.Contender("peer", command, environment(), threads=2) as peer:
        assert peer.open(batch=8) == {"threads": 2, "batch": 8}
        assert peer.ask("decode", prompts=[[1], [2]]) == 2


def test_an_error_is_told_and_the_next_request_is_read(command: list[str]) -> None:
    with contender.Contender("peer", command, environment()) as peer:
        with pytest.raises(
            contender.ContenderError, match=r"^peer could not decode: ValueError: no prompts$"
        ):
            peer.ask("decode", prompts=[])
        assert peer.ask("decode", prompts=[[1]]) == 1


def test_the_last_words_of_one_that_died_are_told(command: list[str]) -> None:
    with contender.Contender("peer", command, environment()) as peer:
        for _ in range(2):
            with pytest.raises(contender.ContenderError, match="peer ended: out of luck"):
                peer.ask("die")


def test_a_contender_ends_with_its_block(command: list[str]) -> None:
    with contender.Contender("peer", command, environment()) as peer:
        pid = peer.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
