"""How a run stands, over simulated cards: counts, rates, states, and what it is made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_cards import DirectReader, SimulatedCards

from qaic_ray.dispatch.dispatcher import (
    DeliverRows,
    QuarantineWorker,
    ReplaceWorker,
    RetireWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    ShardFinished,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.metrics import EngineState
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.driver import Audience, Driver, Progress
from qaic_ray.runs.run_view import (
    BACKOFF,
    BUSY,
    LOST,
    OPENING,
    READY,
    RunFollower,
    RunView,
    share_by_length,
)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def row(index: int, reason: FinishReason = FinishReason.STOP, text: str = "x") -> Row:
    return Row(index, "p", text, reason, token_ids=(1, 2))


PROMPTS = (Prompt(0, "p"), Prompt(1, "p"))


def test_the_life_of_a_card() -> None:
    clock = Clock()
    watch = RunFollower(clock=clock)

    def state() -> str:
        return watch.view().cards[0].state

    watch.change(RunStarted(("card 0",)))
    assert state() == OPENING
    watch.change(WorkerReady("card 0", 4))
    assert state() == READY
    watch.change(RunShard("card 0", 1, PROMPTS, 1))
    assert state() == BUSY
    watch.change(RowsFinished("card 0", 1, (row(0), row(1))))
    assert state() == READY
    watch.change(ShardFinished("card 0", 1))
    watch.change(RunShard("card 0", 2, PROMPTS, 1))
    watch.change(ShardFailed("card 0", 2, "it is off", retryable=True))
    assert (state(), watch.view().cards[0].error) == (READY, "it is off")
    watch.change(RetireWorker("card 0", "stalled"))
    assert state() == BACKOFF
    watch.change(ReplaceWorker("card 0", 1))
    assert (state(), watch.view().cards[0].restarts) == (OPENING, 1)
    watch.change(WorkerLost("card 0", "gone", 1))
    assert (state(), watch.view().cards[0].error) == (BACKOFF, "gone")
    watch.change(QuarantineWorker("card 0", "gone"))
    assert state() == LOST


def test_tokens_move_before_the_first_row_ends() -> None:
    clock = Clock()
    watch = RunFollower(clock=clock)
    watch.change(RunStarted(("card 0", "card 1")))
    for name in ("card 0", "card 1"):
        watch.change(WorkerReady(name, 4))
        watch.change(WorkerProgress(name, 0))
        watch.change(RunShard(name, 0, PROMPTS, 1))
    clock.now_s = 2.0
    watch.change(WorkerProgress("card 0", 10, 0, 40, EngineState(running=4)))
    watch.change(WorkerProgress("card 1", 10, 0, 20, EngineState(running=2)))
    view = watch.view()
    assert view.tokens_per_s == pytest.approx(30.0)
    assert [(card.tokens_per_s, card.running) for card in view.cards] == [(20.0, 4), (10.0, 2)]
    assert view.rows_done == 0


def test_a_rate_is_that_of_the_last_seconds_and_survives_a_death() -> None:
    clock = Clock()
    watch = RunFollower(clock=clock)
    watch.change(RunStarted(("card 0",)))
    watch.change(WorkerReady("card 0", 4))
    watch.change(RunShard("card 0", 0, PROMPTS, 1))
    tokens = 0
    for second in range(1, 200):
        clock.now_s = float(second)
        tokens += 10 if second > 100 else 1
        watch.change(WorkerProgress("card 0", second, 0, tokens, EngineState(running=1)))
    assert watch.view().tokens_per_s == pytest.approx(10.0)
    watch.change(WorkerLost("card 0", "gone"))
    watch.change(WorkerReady("card 0", 4, 1))
    clock.now_s = 200.0
    watch.change(WorkerProgress("card 0", 1, 1, 5, EngineState(running=1)))
    assert 0 < watch.view().tokens_per_s <= 10.0


def test_the_end_is_told_from_rows_and_a_total() -> None:
    clock = Clock()
    watch = RunFollower(1000, clock=clock)
    watch.change(RunStarted(("card 0",)))
    clock.now_s = 60.0  # cards opened so long: not the rows' speed
    watch.change(RunShard("card 0", 0, PROMPTS, 1))
    assert watch.view().eta_s is None
    clock.now_s = 70.0
    reasons = [FinishReason.LENGTH, FinishReason.STOP]
    watch.change(
        DeliverRows(tuple(row(i, reasons[i % 2], "" if i < 3 else "y") for i in range(20)))
    )
    watch.counted(rows_read=400, rows_done=120, rows_failed=2, exhausted=False)
    view = watch.view()
    assert (view.rows_total, view.is_exact, view.rows_done) == (1000, False, 120)
    assert view.eta_s == pytest.approx(880 / 2.0)
    assert share_by_length(view) == 0.5
    assert view.sample is not None
    assert view.sample.index == 3
    watch.counted(rows_read=400, rows_done=120, rows_failed=2, exhausted=True)
    view = watch.view()
    assert (view.rows_total, view.is_exact, view.eta_s) == (400, True, pytest.approx(140.0))


def test_errors_are_counted_by_class() -> None:
    watch = RunFollower()
    failed = Row.failed(Prompt(0, "p"), "no")
    watch.change(DeliverRows((failed, failed, row(1))))
    view = watch.view()
    assert view.by_error == {"refused": 2}
    assert view.share_failed == pytest.approx(2 / 3)
    assert watch.ended == (3, 2)
    assert RunView().share_failed == 0.0


@given(
    num_prompts=st.integers(0, 60),
    num_cards=st.integers(1, 4),
    seed=st.integers(0, 1000),
    mean_life_s=st.sampled_from([None, 3.0]),
)
def test_it_agrees_with_the_driver_whatever_happens(
    num_prompts: int, num_cards: int, seed: int, mean_life_s: float | None
) -> None:
    cards = SimulatedCards([0.0] * num_cards, seed=seed, mean_life_s=mean_life_s, progress_s=0.5)
    watch = RunFollower(clock=cards.clock)

    def on_progress(progress: Progress) -> None:
        watch.counted(
            rows_read=progress.rows_read,
            rows_done=progress.rows_done,
            rows_failed=progress.rows_failed,
            exhausted=progress.input_exhausted,
        )
        view = watch.view()
        assert view.num_busy <= num_cards
        assert view.tokens_per_s >= 0

    audience = Audience(on_event=watch.change, on_progress=on_progress)
    prompts = [Prompt(i, "same") for i in range(num_prompts)]
    result = Driver(cards, prompts, audience, clock=cards.clock, reader=DirectReader).run()
    view = watch.view()
    assert view.rows_done == result.total.rows
    assert view.rows_failed == result.total.failed_rows
    assert view.num_ended == view.rows_done
    if result.broken_off is None:
        assert view.rows_total == num_prompts
        assert view.num_busy == 0
    losses = {worker.name: worker.losses for worker in result.workers}
    assert all(card.restarts <= losses[card.name] for card in view.cards)
