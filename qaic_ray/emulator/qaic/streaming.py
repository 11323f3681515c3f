"""Inferences one after another, with every place of a program kept busy."""

from __future__ import annotations

import time
from collections import deque
from typing import Callable, Deque, Tuple

from .hosting import Flight, HostedProgram


def stream(
    host: HostedProgram,
    start: Callable[[int], Flight],
    *,
    goes_on: Callable[[int, float], bool],
    finished: Callable[[int, Flight], None],
) -> Tuple[int, float]:
    """Keep every place busy; how many inferences ended, and the seconds that took.

    Args:
        host: the program.
        start: begins inference `i`.
        goes_on: whether inference `i` is begun after so many seconds.
        finished: what is done with each, in the order in which they began.
    """
    flights: Deque[Tuple[int, Flight]] = deque()
    begun = time.perf_counter()
    count = 0
    try:
        while goes_on(count, time.perf_counter() - begun):
            if len(flights) == host.num_places:
                finished(*flights.popleft())
            flights.append((count, start(count)))
            count += 1
        while flights:
            finished(*flights.popleft())
    finally:
        for _, flight in flights:
            _ignoring_failure(flight)
    return count, time.perf_counter() - begun


def _ignoring_failure(flight: Flight) -> None:
    """Wait for a flight whose result nobody wants, since another one has failed."""
    try:
        flight.finish()
    except RuntimeError:
        return
