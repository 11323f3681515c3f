"""How a grid that is compiled stands."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from qaic_ray.cli.live.live_text import GridView
from qaic_ray.compile.store import BuildRequest, build_log


class GridWatch:
    """Keeps up which variants are built; another thread may ask for the view.

    Args:
        total: variants.
        clock: seconds.
    """

    def __init__(self, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._total, self._done, self._failed = total, 0, 0
        self._building: dict[str, tuple[float, BuildRequest]] = {}

    def began(self, request: BuildRequest) -> None:
        """The build of one begins."""
        with self._lock:
            self._building[request.variant.label] = self._clock(), request

    def ended(self, label: str, *, ok: bool) -> bool:
        """One is there, or failed; whether that was the last."""
        with self._lock:
            self._building.pop(label, None)
            self._done += 1
            self._failed += not ok
            return self._done == self._total

    def view(self) -> GridView:
        """How it stands now."""
        with self._lock:
            now_s = self._clock()
            building = {label: now_s - at_s for label, (at_s, _) in self._building.items()}
            first = next(iter(self._building.values()), None)
            log = None if first is None else build_log(first[1])
            shown = "" if log is None else os.path.relpath(log)
            return GridView(self._total, self._done, self._failed, building, shown)
