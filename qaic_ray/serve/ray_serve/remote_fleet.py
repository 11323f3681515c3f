"""The fleet as a replica of the interface sees it: replicas of cards, through Ray Serve's handle.

    submit -> Question -> handle (its router chooses) -> replica of cards
    PendingRow <- tokens by the inbox, the row by the handle

A call of the handle lasts as long as its prompt runs, so that Ray Serve counts what runs: for its
scaling, for its draining, and for the router. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from qaic_ray.errors import FleetClosed
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.metrics import EngineState
from qaic_ray.rows import ErrorClass, Prompt, Row, TokenChunk
from qaic_ray.runs.token_streams import RowStream
from qaic_ray.serve.ray_serve.question import FleetState, Inbox, Question
from qaic_ray.serve.ray_serve.replica_choice import ReplicaChoice
from qaic_ray.serve.ray_serve.token_mail import Told
from qaic_ray.worker.worker import WorkerInfo

MAX_LOSSES = 3
"""So many replicas may be lost under a prompt before it is given up: it may be what ends them."""

_ENGINE_BITS = 20

log = logging.getLogger("qaic_ray.serve")


class ReplicaLost(Exception):
    """The replica that had a question is gone, or has lost its cards."""


Ask = Callable[[Question], Coroutine[Any, Any, Row]]
"""Has a question answered; it is cancelled where nobody wants the answer. It raises ReplicaLost."""


@dataclass
class _Call:
    """One attempt of a streamed prompt: what its reader was told of it."""

    pending: PendingRow
    stream: RowStream
    has_told: bool = False

    def take(self, told: Told) -> None:
        """Tell what a choice got."""
        delta = told.delta
        is_new = delta.restarted or not self._num_tokens.get(delta.choice)
        begin = 0 if is_new else self._num_tokens[delta.choice]
        self._num_tokens[delta.choice] = begin + len(delta.token_ids)
        chunk = TokenChunk(
            self.pending.prompt.index,
            delta.choice,
            text_at=0,
            text=delta.text,
            tokens_at=begin,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
        )
        found = self.stream.take("", chunk)
        if found is not None:
            self.has_told = True
            self.pending.told(found)

    def __post_init__(self) -> None:
        self._num_tokens: dict[int, int] = {}


class RemoteFleet:
    """Takes prompts as an `OpenFleet` does, in any thread.

    Args:
        ask: has a question answered, in the loop of who makes this.
        inbox: where tokens come in; see `told`.
        choice: which replica has what.
    """

    def __init__(self, ask: Ask, inbox: Inbox, choice: ReplicaChoice) -> None:
        self._ask = ask
        self._inbox = inbox
        self._choice = choice
        self._loop = asyncio.get_running_loop()
        self._indexes = count()
        self._numbers = count()
        self._calls: dict[int, _Call] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._states: Sequence[FleetState] = ()
        self._is_closed = False

    def stands(self, states: Sequence[FleetState]) -> None:
        """How the replicas stand now."""
        self._states = states

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """The workers of all replicas that are ready, about a second ago."""
        return tuple(worker for state in self._states for worker in state.workers)

    @property
    def engines(self) -> dict[str, EngineState]:
        """See `OpenFleet.engines`; those of a replica that was made anew are other engines."""
        return {
            name: replace(engine, engine=engine.engine + (state.pid << _ENGINE_BITS))
            for state in self._states
            for name, engine in state.engines.items()
        }

    @property
    def num_waiting(self) -> int:
        """Prompts that no worker has, in replicas or on their way."""
        running = sum(engine.running for s in self._states for engine in s.engines.values())
        return max(sum(state.num_waiting for state in self._states), self.num_open - running)

    @property
    def is_closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._is_closed

    @property
    def num_open(self) -> int:
        """Prompts that are not done."""
        return len(self._tasks)

    def submit(self, prompt: Prompt, *, wait: bool = True) -> PendingRow:
        """See `OpenFleet.submit`; there is always room, as replicas have queues.

        Raises:
            FleetClosed: it takes nothing more.
        """
        if self._is_closed:
            raise FleetClosed("The replica of the interface ends.")
        pending = PendingRow(replace(prompt, index=next(self._indexes)), self._cancel)
        self._in_loop(lambda: self._begin(pending))
        return pending

    def told(self, told: Sequence[Told]) -> None:
        """Tokens came in; called in the loop. Those of a call that is over are of no use."""
        for one in told:
            if (call := self._calls.get(one.call)) is not None:
                call.take(one)

    async def close(self) -> None:
        """Take nothing more, and cancel what is open."""
        self._is_closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one prompt, in the loop

    def _begin(self, pending: PendingRow) -> None:
        index = pending.prompt.index
        task = self._loop.create_task(self._answer(pending))
        self._tasks[index] = task
        task.add_done_callback(lambda _: self._tasks.pop(index))

    def _cancel(self, index: int) -> None:
        def cancel() -> None:
            if (task := self._tasks.get(index)) is not None:
                task.cancel()

        self._in_loop(cancel)

    def _in_loop(self, work: Callable[[], None]) -> None:
        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_here = False
        if is_here:
            work()
        else:
            self._loop.call_soon_threadsafe(work)

    async def _answer(self, pending: PendingRow) -> None:
        """Ask until there is a row: again where a replica was lost before anybody was told."""
        prompt = pending.prompt
        try:
            for attempt in range(1, MAX_LOSSES + 1):
                call = _Call(pending, RowStream(prompt.index))
                try:
                    row = await self._attempt(call)
                except ReplicaLost as error:
                    log.warning("A replica was lost under a prompt (%s).", error)
                    if call.has_told:
                        pending.fail(
                            FleetClosed(
                                "The replica was lost after the answer had begun: ask again, the "
                                "text so far is void."
                            )
                        )
                        return
                    continue
                self._done(call, replace(row, attempts=row.attempts + attempt - 1))
                return
            lost = f"{MAX_LOSSES} replicas were lost under it."
            self._done(call, Row.failed(prompt, lost, error_class=ErrorClass.DEVICE))
        except asyncio.CancelledError:
            self._done(_Call(pending, RowStream(prompt.index)), Row.cancelled(prompt))
        except Exception as error:  # told to who waits, who would wait for ever
            log.error("A prompt came to a bad end.", exc_info=error)
            words = f"{type(error).__name__} came up in qaic-ray: please report it."
            failed = Row.failed(prompt, words, error_class=ErrorClass.DEVICE)
            self._done(_Call(pending, RowStream(prompt.index)), failed)

    async def _attempt(self, call: _Call) -> Row:
        prompt, number, row = call.pending.prompt, next(self._numbers), None
        if prompt.stream:
            self._calls[number] = call
        try:
            row = await self._ask(Question(prompt, number, self._inbox, self._choice))
            return replace(row, index=prompt.index)
        finally:
            self._calls.pop(number, None)
            self._choice.end(prompt, row)

    @staticmethod
    def _done(call: _Call, row: Row) -> None:
        if call.pending.prompt.stream:
            for delta in call.stream.end(row):
                call.pending.told(delta)
        call.pending.finish(row)
