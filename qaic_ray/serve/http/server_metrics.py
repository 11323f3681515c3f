"""What a server measures, under vLLM's names, as Prometheus reads it from /metrics."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from qaic_ray.metrics import NO_ENGINE, EngineState
from qaic_ray.rows import FinishReason, Row
from qaic_ray.telemetry.names import Metric, MetricKind
from qaic_ray.telemetry.recorder import EndedRequest, RequestRecorder

CONTENT_TYPE = CONTENT_TYPE_LATEST
_VLLM = "vllm_"


class PrometheusSink:
    """Keeps values for /metrics.

    Names that begin with `vllm_` have a colon behind it, as vLLM's own server writes them.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}

    def add(self, metric: Metric, amount: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        found = self._of(metric)
        assert isinstance(found, Counter)
        found.labels(**tags).inc(amount)

    def set(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        found = self._of(metric)
        assert isinstance(found, Gauge)
        found.labels(**tags).set(value)

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        found = self._of(metric)
        assert isinstance(found, Histogram)
        found.labels(**tags).observe(value)

    def exposition(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def _of(self, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.name not in self._metrics:
            self._metrics[metric.name] = self._made(metric)
        return self._metrics[metric.name]

    def _made(self, metric: Metric) -> Counter | Gauge | Histogram:
        name = metric.name
        if name.startswith(_VLLM):
            name = f"vllm:{name.removeprefix(_VLLM)}"
        about = (name, metric.description, metric.tags)
        match metric.kind:
            case MetricKind.COUNTER:
                return Counter(*about, registry=self.registry)
            case MetricKind.GAUGE:
                return Gauge(*about, registry=self.registry)
            case MetricKind.HISTOGRAM:
                return Histogram(*about, buckets=metric.boundaries, registry=self.registry)


class ServerMetrics:
    """What requests took, by the worker that answered them.

    Args:
        model: the name that the series have.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._sink = PrometheusSink()
        self._recorders: dict[str, RequestRecorder] = {}
        self._stood: dict[str, EngineState] = {}
        self._lock = threading.RLock()  # of both: the loop's thread and the fleet's count here
        self.recorder("")

    def recorder(self, worker: str) -> RequestRecorder:
        """The recorder of a worker's requests."""
        with self._lock:
            if worker not in self._recorders:
                self._recorders[worker] = RequestRecorder(
                    self._sink, model_name=self._model, engine=worker
                )
            return self._recorders[worker]

    def looked(self, engines: Mapping[str, EngineState], num_waiting: int) -> None:
        """How the engine of each worker stands, and how many prompts no worker has.

        A worker that is not there any more has no rows.
        """
        with self._lock:
            for worker in self._recorders.keys() - engines.keys() - {""}:
                before = self._stood.get(worker, NO_ENGINE)
                gone = replace(before, running=0, waiting=0, kv_usage=0.0)
                self._recorders[worker].looked(gone)
            for worker, state in engines.items():
                self.recorder(worker).looked(state)
                self._stood[worker] = state
            self.recorder("").looked(EngineState(waiting=num_waiting))

    def ended(self, rows: Sequence[Row], arrived_at: float) -> None:
        """Rows of a request that came at `arrived_at`, Unix time in seconds."""
        with self._lock:
            for row in rows:
                self._ended(row, arrived_at)

    def _ended(self, row: Row, arrived_at: float) -> None:
        recorder = self.recorder(row.worker)
        if not row.ok:
            reason = "abort" if row.finish_reason is FinishReason.ABORT else "error"
            recorder.unanswered(reason)
            return
        end_s = 0.0 if row.ended_at is None else max(0.0, row.ended_at - arrived_at)
        first_s = max(0.0, end_s - row.decode_s)
        scheduled_s = max(0.0, first_s - max(0.0, row.ttft_s - (row.queue_s or 0.0)))
        for sample in row.choices or (row,):
            recorder.ended(
                EndedRequest(
                    finished_reason=sample.finish_reason.value,
                    prompt_tokens=row.prompt_tokens,
                    generated_tokens=len(sample.token_ids),
                    scheduled_s=scheduled_s,
                    first_token_s=first_s,
                    end_s=end_s,
                )
            )

    def exposition(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return self._sink.exposition()
