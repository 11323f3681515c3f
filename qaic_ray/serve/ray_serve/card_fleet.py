"""An open fleet on the cards that this process, a replica of Ray Serve, holds of its node."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from qaic_ray.cards.inventory import usable
from qaic_ray.dispatch.policy import DEFAULT_POLICY, text_work
from qaic_ray.fleet.folder_fleet import SHARDS_BESIDE
from qaic_ray.fleet.open_fleet import OpenFleet
from qaic_ray.options import EmulatorOptions
from qaic_ray.pipeline.local_cards import slots_of
from qaic_ray.pipeline.request import RunRequest
from qaic_ray.pipeline.run_step import recorder_of, specs_on
from qaic_ray.runs.driver import Audience
from qaic_ray.runs.metering import metered
from qaic_ray.runs.open_input import OpenInput
from qaic_ray.runs.result import FleetResult
from qaic_ray.serve.ray_serve.held_cards import hold_cards

log = logging.getLogger("qaic_ray.serve")


@dataclass(frozen=True)
class CardsPlan:
    """What a replica of cards is made with.

    Attributes:
        request: model, QPC and how answers are made, as a run has it.
        num_cards: of one replica.
        cpus: of each worker.
        sdk: as a name that means the same on every node.
        emulated: what the emulated SDK is to be, where it is the one.
        kept_slots: slots of each card that the background leaves to the rest.
    """

    request: RunRequest
    num_cards: int
    cpus: float
    sdk: str
    emulated: EmulatorOptions
    kept_slots: int

    @property
    def slots(self) -> int:
        """Prompts that a replica answers side by side; as many as cards where the QPC says none."""
        run = self.request.run
        num_workers = self.num_cards * run.partitions // run.group_size
        return (slots_of(self.request.qpc) or 1) * num_workers


class CardFleet:
    """A fleet of the cards of this replica, which are opened meanwhile.

    Attributes:
        fleet: takes prompts.

    Args:
        plan: what it is made with.
        node_id: Ray's, of the node that this runs on.
        units: Ray's numbers of the cards that this process has, where Ray chooses.
    """

    def __init__(self, plan: CardsPlan, node_id: str, units: tuple[int, ...]) -> None:
        self._plan = plan
        self._node_id = node_id
        self._units = units
        audience = Audience(
            on_worker_ready=lambda info: log.info("%s is ready: %d slots", info.name, info.slots),
            on_wait=log.warning,
        )
        self.fleet = OpenFleet(self._drive, audience=audience)

    def close(self) -> None:
        """End it; what is open is cancelled."""
        self.fleet.close(drain=False)

    def _drive(self, prompts: OpenInput, audience: Audience) -> FleetResult:
        from qaic_ray.cluster.cluster import Cluster
        from qaic_ray.worker.worker import CardWorker

        plan = self._plan
        slots = slots_of(plan.request.qpc) or 1
        policy = replace(
            DEFAULT_POLICY,
            max_shards=max(DEFAULT_POLICY.max_shards, 2 * slots + SHARDS_BESIDE),
            kept_slots=plan.kept_slots,
        )
        with ExitStack() as held:
            cluster = held.enter_context(Cluster(0, held_cpus=plan.cpus))
            nodes = cluster.inventory(plan.sdk, plan.emulated)
            here, ids, cards = hold_cards(
                nodes,
                self._node_id,
                plan.num_cards,
                units=self._units,
                among=None if plan.request.run.devices == "all" else plan.request.run.devices,
            )
            held.enter_context(cards)
            for problem in cluster.problems(nodes):
                log.warning("%s", problem)
            specs = specs_on([here], plan.request.with_run(devices=ids))
            if len({found.machine for found in usable(nodes)}) > 1:
                specs = [replace(spec, name=f"{spec.name} on {here.host}") for spec in specs]
            recorder = held.enter_context(recorder_of(plan.request, plan.request.name, log.warning))
            return cluster.run_prompts(
                prompts,
                specs,
                worker_class=CardWorker,
                audience=metered(audience, recorder),
                work_of=partial(text_work, defaults=plan.request.run.defaults),
                policy=policy,
            )
