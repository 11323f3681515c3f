"""What the actors and tasks of a run print, as files of the run folder: `logs/card-3.log`.

Ray's log monitor on each node reads what its processes have written and sends it to the driver, so
this has also the last words of a process that was killed, and those of other nodes.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher

MAX_LOG_BYTES = 4 * 2**20
"""A log that is longer becomes `NAME.log.1`, in the place of the one before, and a new one begins:
what was printed last is there, in at most twice as many bytes."""
MAX_EARLY_LINES = 10_000
"""Lines that are kept until there is a run folder; the last ones are."""
QUIET_S = 0.3
"""When nothing has come for this long after the end of what prints, nothing more will."""
MAX_FLUSH_S = 2.0


class WorkerLogs(AbstractContextManager["WorkerLogs"]):
    """Listens to what this driver's actors and tasks print, from `__enter__` to `__exit__`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._early: deque[tuple[str, str]] = deque(maxlen=MAX_EARLY_LINES)
        self._folder: Path | None = None
        self._on_error: Callable[[str], None] = lambda _: None
        self._failed = False
        self._heard_s = 0.0
        self._name = f"qaic-ray logs {id(self)}"

    def __enter__(self) -> WorkerLogs:
        global_worker_stdstream_dispatcher.add_handler(self._name, self.hear)
        return self

    def __exit__(self, *_: object) -> None:
        global_worker_stdstream_dispatcher.remove_handler(self._name)

    def write_to(self, folder: Path, on_error: Callable[[str], None]) -> None:
        """Write everything to this folder from now on, and first what was printed before.

        Args:
            folder: is there.
            on_error: told once, by a sentence, when a log cannot be written; none is from then on.
        """
        with self._lock:
            self._folder, self._on_error, self._failed = folder, on_error, False
            while self._early:
                name, line = self._early.popleft()
                self._write(name, [line])

    def flush(self) -> None:
        """Wait for what is still on its way from processes that have ended."""
        deadline_s = time.monotonic() + MAX_FLUSH_S
        self._heard_s = time.monotonic()
        while time.monotonic() < min(deadline_s, self._heard_s + QUIET_S):
            time.sleep(QUIET_S / 10)

    def hear(self, said: Mapping[str, Any]) -> None:
        """Take lines of one process, as Ray's log monitor describes them."""
        name = said["actor_name"] or said["task_name"]
        if not (said["job"] and name):
            return  # of Ray itself
        with self._lock:
            self._heard_s = time.monotonic()
            if self._folder is None:
                self._early.extend((name, line) for line in said["lines"])
            else:
                self._write(name, said["lines"])

    def _write(self, name: str, lines: Sequence[str]) -> None:
        if self._failed or self._folder is None:
            return
        path = self._folder / f"{file_stem(name)}.log"
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(f"{line}\n" for line in lines)
                size = stream.tell()
            if size > MAX_LOG_BYTES:
                path.replace(path.with_name(f"{path.name}.1"))
        except OSError as error:
            self._failed = True
            self._on_error(f"The log {path} cannot be written ({error.strerror}).")


def file_stem(name: str) -> str:
    """The beginning of the name of a file for what an actor or a task of this name prints."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:150] or "unnamed"


def say(text: str) -> None:
    """Put a line with its time into the log of this process, an actor's or a task's."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stderr.flush()
