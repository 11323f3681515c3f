"""A Ray cluster: the cards it offers, compile tasks and runs on it.

Ray's own retries are off: what happens after a failure is decided by the dispatcher.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.exceptions as ray_errors
from ray import ObjectRef
from ray._private.state import available_resources_per_node
from ray._private.worker import RayContext

from qaic_ray.cards.inventory import (
    CARD_RESOURCE,
    KEPT_LABEL,
    Node,
    NodeCards,
    look,
    problems,
    remedy,
)
from qaic_ray.cluster.actor_process import chooses_units
from qaic_ray.cluster.actors import CardActors, cards_needed, on_node
from qaic_ray.cluster.compile_tasks import Request, Result, run_builds
from qaic_ray.cluster.connection import (
    CARD_CPUS,
    ClusterWatch,
    OwnRay,
    call_for,
    first_line,
    join,
    start,
)
from qaic_ray.cluster.dashboard import Dashboard, dashboard_of
from qaic_ray.cluster.kept_ray import KeptRay
from qaic_ray.cluster.losses import loss
from qaic_ray.cluster.worker_logs import WorkerLogs
from qaic_ray.dispatch.dispatcher import Dispatcher
from qaic_ray.dispatch.policy import DEFAULT_POLICY, Policy
from qaic_ray.errors import ClusterLost, DeviceBusy, QaicRayError, UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Driver
from qaic_ray.runs.intake import ThreadedReader
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.open_input import OpenInput
from qaic_ray.runs.result import FleetResult
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts, changed_values, tries

if TYPE_CHECKING:
    from qaic_ray.worker.worker import CardWorker, WorkerSpec


class Cluster(AbstractContextManager["Cluster"]):
    """A context in which Ray is there: the one at `address`, or one that is started here.

    A Ray that this process has joined already is used as it is. Leaving the context ends what
    entering it began, and nothing else.

    Args:
        num_cards: the cards of this machine; a cluster that runs already knows its own.
        address: `host:port` of a running cluster's head, or `auto` for this machine's.
        dashboard: whether a Ray that is started has one, on the loopback interface.
        kept: the Ray of this machine that was left up, to be used in place of a new one.
        name: begins the entry of this driver in the dashboard's list of jobs.
        held_cpus: for a process that is an actor itself and holds the cards of its runs already:
            CPUs of each of their actors, which ask the cluster for no cards.
        timeouts: all of the cluster's and its actors'; the workers' are in their specs.
    """

    def __init__(
        self,
        num_cards: int,
        *,
        address: str | None = None,
        dashboard: bool = False,
        kept: KeptRay | None = None,
        name: str = "qaic-ray",
        held_cpus: float | None = None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self._held_cpus = held_cpus
        self._num_cards = num_cards
        self._address = address
        self._dashboard = dashboard
        self._kept = kept
        self._name = name
        self._timeouts = timeouts
        self._own: OwnRay | None = None
        self._ends = ExitStack()
        self._watch: ClusterWatch | None = None
        self._on_loss: Callable[[], None] = lambda: None
        self._logs = WorkerLogs()
        self.dashboard: Dashboard | None = None

    def __enter__(self) -> Cluster:
        with ExitStack() as ends:
            if not ray.is_initialized():
                context, token_file = self._connect(ends)
                if context.dashboard_url:
                    self.dashboard = dashboard_of(context, token_file)
            ends.enter_context(self._logs)
            ends.callback(self._flush_logs)
            self._watch = self._watching()
            ends.callback(self._watch.close)
            self._ends = ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _connect(self, ends: ExitStack) -> tuple[RayContext, Path | None]:
        """Join a Ray, or start one; what ends that goes to `ends`."""
        if self._kept is not None:
            context = ends.enter_context(self._kept.joined(self._name, self._timeouts))
            return context, self._kept.token_file
        if self._address is not None:
            context = join(self._address, self._timeouts, name=self._name)
            ends.callback(call_for, self._timeouts.shutdown_s, ray.shutdown)
            return context, None
        self._own = start(
            self._num_cards,
            dashboard=self._dashboard,
            name=self._name,
            timeouts=self._timeouts,
        )
        ends.callback(self._own.end)
        return self._own.context, self._own.session.token_file

    @property
    def _is_ours(self) -> bool:
        """Whether it is of this machine alone, and started by a command of ours."""
        return self._own is not None or self._kept is not None

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
        on_begin: Callable[[str], None] | None = None,
    ) -> None:
        """Run `build` on every request; see `run_builds`."""
        with self.losses():
            run_builds(build, requests, parallel=parallel, on_done=on_done, timeouts=self._timeouts)

    def inventory(self, sdk: str | None, emulated: EmulatorOptions) -> list[NodeCards]:
        """The cards of every node, by the SDK that is found there.

        A node that cannot tell is in the list with the reason.

        Args:
            sdk: as the job names it; see `find_sdk`.
            emulated: what the emulated SDK is to be, where it is the one.
        """
        if self._is_ours:  # one node, and it is this one
            return [look(node, sdk, emulated) for node in _nodes()]
        told = self.each_node("look for cards", _look_here, (sdk, emulated))
        return [
            NodeCards(node, node.address, node.node_id, error=found)
            if isinstance(found, str)
            else found
            for node, found in told
        ]

    def each_node(
        self, what: str, ask: Callable[..., Result], arguments: tuple[object, ...]
    ) -> list[tuple[Node, Result | str]]:
        """Call `ask(node, *arguments)` on every node, and return what each says.

        Args:
            what: names the tasks.
            ask: a module's function, so that another process finds it.
            arguments: plain data.

        Returns:
            Each node with its result, or with a sentence without its end where it could not tell.
        """
        with self.losses():
            nodes, task = _nodes(), ray.remote(ask)
            refs = [
                task.options(
                    name=f"{what} on {node.address}",
                    num_cpus=0,
                    max_retries=0,
                    scheduling_strategy=on_node(node.node_id),
                ).remote(node, *arguments)
                for node in nodes
            ]
            ray.wait(refs, num_returns=len(refs), timeout=self._timeouts.look_s)
            return [(node, self._told(ref)) for node, ref in zip(nodes, refs, strict=True)]

    def problems(self, nodes: Sequence[NodeCards]) -> list[str]:
        """A sentence, with its remedy, for each reason why cards of an inventory are not used."""
        if self._is_ours:
            return []  # it offers what it was asked for
        return problems(nodes, ray.get_runtime_context().gcs_address)

    def run_prompts(
        self,
        prompts: Iterable[Prompt | Row] | OpenInput,
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
        with self.losses():
            told = audience or Audience()
            if self._held_cpus is None:
                self._await_cards(specs, told.on_wait)
            with CardActors(
                specs,
                worker_class,
                num_cpus=self._cpus_each(len(specs)),
                takes_cards=self._held_cpus is None,
                loss=self._loss if isinstance(prompts, OpenInput) else None,
                policy=policy,
                timeouts=self._timeouts,
            ) as cards:
                self._on_loss = cards.wake
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

    def _told(self, ref: ObjectRef[Result]) -> Result | str:
        try:
            found: Result = ray.get(ref, timeout=0)
            return found
        except ray_errors.GetTimeoutError:
            return f"it did not answer within {self._timeouts.look_s:.0f} s"
        except ray_errors.RayTaskError as failed:
            return f"the search failed there ({first_line(failed.cause)})"
        except ray_errors.RayError as lost:
            return loss(lost)

    def _await_cards(self, specs: Sequence[WorkerSpec], on_wait: Callable[[str], None]) -> None:
        """Wait until these cards are free; Ray itself would wait without a limit."""
        needed: dict[str, float] = {}
        for spec in specs:
            needed[spec.node_id] = needed.get(spec.node_id, 0.0) + cards_needed(spec)
        total = math.ceil(sum(needed.values()))
        offered = ray.cluster_resources().get(CARD_RESOURCE, 0)
        if offered < total:
            kept = next((node for node in _nodes() if node.is_kept), None)
            raise UsageError(
                f"{total} cards are asked for and the Ray cluster offers {offered:g}: "
                + remedy(kept, head=ray.get_runtime_context().gcs_address)
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

    @contextmanager
    def losses(self) -> Iterator[None]:
        """Raise ClusterLost in place of any error that the loss of Ray has caused."""
        try:
            yield
        except (KeyboardInterrupt, ray_errors.RayError, QaicRayError) as error:
            if self._watch is not None and self._watch.loss is not None:
                raise ClusterLost(f"{self._watch.loss}.") from error
            raise

    def _loss(self) -> str | None:
        """What is gone, when Ray is."""
        return None if self._watch is None else self._watch.loss

    def _watching(self) -> ClusterWatch:
        own, kept = self._own, self._kept

        def on_loss() -> None:
            if own is not None:
                own.session.kill()
            self._on_loss()

        watching = partial(ClusterWatch, on_loss=on_loss, timeouts=self._timeouts)
        if own is not None:
            return watching(dead=own.dead)
        if kept is not None:
            return watching(dead=kept.dead)
        where = "of this machine" if self._address in (None, "auto") else f"at {self._address}"
        what = f"The Ray cluster {where}"
        return watching(ask=_answers, what=what)

    def _cpus_each(self, num_workers: int) -> float:
        """CPUs of each actor: an even share of this machine, or CARD_CPUS of a shared cluster."""
        if self._held_cpus is not None:
            return self._held_cpus
        share = (os.cpu_count() or 1) // num_workers
        if (
            self._kept is not None
            and ray.available_resources().get("CPU", 0) <= share * num_workers
        ):
            return CARD_CPUS  # another command has its share
        return share if self._is_ours and share else CARD_CPUS


def is_joined() -> bool:
    """Whether this process has joined a Ray already, which a `Cluster` would use as it is."""
    return bool(ray.is_initialized())


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
            is_kept=KEPT_LABEL in node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _look_here(node: Node, sdk: str | None, emulated: EmulatorOptions) -> NodeCards:
    return look(replace(node, chooses=chooses_units()), sdk, emulated)


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
