"""What becomes of a worker that dies, hangs or gives all its rows: on real actors."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from fake_worker import IMPATIENT, OF_SILENCE, FakeSpec, FakeWorker, specs

from qaic_ray.cards.lease import Part
from qaic_ray.cluster.actor_process import chooses_units
from qaic_ray.cluster.actors import CardActors, cards_needed
from qaic_ray.cluster.cluster import Cluster
from qaic_ray.dispatch.dispatcher import (
    Event,
    RowsFinished,
    RunShard,
    ShardFinished,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.dispatch.policy import Policy
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience
from qaic_ray.worker.worker import WorkerInfo

pytestmark = pytest.mark.cluster


def texts(*texts: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(i, text) for i, text in enumerate(texts))


def actors_of(*cards: FakeSpec) -> CardActors:
    return CardActors(cards, FakeWorker)  # type: ignore[arg-type]


def events_until(actors: CardActors, kind: type[Any], timeout_s: float = 60.0) -> Iterator[Event]:
    """What is heard, up to the first of a kind; the steps of engines are left out."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        event = actors.wait(max(0.0, deadline_s - time.monotonic()))
        assert event is not None, f"no {kind.__name__} in time"
        if kind is WorkerProgress or not isinstance(event, WorkerProgress):
            yield event
        if isinstance(event, kind):
            return


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll, because nothing tells us."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.05)


def last(events: Iterator[Event]) -> Any:
    return list(events)[-1]


# -- the actors alone


def test_the_life_of_a_worker_and_its_rows(cluster: Cluster) -> None:
    with actors_of(*specs(1, row_s=0.2)) as cards:
        assert last(events_until(cards, WorkerReady)) == WorkerReady("card 0", 4, 0)
        assert cards.wait(60) == WorkerProgress("card 0", 0, 0)
        cards.run(RunShard("card 0", 5, texts(*"abcdefghij"), 1))
        events = list(events_until(cards, ShardFinished))
        rows = [row.index for event in events if isinstance(event, RowsFinished)
                for row in event.rows]  # fmt: skip
        assert rows == list(range(10))
        assert last(events_until(cards, WorkerProgress)).num_steps > 0


def test_nothing_is_heard_of_a_worker_that_was_replaced(cluster: Cluster) -> None:
    with actors_of(*specs(1, row_s=0.05)) as cards:
        last(events_until(cards, WorkerReady))
        pid = cards.info("card 0").pid
        cards.run(RunShard("card 0", 1, texts(*["again"] * 100), 1))
        last(events_until(cards, RowsFinished))
        cards.replace("card 0", 3)
        assert list(events_until(cards, WorkerReady)) == [WorkerReady("card 0", 4, 3)]
        assert cards.info("card 0").pid != pid
        os.kill(cards.info("card 0").pid, signal.SIGKILL)
        lost = last(events_until(cards, WorkerLost))  # by the question for its steps
        assert (lost.worker, lost.incarnation) == ("card 0", 3)
        assert lost.error.startswith("its process died (ActorDiedError: ")
        cards.quarantine("card 0", lost.error)
        assert cards.wait(0.0) is None


def test_a_worker_on_a_node_that_is_gone_cannot_open(cluster: Cluster) -> None:
    with actors_of(FakeSpec("card 0", (0,), node_id="ab" * 28)) as cards:
        event = last(events_until(cards, WorkerLost))
    assert event.error.startswith("its node is gone (ActorUnschedulableError: ")


def test_what_a_worker_takes_of_its_node() -> None:
    assert cards_needed(FakeSpec("", (0, 1, 2, 3))) == 4  # type: ignore[arg-type]
    for count in range(2, 15):
        share = cards_needed(FakeSpec("", (0,), part=Part(1, count)))  # type: ignore[arg-type]
        assert 0.9 < share * count <= 1


def test_cards_that_ray_chooses_are_reported_by_who_got_them(cluster: Cluster) -> None:
    assert ray.get(ray.remote(chooses_units).remote())
    cards = [
        *(FakeSpec(f"worker {i}", (i,), choices=(10, 11, 12, 13)) for i in (0, 1)),
        FakeSpec("worker 2", (2, 3), choices=(10, 11, 12, 13)),
    ]
    with actors_of(*cards) as opened:
        for _ in cards:
            last(events_until(opened, WorkerReady))
        got = [opened.info(spec.name).device_ids for spec in cards]
    assert [len(ids) for ids in got] == [1, 1, 2]
    assert sorted(device_id for ids in got for device_id in ids) == [10, 11, 12, 13]


# -- runs


def run(
    cluster: Cluster,
    prompts: tuple[Prompt, ...],
    cards: list[FakeSpec],
    policy: Policy = IMPATIENT,
    **audience: Any,
) -> tuple[Any, list[Row]]:
    rows: list[Row] = []
    result = cluster.run_prompts(
        prompts,
        cards,  # type: ignore[arg-type]
        worker_class=FakeWorker,  # type: ignore[arg-type]
        policy=policy,
        audience=Audience(on_row=rows.append, **audience),
    )
    assert [row.index for row in rows] == list(range(len(prompts)))
    assert [row.text for row in rows] == [prompt.text[::-1] for prompt in prompts]
    return result, rows


def test_an_only_card_that_dies_is_opened_again(cluster: Cluster) -> None:
    infos: list[WorkerInfo] = []
    prompts = texts(*"abcd", "die", *"efgh")
    result, rows = run(cluster, prompts, specs(1, well_from=1), on_worker_ready=infos.append)
    assert result.ok
    assert [info.name for info in infos] == ["card 0", "card 0"]
    assert infos[0].pid != infos[1].pid
    assert result.settings == {
        "min_backoff_s": 0.1,
        "min_stall_s": 60.0,
        "steps_s": 0.3,
    }
    (worker,) = result.workers
    assert (worker.losses, worker.ready_at_end) == (1, True)
    assert rows[4].attempts == 2


def test_a_process_that_hangs_is_ended_and_replaced(cluster: Cluster) -> None:
    infos: list[WorkerInfo] = []
    prompts = texts(*("stop" if i == 20 else f"prompt {i}" for i in range(40)))
    cards = specs(1, row_s=0.05, well_from=1)
    result, rows = run(cluster, prompts, cards, OF_SILENCE, on_worker_ready=infos.append)
    assert result.ok
    assert "made no step for" in (result.workers[0].error or "")
    assert max(row.attempts for row in rows) == 2
    pids = [info.pid for info in infos]
    assert len(pids) == 2
    until(lambda: not os.path.exists(f"/proc/{pids[0]}"))  # a stopped process is killed too


def test_two_jobs_share_one_cluster(cluster: Cluster) -> None:
    begun = threading.Event()
    told: list[str] = []
    first = threading.Thread(
        target=lambda: run(
            cluster,
            texts(*"abcdefghijkl"),
            specs(3, row_s=0.2),
            on_worker_ready=lambda _: begun.set(),
        )
    )
    first.start()
    assert begun.wait(60)
    result = cluster.run_prompts(
        texts(*"abc"),
        specs(2),  # type: ignore[arg-type]
        worker_class=FakeWorker,  # type: ignore[arg-type]
        policy=IMPATIENT,
        audience=Audience(on_wait=told.append),
    )
    first.join()
    assert result.ok
    assert told == [
        "2 cards are asked for and 1 of them are held by others: waiting for up to 20 s."
    ]
