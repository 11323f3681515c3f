"""What runs in the process of an actor: its title, its cards, and its end with its raylet."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import ray._private.worker
import ray._raylet

from qaic_ray.cards.inventory import CARD_RESOURCE
from qaic_ray.cluster.connection import call_for, first_line
from qaic_ray.cluster.monitoring.ray_metrics import record_worker
from qaic_ray.cluster.worker_logs import say
from qaic_ray.timeouts import Timeouts

if TYPE_CHECKING:
    from qaic_ray.worker.worker import CardWorker, WorkerInfo


def chooses_units() -> bool:
    """Whether Ray chooses which cards an actor gets; asked on a node of the cluster.

    The setting is the head's, or a variable of the node's own.
    """
    from ray._private.state import state

    setting = "custom_unit_instance_resources"
    named = os.environ.get(f"RAY_{setting}") or state.get_system_config().get(setting) or ""
    return CARD_RESOURCE in str(named).split(",")


def card_units() -> tuple[int, ...]:
    """The numbers of the cards that Ray gave to this process, an actor's, where Ray chooses."""
    from ray._private.worker import global_worker

    units = global_worker.core_worker.resource_ids().get(CARD_RESOURCE, [])
    return tuple(sorted(int(unit) for unit, _ in units))


def open_worker(worker: CardWorker, timeouts: Timeouts) -> WorkerInfo:
    """Open a worker's cards, in its actor; those whose numbers Ray gave to it, where it chooses."""
    die_with_parent(worker.close, timeouts)
    _title_process(worker.spec.name)
    if worker.spec.metrics:
        record_worker(worker)
    choices = worker.spec.choices
    chosen = tuple(choices[unit] for unit in card_units()) if choices else worker.spec.device_ids
    say(f"{worker.spec.name}: process {os.getpid()} opens device {', '.join(map(str, chosen))}")
    try:
        info = worker.open(chosen) if choices else worker.open()
    except Exception as error:
        say(f"{worker.spec.name}: {said_by(error)}")
        raise
    say(f"{worker.spec.name}: ready after {info.load_s:.1f} s, {info.slots} slots")
    return info


def _title_process(name: str) -> None:
    """Have `ps` and the dashboard call this process, an actor's, by its card.

    Ray would name it by its class, and by each call while that runs.
    """

    @contextmanager
    def titled(*_: object) -> Iterator[None]:
        ray._raylet.setproctitle(f"ray::{name}")
        yield

    ray._private.worker._changeproctitle = titled


def die_with_parent(close: Callable[[], object], timeouts: Timeouts) -> None:
    """End this process, an actor's, with the raylet that started it: it holds cards.

    Ray itself ends such a process only when the cluster's head has missed the raylet for a while.

    Args:
        close: gives the cards back; may hang.
        timeouts: `parent_s` and `close_s` are used.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(timeouts.parent_s)
        call_for(timeouts.close_s, close)
        os._exit(1)

    threading.Thread(target=watch, name="watch raylet", daemon=True).start()


def said_by(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
