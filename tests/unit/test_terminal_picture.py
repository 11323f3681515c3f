"""scripts/terminal_picture: what is drawn is what a terminal shows, at its time."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from terminal import Screenful

SCRIPT = Path(__file__).parents[2] / "scripts" / "terminal_picture"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def plain(lines: Any) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


PIECES = st.lists(
    st.sampled_from(["\r\x1b[2K", "\r\n", "\x1b[32m", "\x1b[0m", "\x1b[1;36m", "\r"])
    | st.text("ab ✓·", max_size=6),
    max_size=30,
)


@given(pieces=PIECES)
def test_it_shows_what_another_terminal_shows(script: dict[str, Any], pieces: list[str]) -> None:
    """The one of the tests of the live line, which knows no colours and no end of a line."""
    text = "".join(pieces)
    seen, other = script["Seen"](), Screenful(columns=999)
    seen.columns = 999
    seen.write(text)
    other.write(text)
    assert plain(seen.shown()) == [line.rstrip() for line in other.lines]


def test_a_long_line_goes_on_in_the_next_and_colours_are_kept(script: dict[str, Any]) -> None:
    seen = script["Seen"](columns=4)
    seen.write("\x1b[32mabcdef\x1b[0m\r\n\x1b[1mx\x1b[22my\x1b[2mz")
    assert seen.shown() == (
        (("abcd", "green"),),
        (("ef", "green"),),
        (("x", "bold"), ("y", ""), ("z", "dim")),
    )


@pytest.mark.parametrize("text", ["\x1b[5J", "\x1b[3;4H", "\x1b[35m"])
def test_what_it_cannot_draw_is_no_guess(script: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        script["Seen"]().write(text)


def test_a_picture_plays_every_frame_and_rests_on_the_last(script: dict[str, Any]) -> None:
    pieces = [
        (5.0, "\x1b[36m⠋\x1b[0m going <on>"),
        (65.0, "\r\x1b[2Kdone & \x1b[1mfine\x1b[0m\r\n"),
    ]
    frames = script["frames_of"]("x", pieces)
    assert frames[-1][0] < 3  # a minute's wait is none in the picture
    text = script["drawing"](frames, "A title")
    root = ElementTree.fromstring(text)
    lines = [e for e in root.iter(f"{SVG}text") if "line" in e.attrib["class"]]
    said = {"".join(e.itertext()): e.attrib["class"].split()[1] for e in lines}
    assert list(said) == ["$", "$ x", "⠋ going <on>", "done & fine"]
    rules = dict(re.findall(r"^\.(t\d+) \{(.*?)animation", text.split("</style>")[0], re.MULTILINE))
    hidden = {line for line, name in said.items() if rules[name] == "opacity:0;"}
    assert hidden == {"$", "⠋ going <on>"}
    # Each is seen at its time, and the last one to the end.
    for line, name in said.items():
        points = re.search(rf"@keyframes {name}\{{(.*?)\}}\n", text)
        assert points is not None
        assert "opacity:1" in points[1]
        assert points[1].endswith("opacity:0}") is (line in hidden)
