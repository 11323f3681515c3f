"""A fleet whose rows are counted in /metrics: that of batches, which no route waits for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from qaic_ray.fleet.pending_row import PendingRow
from qaic_ray.rows import Prompt, Row
from qaic_ray.serve.http.server_metrics import ServerMetrics

if TYPE_CHECKING:
    from qaic_ray.worker.worker import WorkerInfo


class AnswersPrompts(Protocol):
    """What is asked of the fleet."""

    @property
    def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are ready."""

    def submit(self, prompt: Prompt, *, wait: bool) -> PendingRow:
        """See `OpenFleet.submit`."""


class CountedFleet:
    """The same fleet, with each of its rows told to the metrics.

    Args:
        fleet: answers.
        metrics: count; a row came when its worker had it.
    """

    def __init__(self, fleet: AnswersPrompts, metrics: ServerMetrics) -> None:
        self._fleet = fleet
        self._metrics = metrics

    @property
    def workers(self) -> Sequence[WorkerInfo]:
        """The workers that are ready."""
        return self._fleet.workers

    def submit(self, prompt: Prompt, *, wait: bool) -> PendingRow:
        """See `OpenFleet.submit`."""
        pending = self._fleet.submit(prompt, wait=wait)

        def told() -> None:
            if isinstance(row := pending.ended, Row):
                self._metrics.ended([row], row.started_at or time.time())

        pending.listen(told)
        return pending
