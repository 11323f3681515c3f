"""The dispatcher by tables, by random histories, and by simulated time."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from simulated_cards import SimulatedCards, answer

from qaic_ray.fleet.dispatch import Dispatcher, text_work
from qaic_ray.fleet.driver import Audience, Driver
from qaic_ray.fleet.messages import (
    Command,
    DeliverRows,
    Event,
    PromptsRead,
    ReadPrompts,
    RetireWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    ShardFinished,
    WorkerFailedToOpen,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.rows import Prompt, Row


def prompts(*texts: str, first: int = 0) -> tuple[Prompt, ...]:
    return tuple(Prompt(first + i, text) for i, text in enumerate(texts))


def same(count: int, first: int = 0) -> tuple[Prompt, ...]:
    """Prompts of equal length, so that they go in input order."""
    return prompts(*["same"] * count, first=first)


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    """A dispatcher that reads 100 at once; its invariants are checked at the end."""
    made = Dispatcher(read_ahead=100)
    yield made
    made.check()


def after(dispatcher: Dispatcher, *events: Event) -> list[Command]:
    """The commands that the last of these events brings."""
    commands: list[Command] = []
    for event in events:
        commands = dispatcher.handle(event)
        dispatcher.check()
    return commands


def shards(commands: Sequence[Command]) -> list[tuple[str, int, list[int], int]]:
    return [
        (c.worker, c.shard_id, [p.index for p in c.prompts], c.attempt)
        for c in commands
        if isinstance(c, RunShard)
    ]


# -- by tables


def test_reading_begins_before_any_worker_is_ready(dispatcher: Dispatcher) -> None:
    assert after(dispatcher, RunStarted(("a",))) == [ReadPrompts(100)]
    assert after(dispatcher, PromptsRead(same(3), exhausted=True)) == []
    assert after(dispatcher, WorkerReady("a", 2)) == [RunShard("a", 0, same(2), attempt=1)]


def test_no_prompts_is_finished_at_once(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead((), exhausted=True))
    assert dispatcher.finished


def test_two_full_shards_while_the_input_goes_on(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(100), exhausted=False))
    commands = after(dispatcher, WorkerReady("a", 2))
    assert shards(commands) == [
        ("a", 0, [*range(8)], 1),
        ("a", 1, [*range(8, 16)], 1),
    ]


def test_more_is_read_when_half_of_what_was_read_is_handed_out(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(60), exhausted=False))
    assert after(dispatcher, WorkerReady("a", 2))[-1] == ReadPrompts(100)
    # One read at a time.
    rows = tuple(map(answer, same(8)))
    commands = after(dispatcher, RowsFinished("a", 0, rows), ShardFinished("a", 0))
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


def test_shards_shrink_to_the_end(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a",)), PromptsRead(same(30), exhausted=True))
    sizes = []
    waiting = [c for c in after(dispatcher, WorkerReady("a", 2)) if isinstance(c, RunShard)]
    while waiting:
        shard = waiting.pop(0)
        sizes.append(len(shard.prompts))
        rows = tuple(map(answer, shard.prompts))
        for event in (
            RowsFinished("a", shard.shard_id, rows),
            ShardFinished("a", shard.shard_id),
        ):
            waiting += [c for c in after(dispatcher, event) if isinstance(c, RunShard)]
    assert sizes[0] == 8
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 2
    assert dispatcher.finished


def test_one_shard_in_flight_at_the_end(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(6), exhausted=True),
        WorkerReady("a", 2),
    )
    commands = after(dispatcher, WorkerReady("b", 2))
    assert [worker for worker, *_ in shards(commands)] == ["b"]


def test_an_older_band_goes_first(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a",)),
        PromptsRead(prompts("short", "tiny"), exhausted=False),
        PromptsRead(prompts("a very long prompt" * 99, first=2), exhausted=True),
    )
    commands = after(dispatcher, WorkerReady("a", 1))
    assert [i for _, _, indexes, _ in shards(commands) for i in indexes][:2] == [0, 1]


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


def test_a_lost_workers_prompts_go_to_the_others_once_more(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(4), exhausted=True),
        WorkerReady("a", 4),
    )
    commands = after(dispatcher, WorkerReady("b", 4))
    assert shards(commands) == [("b", 2, [3], 1)]
    done = answer(same(4)[3])
    after(dispatcher, RowsFinished("b", 2, (done,)), ShardFinished("b", 2))
    commands = after(dispatcher, WorkerLost("a", "ActorDiedError: gone"))
    assert {attempt for *_, attempt in shards(commands)} == {2}
    assert sorted(i for _, _, indexes, _ in shards(commands) for i in indexes) == [0, 1, 2]


def test_retried_shards_are_smaller(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(100), exhausted=False),
        WorkerReady("a", 4),
        WorkerLost("a", "gone"),
    )
    commands = after(dispatcher, WorkerReady("b", 4))
    assert [(len(indexes), attempt) for _, _, indexes, attempt in shards(commands)] == [
        (4, 2),
        (4, 2),
    ]


def test_what_a_busy_worker_failed_goes_to_an_idle_one(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(8), exhausted=False),
        WorkerReady("a", 1),
        PromptsRead((), exhausted=True),
        WorkerReady("b", 1),
    )
    commands = after(dispatcher, ShardFinished("a", 0))
    assert {worker for worker, *_ in shards(commands)} == {"b"}


def test_a_worker_that_is_gone_is_not_called_back(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(1), exhausted=True))
    after(dispatcher, WorkerFailedToOpen("a", "no"))
    assert after(dispatcher, WorkerReady("a", 1)) == []


def test_the_last_attempt_runs_alone_and_then_the_prompt_is_given_up() -> None:
    dispatcher = Dispatcher(max_attempts=2)
    after(
        dispatcher,
        RunStarted(("a", "b", "c")),
        PromptsRead(same(2), exhausted=True),
        WorkerReady("a", 1),
        WorkerReady("b", 1),
    )
    commands = after(dispatcher, WorkerLost("b", "gone"))
    assert shards(commands) == []  # the last attempt waits: a has company for it
    commands = after(dispatcher, RowsFinished("a", 0, (answer(same(1)[0]),)), ShardFinished("a", 0))
    assert shards(commands) == [("a", 2, [1], 2)]
    (command,) = after(dispatcher, WorkerLost("a", "gone too"))
    assert isinstance(command, DeliverRows)
    (row,) = command.rows
    assert (row.index, row.attempts, row.worker, row.ok) == (1, 2, "a", False)
    assert row.error == "Given up after 2 attempts; the last one: a: gone too"
    assert dispatcher.finished
    assert not dispatcher.abandoned


def test_no_worker_left_makes_error_rows_of_the_whole_input(dispatcher: Dispatcher) -> None:
    after(dispatcher, RunStarted(("a", "b")), PromptsRead(same(100), exhausted=False))
    after(dispatcher, WorkerFailedToOpen("a", "DeviceError: no"), WorkerReady("b", 1))
    deliver, read = after(dispatcher, WorkerLost("b", "DeviceLost: off"))
    assert isinstance(deliver, DeliverRows)
    assert [row.index for row in deliver.rows] == [*range(100)]
    handed, never = deliver.rows[0], deliver.rows[-1]
    assert (handed.attempts, never.attempts) == (1, 0)
    assert never.error == (
        "No card is left to answer it; the last one to go was b: DeviceLost: off"
    )
    assert read == ReadPrompts(100)
    (deliver,) = after(dispatcher, PromptsRead(same(5, first=100), exhausted=True))
    assert isinstance(deliver, DeliverRows)
    assert [row.index for row in deliver.rows] == [*range(100, 105)]
    assert dispatcher.finished
    assert dispatcher.abandoned


def test_a_shard_that_failed_by_its_card_retires_the_worker(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a", "b")),
        PromptsRead(same(2), exhausted=True),
        WorkerReady("a", 1),
    )
    commands = after(dispatcher, ShardFailed("a", 0, "DeviceError: no", retryable=True))
    assert commands == [RetireWorker("a")]
    assert shards(after(dispatcher, WorkerReady("b", 1)))[0][-1] == 2


def test_a_shard_that_failed_by_itself_is_tried_again_on_the_same_worker(
    dispatcher: Dispatcher,
) -> None:
    after(
        dispatcher,
        RunStarted(("a",)),
        PromptsRead(same(1), exhausted=True),
        WorkerReady("a", 1),
    )
    for attempt in (1, 2):
        commands = after(dispatcher, ShardFailed("a", attempt - 1, "TypeError: x", retryable=False))
        assert shards(commands) == [("a", attempt, [0], attempt + 1)]
    (command,) = after(dispatcher, ShardFailed("a", 2, "TypeError: x", retryable=False))
    assert isinstance(command, DeliverRows)
    assert command.rows[0].error == "Given up after 3 attempts; the last one: a: TypeError: x"


def test_a_shard_that_ends_without_a_row_is_tried_again(dispatcher: Dispatcher) -> None:
    after(
        dispatcher,
        RunStarted(("a",)),
        PromptsRead(same(1), exhausted=True),
        WorkerReady("a", 1),
    )
    assert shards(after(dispatcher, ShardFinished("a", 0))) == [("a", 1, [0], 2)]


@pytest.mark.parametrize(
    "message",
    [
        RunStarted(("a",)),
        PromptsRead(same(2), exhausted=True),
        WorkerReady("a", 4),
        WorkerFailedToOpen("a", "no"),
        WorkerLost("a", "gone"),
        RowsFinished("a", 1, (answer(same(1)[0]),)),
        ShardFinished("a", 1),
        ShardFailed("a", 1, "no", retryable=True),
        ReadPrompts(3),
        RunShard("a", 1, same(2), attempt=2),
        DeliverRows((answer(same(1)[0]),)),
        RetireWorker("a"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_cross_processes(message: Event | Command) -> None:
    assert pickle.loads(pickle.dumps(message)) == message


# -- by random histories


class Histories(RuleBasedStateMachine):
    """Workers that open, fail, answer in any order, repeat themselves and die."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[Command] = []
        self.delivered: dict[int, Row] = {}
        self.first_rows: dict[int, Row] = {}
        self.handed_out: dict[int, int] = {}
        self.opening: list[str] = []
        self.ready: list[str] = []
        self.shards: dict[int, RunShard] = {}
        self.left: dict[int, list[Prompt]] = {}
        self.unread: list[Prompt] = []
        self.to_read: int | None = None
        self.num_rows = 0

    @initialize(
        slots=st.lists(st.integers(1, 4), min_size=1, max_size=5),
        lengths=st.lists(st.integers(1, 3000), max_size=60),
        read_ahead=st.integers(1, 20),
        max_attempts=st.integers(1, 4),
    )
    def start(
        self, slots: list[int], lengths: list[int], read_ahead: int, max_attempts: int
    ) -> None:
        self.max_attempts = max_attempts
        self.slots = {f"card {i}": slot for i, slot in enumerate(slots)}
        self.unread = [Prompt(i, "x" * length) for i, length in enumerate(lengths)]
        self.num_prompts = len(self.unread)
        self.dispatcher = Dispatcher(read_ahead=read_ahead, max_attempts=max_attempts)
        self.opening = list(self.slots)
        self.tell(RunStarted(tuple(self.opening)))

    def tell(self, event: Event) -> None:
        for command in self.dispatcher.handle(event):
            match command:
                case ReadPrompts(num_prompts):
                    assert self.to_read is None, "asked to read twice"
                    self.to_read = num_prompts
                case RunShard(worker, shard_id, shard_prompts, attempt):
                    assert worker in self.ready
                    assert shard_id not in self.shards
                    assert shard_prompts
                    for prompt in shard_prompts:
                        assert prompt.index not in self.delivered
                        count = self.handed_out.get(prompt.index, 0) + 1
                        assert count == attempt <= self.max_attempts
                        self.handed_out[prompt.index] = count
                    self.shards[shard_id] = command
                    self.left[shard_id] = list(shard_prompts)
                case DeliverRows(rows):
                    for row in rows:
                        assert row.index not in self.delivered, "a row came twice"
                        self.delivered[row.index] = row
                case RetireWorker(worker):
                    self.forget(worker)
        for index, row in self.first_rows.items():
            assert self.delivered[index] is row, "not the first row was kept"

    def forget(self, worker: str) -> None:
        self.ready.remove(worker)
        for shard_id in [i for i, shard in self.shards.items() if shard.worker == worker]:
            del self.shards[shard_id]

    def row_of(self, shard: RunShard, prompt: Prompt) -> Row:
        self.num_rows += 1
        row = answer(prompt, f"{shard.worker} {self.num_rows}", shard.attempt)
        if prompt.index not in self.delivered:
            self.first_rows.setdefault(prompt.index, row)
        return row

    @precondition(lambda self: self.to_read is not None)
    @rule()
    def read(self) -> None:
        num, self.to_read = self.to_read, None
        taken, self.unread = self.unread[:num], self.unread[num:]
        self.tell(PromptsRead(tuple(taken), exhausted=len(taken) < (num or 0)))

    @precondition(lambda self: self.opening)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.opening))
        self.opening.remove(worker)
        self.ready.append(worker)
        self.tell(WorkerReady(worker, self.slots[worker]))

    @precondition(lambda self: self.opening)
    @rule(data=st.data())
    def fail_to_open(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.opening))
        self.opening.remove(worker)
        self.tell(WorkerFailedToOpen(worker, "no"))

    @precondition(lambda self: self.shards)
    @rule(data=st.data(), repeat=st.booleans())
    def finish_rows(self, data: st.DataObject, repeat: bool) -> None:
        shard = self.shards[data.draw(st.sampled_from(sorted(self.shards)))]
        pool = shard.prompts if repeat else self.left[shard.shard_id]
        chosen = data.draw(st.lists(st.sampled_from(pool), max_size=4)) if pool else []
        rows = tuple(self.row_of(shard, prompt) for prompt in chosen)
        self.left[shard.shard_id] = [p for p in self.left[shard.shard_id] if p not in chosen]
        self.tell(RowsFinished(shard.worker, shard.shard_id, rows))

    @precondition(lambda self: self.shards)
    @rule(data=st.data(), complete=st.booleans())
    def finish_shard(self, data: st.DataObject, complete: bool) -> None:
        shard = self.shards[data.draw(st.sampled_from(sorted(self.shards)))]
        if complete:
            rows = tuple(self.row_of(shard, prompt) for prompt in self.left[shard.shard_id])
            self.tell(RowsFinished(shard.worker, shard.shard_id, rows))
        del self.shards[shard.shard_id]
        self.tell(ShardFinished(shard.worker, shard.shard_id))

    @precondition(lambda self: self.shards)
    @rule(data=st.data(), retryable=st.booleans())
    def fail_shard(self, data: st.DataObject, retryable: bool) -> None:
        shard = self.shards.pop(data.draw(st.sampled_from(sorted(self.shards))))
        self.tell(ShardFailed(shard.worker, shard.shard_id, "no", retryable))

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), late=st.booleans())
    def lose(self, data: st.DataObject, late: bool) -> None:
        worker = data.draw(st.sampled_from(self.ready))
        held = [shard for shard in self.shards.values() if shard.worker == worker]
        self.forget(worker)
        self.tell(WorkerLost(worker, "gone"))
        if held and late:  # a row that was on its way when the worker died
            self.tell(
                RowsFinished(worker, held[0].shard_id, (self.row_of(held[0], held[0].prompts[0]),))
            )

    @rule()
    def hear_of_a_stranger(self) -> None:
        self.tell(RowsFinished("nobody", 10**6, ()))
        self.tell(ShardFinished("nobody", 10**6))
        self.tell(WorkerReady("nobody", 1))
        self.tell(WorkerLost("nobody", "gone"))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "dispatcher"):
            self.dispatcher.check()

    def teardown(self) -> None:
        if not hasattr(self, "dispatcher"):
            return
        while not self.dispatcher.finished:
            if self.to_read is not None:
                self.read()
            elif self.opening:
                worker = self.opening.pop()
                self.ready.append(worker)
                self.tell(WorkerReady(worker, self.slots[worker]))
            else:
                shard = self.shards.pop(min(self.shards))
                rows = tuple(self.row_of(shard, prompt) for prompt in shard.prompts)
                self.tell(RowsFinished(shard.worker, shard.shard_id, rows))
                self.tell(ShardFinished(shard.worker, shard.shard_id))
            self.dispatcher.check()
        assert sorted(self.delivered) == list(range(self.num_prompts))
        failed = {index for index, row in self.delivered.items() if not row.ok}
        assert failed.isdisjoint(self.first_rows)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# -- by simulated time


def run(cards: SimulatedCards, given_prompts: Sequence[Prompt]) -> list[Row]:
    rows: list[Row] = []
    audience = Audience(on_row=rows.append)
    Driver(cards, given_prompts, audience, clock=cards.clock).run()
    assert [row.index for row in rows] == list(range(len(given_prompts)))
    return rows


@settings(max_examples=30, deadline=None)
@given(
    num_prompts=st.integers(1, 120),
    killers=st.sets(st.integers(0, 119), max_size=2),
    slots=st.integers(1, 4),
)
def test_only_the_prompts_that_kill_are_given_up(
    num_prompts: int, killers: set[int], slots: int
) -> None:
    killers = {index for index in killers if index < num_prompts}
    cards = SimulatedCards(
        [0.0] * (3 * len(killers) + 1), slots, dies=lambda card, prompt: prompt.index in killers
    )
    rows = run(cards, same(num_prompts))
    assert {row.index for row in rows if not row.ok} == killers
    assert all(row.attempts == 3 for row in rows if not row.ok)


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
