"""What the app's routes share: the fleet, the model, the limits, what is measured and logged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qaic_ray.options import ServeOptions
from qaic_ray.rows import Row
from qaic_ray.serve.api_errors import BUSY_RETRY_S, CLOSED_RETRY_S, ApiError
from qaic_ray.serve.http.keys import ApiKeys
from qaic_ray.serve.http.running import LoopBells, Running, TakesPrompts
from qaic_ray.serve.http.server_metrics import ServerMetrics

if TYPE_CHECKING:
    from fastapi import APIRouter

    from qaic_ray.metrics import EngineState
    from qaic_ray.serve.http.request_log import RequestRecord
    from qaic_ray.serve.protocol.asked import Asked
    from qaic_ray.serve.protocol.context import ModelContext

log = logging.getLogger("qaic_ray.serve")

LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


class ServedFleet(TakesPrompts, Protocol):
    """A fleet as the app sees it."""

    @property
    def is_closed(self) -> bool:
        """Whether it takes nothing more."""

    @property
    def engines(self) -> Mapping[str, EngineState]:
        """How the engine of each ready worker stood lately."""

    @property
    def num_waiting(self) -> int:
        """Prompts that no worker has."""


class Service:
    """One served model.

    Attributes:
        options: of the server.
        names: of the model.
        fleet: answers; see `OpenFleet`.
        keys: who may ask.
        is_draining: whether it takes nothing more, because it ends.
        routers: further routes, as those of batches.
        num_running: tells the requests that are being answered.

    Args:
        options: of the server.
        names: of the model.
        fleet: answers prompts.
        keys: who may ask; None for everybody.
    """

    def __init__(
        self,
        options: ServeOptions,
        names: Sequence[str],
        fleet: ServedFleet,
        *,
        keys: ApiKeys | None = None,
    ) -> None:
        self.options = options
        self.names = tuple(names)
        self.fleet = fleet
        self.keys = keys
        self.metrics = ServerMetrics(self.names[0])
        self.is_draining = False
        self.routers: list[APIRouter] = []
        self.num_running: Callable[[], int] = lambda: 0
        self.created = int(time.time())
        self._context: ModelContext | None = None
        self._bells: LoopBells | None = None
        self._num_open = 0

    # -- how it stands

    @property
    def is_local_only(self) -> bool:
        """Whether only this machine reaches it, and nothing else keeps strangers out."""
        return self.options.host in LOCAL_HOSTS and self.keys is None

    @property
    def has_ended(self) -> bool:
        """Whether its fleet takes nothing more."""
        return self.fleet.is_closed

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self._context is not None and not self.is_draining and not self.has_ended

    @property
    def context(self) -> ModelContext:
        """What requests are read with.

        Raises:
            ApiError: no card is ready yet.
        """
        if self._context is None:
            raise ApiError(
                503, "The cards are opening: try again soon.", retry_after_s=CLOSED_RETRY_S
            )
        return self._context

    def became_ready(self, context: ModelContext) -> None:
        """A card is ready, so the shapes of the program are known."""
        self._context = context

    def model_object(self, name: str) -> dict[str, Any]:
        """The model as /v1/models tells it."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "qaic-ray",
            "root": self.names[0],
            "parent": None,
            "max_model_len": self.context.ctx_len,
            "permission": [],
        }

    def exposition(self) -> bytes:
        """What /metrics tells; of engines what the fleet heard of them last, in about a second."""
        self.metrics.looked(self.fleet.engines, self.fleet.num_waiting)
        return self.metrics.exposition()

    # -- requests

    def run(self, asked: Asked) -> Running:
        """Give a request's prompts to the fleet; called in the app's loop.

        Raises:
            ApiError: there is no room for them, or no fleet.
        """
        if self._bells is None:
            self._bells = LoopBells(asyncio.get_running_loop())
        most, more = self.options.max_waiting, len(asked.prompts)
        if self._num_open + more > most:
            raise ApiError(
                429,
                f"{self._num_open} prompts are open, and {most} may be: try again later.",
                code="queue_full",
                retry_after_s=BUSY_RETRY_S,
            )
        self._num_open += more

        def closed() -> None:
            self._num_open -= more

        return Running(asked.prompts, self.fleet, self._bells, on_close=closed)

    def note_prompts(self, record: RequestRecord, asked: Asked, body: Mapping[str, Any]) -> None:
        """A request was read."""
        record.prompt_tokens = sum(len(prompt.token_ids or ()) for prompt in asked.prompts)
        if self.options.log_prompts:
            log.info("%s asked: %s", record.request_id, dict(body))

    def ended(self, record: RequestRecord, rows: Sequence[Row], arrived_at: float) -> None:
        """A request's rows are there."""
        record.answer_tokens = sum(row.generated_tokens for row in rows)
        self.metrics.ended(rows, arrived_at)
        if self.options.log_prompts:
            for row in rows:
                log.info("%s answered: %r", record.request_id, row.text)

    def logged(self, record: RequestRecord) -> None:
        """A request is over."""
        log.info(
            "%s %s %d %.3f s %d+%d tokens%s %s",
            record.method,
            record.path,
            record.status,
            record.seconds,
            record.prompt_tokens,
            record.answer_tokens,
            f" of {record.holder}" if record.holder else "",
            record.request_id,
            extra={"request": record},
        )
