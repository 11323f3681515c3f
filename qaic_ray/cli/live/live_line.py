"""The live line at the end of stderr, drawn again and again; off a terminal a log line at times.

It is drawn by a thread of its own, so that what is drawn never keeps the work waiting.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import count
from typing import Any

from rich.console import Console

from qaic_ray.cli.live.live_text import (
    PLAIN_SPINNER,
    SPINNER,
    View,
    live_lines,
    log_document,
    log_line,
)
from qaic_ray.runs.run_view import RunView

DRAW_EVERY_S = 0.25
DRAW_AT_LEAST_EVERY_S = 0.9
COST_LIMIT = 0.008
"""Share of a core that drawing may take: with very many cards it is drawn less often."""
LOG_EVERY_S = 10.0
_ERASE_LINE = "\r\x1b[2K"
_ERASE_LINE_ABOVE = "\x1b[1A\x1b[2K"


def can_redraw() -> bool:
    """Whether stderr is a terminal on which a line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


class LiveLine:
    """What goes on, on stderr, from `show` to `stop`.

    Args:
        as_json: log lines are objects of JSON; nothing is drawn again then.
        verbose: a line a card too.
    """

    def __init__(self, *, as_json: bool = False, verbose: bool = False) -> None:
        self._as_json, self._verbose = as_json, verbose
        self._redraws = can_redraw() and not as_json
        self._console = Console(stderr=True, highlight=False, soft_wrap=False)
        encoding = (getattr(sys.stderr, "encoding", None) or "").lower()
        self._frames = SPINNER if encoding.startswith("utf") else PLAIN_SPINNER
        self._lock = threading.RLock()
        self._wakes = threading.Event()
        self._ask: Callable[[], View] | None = None
        self._thread: threading.Thread | None = None
        self._num_drawn = 0
        self._is_hidden = False
        self._frame_numbers = count()
        self._logged_s = 0.0
        self._has_logged_rows = False

    def show(self, ask: Callable[[], View]) -> None:
        """Show this from now on; `ask` is called by another thread, again and again."""
        with self._lock:
            self._ask, self._is_hidden = ask, False
            self._logged_s, self._has_logged_rows = time.monotonic(), False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="live line", daemon=True)
                self._thread.start()
        self._wakes.set()

    def stop(self) -> None:
        """Show nothing more; off a terminal a run has said at least once how far it came."""
        with self._lock:
            ask, self._ask = self._ask, None
            self._erase()
            if ask is not None and not self._redraws and not self._has_logged_rows:
                self._log(ask(), rows_only=True)

    @contextmanager
    def paused(self, *, hide: bool = False) -> Iterator[None]:
        """Whatever is printed within is not mixed with the line.

        Args:
            hide: leave the line away behind it, until `unhide`.
        """
        with self._lock:
            self._erase()
            try:
                yield
            finally:
                self._is_hidden = self._is_hidden or hide

    def unhide(self) -> None:
        """Draw the line again."""
        with self._lock:
            self._is_hidden = False

    def draw(self) -> None:
        """Draw now what there is."""
        with self._lock:
            if self._ask is None:
                return
            view = self._ask()
            if not self._redraws:
                self._log_if_due(view)
            elif not self._is_hidden:
                self._redraw(view)

    def _run(self) -> None:
        while True:
            self._wakes.wait()
            before_s = time.thread_time()
            try:
                self.draw()
            except Exception as error:  # noqa: BLE001  # it may not end the run, but is said
                with self._lock:
                    self._ask = None
                sys.stderr.write(f"qaic-ray: the live line ends ({error!r}); the run goes on.\n")
            if self._ask is None:
                self._wakes.clear()
            rest_s = (time.thread_time() - before_s) / COST_LIMIT
            time.sleep(max(DRAW_EVERY_S, min(rest_s, DRAW_AT_LEAST_EVERY_S)))

    def _redraw(self, view: View) -> None:
        frame = self._frames[next(self._frame_numbers) % len(self._frames)]
        width = max(10, self._console.width - 1)  # the last column may wrap
        lines = live_lines(view, width=width, frame=frame, verbose=self._verbose)
        with self._console.capture() as captured:
            for number, line in enumerate(lines):
                self._console.print(line, end="" if number == len(lines) - 1 else "\n")
        sys.stderr.write(self._erasing() + captured.get())
        sys.stderr.flush()
        self._num_drawn = len(lines)

    def _erase(self) -> None:
        if self._num_drawn:
            sys.stderr.write(self._erasing())
            sys.stderr.flush()
            self._num_drawn = 0

    def _erasing(self) -> str:
        if not self._num_drawn:
            return ""
        return _ERASE_LINE + _ERASE_LINE_ABOVE * (self._num_drawn - 1)

    def _log_if_due(self, view: View) -> None:
        has_rows = isinstance(view, RunView) and view.rows_done > 0
        is_first = has_rows and not self._has_logged_rows
        if is_first or time.monotonic() - self._logged_s >= LOG_EVERY_S:
            self._log(view)

    def _log(self, view: View, *, rows_only: bool = False) -> None:
        has_rows = isinstance(view, RunView) and view.rows_done > 0
        if rows_only and not has_rows:
            return
        self._logged_s = time.monotonic()
        self._has_logged_rows = self._has_logged_rows or has_rows
        if self._as_json:
            write_json_line(log_document(view, verbose=self._verbose))
        else:
            sys.stderr.write(log_line(view, verbose=self._verbose) + "\n")
        sys.stderr.flush()


def write_json_line(document: dict[str, Any]) -> None:
    """One object of JSON with the time, on a line of stderr."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    sys.stderr.write(json.dumps({"time": now, **document}, ensure_ascii=False) + "\n")
