"""The product's own dispatcher over fleets that do not exist: makespan, CPU a prompt, memory.

`python benchmarks/fleet_simulation.py` runs 8, 32 and 400 simulated cards;
`--cards 8000 --prompts 10000000` is 1,000 DL2q instances, and takes a quarter of an hour. Prints a
table, and one JSON list as its last line. No Ray, no card, no text: a discrete-event simulation of
rows.

The model. A card runs `SLOTS` rows at a time, one decode step for all of them in `STEP_S`; a row
takes one step of prefill and one for each token of its answer, whatever else runs. Rows begin in
the order they came, as in the engine. Each row says how long its answer may be (`max_tokens`,
Pareto with shape 1.5 between 64 and 1,024): the dispatcher knows this and nothing else. One row in
two runs to that length, the others end at a point drawn uniformly before it. With `--blind` no row
says anything. Rows are told one by one; steps are told every 10 s for each card.

The trouble. Every card dies at random, once in `--mean-life` seconds; what it held is lost, and it
is open again after 20 s. One card in 1,000 dies for good, one in 1,000 hangs once, and one in 100
runs at a third of its speed. The ideal is all work over all slots at full speed as if nothing had
died, or the longest row if that is more; work done twice counts once. `ideal with losses` takes the
seconds of dead and slow cards off the capacity.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import resource
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

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
    ShardFinished,
    TimePassed,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.sampling_params import SamplingParams

SLOTS = 8
STEP_S = 0.02
OPEN_S = 20.0
POLL_S = 10.0
SHORTEST, LONGEST, SHAPE = 64, 1024, 1.5
LIMITS = [SamplingParams(max_tokens=num) for num in range(LONGEST + 1) if num]


@dataclass(slots=True)
class Card:
    """One simulated card. `life` is its incarnation, -1 between two."""

    name: str
    step_s: float = STEP_S
    life: int = 0
    free: int = SLOTS
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    left: dict[int, int] = field(default_factory=dict)
    opened_s: float = 0.0
    down_since_s: float | None = None
    hung: bool = False
    broken: bool = False


@dataclass
class Outcome:
    """What one simulation came to; times in simulated seconds unless they are CPU."""

    cards: int
    prompts: int
    makespan_s: float
    ideal_s: float
    ideal_with_losses_s: float
    deaths: int
    quarantined: int
    error_rows: int
    second_runs: int
    dispatcher_us_per_prompt: float
    events: int
    wall_s: float
    peak_rss_mb: float

    @property
    def efficiency(self) -> float:
        """Ideal over real."""
        return self.ideal_s / self.makespan_s


class Simulation:
    """Cards, an input and a clock around one dispatcher."""

    def __init__(
        self, num_cards: int, num_prompts: int, *, mean_life_s: float, blind: bool, seed: int
    ) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.dispatcher = Dispatcher()
        self.cards = {f"card {i}": Card(f"card {i}") for i in range(num_cards)}
        self.num_prompts, self.blind = num_prompts, blind
        self.mean_life_s = mean_life_s
        self.prompts = self._input()
        # By index while the prompt is open: steps that its answer takes.
        self.steps: dict[int, int] = {}
        self.work_s, self.longest_s, self.lost_s = 0.0, 0.0, 0.0
        self.num_done = self.num_errors = self.num_begun = self.num_deaths = self.num_events = 0
        self.dispatcher_s = 0.0
        # (when, number, what happens, card, its life, shard and index)
        self.heap: list[tuple[float, int, str, Card, int, int, int]] = []
        self.num_scheduled = 0
        self.num_quarantined = 0

    def run(self) -> Outcome:
        """Until every row is there."""
        start_s = time.monotonic()
        names = list(self.cards)
        for name in self.random.sample(names, len(names) // 100):
            self.cards[name].step_s = 3 * STEP_S
        self.tell(RunStarted(tuple(names)))
        for card in self.cards.values():
            self.tell(WorkerReady(card.name, SLOTS, 0))
            self._poll(card)
        self._schedule_trouble(names)
        while not self.dispatcher.finished:
            self.step()
        return self._outcome(time.monotonic() - start_s)

    def step(self) -> None:
        """The next thing that happens."""
        if self.dispatcher.wake_s < self.heap[0][0]:
            self.now_s = max(self.now_s, self.dispatcher.wake_s)
            self.tell(TimePassed())
            return
        time_s, _, what, card, life, shard_id, index = heapq.heappop(self.heap)
        if what == "death":
            self.now_s = time_s
            self._schedule_death()
            self._die(card)
            return
        if life != card.life:
            return
        self.now_s = time_s
        if what == "row" and not card.hung:
            self._finish_row(card, shard_id, index)
        elif what == "open":
            self._opened(card)
        elif what == "poll":
            self._poll(card)
        elif what == "hang":
            card.hung = True
        elif what == "break":
            card.broken = True
            self._die(card)

    # -- what cards do

    def _finish_row(self, card: Card, shard_id: int, index: int) -> None:
        card.free += 1
        row = Row(index, "", "", FinishReason.LENGTH, worker=card.name)
        self.tell(RowsFinished(card.name, shard_id, (row,)))
        card.left[shard_id] -= 1
        self._fill(card)
        if not card.left[shard_id]:
            del card.left[shard_id]
            self.tell(ShardFinished(card.name, shard_id))

    def _fill(self, card: Card) -> None:
        while card.free and card.queue and not card.hung:
            shard_id, index = card.queue.popleft()
            card.free -= 1
            self.num_begun += 1
            steps = 1 + self.steps.get(index, LONGEST)  # done already: nobody knows, so the worst
            self.later(steps * card.step_s, "row", card, (shard_id, index))

    def _die(self, card: Card) -> None:
        if card.life < 0 or card.down_since_s is not None:
            return
        self.num_deaths += 1
        life = card.life
        self._end(card)
        self.tell(WorkerLost(card.name, "died", life))

    def _end(self, card: Card) -> None:
        card.life, card.free = -1, SLOTS
        card.queue.clear()
        card.left.clear()
        if card.down_since_s is None:
            card.down_since_s = self.now_s

    def _opened(self, card: Card) -> None:
        if card.broken:
            life, card.life = card.life, -1
            self.tell(WorkerLost(card.name, "broken", life))
            return
        assert card.down_since_s is not None
        self.lost_s += self.now_s - card.down_since_s
        card.down_since_s, card.hung, card.opened_s = None, False, self.now_s
        self.tell(WorkerReady(card.name, SLOTS, card.life))
        self._poll(card)

    def _poll(self, card: Card) -> None:
        if not card.hung:
            num_steps = int((self.now_s - card.opened_s) / card.step_s)
            self.tell(WorkerProgress(card.name, num_steps, card.life))
        self.later(POLL_S, "poll", card)

    def _schedule_trouble(self, names: list[str]) -> None:
        few = max(1, len(names) // 1000) if len(names) > 100 else 0
        expected_s = self.num_prompts * 2.3 / (SLOTS * len(names))
        for what in ("hang", "break"):
            for name in self.random.sample(names, few):
                self.later(self.random.uniform(0, expected_s), what, self.cards[name])
        self.names = names
        self._schedule_death()

    def _schedule_death(self) -> None:
        if math.isfinite(self.mean_life_s):
            after_s = self.random.expovariate(len(self.names) / self.mean_life_s)
            self.later(after_s, "death", self.cards[self.random.choice(self.names)])

    def later(self, seconds: float, what: str, card: Card, row: tuple[int, int] = (0, 0)) -> None:
        """Let something happen to this life of a card."""
        self.num_scheduled += 1
        entry = (self.now_s + seconds, self.num_scheduled, what, card, card.life, *row)
        heapq.heappush(self.heap, entry)

    # -- what the dispatcher hears and orders

    def tell(self, event: Event) -> None:
        """Hand an event over, and obey."""
        start_s = time.thread_time()
        commands = self.dispatcher.handle(event, self.now_s)
        self.dispatcher_s += time.thread_time() - start_s
        self.num_events += 1
        for command in commands:
            self.obey(command)

    def obey(self, command: Command) -> None:
        """Do what was ordered."""
        match command:
            case RunShard(name, shard_id, prompts):
                card = self.cards[name]
                card.left[shard_id] = len(prompts)
                card.queue.extend((shard_id, prompt.index) for prompt in prompts)
                self._fill(card)
            case DeliverRows(rows):
                for row in rows:
                    del self.steps[row.index]  # a row that comes twice fails here
                    self.num_errors += not row.ok
                self.num_done += len(rows)
            case ReadPrompts(num):
                prompts = tuple(prompt for _, prompt in zip(range(num), self.prompts, strict=False))
                self.tell(PromptsRead(prompts, exhausted=len(prompts) < num))
            case ReplaceWorker(name, incarnation):
                card = self.cards[name]
                self._end(card)
                card.life = incarnation
                self.later(OPEN_S, "open", card)
            case RetireWorker(name):
                self._end(self.cards[name])
            case QuarantineWorker(name):
                self._end(self.cards[name])
                self.num_quarantined += 1

    def _input(self) -> Iterator[Prompt]:
        for index in range(self.num_prompts):
            limit = min(LONGEST, int(SHORTEST * self.random.paretovariate(SHAPE)))
            steps = limit if self.random.random() < 0.5 else self.random.randint(1, limit)
            self.steps[index] = steps
            row_s = (1 + steps) * STEP_S
            self.work_s += row_s
            self.longest_s = max(self.longest_s, row_s)
            yield Prompt(index, "", sampling=None if self.blind else LIMITS[limit - 1])

    def _outcome(self, wall_s: float) -> Outcome:
        assert self.num_done == self.num_prompts
        assert not self.steps
        slots = SLOTS * len(self.cards)
        for card in self.cards.values():
            if card.down_since_s is not None:
                self.lost_s += self.now_s - card.down_since_s
            self.lost_s += self.now_s * (1 - STEP_S / card.step_s)
        lost = self.lost_s / (self.now_s * len(self.cards))
        return Outcome(
            cards=len(self.cards),
            prompts=self.num_prompts,
            makespan_s=self.now_s,
            ideal_s=max(self.work_s / slots, self.longest_s),
            ideal_with_losses_s=max(self.work_s / slots / (1 - lost), self.longest_s),
            deaths=self.num_deaths,
            quarantined=self.num_quarantined,
            error_rows=self.num_errors,
            second_runs=self.num_begun - self.num_prompts,
            dispatcher_us_per_prompt=self.dispatcher_s / self.num_prompts * 1e6,
            events=self.num_events,
            wall_s=wall_s,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )


def show(outcomes: list[Outcome]) -> None:
    """A table for people and a line for programs."""
    table = Table(title=f"{SLOTS} slots a card, {1000 * STEP_S:.0f} ms a step, simulated time")
    rows = [
        ("cards", lambda o: f"{o.cards:,}"),
        ("prompts", lambda o: f"{o.prompts:,}"),
        ("ideal s", lambda o: f"{o.ideal_s:.1f}"),
        ("ideal with losses s", lambda o: f"{o.ideal_with_losses_s:.1f}"),
        ("makespan s", lambda o: f"{o.makespan_s:.1f}"),
        ("ideal / makespan", lambda o: f"{o.efficiency:.2%}"),
        ("deaths", lambda o: f"{o.deaths:,}"),
        ("given up", lambda o: f"{o.quarantined:,}"),
        ("error rows", lambda o: f"{o.error_rows:,}"),
        ("rows begun again", lambda o: f"{o.second_runs:,}"),
        ("dispatcher us a prompt", lambda o: f"{o.dispatcher_us_per_prompt:.1f}"),
        ("peak memory MB", lambda o: f"{o.peak_rss_mb:,.0f}"),
        ("wall s", lambda o: f"{o.wall_s:.1f}"),
    ]
    table.add_column("")
    for _ in outcomes:
        table.add_column(justify="right")
    for name, text in rows:
        table.add_row(name, *map(text, outcomes))
    Console().print(table)
    print(json.dumps([vars(o) | {"efficiency": round(o.efficiency, 4)} for o in outcomes]))


def main() -> None:
    """Run the fleets and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cards", type=int, help="one fleet of so many cards")
    parser.add_argument("--prompts", type=int, default=None, help="default: 150 a slot")
    parser.add_argument("--mean-life", type=float, default=21600.0, help="seconds; 0: for ever")
    parser.add_argument("--blind", action="store_true", help="no row says how long it may be")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fleets = [arguments.cards] if arguments.cards else [8, 32, 400]
    outcomes = []
    for num_cards in fleets:
        # Of the small ones nothing dies: they are the bound of 3 % on about 30 s of work.
        small = num_cards <= 32 and not arguments.cards
        num_prompts = arguments.prompts or SLOTS * num_cards * (16 if small else 150)
        simulation = Simulation(
            num_cards,
            num_prompts,
            mean_life_s=math.inf if small else arguments.mean_life or math.inf,
            blind=arguments.blind,
            seed=arguments.seed,
        )
        outcomes.append(simulation.run())
    show(outcomes)


if __name__ == "__main__":
    main()
