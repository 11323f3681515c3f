"""A Ray to work on, with the cards it offers; compile tasks; runs on it.

Decides nothing: who answers what is decided in `dispatch.py`, and Ray's own retries are off.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
import ray.exceptions as ray_errors
from ray._private.state import available_resources_per_node

from qaic_ray.cards.inventory import CARD_RESOURCE, Node, NodeCards, look, problems
from qaic_ray.cluster.actors import (
    CARD_CPUS,
    CardActors,
    cards_needed,
    chooses_units,
    first_line,
    loss,
    on_node,
)
from qaic_ray.cluster.connection import OwnRay, join, leave, start
from qaic_ray.cluster.watch import ClusterWatch, call_for
from qaic_ray.dispatch.dispatcher import Dispatcher
from qaic_ray.dispatch.shard_size import text_work
from qaic_ray.errors import ClusterLost, CompileError, DeviceBusy, QaicRayError, UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.result import FleetResult

if TYPE_CHECKING:
    from qaic_ray.worker.spec import WorkerSpec
    from qaic_ray.worker.worker import CardWorker

_BUSY_TIMEOUT_S = 20.0
_CANCEL_TIMEOUT_S = 5.0
_LOOK_TIMEOUT_S = 60.0

Request = TypeVar("Request")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What came of one compile task: its result, or the error of ours in its place."""

    label: str
    result: Result | QaicRayError


class Cluster:
    """A Ray to work on: the one at `address`, or one that is started here for `num_cards` cards.

    A Ray that this process has joined already is used as it is. Leaving the context ends what
    entering it began, and nothing else.

    Args:
        num_cards: the cards of this machine; a cluster that runs already knows its own.
        address: `host:port` of a running cluster's head, or `auto` for this machine's.
        dashboard: whether a Ray that is started has one, on the loopback interface.
    """

    def __init__(
        self, num_cards: int, *, address: str | None = None, dashboard: bool = False
    ) -> None:
        self._num_cards = num_cards
        self._address = address
        self._dashboard = dashboard
        self._own: OwnRay | None = None
        self._joined = False
        self._watch: ClusterWatch | None = None
        self.dashboard_url: str | None = None
        self.token_file: Path | None = None

    def __enter__(self) -> Cluster:
        if not ray.is_initialized():
            if self._address is None:
                self._own = start(self._num_cards, dashboard=self._dashboard)
                context = self._own.context
                self.token_file = self._own.session.token_file
            else:
                context = join(self._address)
                self._joined = True
            self.dashboard_url = context.dashboard_url or None
        self._watch = self._watching()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._watch is not None:
                self._watch.close()
        finally:
            if self._own is not None:
                self._own.end()
            elif self._joined:
                leave()

    def compile_variants(
        self,
        build: Callable[[Request], Result],
        requests: Mapping[str, Request],
        *,
        parallel: int,
        on_done: Callable[[Outcome[Result]], None] | None = None,
    ) -> list[Outcome[Result]]:
        """Run `build` on every request, each as one Ray task named `compile <label>`.

        Args:
            build: a module's function, so that another process finds it.
            requests: label -> request.
            parallel: how many run at a time.
            on_done: called with each outcome as it comes.

        Returns:
            The outcomes, in the order of the requests. An error of ours is an outcome; a task whose
            process died is a CompileError.
        """
        with self._losses():
            outcomes = _compile(build, requests, parallel, on_done)
        return [outcomes[label] for label in requests]

    def inventory(self, sdk: str | None, emulated: EmulatorOptions) -> list[NodeCards]:
        """The cards of every node, by the SDK that is found there.

        A node that cannot tell is in the list with the reason.

        Args:
            sdk: as the job names it; see `find_sdk`.
            emulated: what the emulated SDK is to be, where it is the one.
        """
        with self._losses():
            return self._inventory(sdk, emulated)

    def _inventory(self, sdk: str | None, emulated: EmulatorOptions) -> list[NodeCards]:
        nodes = _nodes()
        if self._is_ours:  # one node, and it is this one
            return [look(node, sdk, emulated) for node in nodes]
        refs = [
            _LOOK.options(
                name=f"look for cards on {node.address}",
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=on_node(node.node_id),
            ).remote(node, sdk, emulated)
            for node in nodes
        ]
        ray.wait(refs, num_returns=len(refs), timeout=_LOOK_TIMEOUT_S)
        return [_seen(node, ref) for node, ref in zip(nodes, refs, strict=True)]

    def problems(self, nodes: Sequence[NodeCards]) -> list[str]:
        """What keeps cards of an inventory from being used, each with what mends it."""
        if self._is_ours:
            return []  # it offers what it was asked for
        return problems(nodes, ray.get_runtime_context().gcs_address)

    def run_prompts(
        self,
        prompts: Iterable[Prompt | Row],
        specs: Sequence[WorkerSpec],
        *,
        worker_class: type[CardWorker],
        audience: Audience | None = None,
        journal: Journal | None = None,
        work_of: Callable[[Prompt], float] = text_work,
        on_wait: Callable[[str], None] | None = None,
    ) -> FleetResult:
        """Answer every prompt on an actor for each spec; see `Driver`.

        Args:
            work_of: the estimated work of a prompt, by which long ones go first.
            on_wait: told once, in a sentence, where cards are held by others and are waited for.

        Raises:
            UsageError: the cluster has not so many cards, or a worker found the request wrong.
            DeviceBusy: the cluster's cards are held by others.
            ClusterLost: the Ray is gone; rows that were answered are in the journal.
        """
        with self._losses():
            _await_cards(specs, on_wait)
            with CardActors(specs, worker_class, num_cpus=self._cpus_each(len(specs))) as cards:
                dispatcher = Dispatcher(work_of=work_of)
                told = audience or Audience()
                return Driver(cards, prompts, told, dispatcher=dispatcher, journal=journal).run()

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Make the one error of whatever comes of a Ray that is gone."""
        try:
            yield
        except (KeyboardInterrupt, ray_errors.RayError, QaicRayError) as error:
            if self._watch is not None and self._watch.loss is not None:
                raise ClusterLost(f"{self._watch.loss}.") from error
            raise

    def _watching(self) -> ClusterWatch:
        if self._own is not None:
            return ClusterWatch(dead=self._own.dead, on_loss=self._own.session.kill)
        where = "of this machine" if self._address in (None, "auto") else f"at {self._address}"
        return ClusterWatch(ask=_answers, what=f"The Ray cluster {where}")

    @property
    def _is_ours(self) -> bool:
        """Whether the Ray was started here, for this machine."""
        return self._own is not None

    def _cpus_each(self, num_workers: int) -> float:
        """An even share of this machine where the Ray is ours; of a shared one, next to nothing."""
        share = (os.cpu_count() or 1) // num_workers
        return share if self._is_ours and share else CARD_CPUS


def _answers() -> bool:
    """Whether the cluster answers, and counts this driver's node among the living."""
    here = ray.get_runtime_context().get_node_id()
    try:
        return any(node["Alive"] and node["NodeID"] == here for node in ray.nodes())
    except (ray_errors.RayError, RuntimeError, OSError):
        return False  # it is asked again, and its silence counts


def _nodes() -> list[Node]:
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            int(node["Resources"].get(CARD_RESOURCE, 0)),
            is_head="node:__internal_head__" in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _look_here(node: Node, sdk: str | None, emulated: EmulatorOptions) -> NodeCards:
    return look(replace(node, chooses=chooses_units()), sdk, emulated)


_LOOK = ray.remote(_look_here)


def _seen(node: Node, ref: Any) -> NodeCards:
    try:
        found: NodeCards = ray.get(ref, timeout=0)
        return found
    except ray_errors.GetTimeoutError:
        error = f"it did not answer within {_LOOK_TIMEOUT_S:.0f} s"
    except ray_errors.RayTaskError as failed:
        error = f"the search failed there ({first_line(failed.cause)})"
    except ray_errors.RayError as lost:
        error = loss(lost)
    return NodeCards(node, node.address, node.node_id, error=error)


def _await_cards(specs: Sequence[WorkerSpec], on_wait: Callable[[str], None] | None) -> None:
    """See that the cluster can give these cards: Ray itself would wait for ever."""
    needed: dict[str, float] = {}
    for spec in specs:
        needed[spec.node_id] = needed.get(spec.node_id, 0.0) + cards_needed(spec)
    total = math.ceil(sum(needed.values()))
    offered = ray.cluster_resources().get(CARD_RESOURCE, 0)
    if offered < total:
        head = ray.get_runtime_context().gcs_address
        raise UsageError(
            f"{total} cards are asked for and the Ray cluster offers {offered:g}: start Ray on "
            f"the nodes that have them with `ray start --address={head} "
            f"--resources='{{\"{CARD_RESOURCE}\": <cards of the node>}}'`."
        )
    deadline_s = time.monotonic() + _BUSY_TIMEOUT_S
    while lacking := _lacking(needed):
        words = f"{total} cards are asked for and {lacking:g} of them are held by others"
        if time.monotonic() > deadline_s:
            raise DeviceBusy(f"{words}: wait for the job that holds them, or ask for fewer.")
        if on_wait is not None:
            on_wait(f"{words}: waiting for up to {_BUSY_TIMEOUT_S:.0f} s.")
            on_wait = None
        time.sleep(0.1)


def _lacking(needed: Mapping[str, float]) -> float:
    """How many cards are not free now, by node; those of no node may be anywhere."""
    free: dict[str, float] = {
        node_id: resources.get(CARD_RESOURCE, 0.0)
        for node_id, resources in available_resources_per_node().items()
    }
    free[""] = sum(free.values()) - sum(needed.values()) + needed.get("", 0.0)
    return sum(
        math.ceil(number - free.get(node_id, 0.0))
        for node_id, number in needed.items()
        if number > free.get(node_id, 0.0) + 1e-6
    )


def _compile(
    build: Callable[[Request], Result],
    requests: Mapping[str, Request],
    parallel: int,
    on_done: Callable[[Outcome[Result]], None] | None,
) -> dict[str, Outcome[Result]]:
    waiting = deque(requests.items())
    running: dict[Any, str] = {}
    outcomes: dict[str, Outcome[Result]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                label, request = waiting.popleft()
                options = _BUILD.options(name=f"compile {label}", num_cpus=1, max_retries=0)
                running[options.remote(build, request)] = label
            (ref,), _ = ray.wait(list(running), num_returns=1)
            label = running.pop(ref)
            outcomes[label] = Outcome(label, _built(label, ref))
            if on_done is not None:
                on_done(outcomes[label])
    finally:
        _cancel(list(running))
    return outcomes


def _build(build: Callable[[Request], Result], request: Request) -> Result | QaicRayError:
    try:
        return build(request)
    except QaicRayError as error:
        return error


_BUILD = ray.remote(_build)


def _built(label: str, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray_errors.RayTaskError as error:
        raise error.cause from error
    except ray_errors.RayError as error:
        return CompileError(
            f"The process that compiled {label} died ({type(error).__name__}): most often the "
            "machine ran out of memory; compile fewer at a time with --jobs."
        )


def _cancel(refs: list[Any]) -> None:
    """Interrupt tasks, and give them a moment to end what they started."""

    def cancel() -> None:
        for ref in refs:
            ray.cancel(ref)
        ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_TIMEOUT_S)

    if refs:
        call_for(_CANCEL_TIMEOUT_S + 1.0, cancel)
