"""What an open fleet keeps does not grow with the prompts that it has answered, or cancelled.

Every object of ours that can be reached from the fleet, its driver and its dispatcher is walked,
and the lengths of all its tables are added up: nobody has to remember a new one here.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from stepped_cards import Stepped, SteppedCards

from qaic_ray.dispatch.dispatcher import Event, RunShard, ShardFinished, WorkerProgress
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.metrics import EngineState, EngineTotals
from qaic_ray.rows import Prompt
from qaic_ray.runs.run_view import MARK_S, RATE_S

AT_ONCE = 200


@dataclass
class ForgetfulCards(SteppedCards):
    """Keep nothing of what they ran, and tell how their engines stand."""

    def run(self, shard: RunShard) -> None:
        super().run(shard)
        self.ran.clear()
        self._streamed &= {index for index in self._streamed if index >= shard.shard_id - 10_000}

    def cancel(self, worker: str, indexes: Any) -> None:
        pass

    def _happened(self, card: Any, worker: str, event: Event) -> Event:
        event = super()._happened(card, worker, event)
        if isinstance(event, ShardFinished):
            self._left.pop(event.shard_id, None)
        if isinstance(event, WorkerProgress):
            state = EngineState(running=1, kv_usage=0.25, generated_tokens=event.num_steps)
            return replace(event, engine=state)
        return event


def lengths(*roots: object) -> Counter[str]:
    """The number of items of all containers that objects of ours hold, by who holds them."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    to_see: deque[tuple[str, object]] = deque(("", root) for root in roots)
    while to_see:
        where, one = to_see.popleft()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            found[where] += len(one)
            to_see.extend((where, value) for value in (*one.keys(), *one.values()))
        elif isinstance(one, list | set | frozenset | tuple | deque):
            found[where] += len(one)
            to_see.extend((where, value) for value in tuple(one))
        elif type(one).__module__.startswith("qaic_ray."):
            name = type(one).__name__
            slots = [s for kind in type(one).__mro__ for s in getattr(kind, "__slots__", ())]
            fields = {**getattr(one, "__dict__", {})}
            fields |= {slot: getattr(one, slot) for slot in slots if hasattr(one, slot)}
            to_see.extend((f"{name}.{key}", value) for key, value in fields.items())
            for key, value in fields.items():
                if hasattr(value, "itemsize") and hasattr(value, "__len__"):
                    found[f"{name}.{key}"] += len(value)
    return found


def answered(number: int, *, cancels: bool) -> tuple[Counter[str], Stepped]:
    """What is there after so many prompts, when the last one is done."""
    cards = ForgetfulCards([0.0, 0.0, 0.0], slots=8, progress_s=1.0)
    stepped = Stepped(cards)
    stepped.cards.let_run()
    draw = random.Random(3)
    waiting: deque[PendingRow] = deque()
    for count in range(number):
        ids = tuple(draw.randrange(100) for _ in range(draw.randrange(60)))
        prompt = Prompt(0, "text", token_ids=ids, stream=count % 2 == 0, background=count % 3 == 0)
        waiting.append(stepped.fleet.submit(prompt))
        if cancels and draw.random() < 0.5:
            draw.choice(waiting).cancel()
        if len(waiting) == AT_ONCE or count == number - 1:
            while waiting:
                waiting.pop().row(60.0)
    return lengths(stepped.fleet, stepped.driver, stepped.dispatcher), stepped


def grown(less: Counter[str], more: Counter[str]) -> dict[str, int]:
    """What has more items by more than what shards and slots may have at a moment; marks of rates,
    which are kept for so many seconds of real time, are bounded by those."""
    assert more["_Rate._marks"] <= 5 * 3 * 2 * (RATE_S / MARK_S + 2)
    return {
        name: more[name] - less[name]
        for name in more
        if more[name] - less[name] > 500 and name != "_Rate._marks"
    }


@pytest.mark.parametrize("number", [3_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_thousands_of_prompts_take_no_more_than_some_hundreds(number: int) -> None:
    few, first = answered(600, cancels=False)
    many, second = answered(number, cancels=False)
    assert grown(few, many) == {}
    assert many["PromptTable.open"] == many["Driver._streams"] == many["Intake.open"] == 0
    assert many.total() < 5_000
    for stepped in (first, second):
        stepped.fleet.close()


def test_thousands_that_were_cancelled_at_any_moment_leave_nothing() -> None:
    after, stepped = answered(1_500, cancels=True)
    stepped.fleet.close()
    result = stepped.fleet.result
    assert result is not None
    assert 100 < result.total.failed_rows < 1_400
    empty = (
        *("OpenFleet._open", "OpenFleet._to_cancel", "OpenInput._waiting", "PromptTable.open"),
        *("Driver._streams", "Driver._to_cancel", "Driver._cancelled", "Intake.open"),
        *("Intake._done", "WaitingList.entries", "WaitingPrompts.suspects"),
    )
    assert {name: after[name] for name in empty} == dict.fromkeys(empty, 0)
    assert after.total() < 5_000


def test_a_table_that_grows_is_seen() -> None:
    """The walk finds what is left in any place, also in one of the driver's own tables."""
    _, stepped = answered(100, cancels=False)
    assert stepped.driver is not None
    before = lengths(stepped.fleet, stepped.driver)
    stepped.driver._cancelled.update(range(10**6, 10**6 + 600))
    stepped.driver._intake._done.extend([1] * 700)
    grew = grown(before, lengths(stepped.fleet, stepped.driver))
    assert grew == {"Driver._cancelled": 600, "Intake._done": 700}
    stepped.fleet.close()


def test_what_a_server_shows_of_its_cards() -> None:
    cards = ForgetfulCards([0.0, 5.0], slots=4, progress_s=1.0, seconds_of=lambda _: 9.0)
    stepped = Stepped(cards)
    fleet = stepped.fleet
    assert (fleet.num_slots, fleet.kv_usage, fleet.engines) == (0, 0.0, {})
    cards.pass_time(0.0)
    assert fleet.num_slots == 4
    for _ in range(3):
        fleet.submit(Prompt(0, "long"))
    cards.settle()
    assert (fleet.num_running, fleet.num_waiting) == (3, 0)
    for _ in range(8):
        cards.pass_time(1.0)
    assert fleet.num_slots == 8
    assert fleet.kv_usage == 0.25
    assert set(fleet.engines) == {"card 0", "card 1"}
    before = fleet.engine_totals.generated_tokens
    assert before > 0
    cards.lose("card 0")
    assert set(fleet.engines) == {"card 1"}
    assert fleet.num_slots == 4
    assert fleet.engine_totals.generated_tokens >= before
    for _ in range(4):
        cards.pass_time(1.0)
    assert fleet.engines["card 0"].engine == 1, "it is another one, whose counts begin anew"
    cards.let_run()
    fleet.close(drain=False)


def test_totals_of_engines_only_rise() -> None:
    totals, seen = EngineTotals(), []
    for state in (
        EngineState(prompt_tokens=10, reused_tokens=4, generated_tokens=7),
        EngineState(prompt_tokens=10, reused_tokens=4, generated_tokens=5),  # taken back
        EngineState(prompt_tokens=30, reused_tokens=9, generated_tokens=9),
        EngineState(prompt_tokens=1, generated_tokens=2, engine=1),  # made anew
        EngineState(prompt_tokens=5, reused_tokens=1, generated_tokens=2, engine=2),
    ):
        totals.looked("card 0", state)
        seen.append((totals.prompt_tokens, totals.reused_tokens, totals.generated_tokens))
    assert seen == [(10, 4, 7), (10, 4, 7), (30, 9, 9), (31, 9, 11), (36, 10, 13)]
    totals.looked("card 1", EngineState(generated_tokens=7))
    assert totals.generated_tokens == 20
