"""How much work a prompt is, and what a worker is given at once. Keeps nothing, knows no time."""

from __future__ import annotations

import math

from qaic_ray.dispatch.prompts import MAX_SHARDS, PromptTable
from qaic_ray.dispatch.waiting import OpenPrompt, Size, Waiting
from qaic_ray.dispatch.worker_pool import WorkerPool
from qaic_ray.dispatch.workers import WorkerState, WorkerStatus
from qaic_ray.rows import Prompt
from qaic_ray.sampling_params import SamplingParams

GREEDY = SamplingParams()
READ_AHEAD = 8192
"""Prompts read at once, and how many there are in a band, where the fleet needs no more."""
READ_ROUNDS = 4
"""A read has at least so many prompts for each slot of the fleet."""
AHEAD_ROUNDS = 16
"""At least so many for each slot wait until the input has ended: the longest of them, which go
first then, are done before the end even if a worker dies with them."""
SLOW = 0.67
"""A worker is slow when its slots do less than this part of the fleet's mean."""
SHARD_S = 1.0
"""A full shard is so much of a worker's time; where its speed is not known yet, one round of its
slots."""
MAX_SHARD_PROMPTS = 1024
RETRY_SHRINK = 4
"""Prompts that were on a dying worker go in groups of so many times fewer than it has slots."""
GUIDE = 3
"""Near the end a shard is a worker's share of what is left, divided by this."""
ANSWER_TOKENS = 32
"""Length of an answer whose prompt does not say how long it may be."""
TOKEN_WORK = 32.0
"""Work of one token of an answer, in characters of prompt."""


def text_work(prompt: Prompt, defaults: SamplingParams = GREEDY) -> float:
    """Estimated work of a prompt where nothing better is known, in characters.

    Args:
        defaults: of prompts that bring no parameters of their own.
    """
    if prompt.messages is None:
        length = len(prompt.text)
    else:
        length = sum(len(message.get("content", "")) for message in prompt.messages)
    sampling = prompt.sampling or defaults
    num_tokens = ANSWER_TOKENS if sampling.max_tokens is None else sampling.max_tokens
    return length + TOKEN_WORK * num_tokens * sampling.n


def num_to_read(waiting: Waiting, pool: WorkerPool, read_ahead: int) -> int:
    """How many prompts to read now; 0 while enough of them wait."""
    if waiting.num_grouped > max(read_ahead // 2, AHEAD_ROUNDS * pool.num_slots):
        return 0
    return max(read_ahead, READ_ROUNDS * pool.num_slots)


def much_remains(waiting: Waiting, pool: WorkerPool, *, exhausted: bool) -> bool:
    """Whether it is too early to think of the end."""
    return not exhausted or waiting.num_grouped > 2 * pool.num_slots


def wants_shard(
    worker: WorkerState, table: PromptTable, pool: WorkerPool, *, exhausted: bool
) -> bool:
    """Whether a worker would take one.

    While much remains it fills its slots and its queue; then its slots, up to its share of all open
    prompts where others still open, who will want theirs.
    """
    if worker.state is not WorkerStatus.READY or worker.alone or worker.retry_s is not None:
        return False
    if not worker.shards:
        return True
    if worker.draining or len(worker.shards) == MAX_SHARDS:
        return False
    if not much_remains(table.waiting, pool, exhausted=exhausted):
        share = math.inf
        if pool.num_awaited:
            share = math.ceil(len(table.open) / pool.num_sharing)
        return worker.num_unfinished < min(worker.slots, share)
    # Nothing is queued in a worker of unknown speed: it may be there for long.
    return worker.num_unfinished < worker.slots or worker.queued_work < SHARD_S * worker.work_per_s


def is_slow(worker: WorkerState, pool: WorkerPool) -> bool:
    """Whether a worker is known to be slower than the fleet by much: its steps, or its rows."""
    if worker.step_s is not None:
        return SLOW * worker.step_s > pool.mean_step_s
    return 0 < worker.work_per_s < SLOW * worker.slots * pool.work_per_slot


def take_group(
    worker: WorkerState, waiting: Waiting, pool: WorkerPool, *, exhausted: bool
) -> tuple[list[OpenPrompt], bool]:
    """The prompts of a worker's next shard, none where none fits; whether they must be alone.

    After a failure fresh prompts tell whether the worker is well. Where there are none, those that
    were on a dying worker go alone: what happens then is told of one prompt.
    """
    retried = bool(waiting.retried) and not (worker.failures and waiting.fresh)
    alone = retried and worker.failures > 0
    if not waiting.num_grouped or (alone and worker.shards):
        return [], alone
    size = _shard_size(worker, waiting, pool, exhausted=exhausted, retried=retried)
    queue = waiting.retried if retried else waiting.fresh
    slow = is_slow(worker, pool)
    return waiting.take(queue, (1, 1, 0.0) if alone else size, shortest=slow), alone


def _shard_size(
    worker: WorkerState, waiting: Waiting, pool: WorkerPool, *, exhausted: bool, retried: bool
) -> Size:
    """The size of a worker's next shard, of fresh prompts or of retried ones."""
    least = max(1, worker.slots - worker.num_unfinished)
    most = MAX_SHARD_PROMPTS if worker.work_per_s else least
    work = SHARD_S * worker.work_per_s or math.inf
    if retried:
        most = max(1, worker.slots // RETRY_SHRINK)
    if exhausted:
        least = min(least, math.ceil(waiting.num_grouped / pool.num_sharing))
        work = min(work, waiting.work * pool.part(worker) / GUIDE)
    return least, most, work
