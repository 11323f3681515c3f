"""What the machine can do and what else it does: its limits, and CPU time that others take.

`python machine.py THREADS [SECONDS]` prints the limits as JSON: memory read bandwidth with so many
threads, and float32 matrix products. Run alone, as the products' threads are set by the environment
(`limits_environment`).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

READ_BYTES = 256 * 2**20
"""A thread's own array, far larger than a cache."""
GEMM_SIZE = 2048
IDLE_CORES = 0.1
"""A machine is quiet where all others together keep less than this share of one core busy."""
_SAMPLE_S = 0.4
_TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
_CHIP_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


# -- limits


def read_gb_s(threads: int, seconds: float) -> float:
    """The fastest of many reads of memory, GB/s, each by all threads at once."""
    arrays = [np.ones(READ_BYTES // 8, np.int64) for _ in range(threads)]

    def best_of(pool: ThreadPoolExecutor) -> float:
        begun_s = time.perf_counter()
        list(pool.map(np.bitwise_or.reduce, arrays))
        return time.perf_counter() - begun_s

    with ThreadPoolExecutor(threads) as pool:
        times = [best_of(pool) for _ in _for(seconds)]
    return threads * READ_BYTES / min(times) / 1e9


def gemm_gflop_s(seconds: float) -> float:
    """The fastest of many float32 matrix products by numpy's BLAS, GFLOP/s."""
    a, b = (np.full((GEMM_SIZE, GEMM_SIZE), value, np.float32) for value in (0.5, 2.0))
    out = np.empty_like(a)
    times = []
    for _ in _for(seconds):
        begun_s = time.perf_counter()
        np.matmul(a, b, out=out)
        times.append(time.perf_counter() - begun_s)
    return float(2 * GEMM_SIZE**3 / min(times) / 1e9)


def _for(seconds: float) -> Iterator[None]:
    """Twice at least, and until the time is over."""
    end_s = time.perf_counter() + seconds
    yield
    yield
    while time.perf_counter() < end_s:
        yield


def limits_environment(threads: int) -> dict[str, str]:
    """The environment in which BLAS uses so many threads."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads))}


# -- others


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of all cores so far: those busy, the host's other guests' with them."""

    at_s: float
    busy_s: float
    stolen_s: float


def parse_cpu_line(line: str, at_s: float) -> CpuTimes:
    """The first line of /proc/stat; guests' time is in user and nice already."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return CpuTimes(at_s, busy * _TICKS_S, steal * _TICKS_S)


def cpu_times() -> CpuTimes:
    """Of this machine, now."""
    with open("/proc/stat", encoding="ascii") as file:
        return parse_cpu_line(file.readline(), time.monotonic())


def process_s(pids: Iterable[int]) -> float:
    """CPU seconds of these processes so far; of one that ended, none."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total * _TICKS_S


def wait_until_quiet(limit_s: float) -> dict[str, float]:
    """Wait while others keep this machine busy, no longer than `limit_s`.

    Returns:
        `waited_s`, and in `busy_cores` how many cores were busy when the wait ended.
    """
    begun_s = time.monotonic()
    while True:
        before = cpu_times()
        time.sleep(_SAMPLE_S)
        after = cpu_times()
        busy = (after.busy_s - before.busy_s) / (after.at_s - before.at_s)
        waited_s = after.at_s - begun_s
        if busy < IDLE_CORES or waited_s >= limit_s:
            return {"waited_s": round(waited_s, 2), "busy_cores": round(busy, 3)}


@dataclass
class Patience:
    """How long a quiet machine is waited for: before each timing, and in all until more is given.

    Args:
        each_s: before a timing, at most.
        left_s: of all waits and repeats, until `give`.
    """

    each_s: float
    left_s: float = 0.0
    spent_s: float = 0.0

    def give(self, seconds: float) -> None:
        """Add to what is left."""
        self.left_s += seconds

    def spend(self, seconds: float) -> None:
        """Take from what is left."""
        self.left_s = max(0.0, self.left_s - seconds)
        self.spent_s += seconds

    def wait(self) -> dict[str, float]:
        """See `wait_until_quiet`."""
        seen = wait_until_quiet(min(self.each_s, self.left_s))
        self.spend(seen["waited_s"])
        return seen


@contextmanager
def others_watched(pids: Iterable[int]) -> Iterator[dict[str, float]]:
    """Fill the yielded dict with `others_cores`, CPU that neither we nor `pids` used, at the end.

    With it come `stolen_cores`, what the host gave to other guests, and the load average.
    """
    mine = (os.getpid(), *pids)
    found: dict[str, float] = {}
    before, mine_before_s = cpu_times(), process_s(mine)
    yield found
    after, mine_s = cpu_times(), process_s(mine) - mine_before_s
    span_s = max(after.at_s - before.at_s, 1e-3)
    others_s = max(after.busy_s - before.busy_s - mine_s, 0.0)
    found["others_cores"] = round(others_s / span_s, 3)
    found["stolen_cores"] = round((after.stolen_s - before.stolen_s) / span_s, 3)
    found["load_average"] = round(os.getloadavg()[0], 2)


def processor() -> dict[str, Any]:
    """Its name, cores that we may use, and instruction sets that matter here."""
    name, flags = platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return {
        "name": name,
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": [flag for flag in _CHIP_FLAGS if flag in flags],
    }


if __name__ == "__main__":
    most_s = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    print(
        json.dumps(
            {
                "read_gb_s": read_gb_s(int(sys.argv[1]), most_s),
                "gemm_gflop_s": gemm_gflop_s(most_s),
            }
        )
    )
