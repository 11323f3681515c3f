"""What the driver of a run hears and orders, as its metrics."""

from __future__ import annotations

from dataclasses import replace

from qaic_ray.dispatch.dispatcher import (
    Command,
    DeliverRows,
    Event,
    RetireWorker,
    RunShard,
    WorkerLost,
    WorkerReady,
)
from qaic_ray.runs.driver import Audience, Progress
from qaic_ray.telemetry.recorder import RunRecorder


def metered(audience: Audience, recorder: RunRecorder) -> Audience:
    """The audience, and a recorder that is told what becomes a metric."""

    def on_event(event: Event | Command) -> None:
        audience.on_event(event)
        match event:
            case RunShard(prompts=prompts, attempt=attempt):
                recorder.began(len(prompts), attempt)
            case DeliverRows(rows):
                recorder.rows_ended(len(rows), sum(not row.ok for row in rows))
            case WorkerReady(worker):
                recorder.worker_ready(worker)
            case WorkerLost(worker) | RetireWorker(worker):
                recorder.worker_lost(worker)

    def on_progress(progress: Progress) -> None:
        audience.on_progress(progress)
        recorder.waiting(progress.prompts_waiting)

    return replace(audience, on_event=on_event, on_progress=on_progress)
