"""What a session measures of its own inferences: latencies, and where Python spent them."""

from __future__ import annotations

import cProfile
import pstats
import threading
from array import array
from typing import Any, Callable, Dict, List, Tuple, TypeVar

import numpy as np

Result = TypeVar("Result")

PERCENTILES = {"P25": 25.0, "P50": 50.0, "P75": 75.0, "P90": 90.0, "P99": 99.0, "P999": 99.9}
_PRINTED = ("P25", "P50", "P75", "P90", "P99")
_MOST_PROFILES = 1000
_HEADER = "|  File-Line-Function  | |  num calls  | |  func time  | |  tot time  |\n"


class Latencies:
    """Seconds of each inference; the first one, in which the device warms up, is left out."""

    def __init__(self) -> None:
        self._seconds = array("d")

    def add(self, seconds: float) -> None:
        """One more inference."""
        self._seconds.append(seconds)

    def metrics(self) -> Dict[str, Any]:
        """The documented metrics, in seconds.

        Raises:
            RuntimeError: before the first inference.
        """
        if not self._seconds:
            raise RuntimeError("No inference was run yet; call run() first")
        used = np.array(self._seconds[1:] or self._seconds)
        found: Dict[str, Any] = {
            "num_of_inferences": len(used),
            "min_latency": float(used.min()),
            "max_latency": float(used.max()),
        }
        for name, percent in PERCENTILES.items():
            found[name] = float(np.percentile(used, percent))
        found["total_inference_time"] = float(used.sum())
        found["avg_latency"] = float(used.mean())
        return found

    def lines(self) -> List[str]:
        """The metrics as the vendor's `print_metrics` shows them."""
        found = self.metrics()
        average = f"Average latency / inference time observed is {found['avg_latency']} s"
        return [
            f"Number of inferences utilized for calculation are {found['num_of_inferences']}",
            f"Minimum latency observed {found['min_latency']} s",
            f"Maximum latency observed {found['max_latency']} s",
            average,
            *(
                f"{name} / {name[1:]}% of inferences observed latency less than {found[name]} s"
                for name in _PRINTED
            ),
            f"Sum of all the inference times {found['total_inference_time']} s",
            average,
        ]


class Profiles:
    """Python's profile of each of the first inferences."""

    def __init__(self) -> None:
        self._rows: List[List[Tuple[Any, int, float, float]]] = []
        # Python has one profiler a process.
        self._lock = threading.Lock()

    def run(self, call: Callable[[], Result]) -> Result:
        """Make the call, and keep its profile."""
        with self._lock:
            if len(self._rows) == _MOST_PROFILES:
                return call()
            profile = cProfile.Profile()
            try:
                return profile.runcall(call)
            finally:
                stats: Any = pstats.Stats(profile)
                self._rows.append(
                    [(where, calls, own, whole)
                     for where, (_, calls, own, whole, _) in stats.stats.items()]
                )  # fmt: skip

    def lines(self, count: int) -> List[str]:
        """The profiles of the first `count` inferences, one function a line."""
        said = [_HEADER]
        for rows in self._rows[:count]:
            said += [f"{where} {calls} {own} {whole}\n" for where, calls, own, whole in rows]
        return said
