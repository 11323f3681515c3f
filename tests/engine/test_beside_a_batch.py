"""Online requests on one card, alone and beside a batch that never ends, in simulated time.

0.02 s a decode step and 0.04 s a chunk. As many slots are kept as there are clients, so that each
request finds one. The batch has more prompts than the card ever takes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from formula_program import FormulaProgram

from qaic_ray.contract import Specialization, Specializations
from qaic_ray.engine.engine import Engine
from qaic_ray.engine.steps import Sequence
from qaic_ray.worker.engine_thread import Backlog

CHUNK_S, DECODE_S = 0.04, 0.02
CHUNK, SLOTS, NUM_TOKENS = 4, 8, 40


@dataclass
class Load:
    """What requests took: seconds to the first token, and between tokens; and rows of the batch."""

    ttft_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    num_late: int = 0


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


def run(*, with_batch: bool, num_clients: int, num_requests: int = 60) -> Load:
    """Each client asks, reads, thinks for a second or so, and asks again; each has a kept slot."""
    now_s, draw, load = 0.0, random.Random(5), Load()
    shapes = (Specialization(1, CHUNK, 64, SLOTS), Specialization(SLOTS, 1, 64, SLOTS))
    program = FormulaProgram(Specializations(shapes), memory=4)
    inner = program.run

    def timed(shape, inputs, meanwhile=None):  # type: ignore[no-untyped-def]
        nonlocal now_s
        now_s += DECODE_S if shape.is_decode else CHUNK_S
        return inner(shape, inputs, meanwhile)

    program.run = timed  # type: ignore[method-assign]
    engine = Engine(program, lambda: now_s, max_stall_s=0.0, prefix_reuse=False)
    engine.batcher.kept_slots = num_clients
    backlog = Backlog()
    ask_s = [draw.expovariate(1.0) for _ in range(num_clients)]
    online: dict[Sequence, list[float]] = {}
    num_asked = 0
    while len(load.ttft_s) < num_requests:
        while min(ask_s) <= now_s:
            num_asked += 1
            row = Sequence(num_asked, tuple(range(6, 6 + CHUNK * draw.randint(1, 3))), NUM_TOKENS)
            online[row] = [min(ask_s)]
            ask_s.remove(min(ask_s))
            ask_s += [float("inf")] * (not ask_s)
            backlog.add([(row, None)])
        while with_batch and len(backlog._background) < SLOTS:
            load.num_late += 1
            prompt = (7,) * draw.randint(CHUNK, 4 * CHUNK)
            key = 10**6 + load.num_late
            backlog.add([(Sequence(key, prompt, NUM_TOKENS, background=True), None)])
        while (waiting := backlog.next_for(engine.batcher)) is not None:
            engine.add(*waiting)
        if not engine.busy:
            now_s = min(ask_s)
            continue
        before = {row: len(row.output_ids) for row in online}
        done = engine.step()
        for row, count in before.items():
            online[row] += [now_s] * (len(row.output_ids) - count)
        for row in {one.sequence for one in done} & online.keys():
            times = online.pop(row)
            load.ttft_s.append(times[1] - times[0])
            load.gap_s += [after - before for before, after in pairwise(times[1:])]
            ask_s = [at_s for at_s in ask_s if at_s < float("inf")]
            ask_s.append(now_s + draw.expovariate(1.0))
    return load


@pytest.mark.parametrize("num_clients", [1, 3])
def test_a_batch_costs_requests_a_chunk_and_a_step_at_most(num_clients: int) -> None:
    alone = run(with_batch=False, num_clients=num_clients)
    beside = run(with_batch=True, num_clients=num_clients)
    for q in (0.5, 0.9, 0.99):
        more_s = quantile(beside.ttft_s, q) - quantile(alone.ttft_s, q)
        assert more_s <= CHUNK_S + DECODE_S + 1e-9, (q, more_s)
    assert quantile(beside.gap_s, 0.5) == pytest.approx(DECODE_S)
    assert max(beside.gap_s) <= CHUNK_S + DECODE_S + 1e-9
    mean_s = sum(beside.gap_s) / len(beside.gap_s)
    assert mean_s <= 1.25 * sum(alone.gap_s) / len(alone.gap_s) + 1e-9, "a fifth is prefill"
    assert beside.num_late > 60, "the batch goes on"
