"""The report: one document, and everything shown drawn from it."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_summaries import FAST, Page, make_summary, nothing_ran

from qaic_ray.metrics import Durations, Measurement, Tally
from qaic_ray.report.page import html_page
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.report import (
    MAX_BINS,
    RunSummary,
    histogram,
    rate_text,
    round_up,
    seconds_text,
    tables,
)
from qaic_ray.runs.result import BrokenOff, Cause, FleetResult, WorkerResult


def terminal(summary: RunSummary) -> str:
    console = Console(file=io.StringIO(), width=100)
    for part in summary.renderables():
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_recorded_run_ends_with_what_replays_it(tmp_path: Path) -> None:
    command = "qaic-runner -t qpc --write-output-num-samples 3"
    assert terminal(make_summary(tmp_path, replay=command)).splitlines()[-1] == f"replay  {command}"
    assert "replay" not in terminal(make_summary(tmp_path)).splitlines()[-1]


# -- the document


def test_merged_rate_is_all_tokens_over_the_span_and_no_sum_of_rates(tmp_path: Path) -> None:
    document = make_summary(tmp_path).document()
    assert document["tokens_per_s"] == 2400 / 60
    assert [worker["decode_tokens_per_s"] for worker in document["workers"]] == [100.0, 25.0]


def test_the_document_adds_up_and_is_json(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)
    document = summary.document()
    assert json.loads(json.dumps(document)) == document
    assert (document["rows"], document["failed_rows"]) == (7, 2)
    assert document["rows"] == sum(worker["rows"] for worker in document["workers"]) + 1
    assert document["ttft_median_s"] == pytest.approx(0.3, rel=0.00101)
    assert document["seconds"] == 60.0
    assert document["emulated"]
    assert not summary.result.ok


def test_a_run_that_never_began_has_a_report(tmp_path: Path) -> None:
    summary = make_summary(tmp_path, result=nothing_ran())
    document = summary.document()
    assert (document["seconds"], document["tokens_per_s"]) == (0.0, 0.0)
    assert document["workers"][0]["decode_tokens_per_s"] is None
    assert document["ttft_s_histogram"] == {"edges": [], "counts": []}
    assert "Every card was lost." in terminal(summary)
    assert "No answers." in Page(html_page(document)).text


# -- histograms


@given(
    st.dictionaries(st.just(0.0) | st.floats(1e-6, 1e6), st.integers(1, 5), min_size=1),
    st.booleans(),
)
def test_every_value_is_in_one_bin(counts: dict[float, int], whole: bool) -> None:
    if whole:
        counts = {float(math.floor(value)): count for value, count in counts.items()}
    bins = histogram(counts, whole=whole)
    edges = bins["edges"]
    assert sum(bins["counts"]) == sum(counts.values())
    assert len(edges) == len(bins["counts"]) + 1 <= MAX_BINS + 2
    assert edges[0] == 0
    assert edges[-1] >= max(counts)
    if whole:
        assert all(edge == int(edge) for edge in edges)


def test_bins_are_round() -> None:
    assert histogram({0: 1, 49: 2, 50: 3}, whole=True) == {
        "edges": [2.0 * i for i in range(27)],
        "counts": [1, *[0] * 23, 2, 3],
    }
    assert histogram({0.07: 1, 0.01: 4})["edges"][:3] == [0.0, 0.005, 0.01]


@given(st.floats(1e-9, 1e9))
def test_round_up_is_round_and_up(width: float) -> None:
    rounded = round_up(width)
    assert width <= rounded <= 2.0001 * width
    assert re.fullmatch(r"(1|2|2\.5|5)0*e[+-]\d+", f"{rounded:.1e}".replace(".0e", "e"))


def test_figures() -> None:
    values = (0.0, 1.2e-5, 0.0123456, 0.99949, 0.9996, 1.2345, 99.96, 1234.5)
    assert [seconds_text(value) for value in values] == [
        "–",
        "12.0 µs",
        "12.3 ms",
        "999 ms",
        "1.00 s",
        "1.23 s",
        "100 s",
        "1,234 s",
    ]
    assert [rate_text(value) for value in (None, 0.0, 9.876, 119.2, 12345.6)] == [
        "–",
        "–",
        "9.88",
        "119",
        "12,346",
    ]


# -- what is shown


def test_the_terminal_says_what_the_figures_are(tmp_path: Path) -> None:
    lines = terminal(make_summary(tmp_path)).splitlines()
    assert lines[0] == "smollm2  emulated SDK 1.20: not a card's speed"
    (card_0,) = (line for line in lines if line.strip().startswith("card 0"))
    assert card_0.split() == ["card", "0", "3", "30", "1,200", "200", "ms", "100"]
    (everything,) = (line for line in lines if line.strip().startswith("all"))
    assert everything.split() == ["all", "7", "60", "2,400", "300", "ms"]
    (merged,) = (line for line in lines if line.startswith("merged"))
    assert merged.startswith("merged 40.0 tokens/s")
    assert "2 of 7 rows failed: see errors.jsonl in the run folder" in lines
    assert "card 1 was lost: ActorDiedError: <b>gone</b>" in lines
    # A folder is shown to be copied: it may fold at the screen's edge, but holds nothing else.
    assert str(tmp_path) in "".join(lines[-2:])


def test_a_card_that_came_back_is_not_said_to_be_lost(tmp_path: Path) -> None:
    error = "DeviceLost: gone"
    workers = (
        WorkerResult("card 0", None, FAST, error=error, losses=1, ready_at_end=True),
        WorkerResult("card 1", None, FAST, error=error, losses=3, ready_at_end=True),
        WorkerResult("card 2", None, FAST, error=error, losses=3),
        WorkerResult("card 3", None, FAST, error="DeviceError: timed out", ready_at_end=True),
        WorkerResult("card 4", None, FAST, losses=0, ready_at_end=True),
    )
    summary = make_summary(tmp_path)
    summary = replace(summary, result=replace(summary.result, workers=workers))
    sentences = [
        "card 0 was lost once and came back: DeviceLost: gone",
        "card 1 was lost 3 times and came back: DeviceLost: gone",
        "card 2 was lost: DeviceLost: gone",
        "card 3 had an error and went on: DeviceError: timed out",
    ]
    lines = terminal(summary).splitlines()
    assert [line for line in lines if re.match(r"card \d (was|had)", line)] == sentences
    page = Page(html_page(summary.document())).text
    assert all(sentence in page for sentence in sentences)
    assert "card 4 was" not in page


def test_settings_that_are_not_the_defaults_are_named(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)
    assert "defaults" not in terminal(summary) + html_page(summary.document())
    settings = {"lock_s": 3.5, "retries": 7}
    summary = replace(summary, result=replace(summary.result, settings=settings))
    assert summary.document()["settings"] == settings
    assert "not the defaults: lock_s 3.5, retries 7" in terminal(summary).splitlines()
    assert "Not the defaults: lock_s 3.5, retries 7" in html_page(summary.document())


def test_a_report_of_an_earlier_version_is_drawn(tmp_path: Path) -> None:
    document = make_summary(tmp_path).document()
    del document["settings"]
    for worker in document["workers"]:
        del worker["losses"], worker["ready_at_end"]
    assert "card 1 was lost: ActorDiedError" in Page(html_page(document)).text
    assert len(list(tables(document))) == len(list(make_summary(tmp_path).renderables()))


def test_a_real_sdk_needs_no_excuse(tmp_path: Path) -> None:
    summary = make_summary(tmp_path, sdk="real SDK 1.20.2")
    assert terminal(summary).splitlines()[0] == "smollm2  real SDK 1.20.2"
    page = html_page(summary.document())
    assert "not a card's speed" not in page
    assert "real SDK 1.20.2" in page


# -- the tally


@given(
    st.lists(
        st.tuples(st.sampled_from(["card 0", "card 1", ""]), st.integers(0, 9), st.booleans()),
        max_size=30,
    )
)
def test_the_tally_splits_by_worker_and_loses_nothing(rows: list[tuple[str, int, bool]]) -> None:
    tally = Tally()
    for index, (worker, num_tokens, ok) in enumerate(rows):
        reason = FinishReason.STOP if ok else FinishReason.ERROR
        tokens = tuple(range(num_tokens))
        tally.add(Row(index, "p", "t", reason, token_ids=tokens, ttft_s=1.0, worker=worker))
    parts = [tally.measurement(worker) for worker in ("card 0", "card 1", "")]
    assert sum(part.rows for part in parts) == len(rows)
    assert sum(part.failed_rows for part in parts) == sum(not ok for *_, ok in rows)
    assert sum(part.generated_tokens for part in parts) == sum(count for _, count, _ in rows)
    assert sum(len(part.ttft) for part in parts) == sum(tally.length_counts.values())
    assert tally.measurement("nobody") == Measurement()


def test_an_engines_steps_are_taken_and_its_rows_are_not() -> None:
    tally = Tally()
    tally.add(Row.failed(Prompt(0, "p"), "no", worker="card 0"))
    engine = Measurement(rows=50, generated_tokens=9, decode_steps=7, ttft=Durations.of([1.0]))
    assert tally.measurement("card 0", engine) == Measurement(rows=1, failed_rows=1, decode_steps=7)


@pytest.mark.parametrize("failed", [0, 1])
def test_ok_means_every_row_was_answered(tmp_path: Path, failed: int) -> None:
    rows = Measurement(rows=2, failed_rows=failed)
    assert make_summary(tmp_path, result=FleetResult((), rows, None, {})).result.ok is (failed == 0)


def test_a_run_that_lost_its_cards_says_how_to_go_on(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)
    assert summary.document()["error"] is None
    lost = replace(summary.result, broken_off=BrokenOff(Cause.CARDS, "Every card was lost."))
    error = replace(summary, result=lost).document()["error"]
    assert error.startswith("Every card was lost. ")
    assert f"`qaic-ray run --resume {tmp_path}`" in error
