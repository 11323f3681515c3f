"""Diagrams of states are drawn whole, without a network, from the text that git hosts draw too."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "site"))

from states import WIDTH, changes_of, drawn  # noqa: E402

DIAGRAMS = [
    block
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for block in re.findall(r"^```mermaid\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
]


def test_there_are_diagrams() -> None:
    assert len(DIAGRAMS) >= 3


@pytest.mark.parametrize("source", DIAGRAMS, ids=range(len(DIAGRAMS)))
def test_a_diagram_has_every_state_and_change(source: str) -> None:
    svg = ElementTree.fromstring(drawn(source).replace(" data-search-exclude", "")).find("svg")
    assert svg is not None
    texts = [text.text or "" for text in svg.iter("text")]
    changes = changes_of(source)
    assert len(changes) == source.count("-->")
    for start, end, why in changes:
        assert {start, end} - {"[*]"} <= set(texts)
        assert why in texts or not why
    heights = [float(text.attrib["y"]) for text in svg.iter("text")]
    assert max(heights) < float(svg.attrib["viewBox"].split()[3])


@pytest.mark.parametrize("source", DIAGRAMS, ids=range(len(DIAGRAMS)))
def test_no_text_leaves_the_picture(source: str) -> None:
    """A letter of 12 px is at most 7 px wide on the mean."""
    svg = ElementTree.fromstring(drawn(source).replace(" data-search-exclude", "")).find("svg")
    assert svg is not None
    for text in svg.iter("text"):
        half = 3.5 * len(text.text or "") * 0.9
        assert half <= float(text.attrib["x"]) <= WIDTH - half, text.text


@pytest.mark.parametrize("source", ["graph TD\n a --> b", "stateDiagram-v2\n a -> b"])
def test_another_diagram_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"drawn here|no change of state"):
        changes_of(source)
