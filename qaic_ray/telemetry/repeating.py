"""A call that is made again and again, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

_log = logging.getLogger(__name__)


class Repeating(AbstractContextManager["Repeating"]):
    """Calls `look` at once and then at an interval, until `close` or the end of the process.

    What it raises is logged, the first time, and ends nothing.

    Args:
        look: what is called.
        interval_s: seconds between its end and its next beginning.
        what: names it, for the log.
    """

    def __init__(self, look: Callable[[], None], interval_s: float, what: str) -> None:
        self._look = look
        self._interval_s = interval_s
        self._what = what
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout_s: float | None = None) -> None:
        """Stop, and wait so long for a call that is being made."""
        self._closed.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        is_said = False
        while True:
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - a viewer's fault is no one else's
                if not is_said:
                    _log.warning("%s: %s", self._what, error)
                    is_said = True
            if self._closed.wait(self._interval_s):
                return
