"""What always holds of a dispatcher between two events; whatever fails is a bug of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qaic_ray.dispatch.assignment import Assignment
from qaic_ray.dispatch.dispatcher import Dispatcher
from qaic_ray.dispatch.prompts import OpenPrompt, PromptTable, Shard, WaitingPrompts
from qaic_ray.dispatch.workers import WorkerPool, WorkerStatus


def check(dispatcher: Dispatcher) -> None:
    check_table(dispatcher._table)
    _check_pool(dispatcher._pool)
    if not dispatcher.finished:
        _check_assignment(dispatcher._assignment)
        assert dispatcher.wake_s > dispatcher._now_s, "the driver would never sleep"


def check_table(table: PromptTable) -> None:
    assert table._num_read == len(table.open) + table._num_done
    _check_waiting(table)
    running = [(i, s.id) for s in table.shards.values() for i in s.unfinished]
    assert sorted(running) == sorted(
        (i, shard_id) for i, entry in table.open.items() for shard_id in entry.shard_ids
    ), "a prompt and its shard do not know each other"
    for entry in table.open.values():
        assert len(entry.shard_ids) <= 2, "a prompt runs a third time"
        workers = {table.shards[shard_id].worker.name for shard_id in entry.shard_ids}
        assert len(workers) == len(entry.shard_ids), "a prompt runs twice on one worker"
    for shard in table.shards.values():
        _check_shard(table, shard)


def _check_waiting(table: PromptTable) -> None:
    entries = [entry for entry in table.open.values() if not entry.shard_ids]
    for waiting, is_background in ((table.foreground, False), (table.background, True)):
        _check_urgency(table, waiting, [e for e in entries if e.prompt.background is is_background])


def _check_urgency(
    table: PromptTable, waiting: WaitingPrompts, entries: Sequence[OpenPrompt]
) -> None:
    alone_from = table._policy.alone_from
    grouped = [entry for entry in entries if entry.attempt < alone_from]
    fresh = {e.prompt.index for e in grouped if e.attempt == 1}
    assert {entry.prompt.index for entry in waiting.fresh.entries} == fresh
    retried = {entry.prompt.index for entry in waiting.retried.entries}
    assert retried == {e.prompt.index for e in grouped} - fresh
    assert set(waiting.suspects) == {e.prompt.index for e in entries if e.attempt >= alone_from}
    assert waiting.num_grouped == len(grouped)
    assert len(grouped) == len(waiting.fresh.entries) + len(waiting.retried.entries)
    work = sum(entry.work for entry in grouped)
    assert math.isclose(waiting.work, work, rel_tol=1e-9, abs_tol=1e-3)


def _check_shard(table: PromptTable, shard: Shard) -> None:
    worker, policy = shard.worker, table._policy
    assert shard.id in worker.shards
    assert len(worker.shards) <= policy.max_shards
    assert worker.alone == shard.alone
    entries = [e for i in worker.shards for e in table.shards[i].unfinished.values()]
    assert worker.num_unfinished == len(entries)
    assert worker.taken == sum(entry.num_slots for entry in entries)
    assert worker.lent == sum(entry.num_slots for entry in entries if entry.prompt.background)
    late = [shard.unfinished for shard in map(table.shards.__getitem__, worker.shards)]
    is_late = [{e.prompt.background for e in each.values()} for each in late]
    assert all(len(kinds) <= 1 for kinds in is_late), "background and foreground in one shard"
    if worker.held is not None:
        running = set(worker.held._running)
        assert running == {entry.prompt.index for entry in entries}
        assert len(worker.held._free) == max(0, worker.slots - len(running))
    assert abs(worker.work - sum(entry.work for entry in entries)) < 1e-3
    assert all(entry.attempt == shard.attempt for entry in shard.unfinished.values())
    assert not shard.alone or len(worker.shards) == 1, "a prompt that is to be alone is not"
    assert shard.alone or shard.attempt < policy.alone_from
    assert not shard.alone or len(shard.unfinished) <= 1


def _check_pool(pool: WorkerPool) -> None:
    workers = pool.workers.values()
    recount = WorkerPool(pool._policy)
    for worker in workers:
        recount._count(worker, 1)
    for name in ("num_ready", "_ready_slots", "_num_measured", "_measured_slots", "_num_stepping"):
        assert getattr(pool, name) == getattr(recount, name), name
    assert math.isclose(pool._work_per_s, recount._work_per_s, rel_tol=1e-6, abs_tol=1e-3)
    assert math.isclose(pool._step_s, recount._step_s, rel_tol=1e-6, abs_tol=1e-6)
    assert pool.num_awaited == sum(worker.awaited for worker in workers)
    assert pool.num_draining == sum(worker.draining for worker in workers)
    timed = {name for _, name in pool._timers}
    for worker in workers:
        assert worker.timer_s <= worker.deadline_s(pool.listening_s), "nobody looks at it"
        assert worker.timer_s == math.inf or worker.name in timed
        assert worker.status is WorkerStatus.READY or not worker.shards
        assert worker.shards or not (worker.taken or worker.lent)
        assert worker.held is None or worker.status is WorkerStatus.READY


def _check_assignment(assignment: Assignment) -> None:
    table, pool = assignment._table, assignment._pool
    for worker in pool.workers.values():
        assert worker.requesting == (worker in assignment.requesting)
        if worker.status is WorkerStatus.READY and not worker.shards:
            assert worker.requesting, "nobody will think of an idle worker"
            assert not assignment._num_grouped, "an idle worker, and work"
            for waiting in (table.foreground, table.background):
                suspect = waiting.suspect_for(worker, has_others=len(pool.workers) > 1)
                assert suspect is None, "an idle worker, and a suspect"
