"""The replicas of cards as one of the others sees them: Ray Serve's handle, as a fleet."""

from __future__ import annotations

import asyncio
import logging

import ray
import ray.exceptions as ray_errors
from ray.serve.handle import DeploymentHandle

from qaic_ray.cluster.losses import loss
from qaic_ray.errors import FleetClosed
from qaic_ray.rows import Row
from qaic_ray.serve.ray_serve.question import FleetState, Question
from qaic_ray.serve.ray_serve.remote_fleet import RemoteFleet, ReplicaLost
from qaic_ray.serve.ray_serve.replica_choice import ReplicaChoice
from qaic_ray.serve.ray_serve.token_mail import TokenInbox

log = logging.getLogger("qaic_ray.serve")

LOOK_S = 1.0
"""Interval at which replicas are asked how they stand."""
TOLD_S = 10.0
"""How long they may take to tell."""


class CardsHandle:
    """A fleet of all replicas of cards.

    Attributes:
        fleet: takes prompts.

    Args:
        handle: Ray Serve's, of their deployment.
    """

    fleet: RemoteFleet

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._inbox = TokenInbox(lambda told: self.fleet.told(told))
        self._looking: asyncio.Task[None] | None = None

    async def open(self) -> int:
        """Have it listen, in this loop; tokens of a context, as the program has it."""
        where = await self._inbox.open(node_address())
        self.fleet = RemoteFleet(self._ask, where, ReplicaChoice())
        while not self.fleet.workers:
            first: FleetState = await self._handle.state.remote()  # waits for a replica
            self.fleet.stands((first,))
            await asyncio.sleep(0 if first.workers else LOOK_S)
        self._looking = asyncio.get_running_loop().create_task(self._look())
        return self.fleet.workers[0].ctx_len

    async def close(self) -> None:
        """Take nothing more, and cancel what is open."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self.fleet.close()
        await self._inbox.close()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                told = self._handle.broadcast("state")
                states = await told.results_async(timeout_s=TOLD_S, return_exceptions=True)
            except Exception as error:  # noqa: BLE001  # of a replica that dies meanwhile; ask again
                log.warning("Replicas do not tell how they stand: %r", error)
                continue
            self.fleet.stands([one for one in states if isinstance(one, FleetState)])

    async def _ask(self, question: Question) -> Row:
        """See `remote_fleet.Ask`."""
        response = self._handle.answer.remote(question)
        try:
            row: Row = await response
            return row
        except asyncio.CancelledError:
            response.cancel()
            raise
        except ray_errors.RayTaskError as error:
            if isinstance(error.cause, FleetClosed):
                raise ReplicaLost(str(error.cause)) from error
            raise
        except ray_errors.RayError as error:
            raise ReplicaLost(loss(error)) from error


def node_address() -> str:
    """Of this node, where the others reach it."""
    here = ray.get_runtime_context().get_node_id()
    return next(str(n["NodeManagerAddress"]) for n in ray.nodes() if n["NodeID"] == here)
