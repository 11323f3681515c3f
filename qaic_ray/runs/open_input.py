"""An input that stays open: any thread puts prompts into it, and a driver reads them as they come.

Beside what waits it holds nothing: a million prompts take no more memory than one.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from qaic_ray.runs.intake import Batch

if TYPE_CHECKING:
    from qaic_ray.rows import Prompt
    from qaic_ray.runs.intake import Intake


class OpenInput:
    """Prompts by rising index until `end`; what a driver asks of its reader.

    Attributes:
        poll_s: seconds until `poll` is to be called again: whoever puts something wakes the driver.
    """

    poll_s = math.inf

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Prompt, int]] = deque()
        self._ended = False
        self._num_wanted = 0
        self._intake: Intake | None = None
        self._wake: Callable[[], None] | None = None

    def __len__(self) -> int:
        """Prompts that the driver has not read."""
        return len(self._waiting)

    def put(self, prompt: Prompt, digest: int = 0) -> None:
        """Add a prompt; its index is above those before it.

        Args:
            prompt: for the next worker that has room.
            digest: of its content, for the journal.
        """
        self._waiting.append((prompt, digest))
        self._tell()

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            wake = self._wake
        if wake is not None:
            wake()

    # -- the driver's side

    def read_by(self, intake: Intake, wake: Callable[[], None]) -> None:
        """A driver begins to read.

        Args:
            intake: counts what is read, and keeps the digests of what is open.
            wake: ends the driver's wait; called by any thread.
        """
        with self._lock:
            self._intake, self._wake = intake, wake

    def ask(self, num_items: int) -> None:
        """Ask for so many items; what was asked for before has been given."""
        self._num_wanted = num_items

    def poll(self) -> Batch | None:
        """All that is there, up to what was asked for; None while that is nothing."""
        is_over, intake = self._ended, self._intake  # before what waits is looked at
        assert intake is not None
        items: list[Prompt] = []
        while self._waiting and len(items) < self._num_wanted:
            prompt, digest = self._waiting.popleft()
            intake.open[prompt.index] = digest
            items.append(prompt)
        intake.num_rows += len(items)
        if not items and not is_over:
            return None
        is_all = not self._waiting
        return Batch(tuple(items), exhausted=is_over and is_all, is_dry=is_all)

    def close(self) -> None:
        """Nobody reads any more."""
        with self._lock:
            self._wake = None
