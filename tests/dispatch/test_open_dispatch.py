"""An open input: who gets which prompt, with slots that remember, and work that waits for nobody.

`Slots` is a card as its batcher is, by tokens and not by hashes: what the dispatcher believes of it
is held against that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from invariants import check

from qaic_ray.contract import Specializations
from qaic_ray.dispatch.beginnings import HeldBeginnings, beginning_of
from qaic_ray.dispatch.dispatcher import (
    CancelRows,
    Command,
    DeliverRows,
    Dispatcher,
    Event,
    PromptsCancelled,
    PromptsRead,
    ReadPrompts,
    ReplaceWorker,
    RowsFinished,
    RunShard,
    RunStarted,
    ShardFailed,
    ShardFinished,
    TimePassed,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.dispatch.policy import DEFAULT_POLICY, Policy
from qaic_ray.engine.batching.batcher import PREFIX_BLOCK, Batcher
from qaic_ray.engine.steps import ProgramShapes, Sequence
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.sampling_params import SamplingParams

BLOCK = DEFAULT_POLICY.block_tokens
SYSTEM = tuple(range(1000, 1000 + 3 * BLOCK))


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Whole blocks of the tokens that both begin with."""
    number = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
    return (min(len(left), len(right)) if number is None else number) // BLOCK


def row_of(prompt: Prompt, token_ids: tuple[int, ...] = (), worker: str = "") -> Row:
    """An answer; the last token of one is never fed."""
    return Row(
        prompt.index, prompt.text, "", FinishReason.STOP, token_ids=(*token_ids, 7), worker=worker
    )


@dataclass
class Slots:
    """The slots of a card, in tokens: free ones by how long they have been free."""

    num_slots: int
    free: list[tuple[int, ...]] = field(default_factory=list)
    running: dict[int, Prompt] = field(default_factory=dict)
    queued: dict[int, Prompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = [()] * self.num_slots

    def held(self, prompt: Prompt) -> int:
        return max((common(one, prompt.token_ids or ()) for one in self.free), default=0)

    @property
    def num_engaged(self) -> int:
        return sum(not prompt.background for prompt in self.running.values())

    @property
    def spare(self) -> int:
        """Slots that no prompt has, begun or waiting for its slot again."""
        return self.num_slots - len(self.running) - len(self.queued)

    def begin(self, prompt: Prompt) -> None:
        if not self.free:
            self.queued[prompt.index] = prompt
            late = next((i for i, one in self.running.items() if one.background), None)
            if late is None or prompt.background:
                return
            # One of the background gives its slot, and goes on later.
            one = self.running.pop(late)
            self.free.append(())
            self.begin(self.queued.pop(prompt.index))
            self.queued[late] = one
            return
        self.running[prompt.index] = prompt
        self.free.remove(max(self.free, key=lambda one: common(one, prompt.token_ids or ())))

    def end(self, index: int, answer: tuple[int, ...] = ()) -> None:
        if self.queued.pop(index, None) is not None:
            return
        prompt = self.running.pop(index)
        self.free.append((*(prompt.token_ids or ()), *answer))
        if self.queued:
            first = min(self.queued, key=lambda index: self.queued[index].background)
            self.begin(self.queued.pop(first))


class Online(RuleBasedStateMachine):
    """Requests, and a batch beside them, in any order on workers that may be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher: Dispatcher | None = None
        self.cards: dict[str, Slots] = {}
        self.lives: dict[str, int] = {}
        self.opening: set[str] = set()
        self.shards: dict[int, RunShard] = {}
        self.where: dict[int, str] = {}
        self.waiting: dict[int, Prompt] = {}
        self.done: set[int] = set()
        self.now_s = 0.0
        self.num_read = 0
        self.to_read = False
        self.losses = 0

    @initialize(slots=st.lists(st.integers(1, 4), min_size=2, max_size=4), kept=st.integers(0, 2))
    def start(self, slots: list[int], kept: int) -> None:
        self.kept = kept
        self.slots = {f"card {i}": number for i, number in enumerate(slots)}
        self.dispatcher = Dispatcher(policy=Policy(kept_slots=kept, max_shards=64))
        self.lives = dict.fromkeys(self.slots, 0)
        self.opening = set(self.slots)
        self.tell(RunStarted(tuple(self.slots), is_open=True))

    def tell(self, event: Event) -> None:
        assert self.dispatcher is not None
        self.now_s += 0.01
        commands = self.dispatcher.handle(event, self.now_s)
        check(self.dispatcher)
        for command in commands:
            self.obey(command)

    def obey(self, command: Command) -> None:
        match command:
            case ReadPrompts():
                self.to_read = True
            case DeliverRows(rows):
                for row in rows:
                    assert row.index not in self.done, "answered twice"
                    self.done.add(row.index)
                    self.waiting.pop(row.index, None)
            case ReplaceWorker(worker, incarnation):
                self.lives[worker] = incarnation
                self.opening.add(worker)
            case CancelRows(worker, indexes):
                for index in indexes:
                    if worker in self.cards:
                        self.cards[worker].end(index)
            case RunShard():
                for prompt in command.prompts:
                    self.check_choice(command, prompt)
                    del self.waiting[prompt.index]
                    self.where[prompt.index] = command.worker
                    self.cards[command.worker].begin(prompt)
                self.shards[command.shard_id] = command

    def check_choice(self, shard: RunShard, prompt: Prompt) -> None:
        assert prompt.index in self.waiting, "assigned twice"
        cards, card = self.cards, self.cards[shard.worker]
        if prompt.background:
            kept = min(self.kept, card.num_slots - 1)
            assert card.spare > kept, "a slot that is kept, or a queue"
            return
        if shard.attempt > 1 or self.losses:
            return  # who died is not trusted with everything
        free = [name for name, card in cards.items() if card.num_engaged < card.num_slots]
        if not free:
            return  # so much waits that some is queued
        assert shard.worker in free, "to a full worker while another has room"
        held = {name: cards[name].held(prompt) for name in free}
        assert held[shard.worker] == max(held.values()), "not to the longest beginning"
        equal = [name for name in free if held[name] == held[shard.worker]]
        loads = {name: 1 - cards[name].spare / cards[name].num_slots for name in equal}
        assert loads[shard.worker] == min(loads.values()), "not to the least loaded"

    # -- what happens

    @precondition(lambda self: self.opening)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.opening)))
        self.opening.discard(name)
        self.cards[name] = Slots(self.slots[name])
        # Its steps are never told, so that none is ever stalled.
        self.tell(WorkerReady(name, self.slots[name], self.lives[name]))

    @precondition(lambda self: self.to_read)
    @rule(
        asked=st.lists(
            st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 70)), min_size=1, max_size=5
        )
    )
    def read(self, asked: list[tuple[bool, int, int]]) -> None:
        """`kind`: of which family of prompts, of what length."""
        prompts = tuple(
            Prompt(
                self.num_read + i,
                "",
                token_ids=(*SYSTEM[:length], *range(kind * 200, kind * 200 + length)),
                background=background,
            )
            for i, (background, kind, length) in enumerate(asked)
        )
        self.num_read += len(prompts)
        self.waiting |= {prompt.index: prompt for prompt in prompts}
        self.to_read = False
        self.tell(PromptsRead(prompts, exhausted=False, is_dry=True))

    @precondition(lambda self: any(card.running for card in self.cards.values()))
    @rule(data=st.data(), num_tokens=st.integers(0, 40))
    def finish(self, data: st.DataObject, num_tokens: int) -> None:
        running = [(n, i) for n, card in self.cards.items() for i in card.running]
        name, index = data.draw(st.sampled_from(running))
        shard = next(
            s
            for s in self.shards.values()
            if index in [p.index for p in s.prompts]
            and s.worker == name
            and self.where[index] == name
        )
        prompt = self.cards[name].running[index]
        answer = tuple(range(5000, 5000 + num_tokens))
        self.cards[name].end(index, answer)
        self.tell(RowsFinished(name, shard.shard_id, (row_of(prompt, answer, name),)))
        if {p.index for p in shard.prompts} <= self.done:
            del self.shards[shard.shard_id]
            self.tell(ShardFinished(name, shard.shard_id))

    @precondition(lambda self: self.num_read)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, self.num_read - 1))
        self.tell(PromptsCancelled((index,)))
        assert index in self.done

    @precondition(lambda self: self.cards)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.cards)))
        card = self.cards.pop(name)
        self.losses += 1
        self.waiting |= {
            i: p for i, p in {**card.running, **card.queued}.items() if i not in self.done
        }
        self.shards = {i: shard for i, shard in self.shards.items() if shard.worker != name}
        self.tell(WorkerLost(name, "gone", self.lives[name]))

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        assert self.dispatcher is not None
        self.now_s += min(seconds, max(0.0, self.dispatcher.wake_s - self.now_s))
        self.tell(TimePassed())

    @invariant()
    def nobody_waits_for_a_slot_that_is_free(self) -> None:
        if self.losses or self.dispatcher is None:
            return
        spare = {name: card.spare for name, card in self.cards.items()}
        kinds = {prompt.background for prompt in self.waiting.values()}
        if False in kinds:
            assert all(card.num_engaged >= card.num_slots for card in self.cards.values())
        if True in kinds:
            kept = {name: min(self.kept, self.slots[name] - 1) for name in spare}
            assert all(number <= kept[name] for name, number in spare.items())

    def teardown(self) -> None:
        """Every prompt is answered in the end, those of the background too."""
        if self.dispatcher is None:
            return
        for name in sorted(self.opening):
            self.opening.discard(name)
            self.cards[name] = Slots(self.slots[name])
            self.tell(WorkerReady(name, self.slots[name], self.lives[name]))
        for _ in range(5000):
            shard = next(iter(self.shards.values()), None)
            if shard is not None:
                del self.shards[shard.shard_id]
                left = [p for p in shard.prompts if p.index not in self.done]
                for prompt in left:
                    self.cards[shard.worker].end(prompt.index)
                rows = tuple(row_of(prompt, worker=shard.worker) for prompt in left)
                self.tell(RowsFinished(shard.worker, shard.shard_id, rows))
                self.tell(ShardFinished(shard.worker, shard.shard_id))
            elif self.opening:
                name = self.opening.pop()
                self.cards[name] = Slots(self.slots[name])
                self.tell(WorkerReady(name, self.slots[name], self.lives[name]))
            elif self.waiting:
                self.now_s = max(self.now_s, self.dispatcher.wake_s)
                self.tell(TimePassed())
            else:
                return
        raise AssertionError("prompts wait for ever")


TestOnline = Online.TestCase
TestOnline.settings = settings(stateful_step_count=30)


# -- what slots hold


turns = st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 40))


@given(st.lists(turns, min_size=1, max_size=30), st.integers(1, 4))
def test_what_is_believed_of_slots_is_what_the_batcher_has(
    asked: list[tuple[int, int, int]], num_slots: int
) -> None:
    """Prompts one after another and beside each other, answered by the batcher itself."""
    assert PREFIX_BLOCK == BLOCK
    shapes = Specializations.build(
        batch_size=num_slots, prompt_len=32, ctx_len=256, continuous=True
    )
    batcher = Batcher(ProgramShapes.of(shapes))
    believed = HeldBeginnings(num_slots, DEFAULT_POLICY)
    for index, (kind, length, num_answer) in enumerate(asked):
        ids = (*SYSTEM[: kind * 20], *range(kind * 100, kind * 100 + length))
        prompt = Prompt(index, "", token_ids=ids)
        free = max((common(held, ids) for held in batcher._free.values()), default=0)
        assert believed.num_held(beginning_of(prompt, DEFAULT_POLICY)) == free
        believed.begin(prompt)
        batcher.add(Sequence(index, ids, num_answer))
        batcher.admit()
        # The first prompt of three goes on while the others run.
        while batcher.busy and (len(batcher.running) == num_slots or index % 3):
            step = batcher.plan()
            assert step is not None
            for done in batcher.commit(step, [[9000 + done_by_step(s)] for _, s in step.rows]):
                answered = Prompt(done.key, "", token_ids=done.prompt_ids)
                row = Row(done.key, "", "", FinishReason.LENGTH, token_ids=tuple(done.output_ids))
                believed.end(answered, row)


def done_by_step(sequence: Sequence) -> int:
    """The next token, which follows from the row alone."""
    return sequence.key * 100 + len(sequence.output_ids)


def test_nothing_but_slots_is_remembered() -> None:
    held = HeldBeginnings(4, DEFAULT_POLICY)
    for index in range(1000):
        prompt = Prompt(index, "", token_ids=tuple(range(index, index + 64)))
        held.begin(prompt)
        if index >= 6:
            late = Prompt(index - 6, "", token_ids=tuple(range(index - 6, index + 58)))
            held.end(late, row_of(late))
        assert len(held) <= 6
    held.forget()
    assert not any(held._free)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Prompt(0, "x" * 640), Prompt(1, "x" * 640 + "ANSWER" * 20 + "more")),
        (
            Prompt(0, "hi", messages=({"role": "user", "content": "y" * 200},)),
            Prompt(
                1,
                "and?",
                messages=(
                    {"role": "user", "content": "y" * 200},
                    {"role": "assistant", "content": "ANSWER" * 20},
                    {"role": "user", "content": "and?"},
                ),
            ),
        ),
        (Prompt(0, "", token_ids=(1,) * 40), Prompt(1, "", token_ids=(1,) * 40 + (2,) * 30)),
    ],
    ids=["text", "messages", "tokens"],
)
def test_the_next_turn_begins_with_what_the_slot_holds(first: Prompt, then: Prompt) -> None:
    row = Row(0, "", "ANSWER" * 20, FinishReason.STOP, token_ids=(2,) * 30)
    policy = DEFAULT_POLICY
    without = beginning_of(first, policy)
    whole = beginning_of(first, policy, row)
    following = beginning_of(then, policy)
    assert len(without) < len(whole)
    assert following[: len(whole)] == whole


# -- conversations


def online(num_cards: int, slots: int, **policy: int) -> Dispatcher:
    dispatcher = Dispatcher(policy=Policy(max_shards=64, **policy))
    names = tuple(f"card {i}" for i in range(num_cards))
    dispatcher.handle(RunStarted(names, is_open=True), 0.0)
    for name in names:
        dispatcher.handle(WorkerReady(name, slots), 0.0)
    return dispatcher


def submit(dispatcher: Dispatcher, *prompts: Prompt) -> dict[int, RunShard]:
    commands = dispatcher.handle(PromptsRead(prompts, exhausted=False, is_dry=True), 0.0)
    check(dispatcher)
    return given_in(commands)


def finish(dispatcher: Dispatcher, shard: RunShard, answer: tuple[int, ...] = ()) -> None:
    rows = tuple(row_of(prompt, answer) for prompt in shard.prompts)
    dispatcher.handle(RowsFinished(shard.worker, shard.shard_id, rows), 0.0)
    dispatcher.handle(ShardFinished(shard.worker, shard.shard_id), 0.0)
    check(dispatcher)


def test_conversations_of_many_turns_stay_on_their_cards() -> None:
    """As many as there are slots, that begin alike and take turns in any order."""
    dispatcher, draw = online(3, 4), random.Random(1)
    ids = {who: (*SYSTEM, *range(who * 500, who * 500 + 30)) for who in range(9)}
    homes: dict[int, str] = {}
    index = 0
    begun = submit(dispatcher, *(Prompt(who, "", token_ids=ids[who]) for who in ids))
    for who in ids:
        homes[who] = begun[who].worker
        finish(dispatcher, begun[who], (who,) * 20)
        ids[who] = (*ids[who], *(who,) * 20)
    assert sorted(list(homes.values()).count(name) for name in set(homes.values())) == [3, 3, 3]
    index = len(ids)
    moved = 0
    for _ in range(200):
        who = draw.randrange(9)
        ids[who] = (*ids[who], *range(index, index + 25))
        shard = submit(dispatcher, Prompt(index, "", token_ids=ids[who]))[index]
        moved += shard.worker != homes[who]
        homes[who] = shard.worker
        finish(dispatcher, shard, (index,) * 20)
        ids[who] = (*ids[who], *(index,) * 20)
        index += 1
    assert moved == 0


def test_those_that_share_a_system_prompt_do_not_overload_one_card() -> None:
    dispatcher = online(4, 4)
    first = submit(dispatcher, Prompt(0, "", token_ids=(*SYSTEM, 1)))
    finish(dispatcher, first[0])
    own = {i: tuple(range(i * 50, i * 50 + 40)) for i in range(1, 17)}
    prompts = [Prompt(i, "", token_ids=(*SYSTEM, *ids)) for i, ids in own.items()]
    begun = submit(dispatcher, *prompts)
    workers = [shard.worker for shard in begun.values()]
    assert sorted(workers.count(f"card {i}") for i in range(4)) == [4, 4, 4, 4]


def test_a_worker_that_was_replaced_holds_nothing() -> None:
    dispatcher = online(2, 4)
    ids = tuple(range(100))
    home = submit(dispatcher, Prompt(0, "", token_ids=ids))[0]
    finish(dispatcher, home)
    dispatcher.handle(WorkerLost(home.worker, "gone"), 0.0)
    dispatcher.handle(TimePassed(), 1.0)
    dispatcher.handle(WorkerReady(home.worker, 4, 1), 2.0)
    held = dispatcher._pool.workers[home.worker].held
    assert held is not None
    assert held.num_held(beginning_of(Prompt(1, "", token_ids=ids), Policy())) == 0


def test_an_engine_that_was_made_anew_holds_nothing() -> None:
    dispatcher = online(2, 4)
    ids = tuple(range(100))
    home = submit(dispatcher, Prompt(0, "", token_ids=ids))[0]
    finish(dispatcher, home)
    runs = submit(dispatcher, Prompt(1, "", token_ids=ids))[1]
    assert runs.worker == home.worker
    dispatcher.handle(ShardFailed(runs.worker, runs.shard_id, "it failed", retryable=True), 0.0)
    check(dispatcher)
    held = dispatcher._pool.workers[home.worker].held
    assert held is not None
    assert held.num_held(beginning_of(Prompt(2, "", token_ids=ids), Policy())) == 0


def test_one_worker_keeps_no_beginnings_and_none_are_kept_where_they_are_of_no_use() -> None:
    for dispatcher in (online(1, 2), online(2, 2, block_tokens=0)):
        submit(dispatcher, Prompt(0, "", token_ids=tuple(range(64))))
        assert all(worker.held is None for worker in dispatcher._pool.workers.values())


def test_samples_of_a_prompt_take_a_slot_each() -> None:
    dispatcher = online(2, 4)
    four = SamplingParams(n=4, temperature=1.0)
    wide = submit(dispatcher, Prompt(0, "", token_ids=(1,), sampling=four))[0]
    others = submit(dispatcher, *(Prompt(i, "", token_ids=(i,)) for i in range(1, 5)))
    assert {shard.worker for shard in others.values()} == {"card 0", "card 1"} - {wide.worker}


# -- the background


def test_the_background_leaves_slots_and_is_queued_in_no_worker() -> None:
    dispatcher = online(2, 4, kept_slots=1)
    begun = submit(dispatcher, *(Prompt(i, "", background=True) for i in range(20)))
    assert len(begun) == 6
    first = submit(dispatcher, Prompt(20, "now"), Prompt(21, "now"))
    assert sorted(shard.worker for shard in first.values()) == ["card 0", "card 1"]
    more = submit(dispatcher, *(Prompt(i, "now, and six give their slots") for i in range(22, 28)))
    workers = [shard.worker for shard in more.values()]
    assert sorted(workers.count(name) for name in ("card 0", "card 1")) == [3, 3]
    assert submit(dispatcher, Prompt(28, "waits: every slot is another request's")) == {}
    one = begun[0]
    rows = (row_of(Prompt(0, "", background=True)),)
    commands = dispatcher.handle(RowsFinished(one.worker, one.shard_id, rows), 1.0)
    assert not any(isinstance(command, RunShard) for command in commands), "it had no slot"
    one = first[20]
    rows = (row_of(Prompt(20, "")),)
    commands = dispatcher.handle(RowsFinished(one.worker, one.shard_id, rows), 1.0)
    (given,) = [command for command in commands if isinstance(command, RunShard)]
    assert [prompt.index for prompt in given.prompts] == [28]


def test_a_slot_that_is_free_goes_before_one_that_the_background_gives() -> None:
    dispatcher = online(2, 4)
    late = submit(dispatcher, *(Prompt(i, "", background=True) for i in range(8)))
    ended = next(shard for shard in late.values() if shard.worker == "card 1")
    finish(dispatcher, ended)
    shards = [submit(dispatcher, Prompt(20 + i, ""))[20 + i].worker for i in range(3)]
    assert shards[0] == "card 1", "nobody has to give a slot"
    assert set(shards[1:]) == {"card 0", "card 1"}, "then the one with fewer requests goes first"
    assert shards[1] == "card 0"


def test_of_a_worker_that_dies_all_that_had_begun_may_be_to_blame() -> None:
    dispatcher = online(1, 2)
    submit(dispatcher, *(Prompt(i, "", background=True) for i in range(2)))
    submit(dispatcher, *(Prompt(i, "") for i in range(2, 4)))
    assert dispatcher._pool.workers["card 0"].engaged == 2
    dispatcher.handle(WorkerLost("card 0", "gone"), 1.0)
    check(dispatcher)
    assert {entry.attempt for entry in dispatcher._table.open.values()} == {2}


def test_a_worker_of_one_slot_does_the_background_too() -> None:
    dispatcher = online(1, 1, kept_slots=3)
    assert len(submit(dispatcher, Prompt(0, "", background=True))) == 1


def test_however_much_of_the_background_waits_the_foreground_is_read() -> None:
    dispatcher = Dispatcher(policy=Policy(read_ahead=10, ahead_rounds=1))
    commands = dispatcher.handle(RunStarted(("a",), is_open=True), 0.0)
    for first in range(0, 200, 10):
        assert any(isinstance(command, ReadPrompts) for command in commands)
        batch = tuple(Prompt(first + i, "", background=True) for i in range(10))
        commands = dispatcher.handle(PromptsRead(batch, exhausted=False), 0.0)
    assert dispatcher.num_waiting == 200


def test_a_prompt_of_the_background_that_must_be_alone_gets_its_turn() -> None:
    """It was on two cards that died, and the third one always has something else to do."""
    dispatcher = online(3, 2)
    running = submit(dispatcher, *(Prompt(i, "", background=True) for i in range(6)))
    now_s, lost = 1.0, 0
    for number in range(6, 66):
        suspect = running.get(0)
        if suspect is not None and suspect.attempt == 3:
            break
        if suspect is not None:
            running = {i: shard for i, shard in running.items() if shard.worker != suspect.worker}
            commands = dispatcher.handle(WorkerLost(suspect.worker, "gone"), now_s)
            lost += 1
        else:
            index, shard = next(iter(running.items()))
            del running[index]
            row = row_of(Prompt(index, ""))
            commands = dispatcher.handle(RowsFinished(shard.worker, shard.shard_id, (row,)), now_s)
            commands += dispatcher.handle(ShardFinished(shard.worker, shard.shard_id), now_s)
        check(dispatcher)
        running |= given_in(commands)
        late = Prompt(number, "", background=True)
        commands = dispatcher.handle(PromptsRead((late,), exhausted=False, is_dry=True), now_s)
        running |= given_in(commands)
    assert lost == 2
    assert list(running) == [0], "it is alone"


def given_in(commands: list[Command]) -> dict[int, RunShard]:
    return {p.index: c for c in commands if isinstance(c, RunShard) for p in c.prompts}
