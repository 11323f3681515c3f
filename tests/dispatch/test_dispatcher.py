"""The dispatcher by tables, and by simulated time; `test_schedules.py` has what is not foreseen."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from invariants import check, check_table
from simulated_cards import DirectReader, SimulatedCards, answer

from qaic_ray.dispatch.dispatcher import (
    Command,
    DeliverRows,
    Dispatcher,
    Event,
    PromptsRead,
    QuarantineWorker,
    ReadPrompts,
    ReplaceWorker,
    RetireWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    ShardFinished,
    TimePassed,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.dispatch.policy import DEFAULT_POLICY, Policy, text_work
from qaic_ray.dispatch.prompts import PromptTable
from qaic_ray.dispatch.workers import WorkerState
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.sampling_params import SamplingParams

POLICY = Policy(read_ahead=100)


def prompts(*texts: str, first: int = 0) -> tuple[Prompt, ...]:
    return tuple(Prompt(first + i, text) for i, text in enumerate(texts))


def same(count: int, first: int = 0) -> tuple[Prompt, ...]:
    """Prompts of equal length, so that they go in input order."""
    return prompts(*["same"] * count, first=first)


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    """A dispatcher that reads 100 at once; its invariants are checked at the end."""
    made = Dispatcher(policy=POLICY)
    yield made
    check(made)


def after(dispatcher: Dispatcher, *events: Event, now_s: float = 0.0) -> list[Command]:
    """The commands that the last of these events brings."""
    commands: list[Command] = []
    for event in events:
        commands = dispatcher.handle(event, now_s)
        check(dispatcher)
    return commands


def shards(commands: Sequence[Command]) -> list[tuple[str, int, list[int], int]]:
    return [
        (c.worker, c.shard_id, [p.index for p in c.prompts], c.attempt)
        for c in commands
        if isinstance(c, RunShard)
    ]


def rows_of(*indexes: int) -> tuple[Row, ...]:
    return tuple(answer(Prompt(index, "same")) for index in indexes)


# -- who gets what


def test_reading_begins_before_any_worker_is_ready(dispatcher: Dispatcher) -> None:
    assert after(dispatcher, RunStarted(("a",))) == [ReadPrompts(100)]
    assert after(dispatcher, PromptsRead(same(3), exhausted=True)) == []
    assert after(dispatcher, WorkerReady("a", 2)) == [RunShard("a", 0, same(2), attempt=1)]


def test_no_prompts_is_finished_at_once(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead((), exhausted=True))
    assert dispatcher.finished


def test_nothing_is_queued_in_a_worker_of_unknown_speed(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(100), exhausted=False))
    assert shards(after(dispatcher, WorkerReady("a", 2))) == [("a", 0, [0, 1], 1)]
    assert shards(after(dispatcher, RowsFinished("a", 0, rows_of(0)), now_s=0.5)) == [
        ("a", 1, [2], 1)
    ]


def test_more_is_read_when_half_of_what_was_read_is_handed_out(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(52), exhausted=False))
    assert after(dispatcher, WorkerReady("a", 2))[-1] == ReadPrompts(100)
    # One read at a time.
    commands = after(dispatcher, RowsFinished("a", 0, rows_of(0, 1)), ShardFinished("a", 0))
    assert not [c for c in commands if isinstance(c, ReadPrompts)]


def test_long_prompts_first_and_a_fair_share_for_a_worker_that_still_opens(
    dispatcher: Dispatcher,
) -> None:
    texts = ["x" * (1 + i % 5 * 4000) for i in range(80)]
    after(
        dispatcher,
        RunStarted(("a", "b", "c", "d")),
        PromptsRead(prompts(*texts), exhausted=True),
    )
    commands = after(dispatcher, WorkerReady("a", 2))
    taken = [p for c in commands if isinstance(c, RunShard) for p in c.prompts]
    assert {len(p.text) for p in taken} == {16001}
    # Two shards, each filled by the prompt that takes it past its part of the work that was left.
    work = sum(map(text_work, prompts(*texts)))
    assert sum(map(text_work, taken)) <= work / 4


def test_prompts_of_about_the_same_length_go_in_input_order_until_the_end(
    dispatcher: Dispatcher,
) -> None:
    """So that answers can be shown while the run goes, and the last ones are the short ones."""
    texts = ["x" * (37 * i % 1000) for i in range(40)] + ["x" * 5000]
    after(dispatcher, RunStarted(("a",)), PromptsRead(prompts(*texts), exhausted=True))
    waiting = [c for c in after(dispatcher, WorkerReady("a", 4)) if isinstance(c, RunShard)]
    handed_out: list[int] = []
    while waiting:
        shard = waiting.pop(0)
        handed_out += [prompt.index for prompt in shard.prompts]
        rows = tuple(map(answer, shard.prompts))
        for event in (RowsFinished("a", shard.shard_id, rows), ShardFinished("a", shard.shard_id)):
            waiting += [c for c in after(dispatcher, event) if isinstance(c, RunShard)]
    end = next(i for i in range(1, 41) if handed_out[i] != i - 1)
    assert handed_out[0] == 40
    assert end > 20
    left = handed_out[end:]
    assert left == sorted(left, key=lambda index: (-len(texts[index]), index))


def test_shards_grow_with_the_speed_and_shrink_to_the_end() -> None:
    cards = SimulatedCards([0.0], slots=4, seconds_of=lambda prompt: 0.1)
    run(cards, same(600))
    sizes = [len(shard.prompts) for shard in cards.ran]
    assert sizes[0] == 4
    assert 30 <= max(sizes) <= 42
    assert sizes[-1] <= 2
    tail = sizes[-6:]
    assert tail == sorted(tail, reverse=True)


def test_one_shard_in_flight_at_the_end(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(6), exhausted=True),
        WorkerReady("a", 2),
    )
    commands = after(dispatcher, WorkerReady("b", 2))
    assert [worker for worker, *_ in shards(commands)] == ["b"]


def test_an_older_band_goes_first_until_the_input_has_ended(dispatcher: Dispatcher) -> None:
    long = "a very long prompt" * 99
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(prompts("short", "tiny"), exhausted=False),
        PromptsRead(prompts(long, first=2), exhausted=False),
    )
    assert shards(after(dispatcher, WorkerReady("a", 1)))[0][2] == [0]
    after(dispatcher, PromptsRead((), exhausted=True))
    assert shards(after(dispatcher, WorkerReady("b", 1)))[0][2] == [2]


def test_a_prompt_that_says_how_long_its_answer_may_be_counts_for_that() -> None:
    short, long = (Prompt(0, "x", sampling=SamplingParams(max_tokens=n)) for n in (10, 1000))
    assert text_work(short) < text_work(Prompt(0, "x")) < text_work(long)
    several = replace(long.sampling or SamplingParams(), n=4, temperature=1.0)
    assert text_work(Prompt(0, "x", sampling=several)) > 3 * text_work(long)
    silent = Prompt(0, "x")
    assert text_work(silent, SamplingParams(max_tokens=1000)) == text_work(long)
    assert text_work(short, SamplingParams(max_tokens=1000)) == text_work(short)
    talk = ({"role": "system", "content": "y" * 5000}, {"role": "user", "content": "x"})
    assert text_work(Prompt(0, "x", messages=talk)) == text_work(Prompt(0, "x" * 5001))


def test_the_first_row_of_a_prompt_is_the_one_kept(dispatcher: Dispatcher) -> None:
    (prompt,) = same(1)
    after(
        dispatcher,
        RunStarted(("a",)),
        PromptsRead((prompt,), exhausted=True),
        WorkerReady("a", 1),
    )
    first, second = answer(prompt, "a"), answer(prompt, "b")
    commands = after(dispatcher, RowsFinished("a", 0, (first, second)))
    assert commands == [DeliverRows((first,))]
    assert dispatcher.finished
    assert after(dispatcher, RowsFinished("a", 0, (second,))) == []


@pytest.mark.parametrize("event", ["row", "progress"])
def test_what_an_event_costs_does_not_grow_with_the_fleet(event: str) -> None:
    def num_calls(num_workers: int) -> int:
        names = tuple(f"card {i}" for i in range(num_workers))
        dispatcher = Dispatcher()
        dispatcher.handle(RunStarted(names), 0.0)
        dispatcher.handle(PromptsRead(same(20 * num_workers), exhausted=False), 0.0)
        for name in names:
            dispatcher.handle(WorkerReady(name, 4), 0.0)
        count = 0

        def profile(frame: object, what: str, arg: object) -> None:
            nonlocal count
            count += 1

        heard: Event = WorkerProgress(names[0], 5)
        if event == "row":
            heard = RowsFinished(names[0], 0, rows_of(0))
        sys.setprofile(profile)
        try:
            dispatcher.handle(heard, 1.0)
        finally:
            sys.setprofile(None)
        return count

    assert num_calls(1000) <= num_calls(10) + 5


# -- deaths


def test_a_lost_workers_prompts_go_to_the_others_once_more(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(4), exhausted=True),
        WorkerReady("a", 4),
    )
    given = shards(after(dispatcher, WorkerReady("b", 4)))
    indexes = [index for _, _, some, _ in given for index in some]
    for _, shard_id, some, _ in given:
        after(dispatcher, RowsFinished("b", shard_id, rows_of(*some)), ShardFinished("b", shard_id))
    commands = after(dispatcher, WorkerLost("a", "ActorDiedError: gone"))
    assert {(worker, attempt) for worker, _, _, attempt in shards(commands)} == {("b", 2)}
    again = [i for _, _, some, _ in shards(commands) for i in some]
    assert sorted(again + indexes) == [0, 1, 2, 3]


def test_an_open_input_that_is_dry_is_shared_out(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b"), is_open=True),
        WorkerReady("a", 8),
        WorkerReady("b", 8),
    )
    commands = after(dispatcher, PromptsRead(same(4), exhausted=False, is_dry=True))
    given = [(worker, index) for worker, _, some, _ in shards(commands) for index in some]
    assert given == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    commands = after(dispatcher, PromptsRead(same(12, first=4), exhausted=False, is_dry=True))
    given += [(worker, index) for worker, _, some, _ in shards(commands) for index in some]
    assert Counter(worker for worker, _ in given) == {"a": 8, "b": 8}
    assert len(shards(commands)) == 12, "a row does not wait for others of its shard"


def test_a_prompt_that_comes_alone_goes_to_a_worker_with_a_free_slot(
    dispatcher: Dispatcher,
) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b"), is_open=True),
        WorkerReady("a", 1),
        PromptsRead(same(1), exhausted=False, is_dry=True),
    )
    # The speed of `a` is known, so that something could be queued in it.
    after(dispatcher, RowsFinished("a", 0, rows_of(0)), ShardFinished("a", 0), now_s=2.0)
    after(dispatcher, PromptsRead(same(1, first=1), exhausted=False, is_dry=True), now_s=3.0)
    after(dispatcher, WorkerReady("b", 1), now_s=4.0)
    commands = after(
        dispatcher, PromptsRead(same(1, first=2), exhausted=False, is_dry=True), now_s=5.0
    )
    assert shards(commands) == [("b", 2, [2], 1)]


def test_an_open_input_is_abandoned_before_anything_is_asked_for(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",), is_open=True))
    for life in range(3):
        after(dispatcher, WorkerLost("a", "no", life), now_s=100.0 * life)
        after(dispatcher, TimePassed(), now_s=100.0 * life + 50.0)
    assert dispatcher.abandoned
    assert dispatcher.finished


def test_retried_shards_are_smaller(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(100), exhausted=False),
        WorkerReady("a", 8),
        WorkerLost("a", "gone"),
    )
    commands = after(dispatcher, WorkerReady("b", 8))
    assert [(len(indexes), attempt) for _, _, indexes, attempt in shards(commands)] == [(2, 2)] * 4


def test_a_lost_worker_is_replaced_after_a_rest_that_doubles(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(1), exhausted=True))
    assert after(dispatcher, WorkerLost("a", "no"), now_s=10.0) == []
    assert after(dispatcher, TimePassed(), now_s=10.4) == []
    assert after(dispatcher, TimePassed(), now_s=10.5) == [ReplaceWorker("a", 1)]
    assert after(dispatcher, WorkerLost("a", "no", 1), now_s=20.0) == []
    assert after(dispatcher, TimePassed(), now_s=20.9) == []
    assert after(dispatcher, TimePassed(), now_s=21.0) == [ReplaceWorker("a", 2)]
    assert shards(after(dispatcher, WorkerReady("a", 1, 2), now_s=22.0)) == [("a", 0, [0], 1)]


def test_the_driver_is_told_when_to_wake(dispatcher: Dispatcher) -> None:
    dispatcher.handle(RunStarted(("a", "b")), 0.0)
    dispatcher.handle(PromptsRead(same(1), exhausted=True), 0.0)
    dispatcher.handle(WorkerLost("a", "gone"), 10.0)
    assert dispatcher.wake_s == 10.5
    assert dispatcher.handle(TimePassed(), 10.3) == []
    assert dispatcher.wake_s == 10.5  # woken early: again, please


def live(dispatcher: Dispatcher, life: int, *, now_s: float, answers: bool) -> list[Command]:
    """A life of worker `a` that ends with its death, a row of it before that or not."""
    commands = after(dispatcher, WorkerReady("a", 1, life), now_s=now_s)
    given = [command for command in commands if isinstance(command, RunShard)]
    if answers:
        row = rows_of(given[0].prompts[0].index)
        after(dispatcher, RowsFinished("a", given[0].shard_id, row), now_s=now_s + 1)
    commands = after(dispatcher, WorkerLost("a", "gone", life), now_s=now_s + 2)
    after(dispatcher, TimePassed(), now_s=now_s + 60)
    return [command for command in commands if isinstance(command, QuarantineWorker)]


def test_a_worker_that_never_gave_a_row_is_given_up(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(50), exhausted=True))
    ends = [live(dispatcher, life, now_s=100.0 * life, answers=False) for life in range(6)]
    assert ends == [[]] * 5 + [[QuarantineWorker("a", "gone")]]
    assert not dispatcher.abandoned


def test_a_worker_that_gives_rows_between_its_deaths_is_kept(dispatcher: Dispatcher) -> None:
    """A row in every fourth life: only ten times so many lives without one are its end."""
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(5000), exhausted=True))
    for life in range(100):
        assert live(dispatcher, life, now_s=100.0 * life, answers=life % 4 == 0) == []
    life = 100
    while not live(dispatcher, life, now_s=100.0 * life, answers=False):
        life += 1
    assert life - 95 == 39  # 10 x 97 lives / 25 that gave a row


def test_a_worker_that_cannot_be_opened_is_given_up_whatever_it_did(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(50), exhausted=True))
    live(dispatcher, 0, now_s=0.0, answers=True)
    for life in range(1, 4):
        failed = WorkerLost("a", "DeviceError: off", life)
        commands = after(dispatcher, failed, now_s=100.0 * life)
        after(dispatcher, TimePassed(), now_s=100.0 * life + 60)
    assert commands == [QuarantineWorker("a", "DeviceError: off")]


def test_all_workers_given_up_leaves_the_prompts_undone(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(100), exhausted=False))
    for life in range(3):
        commands = after(dispatcher, WorkerLost("a", "no", life), now_s=100.0 * life)
        after(dispatcher, TimePassed(), now_s=100.0 * life + 50)
    assert commands == [QuarantineWorker("a", "no")]
    assert dispatcher.abandoned
    assert dispatcher.finished


def test_the_last_words_of_an_earlier_life_are_not_the_new_ones(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(9), exhausted=True))
    after(dispatcher, WorkerReady("a", 2))
    after(dispatcher, WorkerLost("a", "gone"))
    assert after(dispatcher, TimePassed(), now_s=1.0) == [ReplaceWorker("a", 1)]
    assert after(dispatcher, WorkerReady("a", 2), now_s=1.0) == []
    assert shards(after(dispatcher, WorkerReady("a", 2, 1), now_s=2.0))
    for late in (WorkerLost("a", "gone"), WorkerLost("a", "no"), WorkerReady("a", 9)):
        assert after(dispatcher, late, now_s=3.0) == []
    assert after(dispatcher, ShardFailed("a", 0, "late", retryable=True), now_s=3.0) == []
    row = rows_of(0)
    assert after(dispatcher, RowsFinished("a", 0, row), now_s=3.0)[0] == DeliverRows(row)


def kill(dispatcher: Dispatcher, worker: str, life: int, now_s: float) -> list[Command]:
    """It dies, rests and is opened again; the commands of the death and what it is given then."""
    death = after(dispatcher, WorkerLost(worker, "gone", life), now_s=now_s)
    after(dispatcher, TimePassed(), now_s=now_s + 30)
    return death + after(dispatcher, WorkerReady(worker, 4, life + 1), now_s=now_s + 30)


def test_a_prompt_that_kills_is_found_and_the_card_is_not_blamed(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(2), exhausted=True))
    assert shards(after(dispatcher, WorkerReady("a", 4))) == [("a", 0, [0, 1], 1)]
    # After a failure, and with nothing fresh to show that it is well, each goes alone.
    assert shards(kill(dispatcher, "a", 0, 1.0)) == [("a", 1, [0], 2)]
    for life, attempt in ((1, 2), (2, 3), (3, 4)):
        commands = kill(dispatcher, "a", life, 100.0 * life)
        if attempt < 4:
            assert [s[2:] for s in shards(commands)] in ([([0], attempt + 1)], [([1], 2)])
    check(dispatcher)


def test_a_lone_prompt_that_dies_goes_to_another_worker() -> None:
    dispatcher = Dispatcher(policy=Policy(false_blame=0.01))  # three deaths alone are enough
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(1), exhausted=True))
    after(dispatcher, WorkerReady("a", 1), WorkerLost("a", "gone"))
    assert shards(after(dispatcher, WorkerReady("b", 1))) == [("b", 1, [0], 2)]
    after(dispatcher, WorkerLost("b", "gone"), TimePassed(), now_s=1.0)
    assert shards(after(dispatcher, WorkerReady("a", 1, 1), now_s=2.0)) == [("a", 2, [0], 3)]
    after(dispatcher, WorkerLost("a", "gone", 1), TimePassed(), now_s=9.0)
    assert shards(after(dispatcher, WorkerReady("a", 1, 2), now_s=10.0)) == []
    assert shards(after(dispatcher, WorkerReady("b", 1, 1), now_s=10.0)) == [("b", 3, [0], 4)]
    after(dispatcher, WorkerLost("b", "gone", 1), now_s=11.0)
    assert shards(after(dispatcher, WorkerReady("a", 1, 2), now_s=11.1)) == [("a", 4, [0], 5)]
    (command,) = after(dispatcher, WorkerLost("a", "gone too", 2), now_s=11.2)
    assert isinstance(command, DeliverRows)
    (row,) = command.rows
    assert (row.index, row.attempts, row.worker, row.ok) == (0, 5, "a", False)
    assert row.error == "Given up after 5 attempts; the last one: a: gone too"
    assert dispatcher.finished
    assert not dispatcher.abandoned


def test_one_worker_is_cleared_for_a_suspect_and_the_others_go_on(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a", "b", "c")), PromptsRead(same(60), exhausted=False))
    after(dispatcher, WorkerReady("a", 1), WorkerReady("b", 2), WorkerReady("c", 2))
    for shard_id in (0, 3, 4):  # prompt 0, without a death
        commands = after(dispatcher, ShardFinished("a", shard_id))
        if shard_id == 0:
            assert shards(commands) == [("a", 3, [0], 2)]
    assert shards(commands)
    assert len({worker for worker, *_ in shards(commands)}) == 1


def test_after_a_failure_a_worker_gets_fresh_prompts_first(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(60), exhausted=False))
    after(dispatcher, WorkerReady("a", 4))
    commands = kill(dispatcher, "a", 0, 1.0)
    ((_, shard_id, indexes, attempt),) = shards(commands)
    assert (indexes, attempt) == ([4, 5, 6, 7], 1)
    commands = after(dispatcher, RowsFinished("a", shard_id, rows_of(4)), now_s=32.0)
    assert shards(commands)[0] == ("a", 2, [0], 2)


# -- failed shards


def test_a_passing_failure_is_tried_again_on_the_same_worker_after_a_pause(
    dispatcher: Dispatcher,
) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(2), exhausted=True))
    after(dispatcher, WorkerReady("a", 2), WorkerReady("b", 2))

    def fails(shard_id: int, now_s: float) -> list[Command]:
        return after(dispatcher, ShardFailed("a", shard_id, "busy", retryable=True), now_s=now_s)

    assert fails(0, 1.0) == []
    assert shards(after(dispatcher, TimePassed(), now_s=1.5)) == [("a", 2, [0], 1)]
    assert fails(2, 2.0) == []
    assert after(dispatcher, TimePassed(), now_s=2.9) == []
    assert shards(after(dispatcher, TimePassed(), now_s=3.0)) == [("a", 3, [0], 1)]
    commands = fails(3, 4.0)
    assert commands[0] == RetireWorker("a", "busy")
    assert shards(commands) == [("b", 4, [0], 2)]
    assert ReplaceWorker("a", 1) in after(dispatcher, TimePassed(), now_s=4.5)


def test_a_prompt_that_only_waited_on_a_dying_worker_is_not_blamed(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(1), exhausted=True))
    after(dispatcher, WorkerReady("a", 1), ShardFailed("a", 0, "busy", retryable=True))
    after(dispatcher, WorkerLost("a", "gone"))
    assert shards(after(dispatcher, WorkerReady("b", 1))) == [("b", 2, [0], 1)]


def test_of_a_dying_workers_prompts_only_those_it_had_begun_are_to_blame(
    dispatcher: Dispatcher,
) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(100), exhausted=False))
    given = shards(after(dispatcher, WorkerReady("a", 2)))
    open_shards = {shard_id: indexes for _, shard_id, indexes, _ in given}
    now_s = 0.0
    # Quick rows: after some of them the worker is given more than its slots hold.
    while sum(map(len, open_shards.values())) <= 4:
        shard_id, indexes = next(iter(open_shards.items()))
        del open_shards[shard_id]
        now_s += 0.1
        rows = RowsFinished("a", shard_id, rows_of(*indexes))
        commands = after(dispatcher, rows, now_s=now_s)
        commands += after(dispatcher, ShardFinished("a", shard_id), now_s=now_s)
        open_shards |= {id_: indexes for _, id_, indexes, _ in shards(commands)}
    queued = [index for indexes in open_shards.values() for index in indexes]
    after(dispatcher, WorkerLost("a", "gone"), now_s=now_s)
    taken: dict[int, int] = {}
    commands = after(dispatcher, WorkerReady("b", 2), now_s=now_s)
    while not set(queued) <= taken.keys():
        for worker, shard_id, indexes, attempt in shards(commands):
            taken |= dict.fromkeys(indexes, attempt)
            last = (worker, shard_id, indexes)
        worker, shard_id, indexes = last
        rows = RowsFinished(worker, shard_id, rows_of(*indexes))
        commands = [*after(dispatcher, rows, now_s=now_s)]
        commands += after(dispatcher, ShardFinished(worker, shard_id), now_s=now_s)
        now_s += 0.1
    assert [index for index in queued if taken[index] > 1] == queued[:2]


def test_a_shard_that_failed_by_itself_is_tried_again_on_the_same_worker(
    dispatcher: Dispatcher,
) -> None:
    after(
        dispatcher,
        RunStarted(("a",)),
        PromptsRead(same(1), exhausted=True),
        WorkerReady("a", 1),
    )
    for attempt in (1, 2, 3):
        commands = after(dispatcher, ShardFailed("a", attempt - 1, "TypeError: x", retryable=False))
        assert shards(commands) == [("a", attempt, [0], attempt + 1)]
    (command,) = after(dispatcher, ShardFailed("a", 3, "TypeError: x", retryable=False))
    assert isinstance(command, DeliverRows)
    assert command.rows[0].error == "Given up after 4 attempts; the last one: a: TypeError: x"


def test_a_shard_that_ends_without_a_row_is_tried_again(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a",)),
        PromptsRead(same(1), exhausted=True),
        WorkerReady("a", 1),
    )
    assert shards(after(dispatcher, ShardFinished("a", 0))) == [("a", 1, [0], 2)]


# -- time


def watched(dispatcher: Dispatcher, *names: str) -> None:
    after(dispatcher, RunStarted(names), PromptsRead(same(9), exhausted=True))
    for name in names:
        after(dispatcher, WorkerReady(name, 2), WorkerProgress(name, 0))


def test_a_worker_that_makes_no_step_is_stalled(dispatcher: Dispatcher) -> None:
    watched(dispatcher, "a")
    after(dispatcher, WorkerProgress("a", 50), now_s=1.0)
    assert after(dispatcher, WorkerProgress("a", 50), now_s=1.0 + POLICY.min_stall_s - 1) == []
    commands = after(dispatcher, TimePassed(), now_s=1.0 + POLICY.min_stall_s)
    assert commands == [RetireWorker("a", "it made no step for 15 s")]


def test_a_slow_worker_has_more_time_for_a_step(dispatcher: Dispatcher) -> None:
    watched(dispatcher, "a")
    assert after(dispatcher, TimePassed(), now_s=POLICY.first_stall_s - 1) == []
    after(dispatcher, WorkerProgress("a", 299), now_s=POLICY.first_stall_s - 1)  # a step a second
    assert after(dispatcher, TimePassed(), now_s=POLICY.first_stall_s) == []
    assert after(dispatcher, TimePassed(), now_s=POLICY.first_stall_s + 98) == []
    (retire,) = after(dispatcher, TimePassed(), now_s=POLICY.first_stall_s + 99)
    assert isinstance(retire, RetireWorker)


def test_an_idle_worker_is_not_stalled_and_one_of_no_steps_is_not_watched(
    dispatcher: Dispatcher,
) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(1), exhausted=False))
    after(dispatcher, WorkerReady("a", 2), WorkerReady("b", 2), WorkerProgress("b", 0))
    assert after(dispatcher, TimePassed(), now_s=10_000.0) == []


def test_the_limit_counts_from_the_first_prompt_after_idleness(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)))
    after(dispatcher, WorkerReady("a", 2), WorkerProgress("a", 0))
    after(dispatcher, WorkerProgress("a", 50), now_s=1.0)
    for now_s in range(20, 100, 10):
        after(dispatcher, TimePassed(), now_s=float(now_s))
    after(dispatcher, PromptsRead(same(1), exhausted=True), now_s=100.0)
    assert after(dispatcher, TimePassed(), now_s=100.0 + POLICY.min_stall_s - 1) == []
    assert after(dispatcher, TimePassed(), now_s=100.0 + POLICY.min_stall_s) != []


def test_a_driver_that_did_not_listen_blames_nobody(dispatcher: Dispatcher) -> None:
    watched(dispatcher, "a")
    after(dispatcher, WorkerProgress("a", 50), now_s=1.0)
    after(dispatcher, TimePassed(), now_s=2.0)
    assert after(dispatcher, TimePassed(), now_s=1000.0) == []  # it was read for so long
    assert after(dispatcher, TimePassed(), now_s=1000.0 + POLICY.min_stall_s - 0.1) == []
    assert after(dispatcher, TimePassed(), now_s=1000.0 + POLICY.min_stall_s) != []


def test_opening_has_a_limit(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(1), exhausted=True))
    assert after(dispatcher, TimePassed(), now_s=POLICY.max_open_s - 1) == []
    (retire,) = after(dispatcher, TimePassed(), now_s=POLICY.max_open_s)
    assert retire == RetireWorker("a", "it did not open within 900 s")


# -- the end of a run


def test_a_card_that_slows_down_with_a_full_queue_is_left_behind() -> None:
    """One card is ten times slower than it was when its queue was filled."""
    cards = SimulatedCards([0.0, 0.0], slots=1)

    def seconds_of(prompt: Prompt) -> float:
        if cards.now_s > 4.5:
            cards.slowness["card 0"] = 10.0
        return 0.1

    cards.seconds_of = seconds_of
    rows = run(cards, same(104))
    assert all(row.ok for row in rows)
    assert cards.now_s < 9.0


@pytest.mark.parametrize("progress_s", [None, 0.5], ids=["rows", "steps"])
@pytest.mark.parametrize("slowness", [6.0, 1e9], ids=["slow", "silent"])
def test_the_last_prompts_of_a_straggler_run_a_second_time(
    slowness: float, progress_s: float | None
) -> None:
    cards = SimulatedCards([0.0] * 4, slots=2, slowness={"card 3": slowness}, progress_s=progress_s)
    rows = run(cards, same(80))
    assert all(row.ok for row in rows)
    assert cards.now_s < 80 / 6 + 4
    twice = [shard for shard in cards.ran if shard.attempt > 1]
    assert not twice, "a second run is no new attempt"


def test_a_long_prompt_on_a_card_that_is_well_runs_once() -> None:
    cards = SimulatedCards(
        [0.0] * 4,
        slots=2,
        seconds_of=lambda prompt: 60.0 if prompt.index == 3 else 1.0,
        progress_s=0.5,
    )
    run(cards, same(64))
    assert sum(len(shard.prompts) for shard in cards.ran) == 64


def test_a_prompt_that_left_a_list_is_not_there_when_it_waits_in_another() -> None:
    table = PromptTable(POLICY)
    table.read(same(3), exhausted=False)
    (shortest,) = table.foreground.take(table.foreground.fresh, (1, 1, 0.0), shortest=True)
    worker = WorkerState("a", 0.0, POLICY, slots=1)
    table.begin(worker, [shortest], 0.0, alone=False)
    check_table(table)
    assert table.on_worker_lost(worker, "gone", num_begun=1) == []
    check_table(table)
    others = [entry.prompt for entry in table.foreground.take(table.foreground.fresh, (9, 9, 0.0))]
    assert {shortest.prompt.index} | {prompt.index for prompt in others} == {0, 1, 2}
    assert table.foreground.take(table.foreground.retried, (9, 9, 0.0)) == [shortest]
    assert table.foreground.num_grouped == 0


def test_an_answered_prompt_waits_no_more(dispatcher: Dispatcher) -> None:
    """It was thought to be lost, and its row comes late."""
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(9), exhausted=False))
    after(dispatcher, WorkerReady("a", 4), WorkerLost("a", "gone"))
    late = rows_of(0, 3, 7)
    assert after(dispatcher, RowsFinished("a", 0, late)) == [DeliverRows(late)]
    commands = after(dispatcher, PromptsRead((), exhausted=True), WorkerReady("b", 9))
    given = [index for _, _, indexes, _ in shards(commands) for index in indexes]
    assert given
    assert not {0, 3, 7}.intersection(given)


def test_a_slow_worker_is_given_the_short_prompts() -> None:
    lengths = [1 + 97 * i % 400 for i in range(400)]
    given = [Prompt(i, "x" * (100 * length)) for i, length in enumerate(lengths)]
    cards = SimulatedCards(
        [0.0] * 4,
        slots=2,
        seconds_of=lambda prompt: len(prompt.text) / 20_000,
        slowness={"card 0": 4.0},
    )
    run(cards, given)
    ended = [len(p.text) for shard in cards.ran[40:] for p in shard.prompts]
    slow = [len(p.text) for s in cards.ran[40:] if s.worker == "card 0" for p in s.prompts]
    assert sum(slow) / len(slow) < sum(ended) / len(ended)


@pytest.mark.parametrize(
    "message",
    [
        RunStarted(("a",)),
        PromptsRead(same(2), exhausted=True),
        WorkerReady("a", 4),
        WorkerLost("a", "no"),
        WorkerLost("a", "gone", 2),
        WorkerProgress("a", 100),
        RowsFinished("a", 1, (answer(same(1)[0]),)),
        ShardFinished("a", 1),
        ShardFailed("a", 1, "no", retryable=True),
        TimePassed(),
        ReadPrompts(3),
        RunShard("a", 1, same(2), attempt=2),
        DeliverRows((answer(same(1)[0]),)),
        RetireWorker("a", "no"),
        ReplaceWorker("a", 1),
        QuarantineWorker("a", "no"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_cross_processes(message: Event | Command) -> None:
    assert pickle.loads(pickle.dumps(message)) == message


# -- by simulated time


def run(
    cards: SimulatedCards, given_prompts: Sequence[Prompt], policy: Policy = DEFAULT_POLICY
) -> list[Row]:
    rows: list[Row] = []
    audience = Audience(on_row=rows.append)
    dispatcher = Dispatcher(policy=policy)
    Driver(
        cards,
        given_prompts,
        audience,
        dispatcher=dispatcher,
        clock=cards.clock,
        reader=DirectReader,
    ).run()
    check(dispatcher)
    assert [row.index for row in rows] == list(range(len(given_prompts)))
    return rows


@given(
    num_prompts=st.integers(1, 120),
    killers=st.sets(st.integers(0, 119), max_size=2),
    num_cards=st.integers(1, 3),
    slots=st.integers(1, 8),
)
def test_only_the_prompts_that_kill_are_given_up(
    num_prompts: int, killers: set[int], num_cards: int, slots: int
) -> None:
    killers = {index for index in killers if index < num_prompts}
    cards = SimulatedCards(
        [0.0] * num_cards, slots, dies=lambda card, prompt: prompt.index in killers
    )
    rows = run(cards, same(num_prompts))
    assert {row.index for row in rows if not row.ok} == killers
    assert all(4 <= row.attempts <= 7 for row in rows if not row.ok)
    assert not cards.quarantined


@pytest.mark.parametrize("seed", range(5))
def test_cards_that_seldom_live_to_see_a_row_answer_all_of_them(seed: int) -> None:
    """A row takes as long as a card lives in the mean."""
    cards = SimulatedCards([0.0] * 4, mean_life_s=1.0, seed=seed)
    rows = run(cards, same(150))
    assert all(row.ok for row in rows)
    assert not cards.quarantined


@pytest.mark.parametrize("seed", range(20))
def test_where_workers_die_all_the_time_no_prompt_is_blamed_for_it(seed: int) -> None:
    """Rows take a second of a life of eight: many prompts die with a worker again and again."""
    killers = {seed, 100 + seed}
    cards = SimulatedCards(
        [0.0] * 4,
        slots=4,
        dies=lambda card, prompt: prompt.index in killers,
        mean_life_s=8.0,
        seed=seed,
    )
    rows = run(cards, same(400))
    assert {row.index for row in rows if not row.ok} == killers
    assert max(row.attempts for row in rows if row.ok) > 2


@pytest.mark.parametrize(
    ("num_cards", "slots", "num_prompts", "floor"),
    [(4, 4, 64, 0.85), (4, 4, 1000, 0.97), (8, 8, 3000, 0.97), (3, 1, 200, 0.97)],
)
def test_cards_end_together_on_heavy_tailed_work(
    num_cards: int, slots: int, num_prompts: int, floor: float
) -> None:
    """Makespan against the lower bound: all work over all slots, or the longest prompt."""

    def length(i: int) -> int:  # Pareto with shape 1.5, without a random generator
        return int(400 / ((i * 7919 % num_prompts + 1) / (num_prompts + 1)) ** (1 / 1.5))

    texts = [Prompt(i, "x" * length(i)) for i in range(num_prompts)]
    cards = SimulatedCards(
        [0.0] * num_cards, slots, seconds_of=lambda prompt: (len(prompt.text) + 1024) / 1000
    )
    run(cards, texts)
    work_s = [cards.seconds_of(prompt) for prompt in texts]
    ideal_s = max(sum(work_s) / (num_cards * slots), max(work_s))
    assert ideal_s / cards.now_s >= floor


def test_a_card_that_opens_late_still_gets_its_share() -> None:
    cards = SimulatedCards([0.0, 0.0, 0.0, 2.0], slots=4)
    run(cards, same(256))
    # 16 slots, 256 seconds of work, one card two seconds late.
    assert cards.now_s <= 18.0
    assert cards.busy_s["card 3"] >= 48.0
