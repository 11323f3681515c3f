"""A worker's requests, engine and cards as metrics: what is recorded of them, and when."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from qaic_ray.engine.engine import Finished
from qaic_ray.metrics import EngineState
from qaic_ray.sdk import Sdk, open_sdk
from qaic_ray.telemetry.recorder import CardRecorder, EndedRequest, MetricSink, RequestRecorder
from qaic_ray.worker.spec import WorkerSpec

ENGINE_S = 1.0
"""Interval at which an engine is looked at."""
CARDS_S = 10.0
"""Interval at which a node's cards are asked for; Ray exports as often."""

_log = logging.getLogger(__name__)


class RecordedWorker(Protocol):
    """What is needed of a worker."""

    spec: WorkerSpec
    recorder: RequestRecorder

    def engine_state(self) -> EngineState:
        """How its engine stands."""


def record_ended(recorder: RequestRecorder, done: Finished, arrived_s: float) -> None:
    """Record a sequence that ended; it came at `arrived_s` by the engine's clock."""
    reason = done.sequence.finish_reason
    if done.error is not None or reason is None:
        recorder.unanswered("error")
        return
    first_s = done.entered_s + done.ttft_s - arrived_s
    request = EndedRequest(
        finished_reason=reason.value,
        prompt_tokens=len(done.sequence.prompt_ids),
        generated_tokens=len(done.sequence.output_ids),
        scheduled_s=done.scheduled_s - arrived_s,
        first_token_s=first_s,
        end_s=first_s + done.decode_s,
    )
    recorder.ended(request)


class WorkerRecording(AbstractContextManager["WorkerRecording"]):
    """Records all that a worker does until `close`, in threads of its own.

    Args:
        worker: what it does; it need not be open yet.
        sink: where values go.
        cards_lock: gives a file that the workers of a node share: whoever holds it records the
            cards of the node, those of no worker too, and another one where that has ended.
    """

    def __init__(
        self, worker: RecordedWorker, sink: MetricSink, cards_lock: Callable[[], Path]
    ) -> None:
        self._worker = worker
        self._recorder = worker.recorder = RequestRecorder(
            sink, model_name=worker.spec.model, engine=worker.spec.name
        )
        self._cards = CardRecorder(sink)
        self._cards_lock = cards_lock
        self._lock: int | None = None
        self._sdk: Sdk | None = None
        self._closed = threading.Event()
        self._threads = [
            self._start("record engine", ENGINE_S, self.look_at_engine),
            self._start("record cards", CARDS_S, self.look_at_cards),
        ]

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Record once more how the engine stands, and stop."""
        self._closed.set()
        for thread in self._threads:
            thread.join(ENGINE_S)  # one may wait for qaic-util
        self.look_at_engine()
        if self._lock is not None:
            os.close(self._lock)

    def look_at_engine(self) -> None:
        """Record how the engine stands now."""
        self._recorder.looked(self._worker.engine_state())

    def look_at_cards(self) -> None:
        """Record the cards of this node, where no other worker does."""
        if not self._holds_lock():
            return
        self._sdk = self._sdk or open_sdk(Path(self._worker.spec.sdk_root))
        self._cards.looked(self._sdk.devices())

    def _holds_lock(self) -> bool:
        if self._lock is None:
            lock = os.open(self._cards_lock(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    def _start(self, name: str, interval_s: float, look: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._watch, args=(interval_s, look), name=name)
        thread.daemon = True
        thread.start()
        return thread

    def _watch(self, interval_s: float, look: Callable[[], None]) -> None:
        is_said = False
        while True:
            try:
                look()
            except Exception as error:  # noqa: BLE001 - a run does not end of its metrics
                if not is_said:
                    _log.warning("%s: not recorded: %s", self._worker.spec.name, error)
                    is_said = True
            if self._closed.wait(interval_s):
                return
