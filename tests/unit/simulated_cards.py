"""Cards that take simulated time, for the driver and the dispatcher: no process, no waiting."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qaic_ray.fleet.messages import (
    Event,
    RowsFinished,
    RunShard,
    ShardFinished,
    WorkerFailedToOpen,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.fleet.worker import WorkerInfo
from qaic_ray.metrics import Measurement
from qaic_ray.rows import FinishReason, Prompt, Row


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
class SimulatedCards:
    """`len(open_s)` cards of `slots` slots; a row takes `seconds_of(prompt)` in one slot.

    Rows queue in the card in the order they came, as in the engine. `dies(card, prompt)`: starting
    this prompt kills this card. `open_s[i]` None: card i cannot be opened.
    """

    open_s: Sequence[float | None]
    slots: int = 4
    seconds_of: Callable[[Prompt], float] = lambda prompt: 1.0
    dies: Callable[[str, Prompt], bool] = lambda card, prompt: False
    now_s: float = 0.0
    ran: list[RunShard] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = tuple(f"card {i}" for i in range(len(self.open_s)))
        self.busy_s = dict.fromkeys(self.names, 0.0)
        self._heap: list[tuple[float, int, Event]] = []
        self._queue: dict[str, list[tuple[int, Prompt, int]]] = {name: [] for name in self.names}
        self._free = dict.fromkeys(self.names, self.slots)
        self._left: dict[int, int] = {}
        self._gone: set[str] = set()
        for name, open_s in zip(self.names, self.open_s, strict=True):
            if open_s is None:
                self._later(1.0, WorkerFailedToOpen(name, "DeviceError: no"))
            else:
                self._later(open_s, WorkerReady(name, self.slots))

    def clock(self) -> float:
        return self.now_s

    def wait(self) -> Event:
        self.now_s, _, event = heapq.heappop(self._heap)
        worker = getattr(event, "worker", "")
        if worker in self._gone:
            return self.wait()
        if isinstance(event, WorkerLost | WorkerFailedToOpen):
            self._gone.add(worker)
        if isinstance(event, RowsFinished):
            self._free[worker] += 1
            self._left[event.shard_id] -= 1
            if not self._left[event.shard_id]:
                self._later(0.0, ShardFinished(worker, event.shard_id))
            self._fill(worker)
        return event

    def run(self, shard: RunShard) -> None:
        assert shard.worker not in self._gone
        self.ran.append(shard)
        self._left[shard.shard_id] = len(shard.prompts)
        self._queue[shard.worker] += [(shard.shard_id, p, shard.attempt) for p in shard.prompts]
        self._fill(shard.worker)

    def retire(self, worker: str) -> None:
        self._gone.add(worker)

    def info(self, worker: str) -> WorkerInfo:
        return info(worker, self.slots)

    def measurements(self) -> dict[str, Measurement]:
        # The engine's own row counts are wrong on purpose: the driver must not take them.
        return {
            name: Measurement(rows=999, decode_steps=3, decode_tokens=10, decode_s=2.0)
            for name in self.names
            if name not in self._gone
        }

    def _fill(self, worker: str) -> None:
        while self._free[worker] and self._queue[worker]:
            shard_id, prompt, attempt = self._queue[worker].pop(0)
            if self.dies(worker, prompt):
                self._later(0.0, WorkerLost(worker, "ActorDiedError: killed"))
                self._queue[worker].clear()
                return
            self._free[worker] -= 1
            seconds = self.seconds_of(prompt)
            self.busy_s[worker] += seconds
            row = answer(prompt, worker, attempt)
            self._later(seconds, RowsFinished(worker, shard_id, (row,)))

    def _later(self, seconds: float, event: Event) -> None:
        self._count = getattr(self, "_count", 0) + 1
        heapq.heappush(self._heap, (self.now_s + seconds, self._count, event))
