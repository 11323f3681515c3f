"""A replica of the interface, as Ray Serve makes it: the app, over the replicas of cards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import ray
import ray.exceptions as ray_errors
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from qaic_ray.errors import FleetClosed
from qaic_ray.rows import Row
from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.http.keys import ApiKeys
from qaic_ray.serve.http.request_log import log_to_stderr
from qaic_ray.serve.http.service import Service
from qaic_ray.serve.ray_serve.question import Question
from qaic_ray.serve.ray_serve.remote_fleet import RemoteFleet, ReplicaLost
from qaic_ray.serve.ray_serve.replica_choice import ReplicaChoice
from qaic_ray.serve.ray_serve.token_mail import TokenInbox
from qaic_ray.serve.serving import Served, context_of


@dataclass(frozen=True)
class InterfacePlan:
    """What a replica of the interface is made with.

    Attributes:
        served: the model, and the server's options.
        keys: who may ask; None for everybody.
    """

    served: Served
    keys: ApiKeys | None


class Interface:
    """The ASGI app of one replica.

    Args:
        plan: what it is made with.
        cards: replicas that answer.
    """

    # Ray Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, plan: InterfacePlan, cards: DeploymentHandle
    ) -> None:
        log_to_stderr()
        self._cards = cards
        self._inbox = TokenInbox(lambda told: self._fleet.told(told))
        where = await self._inbox.open(_node_address())
        self._fleet = RemoteFleet(self._ask, where, ReplicaChoice())
        served = plan.served
        self._service = Service(served.options, served.names, self._fleet, keys=plan.keys)
        ctx_len = await cards.context_len.remote()
        self._service.became_ready(await asyncio.to_thread(context_of, served, ctx_len))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """See Ray Serve."""
        return create_app(self._service)

    async def num_running(self, drain: bool = False) -> int:
        """Requests that are being answered.

        Args:
            drain: take nothing more from now on.
        """
        if drain:
            self._service.is_draining = True
        return self._service.num_running()

    async def __del__(self) -> None:
        """See Ray Serve: called once, when nothing runs here any more."""
        await self._fleet.close()
        await self._inbox.close()

    async def _ask(self, question: Question) -> Row:
        """See `remote_fleet.Ask`."""
        response = self._cards.answer.remote(question)
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
            raise ReplicaLost(next(iter(str(error).splitlines()), "")) from error


def _node_address() -> str:
    """Of this node, where the others reach it."""
    here = ray.get_runtime_context().get_node_id()
    return next(str(n["NodeManagerAddress"]) for n in ray.nodes() if n["NodeID"] == here)
