"""A fleet that stays open, over the driver of a run in a thread of its own.

    submit (any thread) -> OpenInput -> Driver (its thread) -> Audience -> PendingRow

What it is driven by, cards on Ray or simulated ones, is the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from qaic_ray.dispatch.dispatcher import (
    Command,
    Event,
    QuarantineWorker,
    ReplaceWorker,
    RetireWorker,
    WorkerLost,
)
from qaic_ray.errors import FleetBusy, FleetClosed, QaicRayError
from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience, Progress
from qaic_ray.runs.open_input import OpenInput
from qaic_ray.runs.run_view import RunFollower, RunView
from qaic_ray.runs.token_streams import RowStream, TokenDelta

if TYPE_CHECKING:
    from qaic_ray.fleet.kept_rows import KeptRows
    from qaic_ray.metrics import EngineState, EngineTotals
    from qaic_ray.runs.result import FleetResult
    from qaic_ray.worker.worker import WorkerInfo

Drive = Callable[[OpenInput, Audience], "FleetResult"]
"""Answers an open input until it ends; it is called in the fleet's thread."""

_CLOSED = "The fleet was closed."


class OpenFleet(AbstractContextManager["OpenFleet"]):
    """Takes prompts at any time, from any thread, until it is closed.

    Attributes:
        result: what the driver counted, once the fleet has ended by itself or was closed.

    Args:
        drive: answers the input.
        kept: answers of earlier sessions; a prompt that has one there does not run.
        max_open: prompts that may be open at once, running ones included; None for no limit.
        audience: is told too, in the fleet's thread.
    """

    def __init__(
        self,
        drive: Drive,
        *,
        kept: KeptRows | None = None,
        max_open: int | None = None,
        audience: Audience | None = None,
    ) -> None:
        self.result: FleetResult | None = None
        self._drive = drive
        self._kept = kept
        self._max_open = max_open
        self._told = audience or Audience()
        self._input = OpenInput()
        self._follower = RunFollower()
        self._lock = threading.Condition()
        self._open: dict[int, PendingRow] = {}
        self._next_index = kept.next_index if kept else 0
        self._infos: dict[str, WorkerInfo] = {}
        self._cancel_rows: Callable[[Iterable[int]], None] | None = None
        self._to_cancel: list[int] = []  # since before the driver began
        self._closed: FleetClosed | None = None
        self._is_ready = threading.Event()
        # A daemon: a program that forgets to close the fleet must end all the same.
        self._thread = threading.Thread(target=self._run, name="open fleet", daemon=True)
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close it; after an error nothing that is open is waited for."""
        self.close(drain=kind is None)

    # -- prompts

    def submit(
        self, prompt: Prompt, *, wait: bool = True, timeout_s: float | None = None
    ) -> PendingRow:
        """Give it a prompt; whatever index that has, it gets the next one.

        Args:
            prompt: with `stream` its tokens are told as they come.
            wait: for room, where `max_open` prompts are open.
            timeout_s: how long.

        Raises:
            FleetBusy: there is no room.
            FleetClosed: it takes nothing more, and says why.
        """
        digest, row = (0, None) if self._kept is None else self._kept.take(prompt)
        with self._lock:
            if row is None:
                self._await_room(wait, timeout_s)
            self._refuse_closed()
            index = self._next_index if row is None else row.index
            pending = PendingRow(replace(prompt, index=index), self._cancel)
            if row is None:
                self._next_index += 1
                self._open[index] = pending
                self._input.put(pending.prompt, digest)
        if row is not None:
            for delta in RowStream(index).end(row) if prompt.stream else ():
                pending.told(delta)
            pending.finish(row)
        return pending

    def _await_room(self, wait: bool, timeout_s: float | None) -> None:
        most = self._max_open
        if most is None:
            return
        has_room = self._lock.wait_for(
            lambda: len(self._open) < most or self._closed is not None,
            timeout_s if wait else 0.0,
        )
        if not has_room:
            raise FleetBusy(f"{most} prompts are open, as many as may be: try again later.")

    def _refuse_closed(self) -> None:
        if self._closed is not None:
            raise FleetClosed(str(self._closed)) from self._closed

    def _cancel(self, index: int) -> None:
        with self._lock:
            if index in self._open:
                self._cancel_all((index,))

    def _cancel_all(self, indexes: Sequence[int]) -> None:
        if self._cancel_rows is None:
            self._to_cancel += indexes
        else:
            self._cancel_rows(indexes)

    # -- how it stands

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until a worker is ready.

        Raises:
            QaicRayError: what ended the fleet before that.
            TimeoutError: after `timeout_s`.
        """
        if not self._is_ready.wait(timeout_s):
            raise TimeoutError("No worker is ready.")
        closed = self._closed
        if closed is not None:
            raise closed.__cause__ if isinstance(closed.__cause__, QaicRayError) else closed

    @property
    def is_closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._closed is not None

    @property
    def num_open(self) -> int:
        """Prompts that are not done."""
        return len(self._open)

    @property
    def num_running(self) -> int:
        """Prompts that workers have."""
        return min(self._follower.num_given, len(self._open))

    @property
    def num_waiting(self) -> int:
        """Prompts that no worker has."""
        return max(0, len(self._open) - self._follower.num_given)

    @property
    def num_slots(self) -> int:
        """Rows that all ready workers run side by side."""
        return sum(info.slots for info in self.workers)

    @property
    def engines(self) -> dict[str, EngineState]:
        """How the engine of each ready worker stood when it was asked last, about a second ago.

        Its rows are sequences, one for each sample of a prompt; its token counts are its own, and
        begin anew with each engine, whose number rises. Those of all that the fleet has had are in
        `engine_totals`.
        """
        cards = self._follower.view().cards
        return {card.name: card.engine for card in cards if card.name in self._infos}

    @property
    def engine_totals(self) -> EngineTotals:
        """Tokens of all engines that the fleet has had: counts that only rise."""
        return self._follower.engine_totals

    @property
    def kv_usage(self) -> float:
        """The share of all slots' cache positions that running rows use, of 0 to 1."""
        engines, workers = self.engines, self.workers
        used = sum(engines[i.name].kv_usage * i.slots for i in workers if i.name in engines)
        return used / max(1, sum(info.slots for info in workers))

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """The workers that are ready."""
        return tuple(self._infos.values())

    def view(self) -> RunView:
        """How it stands: each card, tokens a second, rows by their ends."""
        return self._follower.view()

    # -- its end

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take nothing more, end what is open, give the cards back. Any number of calls.

        Args:
            drain: answer what is open; else it is cancelled.
            timeout_s: how long to wait for the end.
        """
        with self._lock:
            if self._closed is None:
                self._closed = FleetClosed(_CLOSED)
                self._lock.notify_all()
            if not drain:
                self._cancel_all(list(self._open))
        self._input.end()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        cause: BaseException | None = None
        why = _CLOSED
        try:
            self.result = self._drive(self._input, self._audience())
            if self.result.broken_off is not None:
                why = _why_broken_off(self.result)
        except BaseException as error:  # noqa: BLE001  # told to all who wait, as their cause
            cause = error
            named = str(error) if isinstance(error, QaicRayError) else repr(error)
            why = f"The fleet has ended: {named}"
        self._end(why, cause)

    def _end(self, why: str, cause: BaseException | None) -> None:
        error = FleetClosed(why)
        error.__cause__ = cause
        with self._lock:
            if self._closed is None or cause is not None:
                self._closed = error
            left = list(self._open.values())
            self._open.clear()
            self._infos.clear()
            self._cancel_rows = None
            self._lock.notify_all()
        for pending in left:
            pending.fail(error)
        self._is_ready.set()

    # -- what the driver tells, in the fleet's thread

    def _audience(self) -> Audience:
        told = self._told

        def on_worker_ready(info: WorkerInfo) -> None:
            self._infos[info.name] = info
            self._is_ready.set()
            told.on_worker_ready(info)

        def on_event(event: Event | Command) -> None:
            match event:
                case (
                    WorkerLost(worker)
                    | RetireWorker(worker)
                    | ReplaceWorker(worker)
                    | QuarantineWorker(worker)
                ):
                    self._infos.pop(worker, None)
            self._follower.change(event)
            told.on_event(event)

        def on_progress(progress: Progress) -> None:
            self._follower.counted(
                rows_read=progress.rows_read,
                rows_done=progress.rows_done,
                rows_failed=progress.rows_failed,
                exhausted=progress.input_exhausted,
            )
            told.on_progress(progress)

        return replace(
            told,
            on_worker_ready=on_worker_ready,
            on_saved=self._saved,
            on_tokens=self._generated,
            on_begin=self._begun,
            on_event=on_event,
            on_progress=on_progress,
        )

    def _begun(self, cancel: Callable[[Iterable[int]], None]) -> None:
        with self._lock:
            self._cancel_rows = cancel
            self._cancel_all(self._to_cancel)
            self._to_cancel = []

    def _saved(self, row: Row) -> None:
        with self._lock:
            pending = self._open.pop(row.index)
            self._lock.notify()
        self._told.on_saved(row)
        pending.finish(row)

    def _generated(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            if (pending := self._open.get(delta.index)) is not None:
                pending.told(delta)


def _why_broken_off(result: FleetResult) -> str:
    """Why a fleet has ended by itself, with the last error of each worker."""
    assert result.broken_off is not None
    errors = {worker.error.rstrip("."): worker.name for worker in result.workers if worker.error}
    named = "; ".join(f"{name}: {error}" for error, name in errors.items())
    return f"{result.broken_off.error}{f' ({named}.)' if named else ''}"
