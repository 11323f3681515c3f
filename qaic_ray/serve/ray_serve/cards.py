"""A replica of cards, as Ray Serve makes it: answers questions, and tells tokens meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from contextlib import suppress
from typing import Any

import ray

from qaic_ray.cluster.actor_process import card_units
from qaic_ray.errors import FleetClosed
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.rows import Row
from qaic_ray.serve.http.request_log import log_to_stderr
from qaic_ray.serve.ray_serve.card_fleet import CardFleet, CardsPlan
from qaic_ray.serve.ray_serve.question import FleetState, Inbox, Question
from qaic_ray.serve.ray_serve.request_router import SLOTS
from qaic_ray.serve.ray_serve.token_mail import TokenOutbox, Told


class CardsReplica:
    """An open fleet over some cards of this node.

    Args:
        plan: what it is made with.
    """

    # Ray Serve awaits it.
    async def __init__(self, plan: CardsPlan) -> None:  # type: ignore[misc]
        log_to_stderr()
        self._plan = plan
        self._mail = _Mail(asyncio.get_running_loop())
        node_id = ray.get_runtime_context().get_node_id()
        self._cards = await asyncio.to_thread(CardFleet, plan, node_id, card_units())
        await asyncio.to_thread(self._cards.fleet.wait_ready)

    async def answer(self, question: Question) -> Row:
        """The row of a question; its tokens go to its inbox while they come.

        Raises:
            FleetClosed: the cards are lost.
        """
        pending = self._cards.fleet.submit(question.prompt)
        try:
            self._mail.send_what_comes(pending, question)
            return await pending.async_row()
        finally:
            pending.cancel()  # of one that is done nothing comes

    async def state(self) -> FleetState:
        """How its fleet stands."""
        fleet = self._cards.fleet
        return FleetState(fleet.workers, dict(fleet.engines), fleet.num_waiting, os.getpid())

    async def check_health(self) -> None:
        """See Ray Serve: where this raises, the replica is made anew."""
        fleet = self._cards.fleet
        if fleet.is_closed:
            fleet.wait_ready()  # raises what ended it
            raise FleetClosed("The cards of this replica are lost.")

    def record_replica_metadata(self) -> dict[str, Any]:
        """See Ray Serve: what routers know of this replica."""
        return {SLOTS: self._plan.slots}

    async def __del__(self) -> None:
        """See Ray Serve: called once, when nothing runs here any more."""
        await self._mail.close()
        await asyncio.to_thread(self._cards.close)


class _Mail:
    """Tokens from the fleet's thread to the inboxes: what a step made travels together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung: deque[tuple[TokenOutbox, PendingRow, int]] = deque()
        self._is_scheduled = False
        self._outboxes: dict[Inbox, TokenOutbox] = {}

    def send_what_comes(self, pending: PendingRow, question: Question) -> None:
        """Send what a prompt gets, where it streams; called in the loop.

        All of it goes by one connection: where that breaks, the rest comes with the row.
        """
        if not question.prompt.stream:
            return
        outbox, number = self._outbox(question.inbox), question.call

        def ring() -> None:  # in the fleet's thread
            self._rung.append((outbox, pending, number))
            if not self._is_scheduled:
                self._is_scheduled = True
                with suppress(RuntimeError):  # the loop is closed: nobody waits
                    self._loop.call_soon_threadsafe(self._send)

        pending.listen(ring)

    async def close(self) -> None:
        """End all connections."""
        for outbox in self._outboxes.values():
            await outbox.close()

    def _outbox(self, inbox: Inbox) -> TokenOutbox:
        for broken in [one for one, box in self._outboxes.items() if box.is_broken]:
            del self._outboxes[broken]
        if inbox not in self._outboxes:
            self._outboxes[inbox] = TokenOutbox(inbox)
        return self._outboxes[inbox]

    def _send(self) -> None:
        self._is_scheduled = False  # before the first is taken: none is left behind
        told: dict[TokenOutbox, list[Told]] = {}
        while self._rung:
            outbox, pending, number = self._rung.popleft()
            if not pending.done:  # else its row tells the rest
                told.setdefault(outbox, []).extend(
                    Told(number, delta) for delta in pending.take_deltas()
                )
        for outbox, some in told.items():
            if some:
                outbox.put(some)
