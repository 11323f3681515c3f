"""The first page and those behind it: short, whole, and what they say can be typed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qaic_ray import __version__

ROOT = Path(__file__).parents[2]
FIRST = ROOT / "README.md"
PAGES = [FIRST, *(ROOT / "docs").rglob("*.md"), ROOT / "jobs" / "README.md"]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PICTURES = {"docs/pictures/terminal.svg", "docs/pictures/report.png"}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """As a forge makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for _, _, target in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place) if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_named_by_the_index() -> None:
    docs = ROOT / "docs"
    index = docs / "index.md"
    linked = {
        (index.parent / target).resolve()
        for _, _, target in _LINK.findall(index.read_text(encoding="utf-8"))
    }
    with_their_own = (docs / "explanation" / "decisions", docs / "reference")
    found = {page for page in docs.rglob("*.md") if page.parent not in with_their_own}
    assert found - {index} <= linked
    assert {docs / "reference" / "index.md", with_their_own[0] / "README.md"} <= linked


def test_the_first_page_is_read_in_a_minute() -> None:
    """As `wc -w` counts: blocks, links and what stands for pictures too."""
    assert len(FIRST.read_text(encoding="utf-8").split()) < 400


def test_the_first_page_has_two_pictures_that_are_soon_there() -> None:
    shown = {target for mark, _, target in _LINK.findall(FIRST.read_text("utf-8")) if mark}
    assert shown == PICTURES
    assert sum((ROOT / picture).stat().st_size for picture in PICTURES) < 300_000


def test_the_first_page_goes_from_what_it_is_to_where_to_go_on() -> None:
    heads = re.findall(r"^## (.*)$", FIRST.read_text(encoding="utf-8"), re.MULTILINE)
    assert heads == [
        "Install",
        "Three commands",
        "From the recipe",
        "What you get",
        "Emulated figures",
        "Where to go on",
    ]


def test_the_terminal_is_a_recording_that_needs_nothing_else() -> None:
    text = (ROOT / "docs" / "pictures" / "terminal.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    last = [
        "".join(line.itertext())
        for line in root.iter("{http://www.w3.org/2000/svg}text")
        if "line" in line.attrib.get("class", "")
    ]
    assert '$ qaic-ray run smollm2-135m "The capital of France is"' in last
    assert any(line.startswith("merged ") for line in last)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in text
    assert "/tmp" not in text


def test_the_wheel_that_pages_name_is_the_one_that_is_built() -> None:
    for page in [
        FIRST,
        ROOT / "docs" / "how-to" / "clusters.md",
        ROOT / "docs" / "how-to" / "dl2q.md",
    ]:
        wheels = set(re.findall(r"qaic_ray-[\w.]+-py3-none-any\.whl", page.read_text("utf-8")))
        assert wheels == {f"qaic_ray-{__version__}-py3-none-any.whl"}
    planned = subprocess.run(
        ["make", "--dry-run", "wheel"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip wheel" in planned.stdout
    assert "--wheel-dir dist" in planned.stdout
