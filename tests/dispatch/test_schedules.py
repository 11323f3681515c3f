"""The dispatcher under any order of deaths, hangs, late words, duplicates and lost answers.

Two adversaries. `Schedules` may do anything at any time, and knows of each prompt how often it came
to a bad end, and how often alone: that decides what may be said of it. `fleet` is simulated cards
that die at random and of poison prompts, in time. `check()` is asked after every event. The slow
form runs 10,000 schedules of each, in 20 seeds.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from invariants import check
from simulated_cards import DirectReader, SimulatedCards, answer

from qaic_ray.dispatch.dispatcher import (
    CancelRows,
    Command,
    DeliverRows,
    Dispatcher,
    Event,
    PromptsCancelled,
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
from qaic_ray.dispatch.policy import Policy
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.driver import Audience, Driver

NUM_SEEDS = 20
NUM_SCHEDULES = 10_000
POLICY = Policy()


class Schedules(RuleBasedStateMachine):
    """Workers that open, fail, answer in any order, repeat themselves, hang and die."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.wake_s: float | None = None
        self.delivered: dict[int, Row] = {}
        self.cancelled: set[int] = set()
        self.first_rows: dict[int, Row] = {}
        self.bad_ends: Counter[int] = Counter()
        self.lone_ends: dict[int, list[str]] = {}
        self.lives: dict[str, int] = {}
        self.opening: list[str] = []
        self.ready: list[str] = []
        self.hung: set[str] = set()
        self.quarantined: set[str] = set()
        self.failures: Counter[str] = Counter()
        self.openings: Counter[str] = Counter()
        self.shards: dict[int, RunShard] = {}
        self.left: dict[int, list[Prompt]] = {}
        self.old_shards: list[RunShard] = []
        self.failing: RunShard | None = None
        self.to_read: int | None = None
        self.num_rows = 0
        self.dispatcher: Dispatcher | None = None

    @initialize(
        slots=st.lists(st.integers(1, 5), min_size=1, max_size=4),
        lengths=st.lists(st.integers(1, 3000), max_size=40),
        read_ahead=st.integers(1, 20),
        is_open=st.booleans(),
    )
    def start(self, slots: list[int], lengths: list[int], read_ahead: int, is_open: bool) -> None:
        self.is_open = is_open
        self.slots = {f"card {i}": slot for i, slot in enumerate(slots)}
        self.unread = [Prompt(i, "x" * length) for i, length in enumerate(lengths)]
        self.num_prompts = len(self.unread)
        self.dispatcher = Dispatcher(policy=Policy(read_ahead=read_ahead))
        self.opening = list(self.slots)
        self.lives = dict.fromkeys(self.slots, 0)
        self.tell(RunStarted(tuple(self.opening), is_open))

    # -- what the dispatcher orders

    def tell(self, event: Event, after_s: float = 0.01) -> None:
        assert self.dispatcher is not None
        self.now_s += after_s
        commands = self.dispatcher.handle(event, self.now_s)
        check(self.dispatcher)
        self.wake_s = None if self.dispatcher.wake_s == math.inf else self.dispatcher.wake_s
        # What was given up belongs to the end of it, whatever the order of the commands.
        for command in commands:
            if isinstance(command, RetireWorker | QuarantineWorker):
                self.end_life(command.worker)
        for command in commands:
            self.obey(command)
        for index, row in self.first_rows.items():
            assert self.delivered[index] is row, "not the first row was kept"

    def obey(self, command: Command) -> None:
        match command:
            case ReadPrompts(num_prompts):
                assert self.to_read is None, "asked to read twice"
                self.to_read = num_prompts
            case RunShard():
                self.take_shard(command)
            case CancelRows(worker, indexes):
                assert worker in self.slots  # it may be retired for the same event
                assert set(indexes) <= self.cancelled
            case DeliverRows(rows):
                for row in rows:
                    assert row.index not in self.delivered, "a row came twice"
                    self.delivered[row.index] = row
                    if row.finish_reason is FinishReason.ABORT:
                        assert row.index in self.cancelled
                    elif not row.ok:
                        self.check_blame(row)
            case ReplaceWorker(worker, incarnation):
                assert worker not in self.quarantined
                assert worker not in self.ready
                assert worker not in self.opening
                assert incarnation == self.lives[worker] + 1
                self.lives[worker] = incarnation
                self.opening.append(worker)
            case QuarantineWorker(worker):
                shut = self.openings[worker] >= POLICY.max_openings
                assert shut or self.failures[worker] >= POLICY.max_failures
                self.quarantined.add(worker)

    def take_shard(self, shard: RunShard) -> None:
        assert shard.worker in self.ready
        assert shard.shard_id not in self.shards
        assert shard.prompts
        company = [other for other in self.shards.values() if other.worker == shard.worker]
        assert not [other for other in company if other.attempt > 2], "a suspect has company"
        assert shard.attempt <= 2 or (len(shard.prompts) == 1 and not company)
        for prompt in shard.prompts:
            assert prompt.index not in self.delivered
            assert shard.attempt <= self.bad_ends[prompt.index] + 1, "blamed for nothing"
            places = [s.worker for s in self.shards.values() if prompt in self.left[s.shard_id]]
            assert len(places) < 2, "it runs a third time"
            assert shard.worker not in places
        self.shards[shard.shard_id] = shard
        self.left[shard.shard_id] = list(shard.prompts)

    def check_blame(self, row: Row) -> None:
        """An error row is of a prompt that came to two bad ends alone, on two workers if it can."""
        assert 4 <= row.attempts <= min(POLICY.max_attempts, self.bad_ends[row.index])
        ends = self.lone_ends[row.index]
        assert len(ends) >= 2, "blamed for what happened to another"

    # -- what becomes of shards and workers

    def end_shard(self, shard_id: int, *, badly: bool) -> None:
        shard = self.shards.pop(shard_id)
        self.old_shards = [*self.old_shards[-5:], shard]
        company = [other for other in self.shards.values() if other.worker == shard.worker]
        if not badly:
            return
        for prompt in self.left[shard_id]:
            index = prompt.index
            elsewhere = any(prompt in self.left[other] for other in self.shards)
            if index not in self.delivered and not elsewhere:
                self.bad_ends[index] += 1
                if len(shard.prompts) == 1 and not company:
                    self.lone_ends.setdefault(index, []).append(shard.worker)

    def end_life(self, worker: str) -> None:
        """It died, or was given up: any prompt on it may have come to a bad end."""
        for place in (self.opening, self.ready):
            if worker in place:
                place.remove(worker)
                self.failures[worker] += 1
                self.openings[worker] += place is self.opening
        self.hung.discard(worker)
        if self.failing is not None and self.failing.worker == worker:
            # It was the last straw: the worker is retired with this shard on it.
            self.shards[self.failing.shard_id] = self.failing
        for shard_id in [i for i, shard in self.shards.items() if shard.worker == worker]:
            self.end_shard(shard_id, badly=True)

    def row_of(self, shard: RunShard, prompt: Prompt) -> Row:
        self.num_rows += 1
        row = answer(prompt, f"{shard.worker} {self.num_rows}", shard.attempt)
        if prompt.index not in self.delivered:
            self.first_rows.setdefault(prompt.index, row)
        return row

    def some_shard(self, data: st.DataObject) -> RunShard | None:
        ids = sorted(i for i, shard in self.shards.items() if shard.worker not in self.hung)
        return self.shards[data.draw(st.sampled_from(ids))] if ids else None

    # -- what may happen

    @precondition(lambda self: self.to_read is not None)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        num, self.to_read = self.to_read or 0, None
        size = data.draw(st.integers(1, num)) if self.is_open else num
        taken, self.unread = self.unread[:size], self.unread[size:]
        is_over = len(taken) < size
        is_dry = self.is_open and data.draw(st.booleans())
        self.tell(PromptsRead(tuple(taken), exhausted=is_over, is_dry=is_dry))

    @precondition(lambda self: self.opening)
    @rule(data=st.data(), opens=st.sampled_from([True, True, True, False]))
    def open(self, data: st.DataObject, opens: bool) -> None:
        worker = data.draw(st.sampled_from(self.opening))
        if not opens:
            self.end_life(worker)
            self.tell(WorkerLost(worker, "no", self.lives[worker]))
            return
        self.opening.remove(worker)
        self.openings[worker] = 0
        self.ready.append(worker)
        self.tell(WorkerReady(worker, self.slots[worker], self.lives[worker]))
        self.tell(WorkerProgress(worker, 0, self.lives[worker]))

    @precondition(lambda self: self.shards)
    @rule(data=st.data(), repeat=st.booleans())
    def finish_rows(self, data: st.DataObject, repeat: bool) -> None:
        shard = self.some_shard(data)
        if shard is None:
            return
        pool = shard.prompts if repeat else self.left[shard.shard_id]
        chosen = data.draw(st.lists(st.sampled_from(pool), max_size=4)) if pool else []
        rows = tuple(self.row_of(shard, prompt) for prompt in chosen)
        self.left[shard.shard_id] = [p for p in self.left[shard.shard_id] if p not in chosen]
        if rows:
            self.failures[shard.worker] = 0
        self.tell(RowsFinished(shard.worker, shard.shard_id, rows))

    @precondition(lambda self: self.shards)
    @rule(data=st.data(), complete=st.sampled_from([True, True, False]))
    def finish_shard(self, data: st.DataObject, complete: bool) -> None:
        shard = self.some_shard(data)
        if shard is None:
            return
        if complete:
            self.complete(shard)
        self.end_shard(shard.shard_id, badly=not complete)
        self.tell(ShardFinished(shard.worker, shard.shard_id))

    def complete(self, shard: RunShard) -> None:
        rows = tuple(self.row_of(shard, prompt) for prompt in self.left[shard.shard_id])
        self.left[shard.shard_id] = []
        if rows:
            self.failures[shard.worker] = 0
        self.tell(RowsFinished(shard.worker, shard.shard_id, rows))

    @precondition(lambda self: self.shards)
    @rule(data=st.data(), retryable=st.booleans())
    def fail_shard(self, data: st.DataObject, retryable: bool) -> None:
        shard = self.some_shard(data)
        if shard is None:
            return
        if not retryable:
            self.end_shard(shard.shard_id, badly=True)
            self.tell(ShardFailed(shard.worker, shard.shard_id, "no", retryable))
            return
        self.end_shard(shard.shard_id, badly=False)
        self.failing = shard
        self.tell(ShardFailed(shard.worker, shard.shard_id, "no", retryable))
        self.failing = None

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), late=st.booleans())
    def lose(self, data: st.DataObject, late: bool) -> None:
        worker = data.draw(st.sampled_from(self.ready))
        held = [shard for shard in self.shards.values() if shard.worker == worker]
        self.end_life(worker)
        self.tell(WorkerLost(worker, "gone", self.lives[worker]))
        if held and late:  # a row that was on its way when the worker died
            row = self.row_of(held[0], held[0].prompts[0])
            self.tell(RowsFinished(worker, held[0].shard_id, (row,)))

    @precondition(lambda self: self.num_prompts)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Those that are not read yet are the driver's to remember."""
        wanted = data.draw(st.sets(st.integers(0, self.num_prompts - 1), max_size=3))
        read = {index for index in wanted if index < self.num_prompts - len(self.unread)}
        self.cancelled |= read
        self.tell(PromptsCancelled(tuple(wanted)))
        assert read <= self.delivered.keys()

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def hang(self, data: st.DataObject) -> None:
        self.hung.add(data.draw(st.sampled_from(self.ready)))

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), num_steps=st.integers(0, 1000))
    def progress(self, data: st.DataObject, num_steps: int) -> None:
        worker = data.draw(st.sampled_from(self.ready))
        if worker not in self.hung:
            self.tell(WorkerProgress(worker, num_steps, self.lives[worker]))

    @rule(seconds=st.sampled_from([0.1, 0.6, 3.0, 20.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        if self.wake_s is not None:
            seconds = min(seconds, max(0.0, self.wake_s - self.now_s))
        self.tell(TimePassed(), seconds)

    @precondition(lambda self: any(self.lives.values()))
    @rule(data=st.data(), kind=st.integers(0, 3))
    def hear_of_an_earlier_life(self, data: st.DataObject, kind: int) -> None:
        worker = data.draw(st.sampled_from([name for name, life in self.lives.items() if life]))
        life = self.lives[worker] - 1
        self.tell(
            [
                WorkerLost(worker, "late", life),
                WorkerReady(worker, 5, life),
                WorkerLost(worker, "late", life),
                WorkerProgress(worker, 10**6, life),
            ][kind]
        )

    @precondition(lambda self: self.old_shards)
    @rule(data=st.data())
    def hear_of_an_ended_shard(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(self.old_shards))
        self.tell(ShardFinished(shard.worker, shard.shard_id))
        self.tell(ShardFailed(shard.worker, shard.shard_id, "late", True))

    @rule()
    def hear_of_a_stranger(self) -> None:
        self.tell(RowsFinished("nobody", 10**6, ()))
        self.tell(ShardFinished("nobody", 10**6))
        self.tell(WorkerReady("nobody", 1))
        self.tell(WorkerLost("nobody", "gone"))

    @invariant()
    def abandoned_means_nobody_is_left(self) -> None:
        if self.dispatcher is not None and self.dispatcher.abandoned:
            assert self.quarantined == set(self.slots)

    def teardown(self) -> None:
        """From here on all goes well: the run must come to its end, and every row be there."""
        if self.dispatcher is None:
            return
        for _ in range(5000):
            if self.dispatcher.finished:
                break
            self.go_on()
        assert self.dispatcher.finished, "the run hangs"
        if self.dispatcher.abandoned:
            assert self.quarantined == set(self.slots)
        else:
            assert sorted(self.delivered) == list(range(self.num_prompts))
        failed = {i for i, row in self.delivered.items() if not row.ok} - self.cancelled
        assert failed.isdisjoint(self.first_rows)

    def go_on(self) -> None:
        well = [shard for shard in self.shards.values() if shard.worker not in self.hung]
        if self.to_read is not None:
            num, self.to_read = self.to_read, None
            taken, self.unread = self.unread[:num], self.unread[num:]
            self.tell(PromptsRead(tuple(taken), exhausted=len(taken) < num))
        elif self.opening:
            worker = self.opening.pop()
            self.ready.append(worker)
            self.tell(WorkerReady(worker, self.slots[worker], self.lives[worker]))
            self.tell(WorkerProgress(worker, 0, self.lives[worker]))
        elif well:
            self.complete(well[0])
            self.end_shard(well[0].shard_id, badly=False)
            self.tell(ShardFinished(well[0].worker, well[0].shard_id))
        else:
            assert self.wake_s is not None, "nothing will ever happen"
            wait_s = max(0.0, self.wake_s - self.now_s)
            self.tell(TimePassed(), wait_s)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(stateful_step_count=25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(NUM_SEEDS))
def test_many_schedules(number: int) -> None:
    many = settings(
        max_examples=NUM_SCHEDULES // NUM_SEEDS,
        stateful_step_count=50,
        derandomize=False,
        database=None,
        phases=(Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(seed(number)(Schedules), settings=many)


# -- fleets in simulated time


class Checked(Dispatcher):
    """Asks for its invariants after every event."""

    def handle(self, event: Event, now_s: float) -> list[Command]:
        commands = super().handle(event, now_s)
        check(self)
        return commands


class Fleet(SimulatedCards):
    """Counts for each prompt the deaths at which it was alone on its card."""

    def _happened(self, card: object, worker: str, event: Event) -> Event:
        self.lone = getattr(self, "lone", Counter())
        if isinstance(event, WorkerLost):
            shards = [s for s in self.ran if s.worker == worker and self._left[s.shard_id]]
            for shard in shards[-1:]:
                if len(shard.prompts) == 1:
                    self.lone[shard.prompts[0].index] += 1
        return super()._happened(card, worker, event)  # type: ignore[arg-type]


def fleet(number: int) -> tuple[int, int]:
    """One schedule; how many cards died, and how many good prompts died alone twice by chance."""
    draw = random.Random(number)
    num_prompts, num_cards = draw.randint(1, 40), draw.randint(1, 5)
    poison = {i for i in range(num_prompts) if draw.random() < 0.03}
    seconds = [min(4.0, 0.3 * draw.paretovariate(1.5)) for _ in range(num_prompts)]
    stuck = {i for i in range(num_prompts) if draw.random() < 0.02} - poison
    hung: set[int] = set()

    def hangs(card: str, prompt: Prompt) -> bool:
        """Each of these hangs one card, once: it is the card's fault."""
        first = prompt.index in stuck and prompt.index not in hung
        hung.add(prompt.index)
        return first

    cards = Fleet(
        [0.0] + [draw.choice([0.0, 0.2, 5.0, None]) for _ in range(num_cards - 1)],
        slots=draw.randint(1, 8),
        seconds_of=lambda prompt: seconds[prompt.index],
        dies=lambda card, prompt: prompt.index in poison,
        hangs=hangs,
        slowness={f"card {draw.randrange(num_cards)}": draw.choice([1.0, 2.0, 3.0])},
        mean_life_s=draw.choice([None, 300.0, 1000.0]),
        progress_s=2.0,
        seed=number,
    )
    rows: list[Row] = []
    driver = Driver(
        cards,
        [Prompt(i, "x" * int(1000 * s)) for i, s in enumerate(seconds)],
        Audience(on_row=rows.append),
        dispatcher=Checked(policy=Policy(read_ahead=draw.choice([8, 8192]))),
        clock=cards.clock,
        reader=DirectReader,
    )
    result = driver.run()
    num_deaths = sum(cards.lives_lost.values())
    assert [row.index for row in rows] == list(range(len(rows)))
    failed = {row.index for row in rows if not row.ok}
    by_chance = failed - poison
    assert all(cards.lone[index] >= 2 for index in failed), "blamed for another's death"
    if result.broken_off is None:
        assert len(rows) == num_prompts
        assert failed >= poison
    return num_deaths, len(by_chance)


def test_fleets_that_die_at_random_and_of_poison() -> None:
    num_deaths = 0
    for number in range(140):
        deaths, by_chance = fleet(number)
        num_deaths += deaths
        assert by_chance == 0, f"a good prompt is an error in schedule {number}"
    assert num_deaths > 140


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(NUM_SEEDS))
def test_many_fleets(number: int) -> None:
    num = NUM_SCHEDULES // NUM_SEEDS
    outcomes = [fleet(1000 + number * num + i) for i in range(num)]
    assert sum(by_chance for _, by_chance in outcomes) == 0, "a good prompt is an error"
    assert sum(num_deaths for num_deaths, _ in outcomes) > num
