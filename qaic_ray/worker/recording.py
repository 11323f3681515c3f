"""A worker's requests, engine and cards as metrics: what is recorded of them, and when."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from qaic_ray.engine.engine import Finished
from qaic_ray.metrics import EngineState
from qaic_ray.rows import FinishReason
from qaic_ray.sdk import Sdk, open_sdk
from qaic_ray.telemetry.recorder import CardRecorder, EndedRequest, MetricSink, RequestRecorder
from qaic_ray.telemetry.repeating import Repeating
from qaic_ray.timeouts import Timeouts


class RecordedSpec(Protocol):
    """What is needed of a worker's spec."""

    @property
    def name(self) -> str:
        """The worker's."""

    @property
    def model(self) -> str:
        """As it was named."""

    @property
    def sdk_root(self) -> str:
        """The SDK's folder."""

    @property
    def timeouts(self) -> Timeouts:
        """`record_engine_s` and `record_cards_s` are used."""


class RecordedWorker(Protocol):
    """What is needed of a worker."""

    @property
    def spec(self) -> RecordedSpec:
        """What it was given."""

    recorder: RequestRecorder

    def engine_state(self) -> EngineState:
        """How its engine stands."""


def record_ended(recorder: RequestRecorder, done: Finished, arrived_s: float) -> None:
    """Record a sequence that ended; it came at `arrived_s` by the engine's clock."""
    reason = done.sequence.finish_reason
    if done.error is not None or reason is None:
        recorder.unanswered("error")
        return
    if reason is FinishReason.ABORT:
        recorder.unanswered("abort")
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
        name, timeouts = worker.spec.name, worker.spec.timeouts
        self._looks = (
            Repeating(self.look_at_engine, timeouts.record_engine_s, f"record engine of {name}"),
            Repeating(self.look_at_cards, timeouts.record_cards_s, f"record cards by {name}"),
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Record once more how the engine stands, and stop; a second call does the same."""
        for look in self._looks:
            look.close(self._worker.spec.timeouts.record_engine_s)  # one may wait for qaic-util
        self.look_at_engine()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def look_at_engine(self) -> None:
        """Record how the engine stands now."""
        self._recorder.looked(self._worker.engine_state())

    def look_at_cards(self) -> None:
        """Record the cards of this node, where no other worker does."""
        if not self._holds_lock():
            return
        self._sdk = self._sdk or open_sdk(Path(self._worker.spec.sdk_root))
        self._cards.looked(self._sdk.card_lines())

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
