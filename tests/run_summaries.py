"""Results of runs that never were, and a reader of pages, for the tests of reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from simulated_cards import info

from qaic_ray.metrics import Durations, Measurement, Span
from qaic_ray.runs.report import RunSummary
from qaic_ray.runs.result import BrokenOff, Cause, FleetResult, WorkerResult

FAST = Measurement(
    rows=3,
    prompt_tokens=30,
    generated_tokens=1200,
    decode_steps=100,
    decode_tokens=1000,
    decode_s=10.0,
    ttft=Durations.of((0.1, 0.2, 0.3)),
)
SLOW = replace(FAST, failed_rows=1, decode_s=40.0, ttft=Durations.of((0.4, 0.8)))


def make_summary(folder: Path, **changes: Any) -> RunSummary:
    result = FleetResult(
        workers=(
            WorkerResult("card 0", info("card 0", 8), FAST),
            WorkerResult("card 1", info("card 1", 8), SLOW, error="ActorDiedError: <b>gone</b>"),
        ),
        unassigned=Measurement(rows=1, failed_rows=1),
        span=Span(100.0, 160.0),
        length_counts={400: 3, 600: 2},
    )
    summary = RunSummary(result, "smollm2", "emulated SDK 1.20", folder, "a/model", "a-qpc")
    return replace(summary, **changes)


def nothing_ran() -> FleetResult:
    worker = WorkerResult("card 0", None, Measurement(), error="DeviceBusy: no NSPs are free")
    failed = Measurement(rows=2, failed_rows=2)
    return FleetResult(
        (worker,), failed, None, {}, broken_off=BrokenOff(Cause.CARDS, "Every card was lost.")
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag must be closed."""

    VOID = frozenset({"meta"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.count: Counter[str] = Counter()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "
