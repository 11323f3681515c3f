"""A replica of the interface, as Ray Serve makes it: the app, over the replicas of cards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import ray.exceptions as ray_errors
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.http.keys import ApiKeys
from qaic_ray.serve.http.request_log import log_to_stderr
from qaic_ray.serve.http.service import Service
from qaic_ray.serve.ray_serve.cards_handle import CardsHandle
from qaic_ray.serve.ray_serve.forwarding import Desk, forwarding_router, not_there
from qaic_ray.serve.serving import Served, context_of


@dataclass(frozen=True)
class InterfacePlan:
    """What a replica of the interface is made with.

    Attributes:
        served: the model, and the server's options.
        keys: who may ask; None for everybody.
        deployed_by: tells apart the processes that deploy an application of this name.
    """

    served: Served
    keys: ApiKeys | None
    deployed_by: str


class Interface:
    """The ASGI app of one replica.

    Args:
        plan: what it is made with.
        cards: replicas that answer.
        batches: the replica that has files and batches.
    """

    # Ray Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, plan: InterfacePlan, cards: DeploymentHandle, batches: DeploymentHandle
    ) -> None:
        log_to_stderr()
        served = plan.served
        self._deployed_by = plan.deployed_by
        self._cards = CardsHandle(cards)
        ctx_len = await self._cards.open()
        self._service = Service(served.options, served.names, self._cards.fleet, keys=plan.keys)
        self._service.became_ready(await asyncio.to_thread(context_of, served, ctx_len))

        async def desk() -> Desk:
            try:
                found: Desk = await batches.desk.remote()
            except ray_errors.RayError as error:
                raise not_there() from error
            return found

        self._service.routers.append(forwarding_router(desk))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """See Ray Serve."""
        return create_app(self._service)

    async def deployed_by(self) -> str:
        """Which process deployed this replica."""
        return self._deployed_by

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
        await self._cards.close()
