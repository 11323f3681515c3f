"""The picture of tokens/s against batch, read again as XML."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import pytest
from benchmark_modules import benchmark_module
from hypothesis import given
from hypothesis import strategies as st

picture = benchmark_module("cpu.picture")
SVG = "{http://www.w3.org/2000/svg}"


def curve(name: str, values: dict[int, float], dash: str = "") -> object:
    points = tuple(picture.Point(b, v, v * 0.9, v * 1.1) for b, v in values.items())
    return picture.Curve(name, points, dash)


OURS = curve("ours & <others>", {1: 40.0, 2: 80.0, 4: 150.0})
LIMIT = curve("read", {1: 250.0, 2: 500.0, 4: 900.0}, "7 4")


def test_it_is_xml_with_every_name_and_a_circle_a_figure() -> None:
    root = ET.fromstring(picture.draw([OURS, LIMIT], "Decode", ["note 1", "note 2"]))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"Decode", "note 1", "note 2", "ours & <others>", "read", "1", "2", "4"} <= set(texts)
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == 3
    notes = [circle.findtext(f"{SVG}title") for circle in circles]
    assert notes[0] == "ours & <others>, batch 1: 40 tokens/s (36 to 44)"


def test_a_limit_is_dashed_and_has_no_range() -> None:
    root = ET.fromstring(picture.draw([OURS, LIMIT], "Decode", []))
    classes = [element.get("class") for element in root.iter(f"{SVG}path")]
    assert classes.count("limit") == 1
    assert classes.count("range") == 3
    (limit,) = (e for e in root.iter(f"{SVG}path") if e.get("class") == "limit")
    assert limit.get("stroke-dasharray") == "7 4"


def test_a_contender_without_a_figure_is_left_out() -> None:
    assert "absent" not in picture.draw([OURS, picture.Curve("absent", ())], "Decode", [])


def test_one_batch_alone_can_be_drawn() -> None:
    assert ET.fromstring(picture.draw([curve("ours", {8: 40.0})], "Decode", [])) is not None


def test_doubling_is_the_same_distance_everywhere() -> None:
    plane = picture.Plane([OURS, LIMIT])
    assert plane.x(2) - plane.x(1) == pytest.approx(plane.x(4) - plane.x(2))
    assert plane.y(50) - plane.y(100) == pytest.approx(plane.y(400) - plane.y(800))
    assert plane.ticks == [50, 100, 200, 500, 1000]


def test_a_limit_far_above_the_figures_ends_on_its_own_line() -> None:
    far = curve("far", {1: 100.0, 2: 200.0, 4: 400.0, 8: 800.0, 16: 1600.0}, "7 4")
    ours, ended = picture.without_far_limits([curve("ours", {1: 50.0, 16: 200.0}), far])
    assert ours.points[-1].median == 200.0
    # Three times the highest of the range, 220; the line has 100 tokens/s a row.
    assert [point.median for point in ended.points] == [100.0, 200.0, 400.0, pytest.approx(660.0)]
    assert ended.points[-1].batch == pytest.approx(6.6)


def test_a_limit_that_ends_early_has_its_name_there() -> None:
    far = curve("far", {1: 100.0, 4: 400.0, 16: 1600.0}, "7 4")
    root = ET.fromstring(picture.draw([curve("ours", {1: 50.0, 16: 200.0}), far], "Decode", []))
    places = {e.text: float(e.get("x", "0")) for e in root.iter(f"{SVG}text")}
    right = picture.WIDTH - picture.RIGHT
    assert places["far"] < right < places["ours"]


def test_every_limit_has_a_beginning() -> None:
    far = curve("far", {1: 1000.0, 2: 2000.0}, "7 4")
    _, ended = picture.without_far_limits([curve("ours", {1: 5.0, 2: 9.0}), far])
    assert [point.median for point in ended.points] == [1000.0, pytest.approx(1200.0)]


@given(st.lists(st.floats(0, 500), min_size=1, max_size=12))
def test_names_keep_their_distance_their_order_and_their_room(heights: list[float]) -> None:
    wanted = {f"name {number}": height for number, height in enumerate(heights)}
    found = picture.spread(wanted, 17, 0, 500)
    assert found.keys() == wanted.keys()
    ordered = sorted(found.values())
    assert all(b - a >= 17 - 1e-6 for a, b in itertools.pairwise(ordered))
    for one, two in itertools.combinations(wanted, 2):
        if wanted[one] < wanted[two]:
            assert found[one] < found[two]
    assert ordered[0] >= -1e-6
    assert ordered[-1] <= 500 + 1e-6


def test_names_that_have_room_stay_where_their_lines_end() -> None:
    wanted = {"a": 100.0, "b": 150.0, "c": 300.0}
    assert picture.spread(wanted, 17, 0, 500) == wanted
    assert picture.spread({"a": 100.0, "b": 100.0}, 20, 0, 500) == {"a": 90.0, "b": 110.0}
