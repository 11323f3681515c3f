"""What a driver asks of the cards of its run: actors on Ray, or simulated ones in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from qaic_ray.dispatch.dispatcher import Event, RunShard
from qaic_ray.metrics import Measurement

if TYPE_CHECKING:
    from qaic_ray.worker.worker import WorkerInfo


class Cards(Protocol):
    """The workers of a run; opening each for the first time has begun.

    Only `wait` blocks. A card that is gone is an event, and no error.
    """

    @property
    def names(self) -> Sequence[str]:
        """Every worker that is being opened."""

    def wait(self, timeout_s: float | None) -> Event | None:
        """Block until a worker has something to say, and return it; None after `timeout_s`.

        Every few seconds each worker that is ready is asked for its engine's steps, without waiting
        for the answer, which is returned later as a WorkerProgress. The first one, of 0 steps,
        follows WorkerReady at once, so that a worker that never answers is watched too.

        Raises:
            UsageError: a worker found that the request itself is wrong.
        """

    def wake(self) -> None:
        """Have `wait` return soon, where these cards can; any thread may call it."""

    def run(self, shard: RunShard) -> None:
        """Begin a shard; rows are answered in the order of its prompts, behind older shards.

        `wait` returns its RowsFinished, then one ShardFinished or ShardFailed, or WorkerLost for
        all that the worker held. Where prompts have `stream`, it also returns TokensGenerated.
        """

    def cancel(self, worker: str, indexes: Sequence[int]) -> None:
        """End these rows on a worker, those that it still has; nothing where it is gone."""

    def retire(self, worker: str) -> None:
        """End a worker's process at once, if it is there; `wait` returns nothing more of it."""

    def replace(self, worker: str, incarnation: int) -> None:
        """Retire a worker, and begin to open it again with the same cards.

        `wait` returns WorkerReady or WorkerLost with this incarnation.
        """

    def quarantine(self, worker: str, error: str) -> None:
        """Retire a worker for the rest of the run; its cards are given back."""

    def info(self, worker: str) -> WorkerInfo:
        """The slots, shapes and process of a worker that is ready."""

    def measurements(self) -> Mapping[str, Measurement]:
        """The engine's counts of every worker that still lives, since it was last opened."""
