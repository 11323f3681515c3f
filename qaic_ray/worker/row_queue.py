"""From the engine's thread to the one that answers a shard: items one by one in, handfuls out."""

from __future__ import annotations

import queue
import time
from typing import Generic, TypeVar

from qaic_ray.errors import QaicRayError

GATHER_S = 0.05
"""What ends within so long is handed over together: each handful of rows costs the driver about as
much as ten rows do."""

Item = TypeVar("Item")


class RowQueue(Generic[Item]):
    """A queue between two threads, which an error ends."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item | QaicRayError] = queue.SimpleQueue()
        self._error: QaicRayError | None = None

    def put(self, item: Item | QaicRayError) -> None:
        """Add one; nothing may follow an error."""
        self._items.put(item)

    def take(self, most: int) -> list[Item]:
        """Wait for one, and take what comes soon after it, up to `most`.

        Raises:
            QaicRayError: the one that was put, when all before it has been taken.
        """
        if self._error is not None:
            raise self._error
        taken: list[Item] = []
        until_s = None
        while len(taken) < most:
            try:
                item = self._items.get(timeout=_left_s(until_s))
            except queue.Empty:
                break
            if isinstance(item, QaicRayError):
                self._error = item
                if not taken:
                    raise item
                break
            taken.append(item)
            until_s = until_s or time.monotonic() + GATHER_S
        return taken


def _left_s(until_s: float | None) -> float | None:
    return None if until_s is None else max(0.0, until_s - time.monotonic())
