"""The one replica that has files and batches: in a folder of its node, worked on in background."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from pathlib import Path

from ray.serve.handle import DeploymentHandle

from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import find_sdk
from qaic_ray.serve.batches.open_batches import BatchManager
from qaic_ray.serve.batches.routes import batch_router
from qaic_ray.serve.http.app import create_app
from qaic_ray.serve.http.request_log import log_to_stderr
from qaic_ray.serve.http.server import listening_socket, quiet_server
from qaic_ray.serve.http.service import Service
from qaic_ray.serve.ray_serve.cards_handle import CardsHandle, node_address
from qaic_ray.serve.ray_serve.forwarding import Desk, for_desk
from qaic_ray.serve.serving import Served, answering_of, context_of


@dataclass(frozen=True)
class DeskPlan:
    """What the desk is made with.

    Attributes:
        served: the model, and the server's options.
        sdk: as a name that means the same on every node.
        emulated: what the emulated SDK is to be, where it is the one.
    """

    served: Served
    sdk: str
    emulated: EmulatorOptions


class BatchDesk:
    """Files and batches of all replicas of the interface.

    Args:
        plan: what it is made with.
        cards: replicas that answer.
    """

    # Ray Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, plan: DeskPlan, cards: DeploymentHandle
    ) -> None:
        log_to_stderr()
        served = plan.served
        self._cards = CardsHandle(cards)
        ctx_len = await self._cards.open()
        context = await asyncio.to_thread(context_of, served, ctx_len)
        sdk = await asyncio.to_thread(find_sdk, plan.sdk, plan.emulated)
        folder = Path(served.options.folder)
        self._batches = await asyncio.to_thread(BatchManager, folder, self._cards.fleet)
        answering = await asyncio.to_thread(answering_of, served, context, served.request, sdk)
        self._batches.start(answering)

        service = Service(served.options, served.names, self._cards.fleet)
        service.became_ready(context)
        service.routers.append(batch_router(self._batches))
        secret = secrets.token_hex(32)
        opened = listening_socket(node_address(), 0)
        self._desk = Desk(node_address(), opened.getsockname()[1], secret)
        self._server = quiet_server(for_desk(create_app(service), secret))
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[opened]))

    async def desk(self) -> Desk:
        """Where it listens."""
        return self._desk

    async def check_health(self) -> None:
        """See Ray Serve: where this raises, the replica is made anew."""
        if self._serving.done():
            self._serving.result()

    async def __del__(self) -> None:
        """See Ray Serve: batches stop, and go on where a replica is made next."""
        self._server.should_exit = True
        await asyncio.gather(self._serving, return_exceptions=True)
        await asyncio.to_thread(self._batches.close)
        await self._cards.close()
