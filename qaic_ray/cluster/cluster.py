"""A Ray cluster: the cards it offers, compile tasks and runs on it.

Ray's own retries are off: what happens after a failure is decided by the dispatcher.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import ray
import ray.exceptions as ray_errors
from ray import ObjectRef
from ray._private.state import available_resources_per_node

from qaic_ray.cards.inventory import CARD_RESOURCE, Node, NodeCards, look, problems
from qaic_ray.cluster.actors import CardActors, cards_needed, chooses_units, loss, on_node
from qaic_ray.cluster.connection import (
    CARD_CPUS,
    ClusterWatch,
    OwnRay,
    call_for,
    first_line,
    join,
    start,
)
from qaic_ray.cluster.worker_logs import WorkerLogs, say
from qaic_ray.dispatch.dispatcher import Dispatcher
from qaic_ray.dispatch.policy import DEFAULT_POLICY, Policy
from qaic_ray.errors import ClusterLost, CompileError, DeviceBusy, QaicRayError, UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Driver, FleetResult
from qaic_ray.runs.intake import ThreadedReader
from qaic_ray.runs.journal import Journal
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts, changed_values, tries

if TYPE_CHECKING:
    from qaic_ray.worker.worker import CardWorker, WorkerSpec

Request = TypeVar("Request")
Result = TypeVar("Result")


class Cluster(AbstractContextManager["Cluster"]):
    """A context in which Ray is there: the one at `address`, or one that is started here.

    A Ray that this process has joined already is used as it is. Leaving the context ends what
    entering it began, and nothing else.

    Args:
        num_cards: the cards of this machine; a cluster that runs already knows its own.
        address: `host:port` of a running cluster's head, or `auto` for this machine's.
        dashboard: whether a Ray that is started has one, on the loopback interface.
        name: begins the entry of this driver in the dashboard's list of jobs.
        timeouts: all of the cluster's and its actors'; the workers' are in their specs.
    """

    def __init__(
        self,
        num_cards: int,
        *,
        address: str | None = None,
        dashboard: bool = False,
        name: str = "qaic-ray",
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self._num_cards = num_cards
        self._address = address
        self._dashboard = dashboard
        self._name = name
        self._timeouts = timeouts
        self._own: OwnRay | None = None
        self._ends = ExitStack()
        self._watch: ClusterWatch | None = None
        self._logs = WorkerLogs()
        self.dashboard_url: str | None = None
        self.token_file: Path | None = None

    def __enter__(self) -> Cluster:
        with ExitStack() as ends:
            if not ray.is_initialized():
                if self._address is None:
                    self._own = start(
                        self._num_cards,
                        dashboard=self._dashboard,
                        name=self._name,
                        timeouts=self._timeouts,
                    )
                    ends.callback(self._own.end)
                    context = self._own.context
                    self.token_file = self._own.session.token_file
                else:
                    context = join(self._address, self._timeouts, name=self._name)
                    ends.callback(call_for, self._timeouts.shutdown_s, ray.shutdown)
                url = context.dashboard_url
                self.dashboard_url = f"http://{url}" if url else None
            ends.enter_context(self._logs)
            ends.callback(self._flush_logs)
            self._watch = self._watching()
            ends.callback(self._watch.close)
            self._ends = ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def write_logs_to(self, folder: Path, on_error: Callable[[str], None]) -> None:
        """Write what actors and tasks print, and have printed, to `<name>.log` in this folder.

        Args:
            folder: is there.
            on_error: told once, by a sentence, when a log cannot be written.
        """
        self._logs.write_to(folder, on_error)

    def _flush_logs(self) -> None:
        if self._watch is not None and self._watch.loss is None:
            self._logs.flush()

    def compile_variants(
        self,
        build: Callable[[Request], Result],
        requests: Mapping[str, Request],
        *,
        parallel: int,
        on_done: Callable[[str, Result | QaicRayError], None],
    ) -> None:
        """Run `build` on every request, each as one Ray task named `compile <label>`.

        Args:
            build: a module's function, so that another process finds it.
            requests: label -> request.
            parallel: how many run at a time.
            on_done: called with each label and its result, as they come. An error of ours is a
                result; a task whose process died is a CompileError.
        """
        waiting = deque(requests.items())
        running: dict[ObjectRef, str] = {}
        with self._losses():
            try:
                while waiting or running:
                    while waiting and len(running) < parallel:
                        label, request = waiting.popleft()
                        task = _BUILD.options(name=f"compile {label}", num_cpus=1, max_retries=0)
                        running[task.remote(build, label, request)] = label
                    (ref,), _ = ray.wait(list(running), num_returns=1)
                    label = running.pop(ref)
                    on_done(label, _built(label, ref))
            finally:
                self._cancel(list(running))

    def inventory(self, sdk: str | None, emulated: EmulatorOptions) -> list[NodeCards]:
        """The cards of every node, by the SDK that is found there.

        A node that cannot tell is in the list with the reason.

        Args:
            sdk: as the job names it; see `find_sdk`.
            emulated: what the emulated SDK is to be, where it is the one.
        """
        with self._losses():
            nodes = _nodes()
            if self._own is not None:  # one node, and it is this one
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
            ray.wait(refs, num_returns=len(refs), timeout=self._timeouts.look_s)
            return [self._seen(node, ref) for node, ref in zip(nodes, refs, strict=True)]

    def problems(self, nodes: Sequence[NodeCards]) -> list[str]:
        """A sentence, with its remedy, for each reason why cards of an inventory are not used."""
        if self._own is not None:
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
        work_of: Callable[[Prompt], float] | None = None,
        policy: Policy = DEFAULT_POLICY,
    ) -> FleetResult:
        """Answer every prompt on an actor for each spec; see `Driver`.

        Args:
            work_of: the estimated work of a prompt, by which long ones go first; None: by its text.
            policy: the dispatcher's numbers.

        Raises:
            UsageError: the cluster has not so many cards, or a worker found the request wrong.
            DeviceBusy: the cluster's cards are held by others.
            ClusterLost: the Ray is gone; rows that were answered are in the journal.
        """
        with self._losses():
            told = audience or Audience()
            self._await_cards(specs, told.on_wait)
            with CardActors(
                specs,
                worker_class,
                num_cpus=self._cpus_each(len(specs)),
                policy=policy,
                timeouts=self._timeouts,
            ) as cards:
                result = Driver(
                    cards,
                    prompts,
                    told,
                    dispatcher=Dispatcher(policy=policy, work_of=work_of),
                    journal=journal,
                    reader=partial(ThreadedReader, timeouts=self._timeouts),
                ).run()
        settings = {**changed_values(policy), **changed_values(self._timeouts)}
        return replace(result, settings=settings)

    def _seen(self, node: Node, ref: ObjectRef) -> NodeCards:
        try:
            found: NodeCards = ray.get(ref, timeout=0)
            return found
        except ray_errors.GetTimeoutError:
            error = f"it did not answer within {self._timeouts.look_s:.0f} s"
        except ray_errors.RayTaskError as failed:
            error = f"the search failed there ({first_line(failed.cause)})"
        except ray_errors.RayError as lost:
            error = loss(lost)
        return NodeCards(node, node.address, node.node_id, error=error)

    def _await_cards(self, specs: Sequence[WorkerSpec], on_wait: Callable[[str], None]) -> None:
        """Wait until these cards are free; Ray itself would wait without a limit."""
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
        is_told = False
        for is_last in tries(self._timeouts.busy_s, self._timeouts.busy_poll_s):
            if not (lacking := _lacking(needed)):
                return
            words = f"{total} cards are asked for and {lacking:g} of them are held by others"
            if is_last:
                raise DeviceBusy(f"{words}: wait for the job that holds them, or ask for fewer.")
            if not is_told:
                on_wait(f"{words}: waiting for up to {self._timeouts.busy_s:.0f} s.")
                is_told = True

    def _cancel(self, refs: list[ObjectRef]) -> None:
        """Interrupt tasks, and wait up to `cancel_s` for their end."""

        def cancel() -> None:
            for ref in refs:
                ray.cancel(ref)
            ray.wait(refs, num_returns=len(refs), timeout=self._timeouts.cancel_s)

        if refs:
            call_for(self._timeouts.cancel_s + 1.0, cancel)

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Raise ClusterLost in place of any error that the loss of Ray has caused."""
        try:
            yield
        except (KeyboardInterrupt, ray_errors.RayError, QaicRayError) as error:
            if self._watch is not None and self._watch.loss is not None:
                raise ClusterLost(f"{self._watch.loss}.") from error
            raise

    def _watching(self) -> ClusterWatch:
        if self._own is not None:
            own = self._own
            return ClusterWatch(dead=own.dead, on_loss=own.session.kill, timeouts=self._timeouts)
        where = "of this machine" if self._address in (None, "auto") else f"at {self._address}"
        what = f"The Ray cluster {where}"
        return ClusterWatch(ask=_answers, what=what, timeouts=self._timeouts)

    def _cpus_each(self, num_workers: int) -> float:
        """CPUs of each actor: an even share of this machine, or CARD_CPUS of a shared cluster."""
        share = (os.cpu_count() or 1) // num_workers
        return share if self._own is not None and share else CARD_CPUS


def _answers() -> bool:
    """Whether the cluster answers and says that this driver's node is alive."""
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


def _lacking(needed: Mapping[str, float]) -> float:
    """The number of cards that are not free now. Cards without a node may be on any node."""
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


def _build(
    build: Callable[[Request], Result], label: str, request: Request
) -> Result | QaicRayError:
    say(f"compiles {label}")
    try:
        result = build(request)
    except QaicRayError as error:
        say(f"did not compile {label}: {error}")
        return error
    say(f"compiled {label}")
    return result


_BUILD = ray.remote(_build)


def _built(label: str, ref: ObjectRef[Result | QaicRayError]) -> Result | QaicRayError:
    try:
        result: Result | QaicRayError = ray.get(ref)
    except ray_errors.RayTaskError as error:
        raise error.cause from error
    except ray_errors.RayError as error:
        return CompileError(
            f"The process that compiled {label} died ({type(error).__name__}): most often the "
            "machine ran out of memory; compile fewer at a time with --jobs."
        )
    return result
