"""One Ray actor for each card: begins shards, and tells what becomes of them as events.

Ray's own restarts and retries are off: a failure is an event, and `dispatch.py` decides. Knows
nothing of where the cluster came from.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions as ray_errors

from qaic_ray.errors import DeviceError, QaicRayError, UsageError
from qaic_ray.fleet.dispatch import SHARDS_IN_FLIGHT
from qaic_ray.fleet.messages import (
    Event,
    RowsFinished,
    RunShard,
    ShardFailed,
    ShardFinished,
    WorkerFailedToOpen,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.metrics import Measurement

if TYPE_CHECKING:
    from qaic_ray.fleet.worker import CardWorker, WorkerInfo, WorkerSpec

CARD_RESOURCE = "QAIC"
"""One unit of this Ray resource is one card."""
CARD_CPUS = 0.1
"""The least an actor asks of its node, so that a node with few cores still holds all its cards. Ray
sets OMP_NUM_THREADS to what is asked, or to 1, and that is what an emulated card computes with."""
CONTROL_GROUP = "control"

_CLOSE_TIMEOUT_S = 10.0


class CardActors:
    """The driver's `Cards`, each an actor that is named for its worker and holds its cards."""

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        worker_class: type[CardWorker],
        *,
        num_cpus: float = CARD_CPUS,
    ) -> None:
        self.names = tuple(spec.name for spec in specs)
        self._infos: dict[str, WorkerInfo] = {}
        # In flight: what Ray will hear of -> (worker, shard); the shard is None while it opens.
        self._in_flight: dict[Any, tuple[str, int | None]] = {}
        self._actors: dict[str, Any] = {}
        actor_class = ray.remote(concurrency_groups={CONTROL_GROUP: 1})(worker_class)
        namespace = f"qaic-ray-{uuid.uuid4().hex}"  # names are unique in a namespace
        for spec in specs:
            actor = actor_class.options(
                name=spec.name,
                namespace=namespace,
                num_cpus=num_cpus,
                resources={CARD_RESOURCE: len(spec.device_ids)},
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=SHARDS_IN_FLIGHT,
            ).remote(spec)
            self._actors[spec.name] = actor
            self._in_flight[actor.open.options(name=f"open {spec.name}").remote()] = (
                spec.name,
                None,
            )

    def __enter__(self) -> CardActors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            closing = [_control(self._actors[name].close) for name in self._open_names()]
            _wait_all(closing, _CLOSE_TIMEOUT_S)
        for actor in self._actors.values():
            ray.kill(actor)

    def wait(self) -> Event:
        """Block until a worker has something to say, and return it.

        Raises:
            UsageError: a worker found that the request itself is wrong; and whatever else a worker
                raised on opening that is not the card's fault.
        """
        (ref, *_), _ = ray.wait(list(self._in_flight), num_returns=1)
        worker, shard_id = self._in_flight.pop(ref)
        return self._opened(ref, worker) if shard_id is None else self._rows(ref, worker, shard_id)

    def _opened(self, ref: Any, worker: str) -> Event:
        try:
            self._infos[worker] = ray.get(ref)
        except ray_errors.RayTaskError as error:
            if not isinstance(error.cause, DeviceError):
                raise error.cause from error
            self.retire(worker)
            return WorkerFailedToOpen(worker, _text(error.cause))
        except ray_errors.RayError as error:
            if getattr(error, "actor_init_failed", False):  # it does nothing that could fail there
                raise UsageError(
                    f"The actor of {worker} cannot be made on its node "
                    f"({str(error).splitlines()[-1]}): the whole cluster needs the same qaic-ray."
                ) from error
            self.retire(worker)
            return WorkerFailedToOpen(worker, _text(error))
        return WorkerReady(worker, self._infos[worker].slots)

    def _rows(self, ref: Any, worker: str, shard_id: int) -> Event:
        try:
            rows = tuple(ray.get(next(ref)))
        except StopIteration:
            return ShardFinished(worker, shard_id)
        except ray_errors.RayTaskError as error:
            retryable = isinstance(error.cause, QaicRayError) and error.cause.retryable
            return ShardFailed(worker, shard_id, _text(error.cause), retryable)
        except ray_errors.RayError as error:  # of the actor's process, its node, its objects
            self.retire(worker)
            return WorkerLost(worker, _text(error))
        self._in_flight[ref] = (worker, shard_id)  # at the end: every worker gets its turn
        return RowsFinished(worker, shard_id, rows)

    def run(self, shard: RunShard) -> None:
        """Begin a shard; its rows are heard as they finish."""
        answer = self._actors[shard.worker].answer.options(
            num_returns="streaming", name=f"shard {shard.shard_id} on {shard.worker}"
        )
        ref = answer.remote(shard.prompts, shard.attempt)
        self._in_flight[ref] = (shard.worker, shard.shard_id)

    def retire(self, worker: str) -> None:
        """End a worker's process; nothing more is heard of it."""
        ray.kill(self._actors.pop(worker))
        self._in_flight = {
            ref: place for ref, place in self._in_flight.items() if place[0] != worker
        }

    def info(self, worker: str) -> WorkerInfo:
        """What a worker that is ready has."""
        return self._infos[worker]

    def measurements(self) -> dict[str, Measurement]:
        """The work of every worker that is open; one that dies on the question is left out."""
        refs = {_control(self._actors[name].measurement): name for name in self._open_names()}
        found: dict[str, Measurement] = {}
        for ref in _wait_all(list(refs), _CLOSE_TIMEOUT_S):
            try:
                found[refs[ref]] = ray.get(ref)
            except ray_errors.RayActorError:
                continue
        return found

    def _open_names(self) -> list[str]:
        return [name for name in self._actors if name in self._infos]


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _control(method: Any) -> Any:
    """Call an actor's method past its shards."""
    return method.options(concurrency_group=CONTROL_GROUP).remote()


def _wait_all(refs: list[Any], timeout_s: float) -> list[Any]:
    return ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0] if refs else []


def first_line(error: BaseException) -> str:
    """What Ray says, without the page that follows."""
    return next(iter(str(error).splitlines()), type(error).__name__)
