"""The profiles of `qaic-runner`: the latency file and the trace of each instance.

Times are the host's, measured around the emulated runtime. There is no device to ask for cycles.
"""

from __future__ import annotations

from array import array
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from ..folder import current
from ..qaic import raw_stats
from ..qaic.hosting import Flight
from .results import write_file

COLUMNS = (
    "hostRoundTripUs",
    "enqTimeUs",
    "preProcTimeUs",
    "submitTimeUs",
    "execTotalUs",
    "exectoVcUs",
    "execToCompleteUs",
    "postProcUs",
    "totalRoundtripTimeUs",
)
"""Public readers skip four lines, drop `Sample`, `queueDepth` and `numInfInQueue` by name, and take
the third column from the right for the whole time."""

_COUNTED_FROM_ONE_SINCE = (1, 20)
"""Apps version, inferred: public logs count from 0 in January 2024, from 1 in April 2025."""

_PARTS = ("PreProcess", "Enqueue", "Wait", "Execute", "PostProcess")
_US = 1e6


class LatencyLog:
    """The times of some inferences of one instance, from a number on."""

    def __init__(self, start: int, count: int) -> None:
        self._numbers = range(start, start + count)
        self._samples = array("q")
        self._queued = array("q")
        self._moments = array("d")
        self._begun = array("d")
        self._threads = array("q")
        self._runs: Dict[float, raw_stats.Run] = {}
        """Of the inference that began then."""

    def add(self, flight: Flight) -> None:
        """Keep the times of an inference that has ended, where it is one of those asked for."""
        times = flight.times
        if times is None:
            return
        self._begun.append(times.started)
        self._threads.append(times.thread)
        if flight.number not in self._numbers:
            return
        self._samples.append(flight.number)
        self._queued.append(flight.in_queue)
        # Who waits for another inference first comes late to this one: that is not its time.
        post = times.finished - times.woken
        enqueued = min(times.enqueued, times.started)
        self._moments.extend(
            (times.begun, times.prepared, enqueued, times.started, times.ended, times.ended + post)
        )

    def all_begun(self) -> Iterator[Tuple[float, int]]:
        """When each inference began, kept or not, and the thread that ran it."""
        return zip(self._begun, self._threads)

    def keep_run(self, begun: float, run: raw_stats.Run) -> None:
        """The run of the graph that the inference was which began then."""
        self._runs[begun] = run

    def _rows(self) -> Iterator[Tuple[int, int, Sequence[float]]]:
        for place, (sample, queued) in enumerate(zip(self._samples, self._queued)):
            yield sample, queued, self._moments[6 * place : 6 * place + 6]

    def text(self, head: Sequence[str], set_size: int) -> str:
        """The latency file: four lines of head, the columns' names, and a line a sample."""
        lines = [*head, ", ".join(["Sample", *COLUMNS, "queueDepth", "numInfInQueue"])]
        for sample, queued, (begun, prepared, enqueued, started, ended, finished) in self._rows():
            times = (
                ended - enqueued,
                enqueued - prepared,
                prepared - begun,
                0.0,  # queue and device are one program here: nothing is submitted between them
                ended - enqueued,
                started - enqueued,
                ended - started,
                finished - ended,
                finished - begun,
            )
            cells = [f"{seconds * _US:.3f}" for seconds in times]
            lines.append(", ".join([str(sample), *cells, str(set_size), str(queued)]))
        return "\n".join(lines) + "\n"

    def exec_us(self) -> np.ndarray:
        """Microseconds that each inference was computed for."""
        moments = np.array(self._moments).reshape(-1, 6)
        return np.asarray((moments[:, 4] - moments[:, 3]) * _US)

    def samples(self) -> List[int]:
        """Numbers of the inferences that are kept."""
        return list(self._samples)

    def events(self, instance: int) -> List[List[Dict[str, Any]]]:
        """Of each inference the same as events of a Chrome trace, in microseconds."""
        made = []
        for sample, _, moments in self._rows():
            thread = f"activation {instance}"
            own = [
                _event(name, (begin, end - begin), thread, {"inference": sample})
                for name, begin, end in zip(_PARTS, moments, moments[1:])
            ]
            run = self._runs.get(moments[3])
            spare = moments[4] - moments[3] - run.seconds if run else 0.0
            for operator in run.operators if run else ():
                # Two clocks: the run is put into the middle of what it was a part of.
                times = moments[3] + max(spare, 0.0) / 2 + operator.begun, operator.seconds
                details = {"inference": sample, "opName": operator.node, "opKind": operator.kind}
                own.append(_event(operator.kind, times, f"{thread} operators", details))
            made.append(own)
        return made


def share_operators(logs: Sequence[LatencyLog], profiles: Sequence[str]) -> None:
    """Give each inference the run of the graph that was measured of it.

    A thread's runs are its inferences in their order. Where there are not as many of the one as of
    the other, that thread's operators are not told.
    """
    done: Dict[int, List[Tuple[float, int]]] = {}
    for number, log in enumerate(logs):
        for begun, thread in log.all_begun():
            done.setdefault(thread, []).append((begun, number))
    for thread, runs in raw_stats.runs(profiles).items():
        inferences = sorted(done.get(thread, []))
        if len(inferences) == len(runs):
            for (begun, number), run in zip(inferences, runs):
                logs[number].keep_run(begun, run)


def _event(
    name: str, times: Tuple[float, float], thread: str, details: Dict[str, Any]
) -> Dict[str, Any]:
    begun, seconds = times
    return {
        "name": name,
        "ph": "X",
        "ts": begun * _US,
        "dur": seconds * _US,
        "pid": "HOST_PROC",
        "tid": thread,
        "args": details,
    }


def write_latencies(folder: str, logs: Sequence[LatencyLog], name: str, set_size: int) -> None:
    """Write `aic-profiling-program-A-latency.txt` for each instance, A as `_numbered` counts."""
    for number, log in _numbered(logs):
        head = [
            f"Network: {name}",
            f"Program: {number}",
            "Host times in microseconds, of this machine: the SDK is emulated",
            "",
        ]
        text = log.text(head, set_size)
        write_file(folder, f"aic-profiling-program-{number}-latency.txt", text.encode())


def write_traces(folder: str, logs: Sequence[LatencyLog]) -> None:
    """Write `aic-profiling-program-A-trace.json` for each instance, A as `_numbered` counts."""
    for instance, (number, log) in enumerate(_numbered(logs)):
        events = [event for own in log.events(instance) for event in own]
        data = raw_stats.trace(events).encode()
        write_file(folder, f"aic-profiling-program-{number}-trace.json", data)


def _numbered(logs: Sequence[LatencyLog]) -> Iterator[Tuple[int, LatencyLog]]:
    """The logs with the numbers that their files have in this version of the SDK."""
    return enumerate(logs, int(current().version >= _COUNTED_FROM_ONE_SINCE))


def write_statistics(folder: str, logs: Sequence[LatencyLog], name: str, *, raw: bool) -> None:
    """Write a file of each kept inference: its raw statistics, or the summary of them."""
    for instance, log in enumerate(logs):
        for number, own in zip(log.samples(), log.events(instance)):
            stem = f"aic-profiling-program-0-activation-{instance}-inf-{number}"
            if raw:
                data = raw_stats.serialize(raw_stats.RawStats(name, number, own))
                write_file(folder, f"{stem}.bin", data)
            else:
                write_file(folder, f"{stem}.txt", raw_stats.summary(name, own).encode())


def performance_lines(logs: Sequence[LatencyLog]) -> List[str]:
    """The block of metrics that the vendor's tool prints; ours are of this machine."""
    times = np.concatenate([log.exec_us() for log in logs])
    if not times.size:
        return []
    figures = (times.mean(), times.min(), times.max(), times.std())
    return [
        "Aggregated Device Metrics Report (host times of this machine: the SDK is emulated)",
        "Metric, Avg, Min, Max, Std",
        ", ".join(["ExecTimeUs_Func_0", *(f"{figure:.3f}" for figure in figures)]),
    ]
