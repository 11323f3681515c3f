"""Cards that take simulated time, for the driver and the dispatcher: no process, no waiting."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from qaic_ray.dispatch.dispatcher import (
    Event,
    RowsFinished,
    RunShard,
    ShardFinished,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.metrics import Measurement
from qaic_ray.rows import FinishReason, Prompt, Row
from qaic_ray.runs.intake import Batch, ThreadedReader
from qaic_ray.worker.worker import WorkerInfo

STEP_S = 0.02


class DirectReader(ThreadedReader):
    """The input for a driver whose time is simulated: all that is asked for is there at once."""

    def __init__(self, items: Iterable[Prompt | Row]) -> None:
        self.poll_s = 0.02
        self._items = iter(items)
        self._num_wanted = 0

    def ask(self, num_items: int) -> None:
        self._num_wanted = num_items

    def poll(self) -> Batch:
        items: list[Prompt | Row] = []
        try:
            items.extend(islice(self._items, self._num_wanted))
        except UsageError:
            raise
        except QaicRayError as error:
            return Batch(tuple(items), exhausted=True, error=error)
        return Batch(tuple(items), exhausted=len(items) < self._num_wanted)

    def close(self) -> None:
        pass


def answer(prompt: Prompt, worker: str = "", attempt: int = 1) -> Row:
    """The row that every simulated card gives for a prompt."""
    return Row(
        index=prompt.index,
        id=prompt.id,
        prompt=prompt.text,
        text=prompt.text.upper(),
        finish_reason=FinishReason.STOP,
        token_ids=tuple(range(prompt.index % 7 + 1)),
        prompt_tokens=len(prompt.text),
        ttft_s=0.25,
        decode_s=1.0,
        worker=worker,
        attempts=attempt,
    )


def info(name: str, slots: int) -> WorkerInfo:
    return WorkerInfo(name, (int(name.split()[-1]),), "emulated SDK 1.20", slots, 32, 512, 1.5)


@dataclass
class Card:
    """One life of a card: what is queued in it, and what happened to it."""

    incarnation: int
    free: int
    opened_s: float = 0.0
    hung_s: float | None = None
    queue: list[tuple[int, Prompt, int]] = field(default_factory=list)


@dataclass
class SimulatedCards:
    """`len(open_s)` cards of `slots` slots; a row takes `seconds_of(prompt)` in one slot.

    Rows queue in the card in the order they came, as in the engine. `dies(card, prompt)`: starting
    this prompt kills this card; `hangs(card, prompt)`: the card says nothing more. `open_s[i]`
    None: card i cannot be opened. `slowness[card]`: so many times slower. `mean_life_s`: cards die
    at random after so long in the mean, from `seed`. `progress_s`: steps are told so often.
    `answer` makes the row of a prompt, on a card, at an attempt.
    """

    open_s: Sequence[float | None]
    slots: int = 4
    seconds_of: Callable[[Prompt], float] = lambda prompt: 1.0
    dies: Callable[[str, Prompt], bool] = lambda card, prompt: False
    hangs: Callable[[str, Prompt], bool] = lambda card, prompt: False
    slowness: dict[str, float] = field(default_factory=dict)
    mean_life_s: float | None = None
    progress_s: float | None = None
    seed: int = 0
    answer: Callable[[Prompt, str, int], Row] = answer
    now_s: float = 0.0
    ran: list[RunShard] = field(default_factory=list)
    replaced: list[tuple[float, str, int]] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    cancelled: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = tuple(f"card {i}" for i in range(len(self.open_s)))
        self.busy_s = dict.fromkeys(self.names, 0.0)
        self.lives_lost = dict.fromkeys(self.names, 0)
        self._random = random.Random(self.seed)
        self._heap: list[tuple[float, int, int, Event]] = []
        self._count = 0
        self._cards: dict[str, Card] = {}
        self._left: dict[int, int] = {}
        for name in self.names:
            self._open(name, 0)

    def clock(self) -> float:
        return self.now_s

    def wait(self, timeout_s: float | None = None) -> Event | None:
        while self._heap:
            time_s, _, incarnation, event = self._heap[0]
            worker = getattr(event, "worker", "")
            card = self._cards.get(worker)
            if card is None or card.incarnation != incarnation or self._is_mute(card, event):
                heapq.heappop(self._heap)
                continue
            if timeout_s is not None and time_s > self.now_s + timeout_s:
                break
            heapq.heappop(self._heap)
            self.now_s = max(self.now_s, time_s)
            return self._happened(card, worker, event)
        assert timeout_s is not None, "nothing will ever be heard"
        self.now_s += timeout_s
        return None

    def wake(self) -> None:
        """Nobody waits: time is simulated."""

    def run(self, shard: RunShard) -> None:
        card = self._cards[shard.worker]
        self.ran.append(shard)
        self._left[shard.shard_id] = len(shard.prompts)
        card.queue += [(shard.shard_id, p, shard.attempt) for p in shard.prompts]
        self._fill(shard.worker, card)

    def cancel(self, worker: str, indexes: Sequence[int]) -> None:
        # Its rows come all the same: the driver must not take them.
        self.cancelled.append((worker, tuple(indexes)))

    def retire(self, worker: str) -> None:
        self._cards.pop(worker, None)

    def replace(self, worker: str, incarnation: int) -> None:
        assert worker not in self.quarantined
        self.replaced.append((self.now_s, worker, incarnation))
        self._open(worker, incarnation)

    def quarantine(self, worker: str, error: str) -> None:
        self.retire(worker)
        self.quarantined[worker] = error

    def info(self, worker: str) -> WorkerInfo:
        return info(worker, self.slots)

    def measurements(self) -> dict[str, Measurement]:
        # The engine's own row counts are wrong on purpose: the driver must not take them.
        return {
            name: Measurement(rows=999, decode_steps=3, decode_tokens=10, decode_s=2.0)
            for name in self._cards
        }

    def _open(self, name: str, incarnation: int) -> None:
        self._cards[name] = Card(incarnation, self.slots)
        open_s = self.open_s[self.names.index(name)]
        if open_s is None:
            self._later(1.0, WorkerLost(name, "DeviceError: no", incarnation))
        else:
            self._later(open_s, WorkerReady(name, self.slots, incarnation))

    def _is_mute(self, card: Card, event: Event) -> bool:
        return card.hung_s is not None and not isinstance(event, WorkerLost | WorkerProgress)

    def _happened(self, card: Card, worker: str, event: Event) -> Event:
        match event:
            case WorkerLost():
                del self._cards[worker]
                self.lives_lost[worker] += 1
            case WorkerReady():
                card.opened_s = self.now_s
                self._tell_progress(worker, card, 0.0)
                if self.mean_life_s is not None:
                    life_s = self._random.expovariate(1 / self.mean_life_s)
                    self._later(life_s, WorkerLost(worker, "ActorDiedError: age", card.incarnation))
            case WorkerProgress():
                self._tell_progress(worker, card, self.progress_s or 0.0)
            case RowsFinished(shard_id=shard_id):
                card.free += 1
                self._left[shard_id] -= 1
                if not self._left[shard_id]:
                    self._later(0.0, ShardFinished(worker, shard_id))
                self._fill(worker, card)
        return event

    def _tell_progress(self, worker: str, card: Card, after_s: float) -> None:
        if self.progress_s is not None:
            until_s = self.now_s + after_s if card.hung_s is None else card.hung_s
            step_s = STEP_S * self.slowness.get(worker, 1.0)
            num_steps = int((until_s - card.opened_s) / step_s)
            self._later(after_s, WorkerProgress(worker, num_steps, card.incarnation))

    def _fill(self, worker: str, card: Card) -> None:
        while card.free and card.queue and card.hung_s is None:
            shard_id, prompt, attempt = card.queue.pop(0)
            if self.dies(worker, prompt):
                self._later(0.0, WorkerLost(worker, "ActorDiedError: killed", card.incarnation))
                card.hung_s = self.now_s
                return
            if self.hangs(worker, prompt):
                card.hung_s = self.now_s
                return
            card.free -= 1
            seconds = self.seconds_of(prompt) * self.slowness.get(worker, 1.0)
            self.busy_s[worker] += seconds
            row = self.answer(prompt, worker, attempt)
            self._later(seconds, RowsFinished(worker, shard_id, (row,)))

    def _later(self, seconds: float, event: Event) -> None:
        self._count += 1
        incarnation = self._cards[getattr(event, "worker", "")].incarnation
        heapq.heappush(self._heap, (self.now_s + seconds, self._count, incarnation, event))
