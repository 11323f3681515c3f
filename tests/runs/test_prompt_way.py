"""The way of one prompt through the driver, as calls between our modules; `pytest -s` prints it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from simulated_cards import DirectReader, SimulatedCards

from qaic_ray.rows import Prompt
from qaic_ray.runs.delivery import RowWriter
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.journal import Journal

MOST_MOVES = 60
MOST_MODULES = 12
"""Eleven that a prompt goes through, and the result of the run."""
PACKAGE = "qaic_ray."


class Move(NamedTuple):
    """A call from one of our modules into another."""

    caller: str
    callee: str
    function: str


def way(num_prompts: int, folder: Path) -> list[Move]:
    """The moves of a run, from the driver's start to its result: one card, journal and outputs."""
    moves: list[Move] = []

    def note(frame: FrameType, what: str, _: object) -> None:
        if what != "call" or frame.f_back is None:
            return
        caller, callee = (f.f_globals.get("__name__", "") for f in (frame.f_back, frame))
        if caller.startswith(PACKAGE) and callee.startswith(PACKAGE) and caller != callee:
            names = (name.removeprefix(PACKAGE) for name in (caller, callee))
            moves.append(Move(*names, frame.f_code.co_name))

    cards = SimulatedCards([0.0])
    folder.mkdir()
    with Journal(folder, {}) as journal, RowWriter(folder) as write:
        driver = Driver(
            cards,
            [Prompt(index, "same") for index in range(num_prompts)],
            Audience(on_row=write),
            clock=cards.clock,
            reader=DirectReader,
            journal=journal,
        )
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            result = driver.run()
        finally:
            sys.setprofile(before)
    assert result.total.rows == num_prompts
    return moves


def test_the_way_of_a_prompt_is_short(tmp_path: Path) -> None:
    way(1, tmp_path / "first")  # what is made once for a process is no part of the way
    moves = way(1, tmp_path / "one")
    modules = sorted({name for move in moves for name in (move.caller, move.callee)})
    more = len(way(2, tmp_path / "two")) - len(moves)
    lines = [f"{move.caller} -> {move.callee}.{move.function}" for move in moves]
    lines.append(f"{len(moves)} moves, {len(modules)} modules: {', '.join(modules)}")
    lines.append(f"{more} moves more for a second prompt")
    sys.stdout.write("\n".join(("", *lines, "")))
    assert len(moves) <= MOST_MOVES
    assert len(modules) <= MOST_MODULES
