"""One Ray actor for each worker: starts shards on it, and returns what happens as events.

Ray's own restarts and retries are off: a failure is an event, and the dispatcher decides. An actor
that died is not restarted; `replace` creates another one with the same name in the dashboard.
"""

from __future__ import annotations

import math
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
import ray.exceptions as ray_errors
from ray import ObjectRef, ObjectRefGenerator
from ray.actor import ActorHandle, ActorMethod
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qaic_ray.cards.inventory import CARD_RESOURCE
from qaic_ray.cluster.actor_process import open_worker, said_by
from qaic_ray.cluster.connection import CARD_CPUS, call_for
from qaic_ray.cluster.losses import loss
from qaic_ray.cluster.ready_refs import ReadyRefs
from qaic_ray.dispatch.dispatcher import (
    Event,
    RowsFinished,
    RunShard,
    ShardFailed,
    ShardFinished,
    TokensGenerated,
    WorkerLost,
    WorkerProgress,
    WorkerReady,
)
from qaic_ray.dispatch.policy import DEFAULT_POLICY, Policy
from qaic_ray.errors import ClusterLost, DeviceError, UsageError
from qaic_ray.metrics import Measurement
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts

if TYPE_CHECKING:
    from qaic_ray.cards.lease import Part
    from qaic_ray.worker.worker import CardWorker, WorkerInfo, WorkerSpec

CONTROL_GROUP = "control"
TOKENS_GROUP = "tokens"
TOKEN_MESSAGES = 2
"""Messages of tokens that a worker may be ahead of the driver; what comes then is in the next."""
MAX_ASKED_PER_S = 100
"""Workers that are asked for their steps in a second; with many, each is asked less often."""

# Ray counts in ten thousandths.
_RESOURCE_STEPS = 10_000


_Call: TypeAlias = ObjectRef | ObjectRefGenerator
_Returned = Callable[[Any], Event | None]
"""Makes the event of what a call of a worker returned."""


class CardActors(AbstractContextManager["CardActors"]):
    """The driver's `Cards`: an actor for each spec, which has its name and holds its cards.

    Args:
        specs: one a worker.
        worker_class: what the actors are made of.
        num_cpus: what each asks of its node.
        takes_cards: whether each asks for its cards too; else the caller holds them.
        loss: for an open input, where `wake` is to end a wait: says what is gone, when Ray is.
        policy: `max_shards` is used.
        timeouts: `steps_s`, `close_s`, `kill_s` and `parent_s` are used.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        worker_class: type[CardWorker],
        *,
        num_cpus: float = CARD_CPUS,
        takes_cards: bool = True,
        loss: Callable[[], str | None] | None = None,
        policy: Policy = DEFAULT_POLICY,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self.names = tuple(spec.name for spec in specs)
        self._specs = {spec.name: spec for spec in specs}
        self._max_shards = policy.max_shards
        self._actor_class = ray.remote(concurrency_groups={CONTROL_GROUP: 1, TOKENS_GROUP: 1})(
            worker_class
        )
        self._num_cpus = num_cpus
        self._takes_cards = takes_cards
        self._loss = loss
        self._ready_refs = None if loss is None else ReadyRefs()
        self._timeouts = timeouts
        self._namespace = f"qaic-ray-{uuid.uuid4().hex}"

        self._actors: dict[str, ActorHandle] = {}
        self._infos: dict[str, WorkerInfo] = {}
        self._in_flight: dict[_Call, tuple[str, _Returned]] = {}
        self._events: deque[Event] = deque()
        self._streaming: set[str] = set()  # their tokens are listened to
        self._silent: set[str] = set()  # asked for their steps, and have not answered
        self._next_ask_s = 0.0
        for name in self.names:
            self._begin(name)

    def __exit__(self, *_: object) -> None:
        """Have every worker close its card, and end those that hang."""
        call_for(self._timeouts.close_s + self._timeouts.kill_s, self._close)

    def _close(self) -> None:
        self._wait_all([_control(actor.close) for actor in self._actors.values()])
        for actor in self._actors.values():
            ray.kill(actor)

    def wait(self, timeout_s: float | None) -> Event | None:
        """Block until there is an event of a worker, and return it; None after `timeout_s`.

        Raises:
            UsageError: a worker found that the request itself is wrong; and whatever else a worker
                raised on its first opening that is not the card's fault.
            ClusterLost: where `loss` says so.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._events:
            now_s = time.monotonic()
            self._ask_for_steps(now_s)
            until_s = min(deadline_s, self._next_ask_s) - now_s
            ref, is_woken = self._next_ref(max(0.0, until_s))
            if ref is not None:
                _, returned = self._in_flight.pop(ref)
                if (event := returned(ref)) is not None:
                    self._events.append(event)
            elif is_woken or time.monotonic() >= deadline_s:
                return None
        return self._events.popleft()

    def wake(self) -> None:
        """Have `wait` return at once, where the input is open; any thread may call it."""
        if self._ready_refs is not None:
            self._ready_refs.wake()

    def run(self, shard: RunShard) -> None:
        """Start a shard; its rows come as events while they finish."""
        answer = self._actors[shard.worker].answer.options(
            num_returns="streaming", name=f"shard {shard.shard_id} on {shard.worker}"
        )
        if shard.worker not in self._streaming and any(p.stream for p in shard.prompts):
            self._streaming.add(shard.worker)
            tokens = self._actors[shard.worker].tokens.options(
                num_returns="streaming",
                concurrency_group=TOKENS_GROUP,
                name=f"tokens of {shard.worker}",
                _generator_backpressure_num_objects=TOKEN_MESSAGES,
            )
            self._listen_to_tokens(tokens.remote(), shard.worker)
        stream = answer.remote(shard.prompts, shard.attempt)
        self._listen_to(stream, shard.worker, shard.shard_id)

    def cancel(self, worker: str, indexes: Sequence[int]) -> None:
        """End these rows on a worker, those that it still has; nothing where it is gone."""
        if worker in self._actors:
            _control(self._actors[worker].cancel, indexes)

    def retire(self, worker: str) -> None:
        """End a worker's process, if it is there; no further event comes of it."""
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)
        self._infos.pop(worker, None)
        self._silent.discard(worker)
        self._streaming.discard(worker)
        self._in_flight = {ref: call for ref, call in self._in_flight.items() if call[0] != worker}

    def replace(self, worker: str, incarnation: int) -> None:
        """End a worker's process, and start to open its cards in another one."""
        self.retire(worker)
        self._specs[worker] = replace(self._specs[worker], incarnation=incarnation)
        self._begin(worker)

    def quarantine(self, worker: str, error: str) -> None:
        """End a worker's process for the rest of the run."""
        self.retire(worker)

    def info(self, worker: str) -> WorkerInfo:
        """What a worker that is ready has."""
        return self._infos[worker]

    def measurements(self) -> dict[str, Measurement]:
        """The work of every worker that is open; one that dies on the question is left out."""
        refs = {_control(self._actors[name].measurement): name for name in self._infos}
        found: dict[str, Measurement] = {}
        for ref in self._wait_all(list(refs)):
            with suppress(ray_errors.RayActorError):
                found[refs[ref]] = ray.get(ref)
        return found

    # -- calls

    def _begin(self, name: str) -> None:
        """Create a worker's actor, and have it open its cards."""
        spec = self._specs[name]
        actor = self._actor_class.options(
            name=name,
            # A name is unique in a namespace, and Ray forgets that of a dead actor a little later.
            namespace=f"{self._namespace}-{spec.incarnation}",
            num_cpus=self._num_cpus if self._num_cpus >= 1 else _share(self._num_cpus, spec.part),
            resources={CARD_RESOURCE: cards_needed(spec)} if self._takes_cards else {},
            scheduling_strategy=on_node(spec.node_id),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=self._max_shards,
        ).remote(spec)
        self._actors[name] = actor
        opened = actor.__ray_call__.options(name=f"open {name}").remote(open_worker, self._timeouts)
        self._expect(opened, name, partial(self._opened, name))

    def _listen_to(self, stream: ObjectRefGenerator, worker: str, shard_id: int) -> None:
        self._expect(stream, worker, partial(self._rows, worker, shard_id))

    def _listen_to_tokens(self, stream: ObjectRefGenerator, worker: str) -> None:
        self._expect(stream, worker, partial(self._tokens, worker))

    def _ask_for_steps(self, now_s: float) -> None:
        """Ask every open worker that has answered before; the answers come as events."""
        if now_s < self._next_ask_s:
            return
        self._next_ask_s = now_s + max(self._timeouts.steps_s, len(self._infos) / MAX_ASKED_PER_S)
        for name in self._infos.keys() - self._silent:
            self._silent.add(name)
            ref = _control(self._actors[name].progress)
            self._expect(ref, name, partial(self._steps, name))

    def _expect(self, call: _Call, worker: str, returned: _Returned) -> None:
        self._in_flight[call] = worker, returned
        if self._ready_refs is not None:
            self._ready_refs.watch(call)

    def _next_ref(self, timeout_s: float) -> tuple[_Call | None, bool]:
        """A call that has returned something, None after the time; and whether it was woken."""
        if self._ready_refs is not None:
            return self._next_ready(self._ready_refs, timeout_s)
        if not self._in_flight:
            time.sleep(timeout_s)  # Ray refuses to wait for nothing
            return None, False
        ready, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=timeout_s)
        return (ready[0] if ready else None), False

    def _next_ready(self, refs: ReadyRefs, timeout_s: float) -> tuple[_Call | None, bool]:
        try:
            call = refs.next(timeout_s)
        except queue.Empty:
            return None, False
        if self._loss is not None and (lost := self._loss()) is not None:
            raise ClusterLost(f"{lost}.")
        if call is None:
            return None, True
        return (call if call in self._in_flight else None), False  # else of one that was retired

    def _wait_all(self, refs: list[ObjectRef]) -> list[ObjectRef]:
        """Those that have returned within `close_s`."""
        if not refs:
            return []
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=self._timeouts.close_s)
        return list(done)

    # -- results of calls, as events

    def _opened(self, worker: str, ref: ObjectRef) -> Event:
        incarnation = self._specs[worker].incarnation
        try:
            self._infos[worker] = ray.get(ref)
        except ray_errors.RayError as error:
            # What is wrong with the request shows the first time; later the node has changed.
            why = loss(error)
            if isinstance(error, ray_errors.RayTaskError):
                if not (incarnation or isinstance(error.cause, DeviceError)):
                    raise error.cause from error
                why = said_by(error.cause)
            elif getattr(error, "actor_init_failed", False) and not incarnation:
                # It does nothing that could fail there.
                raise UsageError(
                    f"The actor of {worker} cannot be made on its node "
                    f"({str(error).splitlines()[-1]}): the whole cluster needs the same qaic-ray."
                ) from error
            self.retire(worker)
            return WorkerLost(worker, why, incarnation)
        self._events.append(WorkerReady(worker, self._infos[worker].slots, incarnation))
        return WorkerProgress(worker, 0, incarnation)

    def _steps(self, worker: str, ref: ObjectRef) -> Event | None:
        self._silent.discard(worker)
        try:
            num_steps, num_tokens, engine = ray.get(ref)
            incarnation = self._specs[worker].incarnation
            return WorkerProgress(worker, num_steps, incarnation, num_tokens, engine)
        except ray_errors.RayError as error:
            return self._lost(worker, error)

    def _rows(self, worker: str, shard_id: int, stream: ObjectRefGenerator) -> Event:
        try:
            item = ray.get(next(stream))
        except StopIteration:
            return ShardFinished(worker, shard_id)
        except ray_errors.RayTaskError as error:
            cause = error.cause
            retryable = isinstance(cause, ray_errors.RayError) or getattr(cause, "retryable", False)
            return ShardFailed(worker, shard_id, said_by(cause), retryable)
        except ray_errors.RayError as error:  # of the actor's process, its node, its objects
            return self._lost(worker, error)
        self._listen_to(stream, worker, shard_id)  # at the end: every worker gets its turn
        return RowsFinished(worker, shard_id, tuple(item))

    def _tokens(self, worker: str, stream: ObjectRefGenerator) -> Event | None:
        try:
            chunks = ray.get(next(stream))
        except StopIteration:
            return None
        except ray_errors.RayError as error:
            return self._lost(worker, error)
        self._listen_to_tokens(stream, worker)
        return TokensGenerated(worker, tuple(chunks))

    def _lost(self, worker: str, error: ray_errors.RayError) -> Event:
        self.retire(worker)
        return WorkerLost(worker, loss(error), self._specs[worker].incarnation)


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy | None:
    """Ray's word for a node and no other; for an empty id any node will do."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else None


def cards_needed(spec: WorkerSpec) -> float:
    """What a worker takes of its node's cards: a part of one, one or several."""
    return _share(len(spec.device_ids), spec.part)


def _share(number: float, part: Part | None) -> float:
    """One part's of what a whole card takes, so that all parts together never take more."""
    if part is None:
        return float(number)
    return int(number * _RESOURCE_STEPS) // part.count / _RESOURCE_STEPS


def _control(method: ActorMethod, *arguments: object) -> ObjectRef:
    """Call an actor's method in the group that shards do not use; no list of tasks has the call."""
    called = method.options(concurrency_group=CONTROL_GROUP, enable_task_events=False)
    return called.remote(*arguments)
