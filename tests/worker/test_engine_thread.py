"""What waits for an engine, and what is left of rows that nobody wants any more: nothing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from formula_program import FormulaProgram, answer
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.contract import IoContract, Specializations
from qaic_ray.engine.engine import Engine, Finished
from qaic_ray.engine.steps import GREEDY, Sequence
from qaic_ray.rows import FinishReason, Prompt
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.engine_thread import MAX_EARLY, Backlog, EngineThread
from qaic_ray.worker.feeds import RowQueue, TokenFeed
from qaic_ray.worker.text import Answer, Arrival

CTX_LEN = 64


def engine_of(slots: int, *, continuous: bool = True) -> Engine:
    shapes = Specializations.build(
        batch_size=slots, prompt_len=4, ctx_len=CTX_LEN, continuous=continuous
    )
    contract = IoContract.POSITION_IDS if continuous else IoContract.CACHE_INDEX
    return Engine(FormulaProgram(shapes, io_contract=contract))


def sequence(key: int, limit: int = 4, *, background: bool = False) -> Sequence:
    prompt = tuple((key * 5 + i) % 50 + 6 for i in range(key % 9 + 1))
    return Sequence(key, prompt, limit, background=background)


def answer_of(row: Sequence, prompt: Prompt | None = None) -> Answer:
    asked = prompt or Prompt(row.key, "", background=row.background)
    return Answer(asked, GREEDY, (row,), (None,), Arrival())


# -- who goes first


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=30),
    st.integers(1, 4),
    st.integers(0, 5),
    st.booleans(),
)
def test_the_foreground_goes_first_and_has_its_slots(
    asked: list[tuple[bool, int]], slots: int, kept: int, continuous: bool
) -> None:
    engine, backlog = engine_of(slots, continuous=continuous), Backlog()
    engine.batcher.kept_slots = kept
    rows: list[Sequence] = []
    most = slots - min(kept, slots - 1)

    def step() -> None:
        while (waiting := backlog.next_for(engine.batcher)) is not None:
            assert not (waiting[0].background and backlog._foreground)
            engine.add(*waiting)
            assert not (waiting[0].background and len(engine.batcher.waiting) > slots)
        engine.step()
        late = sum(row.background for row in engine.batcher.running.values())
        assert late <= most
        if continuous:
            waiting_rows = [*engine.batcher.waiting, *(one[0] for one in backlog._foreground)]
            kinds = {row.background for row in waiting_rows}
            assert all(row.num_preempted for row in engine.batcher.waiting if row.background)
            assert not (False in kinds and late), "it waits behind the background"

    for key, (background, steps) in enumerate(asked):
        rows.append(sequence(key, 3, background=background))
        backlog.add([(rows[-1], None)])
        for _ in range(steps):
            step()
    for _ in range(500):
        if not (len(backlog) or engine.busy):
            break
        step()
    assert [row.output_ids for row in rows] == [
        row.output_ids for row in rows if len(row.output_ids) == 3
    ], "each is answered in the end"


def test_what_is_taken_out_does_not_wait() -> None:
    backlog = Backlog()
    rows = [sequence(key, background=key % 2 == 1) for key in range(6)]
    backlog.add((row, None) for row in rows)
    assert backlog.take_out([rows[0], rows[3], sequence(9)]) == {rows[0], rows[3]}
    assert len(backlog) == 4
    assert backlog.take_out([rows[0]]) == set()
    backlog.clear()
    assert len(backlog) == 0


# -- cancelled


@pytest.fixture
def thread() -> Iterator[Callable[..., EngineThread]]:
    begun: list[EngineThread] = []

    def begin(slots: int = 3) -> EngineThread:
        made = EngineThread(
            "card 0",
            lambda: engine_of(slots),
            goes_on=True,
            kept_slots=0,
            feed=TokenFeed(),
            timeouts=Timeouts(),
            on_lost=lambda _: None,
        )
        made.start()
        begun.append(made)
        return made

    yield begin
    for made in begun:
        made.close()


def left_in(thread: EngineThread) -> dict[str, int]:
    """The length of every table in which a row may be left."""
    engine, batcher = thread.engine, thread.engine.batcher
    tables = {
        **{name: getattr(thread, name) for name in ("_owner", "_beginning", "_cancelled")},
        **{
            f"backlog{name}": getattr(thread._backlog, name)
            for name in ("_foreground", "_background")
        },
        **{f"feed{name}": getattr(thread._feed, name) for name in ("_running", "_ended")},
        **{
            name: getattr(engine, name)
            for name in ("_readers", "_unread", "_stops", "_errors", "_scored")
        },
        **{
            name: getattr(engine._times, name)
            for name in ("_awaiting", "_first", "_scheduled", "_prefilled_s", "_preempted_s")
        },
        "running": batcher.running,
        "waiting": batcher.waiting,
        "prefilling": getattr(batcher, "_prefilling", ()),
    }
    return {name: len(table) for name, table in tables.items()}


def take_all(queue: RowQueue, number: int) -> list[Finished]:
    taken: list[Finished] = []
    while len(taken) < number:
        taken += queue.take(number - len(taken))
    return taken


def test_a_thousand_rows_cancelled_at_any_moment_leave_nothing(
    thread: Callable[..., EngineThread],
) -> None:
    """Before they come, while they are made, queued, prefilled or decoded, and when they ended."""
    running, draw = thread(4), random.Random(7)
    kinds = {"answered": 0, "ended": 0}

    def client(first: int) -> None:
        own = random.Random(first)
        for key in range(first, first + 100, 4):
            keys = frozenset(range(key, key + 4))
            rows = [sequence(one, own.randint(1, 30), background=one % 3 == 0) for one in keys]
            moment = own.randrange(5)
            if moment == 0:
                running.cancel(keys)
            running.expect(keys)
            if moment == 1:
                running.cancel(keys)
            queue = running.put([answer_of(row) for row in rows], keys)
            if moment == 2:
                running.cancel(keys)
            if moment == 3:
                time.sleep(own.random() * 0.003)
                running.cancel(keys)
            for done in take_all(queue, 4):
                row = done.sequence
                is_ended = row.finish_reason is FinishReason.ABORT
                kinds["ended" if is_ended else "answered"] += 1
                assert is_ended or moment > 2
                right = answer(row.prompt_ids, row.max_new_tokens)
                assert is_ended or row.output_ids[: len(right)] == right
            running.cancel(keys)

    clients = [threading.Thread(target=client, args=(1000 * i,)) for i in range(10)]
    draw.shuffle(clients)
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    assert sum(kinds.values()) == 1000
    assert min(kinds.values()) > 100
    assert set(left_in(running).values()) == {0}
    assert len(running._early) <= MAX_EARLY
    assert len(running.engine.batcher.free_slots) == 4  # type: ignore[union-attr]


def test_a_row_that_is_cancelled_before_it_comes_never_begins(
    thread: Callable[..., EngineThread],
) -> None:
    running = thread()
    running.cancel([5])
    running.expect([5, 6])
    queue = running.put([answer_of(sequence(5, 40)), answer_of(sequence(6, 2))], frozenset({5, 6}))
    ended = {done.sequence.key: done.sequence for done in take_all(queue, 2)}
    assert ended[5].finish_reason is FinishReason.ABORT
    assert ended[5].output_ids == []
    assert ended[6].finish_reason is FinishReason.LENGTH
    assert not running._early


def test_what_is_remembered_of_rows_that_never_come_is_bounded(
    thread: Callable[..., EngineThread],
) -> None:
    running = thread()
    running.cancel(range(3 * MAX_EARLY))
    assert list(running._early) == list(range(2 * MAX_EARLY, 3 * MAX_EARLY))


def test_a_row_that_was_refused_is_not_waited_for_to_be_cancelled(
    thread: Callable[..., EngineThread],
) -> None:
    running = thread()
    running.expect([1])
    running.cancel([1])
    running.put([], frozenset({1}))
    assert set(left_in(running).values()) == {0}


def test_a_slot_is_free_within_a_step_also_in_the_middle_of_a_prefill() -> None:
    """By the engine's own steps: the row that waits begins with the step after the cancel."""
    engine = engine_of(1)
    long, next_one = Sequence(0, tuple(range(6, 46)), 5), sequence(1, 2)
    engine.add(long)
    engine.add(next_one)
    engine.step()
    assert long.slot is not None
    assert 0 < long.num_computed < 40
    engine.abort(long)
    engine.step()
    assert next_one.slot is not None or next_one.output_ids
