"""What is kept of a run beside its rows, for its report: figures, events, and what ran."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray import __version__, interruption
from qaic_ray.compile.store import Build, program_facts
from qaic_ray.pipeline.request import Listener, RunRequest, SdkChoice
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

if TYPE_CHECKING:
    from qaic_ray.report.statistics import RowStatistics
    from qaic_ray.rows import Row
    from qaic_ray.runs.delivery import RowWriter
    from qaic_ray.runs.driver import Audience
    from qaic_ray.runs.history import RunHistory
    from qaic_ray.worker.worker import WorkerInfo

_MAX_COMMAND_CHARS = 1000

Compiles = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunRecording:
    """Takes what happens in a run."""

    history: RunHistory
    statistics: RowStatistics

    def audience(self, write: RowWriter, listener: Listener) -> Audience:
        """Who hears of the run: the files of its rows, this record and the listener."""
        from qaic_ray.runs.driver import Audience

        def on_row(row: Row) -> None:
            with interruption.uninterrupted():
                write(row)
            self.statistics.add(row)
            listener.answered(row)

        def on_earlier_row(row: Row) -> None:
            write.rewrite(row)
            self.statistics.add(row)

        def on_worker_ready(info: WorkerInfo) -> None:
            self.history.worker_ready(info)
            listener.card_ready(info)

        return Audience(
            on_row=on_row,
            on_earlier_row=on_earlier_row,
            on_worker_ready=on_worker_ready,
            on_wait=listener.remark,
            on_event=self.history.happened,
        )


@contextmanager
def recorded(
    folder: Path, request: RunRequest, sdk: SdkChoice, *, listener: Listener, compiles: Compiles
) -> Iterator[RunRecording]:
    """Record a run, and the power of this machine's boards where it is here that it runs.

    Args:
        folder: the run's.
        request: with its QPC.
        sdk: of this machine.
        listener: is told what cannot be recorded; that ends no run.
        compiles: of the job that the run is a part of; see `compile_facts`.
    """
    from qaic_ray.report.statistics import RowStatistics
    from qaic_ray.runs.history import PowerWatch, RunHistory
    from qaic_ray.telemetry.card_lines import board_watts

    with ExitStack() as stack:
        history = stack.enter_context(RunHistory(folder, listener.remark))
        history.write("session_started", **_what_runs(request, sdk), compiles=list(compiles))
        if request.ray.address is None:
            every_s = DEFAULT_TIMEOUTS.power_s
            devices = request.run.devices
            qids = () if devices == "all" else devices  # `on_local_cards` has named them

            def watts() -> dict[str, float]:
                return board_watts(sdk.here.card_lines(), qids)

            watch = PowerWatch(watts, history, every_s, listener.remark)
            stack.enter_context(watch)
        yield RunRecording(history, RowStatistics())


def compile_facts(builds: Sequence[object]) -> Compiles:
    """Name and time of each variant that is there."""
    found = [build for build in builds if isinstance(build, Build)]
    return [
        {"name": build.name, "seconds": _compile_s(build), "reused": build.reused}
        for build in found
    ]


def _compile_s(build: Build) -> float:
    """How long the compiler took, also where it was long ago."""
    took = program_facts(build.path).get("compile_s")
    return float(took) if isinstance(took, int | float) else round(build.seconds, 3)


def _what_runs(request: RunRequest, sdk: SdkChoice) -> dict[str, Any]:
    from qaic_ray.compile.store import content_key

    command = shlex.join(["qaic-ray", *sys.argv[1:]])
    return {
        "qaic_ray": __version__,
        "ray": metadata.version("ray"),
        "python": platform.python_version(),
        "sdk": sdk.here.description,
        "numerics": sdk.here.numerics,
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "pid": os.getpid(),
        "command": command[:_MAX_COMMAND_CHARS],
        "model": request.model,
        "qpc": request.qpc.name,
        "qpc_sha256": content_key(request.qpc),
        **program_facts(request.qpc),
    }
