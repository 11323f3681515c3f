"""What happened in a run beside its rows: `events.jsonl` in the run folder (docs/how-to/report.md).

A line is a JSON object with `at`, the Unix time (UTC) by the driver's clock, and `event`, a name.
Each session adds to the file. A line is written at once, so all but the last survive a kill.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from qaic_ray.dispatch.dispatcher import (
    Command,
    Event,
    QuarantineWorker,
    ReplaceWorker,
    RetireWorker,
    RunShard,
    ShardFailed,
    WorkerLost,
)
from qaic_ray.errors import QaicRayError
from qaic_ray.metrics import Durations, Measurement
from qaic_ray.runs.journal import write_all
from qaic_ray.runs.result import FleetResult
from qaic_ray.worker.worker import WorkerInfo

EVENTS_NAME = "events.jsonl"
MAX_LINE_BYTES = 2**20
_MAX_ERROR_CHARS = 500

Happening = dict[str, Any]


class RunHistory(AbstractContextManager["RunHistory"]):
    """Writes a run's events. A disk that refuses ends the file, and not the run.

    Args:
        folder: the run's.
        on_fault: is told once, in a sentence, when nothing more can be written.
        clock: Unix time.
    """

    def __init__(
        self,
        folder: Path,
        on_fault: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = folder / EVENTS_NAME
        self._on_fault = on_fault
        self._clock = clock
        self._fd = -1
        self._lock = threading.Lock()
        self._has_ended = False
        self._incarnations: dict[str, int] = {}
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o666)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                write_all(self._fd, b"\n")  # behind what a killed session left half-written
        except OSError as error:
            self._give_up(error)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not self._has_ended:
            self.write("session_ended", error=_short(str(error or "")) or type(error).__name__)
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def write(self, event: str, **about: Any) -> None:
        """Add one line; any thread may."""
        line = json.dumps({"at": round(self._clock(), 3), "event": event, **about}) + "\n"
        with self._lock:
            if self._fd < 0:
                return
            try:
                write_all(self._fd, line.encode())
            except OSError as error:
                os.close(self._fd)
                self._fd = -1
                self._give_up(error)

    def worker_ready(self, info: WorkerInfo) -> None:
        """A worker has opened its cards."""
        self.write(
            "worker_ready",
            worker=info.name,
            slots=info.slots,
            device_ids=list(info.device_ids),
            load_s=round(info.load_s, 3),
            sdk=info.sdk,
            shapes=[info.prompt_len, info.ctx_len],
            incarnation=self._incarnations.get(info.name, 0),
        )

    def happened(self, event: Event | Command) -> None:
        """Something that the dispatcher heard or ordered; most of it needs no line."""
        match event:
            case RunShard(worker, _, prompts, attempt):
                if attempt > 1:
                    self.write("retried", worker=worker, attempt=attempt, prompts=len(prompts))
            case WorkerLost(worker, error):
                self.write("worker_lost", worker=worker, error=_short(error))
            case RetireWorker(worker, error):
                self.write("worker_retired", worker=worker, error=_short(error))
            case ReplaceWorker(worker, incarnation):
                self._incarnations[worker] = incarnation
                self.write("worker_reopening", worker=worker, incarnation=incarnation)
            case QuarantineWorker(worker, error):
                self.write("worker_given_up", worker=worker, error=_short(error))
            case ShardFailed(worker, _, error, retryable=True):
                self.write("shard_failed", worker=worker, error=_short(error))

    def ended(self, result: FleetResult) -> None:
        """The session ended by itself; its engines' counts are kept."""
        self._has_ended = True
        broken_off = result.broken_off
        engines = {
            worker.name: _engine_counts(worker.measurement)
            for worker in result.workers
            if worker.measurement.prefill_steps or worker.measurement.decode_steps
        }
        self.write(
            "session_ended",
            error=None if broken_off is None else _short(broken_off.error),
            engines=engines,
        )

    def _give_up(self, error: OSError) -> None:
        self._on_fault(
            f"{self._path} cannot be written ({error.strerror}): the report will lack what happens "
            "to cards from now on."
        )


class PowerWatch(AbstractContextManager["PowerWatch"]):
    """Writes the boards' power into a history, now and then, in a thread of its own.

    It stops by itself where the SDK tells of no power, or fails, which is said once.

    Args:
        watts: asks the SDK; see `Sdk.board_watts`.
        history: where it is written.
        every_s: between two questions.
        on_fault: is told in a sentence what ended it early.
    """

    def __init__(
        self,
        watts: Callable[[], Mapping[str, float]],
        history: RunHistory,
        every_s: float,
        on_fault: Callable[[str], None],
    ) -> None:
        self._watts = watts
        self._history = history
        self._every_s = every_s
        self._on_fault = on_fault
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch power", daemon=True)

    def __enter__(self) -> PowerWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; a question that is being asked is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        pause_s = self._every_s / 3  # a short run has two readings too
        while True:
            try:
                watts = self._watts()
            except QaicRayError as error:
                self._on_fault(f"The cards' power is no longer read: {error}")
                return
            if not watts or self._stopped.is_set():
                return
            self._history.write("power", watts=dict(watts))
            if self._stopped.wait(pause_s):
                return
            pause_s = self._every_s


def read_history(folder: Path) -> Iterator[Happening]:
    """A run's events, in order; none where there is no file, and no line that is not whole."""
    try:
        stream = (folder / EVENTS_NAME).open("rb")
    except FileNotFoundError:
        return
    with stream:
        while line := stream.readline(MAX_LINE_BYTES):
            try:
                happening = json.loads(line)
            except ValueError:
                continue  # half-written when its session was killed
            if isinstance(happening, dict) and isinstance(happening.get("at"), int | float):
                yield happening


def engine_work(counts: object) -> Measurement:
    """The counts of one engine as `session_ended` has them; what is not known is left at zero."""
    if not isinstance(counts, dict):
        return Measurement()
    known: dict[str, Any] = {}
    for name in _ENGINE_COUNTS:
        if isinstance(counts.get(name), int | float):
            known[name] = counts[name]
    bins = counts.get("inter_token")
    if isinstance(bins, list):
        known["inter_token"] = Durations({int(number): int(count) for number, count in bins})
    return Measurement(**known)


# Rows are counted from the journal, which has those of every session.
_ROW_COUNTS = {
    *("rows", "failed_rows", "cut_rows", "prompt_tokens", "generated_tokens"),
    *("loop_tokens", "loop_s", "ttft", "inter_token"),
}
_ENGINE_COUNTS = [each.name for each in fields(Measurement) if each.name not in _ROW_COUNTS]


def _engine_counts(work: Measurement) -> dict[str, Any]:
    counts = {name: round(getattr(work, name), 6) for name in _ENGINE_COUNTS}
    return counts | {"inter_token": sorted(work.inter_token.counts.items())}


def _short(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= _MAX_ERROR_CHARS else f"{line[:_MAX_ERROR_CHARS]}..."
