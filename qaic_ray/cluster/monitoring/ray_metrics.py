"""Metrics on Ray: the sink over `ray.util.metrics`, and where Prometheus finds them.

Each node's agent exports what its actors and drivers record, about every ten seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
import ray._private.worker
from ray.util.metrics import Counter, Gauge, Histogram

from qaic_ray.files.folders import write_whole
from qaic_ray.telemetry.monitoring import targets_folder
from qaic_ray.telemetry.names import METRICS, Metric, MetricKind
from qaic_ray.telemetry.recorder import GuardedSink, RunRecorder
from qaic_ray.telemetry.repeating import Repeating
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts
from qaic_ray.worker.recording import RecordedWorker, WorkerRecording


class RaySink:
    """Keeps values in this process's metrics of Ray; the process is a driver or an actor."""

    def __init__(self) -> None:
        self._metrics: dict[str, Counter | Gauge | Histogram] = {
            metric.name: _of_ray(metric) for metric in METRICS
        }

    def add(self, metric: Metric, amount: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        if amount:
            self._metrics[metric.name].inc(amount, tags)
        else:
            # `inc` refuses 0, and without it a counter's first events have no rate.
            self._metrics[metric.name]._metric.record(0, tags=tags)

    def set(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        self._metrics[metric.name].set(value, tags)

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        self._metrics[metric.name].observe(value, tags)


def _of_ray(metric: Metric) -> Counter | Gauge | Histogram:
    match metric.kind:
        case MetricKind.COUNTER:
            return Counter(metric.name, metric.description, metric.tags)
        case MetricKind.GAUGE:
            return Gauge(metric.name, metric.description, metric.tags)
        case MetricKind.HISTOGRAM:
            boundaries = list(metric.boundaries)
            return Histogram(metric.name, metric.description, boundaries, metric.tags)


def record_worker(worker: RecordedWorker) -> WorkerRecording:
    """Record what a worker does, in its actor, until the actor ends."""
    return WorkerRecording(worker, GuardedSink(RaySink), _cards_lock)


def _cards_lock() -> Path:
    """One file of each node, which goes with its Ray."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    return session / f"qaic-cards-{ray.get_runtime_context().get_node_id()}.lock"


@contextmanager
def recorded_run(
    run: str, on_fault: Callable[[str], None], timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> Iterator[RunRecorder]:
    """The recorder of a run, in its driver; in this context Prometheus finds the run's nodes.

    Args:
        run: its name.
        on_fault: is told, in a sentence, why there are no metrics.
        timeouts: `record_run_s` is used.
    """
    recorder = RunRecorder(GuardedSink(RaySink, on_fault), run)
    try:
        targets: Path | None = _write_targets()
    except OSError as error:
        targets = None
        on_fault(f"Prometheus cannot be told where this run is: {error}.")
    try:
        with Repeating(recorder.look_again, timeouts.record_run_s, "record run"):
            yield recorder
    finally:
        if targets is not None:
            with suppress(OSError):
                targets.unlink()


def _write_targets() -> Path:
    """Tell Prometheus of every node's agent; Ray does so itself only where it has a dashboard."""
    folder = targets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.json"):
        if left.stem.isdecimal() and not Path(f"/proc/{left.stem}").exists():
            left.unlink(missing_ok=True)
    addresses = [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"]
    ]
    path = folder / f"{os.getpid()}.json"
    write_whole(path, json.dumps([{"labels": {"job": "ray"}, "targets": addresses}]))
    return path
