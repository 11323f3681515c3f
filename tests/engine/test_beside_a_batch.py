"""Requests that come at random to one card, alone and beside a batch that never ends, in simulated
time.

A decode step takes 0.02 s and a chunk 0.04 s, of 8 slots one is kept. The batch has more prompts
than the card ever takes.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from formula_program import FormulaProgram

from qaic_ray.contract import Specialization, Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.steps import Sequence
from qaic_ray.worker.engine_thread import Backlog

CHUNK_S, DECODE_S = 0.04, 0.02
SLOTS = 8
THINK_S = 0.1


@dataclass(frozen=True)
class Traffic:
    """What requests and the batch are: chunks of a prompt at most, and tokens of an answer."""

    chunk: int = 4
    chunks: int = 3
    answer: int = 40
    late_chunks: int = 4
    late_answer: int = 40

    @property
    def card_s(self) -> float:
        """Seconds of the whole card that a request takes in the mean."""
        return (1 + self.chunks) / 2 * CHUNK_S + self.answer * DECODE_S / SLOTS


@dataclass
class Load:
    """What requests took: seconds to the first token, and between tokens; and what the batch got.

    `late` are the rows of the batch that ended, `late_tokens` all tokens that it got.
    """

    ttft_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    late: list[Sequence] = field(default_factory=list)
    late_tokens: int = 0
    took_s: float = 0.0

    @property
    def late_rate(self) -> float:
        """Tokens a second of the batch's answers, and of its rows."""
        return self.late_tokens / self.took_s


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


class Card:
    """An engine on simulated time, with what waits for it.

    Args:
        traffic: what comes.
        kept: slots that the batch leaves where it begins.
    """

    def __init__(self, traffic: Traffic, kept: int) -> None:
        self.now_s = 0.0
        shapes = (
            Specialization(1, traffic.chunk, 2048, SLOTS),
            Specialization(SLOTS, 1, 2048, SLOTS),
        )
        program = FormulaProgram(Specializations(shapes), memory=4)
        inner = program.run

        def timed(shape: Specialization, *inputs: Any) -> Any:
            self.now_s += DECODE_S if shape.is_decode else CHUNK_S
            return inner(shape, *inputs)

        program.run = timed  # type: ignore[method-assign]
        self.engine = Engine(program, lambda: self.now_s, max_stall_s=0.0, prefix_reuse=False)
        self.engine.batcher.kept_slots = kept
        self.backlog = Backlog()

    def step(self) -> list[Sequence]:
        while (waiting := self.backlog.next_for(self.engine.batcher)) is not None:
            self.engine.add(*waiting)
        return [done.sequence for done in self.engine.step()]


def run(
    traffic: Traffic,
    share: float,
    *,
    with_batch: bool,
    num_requests: int = 250,
    seed: int = 5,
    kept: int = 1,
) -> Load:
    """Requests at random that take this share of the card; at none the batch is alone.

    Above 1 it is that many clients: each asks, reads, thinks for a moment and asks again.
    """
    card, draw, load = Card(traffic, kept), random.Random(seed), Load()
    other = random.Random(seed + 1)
    num_clients = int(share)
    asks_s = deque(0.0 for _ in range(num_clients))
    for _ in range(num_requests if 0 < share < 1 else 0):
        since_s = asks_s[-1] if asks_s else 0.0
        asks_s.append(since_s + draw.expovariate(share / traffic.card_s))
    num_left = num_requests - len(asks_s) if num_clients else 0
    end_s = 0.0 if share else 60.0
    online: dict[Sequence, list[float]] = {}
    late: set[Sequence] = set()
    num_late = 0
    while card.now_s < end_s or asks_s or online:
        while asks_s and asks_s[0] <= card.now_s:
            length = traffic.chunk * draw.randint(1, traffic.chunks)
            prompt = tuple((7 * len(asks_s) + i) % 50 + 6 for i in range(length))
            row = Sequence(len(asks_s), prompt, traffic.answer)
            online[row] = [asks_s.popleft()]
            card.backlog.add([(row, None)])
        while with_batch and len(card.backlog._background) < SLOTS:
            num_late += 1
            prompt = (7,) * other.randint(traffic.chunk, traffic.late_chunks * traffic.chunk)
            row = Sequence(10**6 + num_late, prompt, traffic.late_answer, background=True)
            late.add(row)
            card.backlog.add([(row, None)])
        if not (card.engine.busy or len(card.backlog)):
            card.now_s = asks_s[0]
            continue
        before = {row: len(row.output_ids) for row in online}
        done = card.step()
        for row, count in before.items():
            online[row] += [card.now_s] * (len(row.output_ids) - count)
        for row in done:
            times = online.pop(row, None)
            if times is None:
                load.late.append(row)
                continue
            load.ttft_s.append(times[1] - times[0])
            load.gap_s += [after - before for before, after in pairwise(times[1:])]
            if num_left:
                num_left -= 1
                asks_s.append(card.now_s + draw.expovariate(1 / THINK_S))
                asks_s = deque(sorted(asks_s))
    load.took_s = card.now_s
    load.late_tokens = sum(len(row.output_ids) for row in late)
    return load


TRAFFIC = {
    "short prompts": Traffic(),
    "long prompts": Traffic(chunk=128, late_chunks=8, late_answer=128, answer=80),
}


SHARES = [0.1, 0.3, 0.5, 0.8, 1, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAFFIC)
@pytest.mark.parametrize("share", SHARES)
def test_a_batch_costs_many_requests_no_more_than_few(kind: str, share: float) -> None:
    check_beside(TRAFFIC[kind], share, num_requests=250)


@pytest.mark.parametrize(
    ("kind", "share", "num_requests"),
    [("short prompts", 0.3, 80), ("long prompts", 0.8, 150), ("long prompts", 1, 30)],
)
def test_a_batch_costs_requests_a_chunk_and_a_step_and_no_time_between_tokens(
    kind: str, share: float, num_requests: int
) -> None:
    check_beside(TRAFFIC[kind], share, num_requests)


def check_beside(traffic: Traffic, share: float, num_requests: int) -> None:
    """The promise, of the 99th percentile and below; and the batch goes on."""
    alone = run(traffic, share, with_batch=False, num_requests=num_requests)
    beside = run(traffic, share, with_batch=True, num_requests=num_requests)
    assert len(alone.ttft_s) == len(beside.ttft_s) == num_requests
    for q in (0.5, 0.9, 0.99):
        more_s = quantile(beside.ttft_s, q) - quantile(alone.ttft_s, q)
        assert more_s <= CHUNK_S + DECODE_S + 1e-9, (q, more_s)
        more = quantile(beside.gap_s, q) / quantile(alone.gap_s, q)
        assert more <= 1.1, (q, more)
    assert max(beside.gap_s) <= CHUNK_S + DECODE_S + 1e-9
    assert len(beside.late) >= max(1, num_requests // 60), "rows of the batch end"
