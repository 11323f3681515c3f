"""The page: drawn from the document alone, whole, and fit to be sent."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import FolderMaker
from run_summaries import Page, make_summary

from qaic_ray.metrics import Durations
from qaic_ray.report import drawing
from qaic_ray.report.comparison import compare, comparison_page
from qaic_ray.report.document import latency_of, redraw, write_report
from qaic_ray.report.page import html_page
from qaic_ray.report.statistics import RowStatistics
from qaic_ray.runs.report import tables


def check_alone(page: str) -> Page:
    """It needs no network, no script, no other file."""
    parsed = Page(page)
    names = {name for name, _ in parsed.attributes}
    assert names.isdisjoint({"src", "href", "srcset", "data", "action", "onclick", "onload"})
    assert parsed.count["script"] == parsed.count["link"] == parsed.count["img"] == 0
    for word in ("url(", "@import", "//"):
        assert word not in page
    return parsed


def test_the_page_needs_nothing_else_and_shows_everything(tmp_path: Path) -> None:
    document = make_summary(tmp_path).document()
    parsed = check_alone(html_page(document))
    for text in ("emulated SDK 1.20", "not a card's speed", "40.0", "2,400", "card 1", "100"):
        assert text in parsed.text
    assert "<b>gone</b>" in parsed.text
    assert parsed.count["b"] == 0
    num_bins = sum(
        len(document[name]["counts"]) for name in ("ttft_s_histogram", "generated_tokens_histogram")
    )
    assert parsed.count["rect"] == num_bins
    assert parsed.count["i"] == 2


def test_the_page_can_be_drawn_from_the_file(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)
    write_report(summary, RowStatistics())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert html_page(document) == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert document.items() >= summary.document().items()
    lacks = len(document["missing"])
    assert len(list(tables(document))) == len(list(summary.renderables())) + lacks


def test_the_page_of_a_run_shows_all_that_the_folder_has(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "a <run>", cards=3, losses=3)
    maker.session(150, ends=False)
    maker.session(150, pause_s=9000.0)
    document = redraw(maker.folder)
    page = (maker.folder / "report.html").read_text(encoding="utf-8")
    parsed = check_alone(page)
    for text in (
        *("a <run>", "0.9.0", "2.60.0", "mx6", "node-7", "1 x 128 of 4096", "a7a7a7a7a7a7a7a7"),
        *("TTFT from the queue", "TTFT from the engine", "Inter-token time", "End to end"),
        *("Tokens a second", "Occupancy", "Errors", "Slowest rows", "Compiles", "1,312 s"),
        *("Energy, simulated", "unfinished", "was killed", "jobs/llama.yaml", "stopped for 2 h"),
    ):
        assert text in parsed.text, text
    marks = [value for name, value in parsed.attributes if name == "class" and value]
    assert {"mark dead", "mark open", "mark retry"} <= set(marks)
    bins = [found["bins"]["counts"] for found in document["latency"].values()]
    bins += [document[f"{which}_tokens_histogram"]["counts"] for which in ("prompt", "generated")]
    assert parsed.count["rect"] == sum(map(len, bins))
    assert parsed.count["path"] == 2 * len(document["timeline"]["workers"])
    assert html_page(json.loads(json.dumps(document))) == page


def test_many_cards_are_drawn_in_few_shapes(tmp_path: Path) -> None:
    maker = FolderMaker(tmp_path / "run", cards=80, slots=2, losses=0)
    maker.session(800)
    document = redraw(maker.folder)
    assert len(document["timeline"]["workers"]) == 65
    assert "Cards from the 65th on are drawn together." in document["missing"]
    assert "56 more cards" in (maker.folder / "report.html").read_text(encoding="utf-8")
    tokens = sum(math.fsum(lane["tokens"]) for lane in document["timeline"]["workers"])
    assert tokens == pytest.approx(document["generated_tokens"], rel=1e-4)


def test_a_comparison_is_a_page_too(tmp_path: Path) -> None:
    folders = []
    for number, cards in enumerate((2, 4)):
        maker = FolderMaker(tmp_path / f"run-{number}", cards=cards, losses=0, seed=number)
        maker.session(100)
        folders.append(maker.folder)
    parsed = check_alone(comparison_page(compare(folders)))
    for text in ("run-0", "run-1", "tokens/s", "What is not the same", "cards"):
        assert text in parsed.text


# -- figures as shapes


@given(st.lists(st.tuples(st.floats(0.001, 5e4), st.floats(0.001, 9e5)), min_size=1, max_size=5))
def test_time_goes_from_left_to_right_without_pauses(spans: list[tuple[float, float]]) -> None:
    at, stretches = 1.7e9, []
    for length, pause in spans:
        stretches.append([at, at + length])
        at += length + pause
    axis = drawing.TimeAxis(stretches)
    edges = [axis.x(time) for stretch in stretches for time in stretch]
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(drawing.WIDTH)
    assert all(before <= after + 1e-6 for before, after in pairwise(edges))
    assert len(axis.pauses) == len(stretches) - 1
    places = [tick.at for tick in axis.ticks]
    assert places == sorted(places)
    assert len(places) <= 14
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in places)
    # In pauses, and before and behind all of it.
    assert axis.x(0.0) == 0
    assert axis.x(9e9) == pytest.approx(drawing.WIDTH)


def test_an_area_is_as_high_as_its_values_and_ends_at_gaps() -> None:
    axis = drawing.TimeAxis([[0.0, 10.0]])
    timeline = {"bucket_s": 1.0, "times": [0.0, 1.0, 2.0, 7.0]}
    path = drawing.area(axis, timeline, [5.0, 5.0, 10.0, 2.5], 10.0)
    assert path == "M0.0 100V50.0H200.0V0.0H300.0V100M700.0 100V75.0H800.0V100"


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=60))
def test_bars_on_a_log_axis_fill_it_and_lose_nothing(seconds: list[float]) -> None:
    latency = latency_of(Durations.of(seconds))
    counts, edges = latency["bins"]["counts"], latency["bins"]["edges"]
    assert sum(counts) == len(seconds)
    assert len(edges) == len(counts) + 1 <= 50
    ratios = [after / before for before, after in pairwise(edges)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)
    bars = drawing.log_bars(latency)
    assert bars.bars[0][0] == pytest.approx(0, abs=0.01)
    assert bars.bars[-1][0] + bars.bars[-1][1] == pytest.approx(drawing.WIDTH, abs=0.1)
    assert max(tall for _, _, tall, _ in bars.bars) == 100
    assert all(0 <= tick.at <= 100 for tick in (*bars.ticks, *bars.lines))


@given(st.floats(1e-9, 1e9))
def test_a_roof_is_round_above_and_near(value: float) -> None:
    assert value * 0.999999 <= drawing.roof(value) <= value * 1.67


def test_words_for_time() -> None:
    assert [drawing.clock_text(s, 1) for s in (0, 59, 60, 3599, 3600, 86_461)] == [
        *("0 s", "59 s", "1:00", "59:59", "1:00:00", "24:01:01"),
    ]
    assert drawing.clock_text(0.25, 0.25) == "0.25 s"
    assert [drawing.span_text(s) for s in (0.4, 12, 200, 7500, 90_000, 190_000)] == [
        *("0.4 s", "12 s", "3 min 20 s", "2 h 5 min", "1 day 1 h", "2 days 4 h"),
    ]
    assert sorted(["card 10", "card 2", "a 3"], key=drawing.natural) == ["a 3", "card 2", "card 10"]
