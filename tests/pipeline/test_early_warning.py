"""What is said after the first rows, and when a run ends early for its errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qaic_ray.dispatch.dispatcher import DeliverRows
from qaic_ray.errors import QaicRayError
from qaic_ray.pipeline.early_warning import EarlyWarning
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.driver import Audience, Progress
from qaic_ray.runs.run_view import RunFollower, RunView


class Run:
    """Ends rows one by one."""

    def __init__(self, stop_if_errors: float | None = None) -> None:
        self.said: list[RunView] = []
        listener: Any = SimpleNamespace(going=self.said.append)
        listener.saved = listener.generated = None
        self.early = EarlyWarning(RunFollower(), listener, stop_if_errors)
        self.audience = self.early.audience(Audience())
        self.done = self.failed = 0

    def end(self, *oks: bool, total: int = 100) -> None:
        for ok in oks:
            prompt = Prompt(self.done, "p")
            row = Row(prompt.index, "p", "x", FinishReason.STOP) if ok else Row.failed(prompt, "no")
            self.done += 1
            self.failed += not ok
            self.audience.on_event(DeliverRows((row,)))
            self.audience.on_progress(Progress(total, self.done, self.failed, 0, True))


def test_it_is_said_once_after_twenty_rows() -> None:
    run = Run()
    run.end(*[True] * 19)
    assert not run.said
    run.end(*[True] * 30)
    (view,) = run.said
    assert view.num_ended == 20


def test_a_run_of_twenty_rows_is_over_by_then() -> None:
    run = Run()
    run.end(*[True] * 20, total=20)
    assert not run.said


def test_too_many_errors_end_it_but_not_before_twenty_rows() -> None:
    run = Run(0.2)
    run.end(*[False] * 3, *[True] * 16)
    with pytest.raises(QaicRayError, match=r"4 of 20 rows failed, and --stop-if-errors .* at 20%"):
        run.end(False)


def test_few_errors_and_no_wish_end_nothing() -> None:
    run = Run(0.2)
    run.end(*[False] * 3, *[True] * 50)
    Run().end(*[False] * 50)
