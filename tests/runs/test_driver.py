"""The driver's loop over simulated cards: order, counts, times, and what is said when cards go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
from simulated_cards import DirectReader, SimulatedCards, answer

from qaic_ray.dispatch.dispatcher import Dispatcher, Event, RunShard, ShardFailed
from qaic_ray.dispatch.policy import Policy
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats.prompts import prompts_from_text
from qaic_ray.metrics import Durations, Measurement, Span
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Driver, Progress
from qaic_ray.runs.open_input import OpenInput
from qaic_ray.runs.result import BrokenOff, Cause, FleetResult
from qaic_ray.worker.worker import WorkerInfo


def same(count: int) -> list[Prompt]:
    return [Prompt(i, "same") for i in range(count)]


def drive(cards: SimulatedCards, prompts: object, **audience: object) -> FleetResult:
    told = Audience(**audience)  # type: ignore[arg-type]
    return Driver(cards, prompts, told, clock=cards.clock, reader=DirectReader).run()  # type: ignore[arg-type]


def test_rows_come_in_input_order_as_soon_as_they_can() -> None:
    cards = SimulatedCards([0.0, 0.0], slots=2, seconds_of=lambda p: 9.0 if p.index == 1 else 1.0)
    heard: list[tuple[float, int]] = []
    drive(cards, same(6), on_row=lambda row: heard.append((cards.now_s, row.index)))
    assert [index for _, index in heard] == [0, 1, 2, 3, 4, 5]
    assert heard[0][0] == 1.0
    assert {second for second, _ in heard[1:]} == {9.0}


def test_rows_and_tokens_are_counted_from_the_rows_and_steps_from_the_engine() -> None:
    cards = SimulatedCards([0.0, 0.0])
    result = drive(cards, same(20))
    expected = [answer(prompt) for prompt in same(20)]
    assert result.ok
    assert result.total.rows == 20
    assert result.total.generated_tokens == sum(row.generated_tokens for row in expected)
    assert result.total.prompt_tokens == 80
    assert result.total.ttft == Durations.of([0.25] * 20)
    assert result.total.decode_steps == 6
    assert sum(result.length_counts.values()) == 20
    assert result.length_counts == {1: 3, 2: 3, 3: 3, 4: 3, 5: 3, 6: 3, 7: 2}


def test_span_runs_from_the_first_shard_to_the_last_row() -> None:
    cards = SimulatedCards([5.0], slots=4)
    result = drive(cards, same(8))
    assert result.span == Span(5.0, 7.0)
    tokens = sum(answer(prompt).generated_tokens for prompt in same(8))
    assert result.tokens_per_s == pytest.approx(tokens / 2.0)


def test_error_rows_of_the_source_keep_their_place_and_see_no_card() -> None:
    cards = SimulatedCards([0.0])
    rows: list[Row] = []
    result = drive(cards, prompts_from_text("a||c"), on_row=rows.append)
    assert [(row.index, row.ok, row.worker) for row in rows] == [
        (0, True, "card 0"),
        (1, False, ""),
        (2, True, "card 0"),
    ]
    assert result.unassigned == Measurement(rows=1, failed_rows=1)
    assert not result.ok
    assert result.broken_off is None


def test_an_input_of_error_rows_alone_waits_for_no_card() -> None:
    cards = SimulatedCards([100.0])
    result = drive(cards, prompts_from_text("|"))
    assert (result.total.rows, result.total.failed_rows, result.span) == (2, 2, None)
    assert cards.now_s == 0.0
    assert result.tokens_per_s == 0.0
    assert result.workers[0].info is None
    assert result.workers[0].error is None


def test_a_card_that_dies_is_named_and_its_prompts_are_answered_by_the_others() -> None:
    cards = SimulatedCards(
        [0.0, 0.0], dies=lambda card, prompt: card == "card 1" and prompt.index > 20
    )
    rows: list[Row] = []
    result = drive(cards, same(64), on_row=rows.append)
    assert result.ok
    assert result.broken_off is None
    assert [worker.error for worker in result.workers] == [None, "ActorDiedError: killed"]
    states = [(worker.losses, worker.ready_at_end) for worker in result.workers]
    assert states == [(0, True), (5, False)]
    assert max(row.attempts for row in rows) == 2
    assert {row.worker for row in rows if row.attempts == 2} == {"card 0"}
    assert result.workers[1].measurement.decode_steps == 0
    assert sum(worker.measurement.rows for worker in result.workers) == 64


def test_a_prompt_that_kills_costs_no_card_and_no_other_prompt() -> None:
    cards = SimulatedCards([None, 2.0], dies=lambda card, prompt: prompt.index == 3)
    rows: list[Row] = []
    result = drive(cards, iter(same(10)), on_row=rows.append)
    assert [row.index for row in rows if not row.ok] == [3]
    assert len(rows) == 10
    assert result.broken_off is None
    assert list(cards.quarantined) == ["card 0"]
    assert [life for _, name, life in cards.replaced if name == "card 1"] == [1, 2, 3, 4]


def test_all_cards_gone_says_so_and_leaves_the_rest_undone() -> None:
    cards = SimulatedCards([None, 2.0], mean_life_s=1e-3)
    rows: list[Row] = []
    result = drive(cards, iter(same(100)), on_row=rows.append)
    assert not any(row.ok for row in rows)
    assert len(rows) < 10
    lost = "Every card was lost; the prompts that were left have no answer."
    assert result.broken_off == BrokenOff(Cause.CARDS, lost)
    assert [worker.error for worker in result.workers] == [
        "DeviceError: no",
        "ActorDiedError: age",
    ]
    assert set(cards.quarantined) == {"card 0", "card 1"}
    assert not result.ok


def test_a_card_whose_shards_fail_is_opened_again_and_goes_on() -> None:
    class Failing(SimulatedCards):
        def run(self, shard: RunShard) -> None:
            super().run(shard)
            if shard.worker == "card 0" and not self.replaced:
                self._later(0.5, ShardFailed("card 0", shard.shard_id, "DeviceError: no", True))

    cards = Failing([0.0, 0.0], slots=1)
    infos: list[WorkerInfo] = []
    result = drive(cards, same(40), on_worker_ready=infos.append)
    assert result.ok
    assert result.workers[0].error == "DeviceError: no"
    assert (result.workers[0].losses, result.workers[0].ready_at_end) == (1, True)
    assert [(name, life) for _, name, life in cards.replaced] == [("card 0", 1)]
    assert [info.name for info in infos] == ["card 0", "card 1", "card 0"]
    assert result.workers[0].measurement.rows > 0


def test_a_card_that_hangs_is_opened_again_when_its_limit_is_over() -> None:
    hung: list[int] = []

    def hangs(card: str, prompt: Prompt) -> bool:
        """The first that comes to it, once."""
        if prompt.index == 5 and not hung:
            hung.append(prompt.index)
            return True
        return False

    cards = SimulatedCards([0.0], hangs=hangs, progress_s=2.0)
    rows: list[Row] = []
    result = drive(cards, same(30), on_row=rows.append)
    assert [row.index for row in rows] == list(range(30))
    assert result.ok
    assert result.workers[0].error == "it made no step for 15 s"
    assert (result.workers[0].losses, result.workers[0].ready_at_end) == (1, True)
    ((replaced_s, name, life),) = cards.replaced
    assert (name, life) == ("card 0", 1)
    assert 15.0 <= replaced_s <= 18.0


def test_progress_counts_up_and_knows_the_end_of_the_input() -> None:
    cards = SimulatedCards([0.0])
    heard: list[Progress] = []
    drive(cards, prompts_from_text("a||b"), on_progress=heard.append)
    assert heard[0] == Progress(rows_read=3, rows_done=1, rows_failed=1, input_exhausted=True)
    assert heard[-1] == Progress(
        rows_read=3, rows_done=3, rows_failed=1, generated_tokens=4, input_exhausted=True
    )


def test_prompts_are_read_as_they_are_needed() -> None:
    num_read = 0

    def endless() -> Iterator[Prompt]:
        nonlocal num_read
        while True:
            yield Prompt(num_read, "same")
            num_read += 1

    class Enough(Exception):
        pass

    def stop(row: Row) -> None:
        if row.index == 1000:
            raise Enough

    cards = SimulatedCards([0.0])
    driver = Driver(
        cards,
        endless(),
        Audience(on_row=stop),
        dispatcher=Dispatcher(policy=Policy(read_ahead=200)),
        clock=cards.clock,
        reader=DirectReader,
    )
    with pytest.raises(Enough):
        driver.run()
    assert num_read <= 1000 + 2 * 200


def test_a_prompt_is_handed_out_before_the_next_one_is_read() -> None:
    answered = threading.Event()

    def typed() -> Iterator[Prompt]:
        yield Prompt(0, "first")
        assert answered.wait(60)
        yield Prompt(1, "second")

    cards = SimulatedCards([0.0])
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        answered.set()

    result = Driver(cards, typed(), Audience(on_row=on_row), clock=cards.clock).run()
    assert [row.text for row in rows] == ["FIRST", "SECOND"]
    assert result.ok


def test_an_input_that_breaks_off_gives_the_rows_before_that_and_an_error() -> None:
    def broken() -> Iterator[Prompt]:
        yield from same(3)
        raise QaicRayError("The prompts in x cannot be read past line 3.")

    cards = SimulatedCards([0.0])
    rows: list[Row] = []
    result = Driver(cards, broken(), Audience(on_row=rows.append), clock=cards.clock).run()
    assert [row.ok for row in rows] == [True] * 3
    broken_off = BrokenOff(Cause.INPUT, "The prompts in x cannot be read past line 3.")
    assert result.broken_off == broken_off
    assert not result.ok


def test_an_input_of_another_run_ends_this_one_at_once() -> None:
    def another() -> Iterator[Prompt]:
        yield from same(3)
        raise UsageError("Row 3 is another one.")

    cards = SimulatedCards([0.0])
    driver = Driver(cards, another(), Audience(), clock=cards.clock)
    with pytest.raises(UsageError, match="Row 3"):
        driver.run()


def test_a_row_that_is_cancelled_when_it_is_done_leaves_nothing() -> None:
    cards = SimulatedCards([0.0])
    cancels: list[Callable[[Iterable[int]], None]] = []
    prompts = OpenInput()
    for index in range(3):
        prompts.put(Prompt(index, "same"))
    prompts.end()
    driver = Driver(
        cards,
        prompts,
        Audience(on_begin=cancels.append, on_saved=lambda row: cancels[0]([row.index])),
        clock=cards.clock,
    )
    assert driver.run().total.rows == 3
    assert driver._cancelled == set()


def test_a_wrong_request_ends_the_run() -> None:
    class Wrong(SimulatedCards):
        def wait(self, timeout_s: float | None = None) -> Event:
            raise UsageError("the QPC is for another model")

    with pytest.raises(UsageError, match="another model"):
        drive(Wrong([0.0]), same(1))
