"""Sees when the Ray that a driver works on is gone: a call into it might then wait for ever.

A thread with a clock of its own. Of a Ray that we started it looks at the two processes that all
rests on; of a cluster it has another thread ask, and sees how long no answer has come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from qaic_ray import interruption

POLL_S = 0.5
ASK_EVERY_S = 3.0
SILENT_S = 30.0
"""How long a cluster's head may be silent. Ray itself ends its driver, without a word, after 60."""


class ClusterWatch:
    """Watches until `close`; a loss interrupts the thread that made this, if it is the main one.

    Args:
        dead: asked twice a second: what of the Ray is gone, as a sentence; must not call into Ray.
        ask: asked every few seconds, in a thread of its own, where there is no better way to know:
            a call into the Ray that fails or does not return while that is gone.
        what: names the cluster in the sentence about its silence.
        on_loss: called once, before the interruption.
    """

    def __init__(
        self,
        *,
        dead: Callable[[], str | None] = lambda: None,
        ask: Callable[[], object] | None = None,
        what: str = "The Ray cluster",
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self.loss: str | None = None
        """What is gone, as a sentence."""
        self._dead = dead
        self._ask = ask
        self._what = what
        self._on_loss = on_loss
        self._interrupts = interruption.can_interrupt()
        self._answered_s = time.monotonic()
        self._closed = threading.Event()
        if ask is not None:
            threading.Thread(target=self._ask_on, name="ask Ray", daemon=True).start()
        self._thread = threading.Thread(target=self._watch, name="watch Ray", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer; after this nothing is interrupted."""
        self._closed.set()
        self._thread.join()
        interruption.clear_loss()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            self.loss = self._dead() or self._silence()
            if self.loss is not None:
                self._on_loss()
                if self._interrupts and not self._closed.is_set():
                    interruption.report_loss(self.loss)
                return

    def _silence(self) -> str | None:
        silent_s = time.monotonic() - self._answered_s
        if self._ask is None or silent_s < SILENT_S:
            return None
        return f"{self._what} has not answered for {silent_s:.0f} s"

    def _ask_on(self) -> None:
        assert self._ask is not None
        while not self._closed.wait(ASK_EVERY_S):
            if self._ask():
                self._answered_s = time.monotonic()


def call_for(timeout_s: float, call: Callable[[], object]) -> bool:
    """Make a call in a thread of its own, and wait so long for it; whether it returned in time."""
    thread = threading.Thread(target=call, name="call Ray", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()
