"""tokens/s as the published recipe's runModel.py counts them, beside its loop run step by step."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from simulated_cards import info

from qaic_ray.metrics import Span, Tally
from qaic_ray.rows import FinishReason, Row, Sample
from qaic_ray.runs.report import Document, RunSummary, tables
from qaic_ray.runs.result import FleetResult, WorkerResult

INPUT_LEN = 256
STATIC_1 = replace(info("card 0", 1), is_static=True)
STATIC_4 = replace(info("card 0", 4), is_static=True)


def runmodel(step_times_s: list[float], batch_size: int) -> float:
    """Its arithmetic: the cache's index moves with each decode step of the loop."""
    cache_index, start_s, end_s = INPUT_LEN, 0.0, 0.0
    for step_s in step_times_s:
        end_s += step_s
        cache_index += 1
    per_row = (cache_index - INPUT_LEN - 1) / (end_s - start_s)
    return round(per_row * batch_size, 2)


def row(index: int, step_times_s: list[float]) -> Row:
    """A row of one token from the prefill and one from each decode step."""
    return Row(
        index=index,
        prompt="a",
        text="b",
        finish_reason=FinishReason.LENGTH,
        token_ids=(7,) * (1 + len(step_times_s)),
        decode_s=sum(step_times_s),
        worker="card 0",
    )


def document(rows: list[Row], **about: object) -> Document:
    tally = Tally()
    for each in rows:
        tally.add(each)
    card = WorkerResult("card 0", about.get("info", STATIC_1), tally.measurement("card 0"))  # type: ignore[arg-type]
    result = FleetResult((card,), tally.measurement(""), Span(0.0, 1.0), {})
    return RunSummary(result, "run", "real SDK 1.20", Path("runs/run")).document()


STEPS = st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=40)


@given(STEPS)
def test_one_row_is_counted_as_the_script_counts_it(steps: list[float]) -> None:
    rate = document([row(0, steps)])["runmodel_tokens_per_s"]
    assert rate == pytest.approx(runmodel(steps, 1), abs=0.0051)


@given(STEPS, st.just(4))
def test_a_batch_whose_rows_end_together_too(steps: list[float], batch: int) -> None:
    rows = [row(index, steps) for index in range(batch)]
    rate = document(rows, info=STATIC_4)["runmodel_tokens_per_s"]
    assert rate == pytest.approx(runmodel(steps, batch), abs=0.0051)


@given(st.lists(STEPS, min_size=1, max_size=5))
def test_several_batches_lie_between_the_slowest_and_the_fastest(
    several: list[list[float]],
) -> None:
    rate = document([row(index, steps) for index, steps in enumerate(several)])
    alone = [runmodel(steps, 1) for steps in several]
    assert min(alone) - 0.01 <= rate["runmodel_tokens_per_s"] <= max(alone) + 0.01


def test_two_cards_are_counted_a_card() -> None:
    """The script's figure is of one card, to be multiplied by their number."""
    tally = Tally()
    tally.add(row(0, [0.1] * 11))
    one = WorkerResult("card 0", STATIC_1, tally.measurement("card 0"))
    two = WorkerResult("card 1", replace(STATIC_1, name="card 1"), one.measurement)
    result = FleetResult((one, two), tally.measurement(""), Span(0.0, 1.0), {})
    both = RunSummary(result, "run", "real SDK 1.20", Path("runs/run")).document()
    assert both["runmodel_tokens_per_s"] == pytest.approx(10 / 1.1, abs=0.001)
    assert [worker["runmodel_tokens_per_s"] for worker in both["workers"]] == [9.091, 9.091]


def test_it_is_said_in_the_script_s_words_and_only_where_the_script_could_say_it() -> None:
    steps = [0.1] * 11
    choice = Sample("b", (7, 7), FinishReason.LENGTH)
    nothing = [
        document([row(0, steps)], info=info("card 0", 8)),  # slots of their own
        document([row(0, steps)], info=None),
        document([row(0, [])]),
        document([replace(row(0, steps), finish_reason=FinishReason.ERROR, error="it failed")]),
        document([replace(row(0, steps), choices=(choice, choice))]),
    ]
    assert [each["runmodel_tokens_per_s"] for each in nothing] == [None] * len(nothing)
    line = "as the recipe's runModel.py counts: Output Tokens/sec per Card = 9.09"
    assert line in shown(document([row(0, steps)]))
    assert "runModel" not in shown(nothing[0])


def shown(figures: Document) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in tables(figures):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
