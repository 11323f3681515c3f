"""What Ray's dashboard costs: seconds until a local Ray is up, and the memory of its processes.

Starts alternate, with and without it; memory is the proportional share (PSS) of every process of
the Ray, and its resident size (RSS), some seconds after the start. Also: the seconds until a
command has joined a Ray that is kept.

    python benchmarks/dashboard_cost.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

PROGRAM = """
import json, sys, time
import psutil, ray
from qaic_ray.cluster import connection, kept_ray
from qaic_ray.cluster.cluster import Cluster
from qaic_ray.cluster.ray_session import marked

how, settle_s = sys.argv[1], float(sys.argv[2])
kept = kept_ray.find() if how == "kept" else None
began_s = time.perf_counter()
with Cluster(2, dashboard=how == "with", kept=kept) as cluster:
    start_s = time.perf_counter() - began_s
    time.sleep(settle_s if kept is None else 0)
    folder = str(cluster._own.session.folder) if kept is None else kept.folder
    memory = [psutil.Process(pid).memory_full_info() for pid in marked(folder)]
rss, pss = (sum(getattr(each, kind) for each in memory) / 2**20 for kind in ("rss", "pss"))
print(json.dumps({"start_s": start_s, "rss_mib": rss, "pss_mib": pss, "processes": len(memory)}))
"""
KEEP = "from qaic_ray.cluster import kept_ray; kept_ray.start(2)"
END = "from qaic_ray.cluster import kept_ray; kept_ray.stop(force=True)"
NAMES = {
    "without": "without a dashboard",
    "with": "with it",
    "kept": "a kept Ray (with it)",
}


def child(*words: str) -> str:
    """What a Python of its own prints, as each command is one."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measure(how: str, settle_s: float) -> dict[str, float]:
    found: dict[str, float] = json.loads(child("-c", PROGRAM, how, str(settle_s)).splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settle-s", type=float, default=8.0)
    options = parser.parse_args()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["QAIC_RAY_CACHE"] = cache
        for _ in range(options.repeats):
            for how in ("without", "with"):
                samples[how].append(measure(how, options.settle_s))
        child("-c", KEEP)
        try:
            for _ in range(options.repeats):
                samples["kept"].append(measure("kept", 0))
        finally:
            child("-c", END)
    medians: dict[str, Any] = {
        how: {key: round(statistics.median(s[key] for s in found), 2) for key in found[0]}
        for how, found in samples.items()
    }
    print(f"| median of {options.repeats} | start, s | RSS, MiB | PSS, MiB | processes |")
    print("|---|---|---|---|---|")
    for how, median in medians.items():
        figures = (median["start_s"], median["rss_mib"], median["pss_mib"], median["processes"])
        print(f"| {NAMES[how]} | {' | '.join(f'{figure:g}' for figure in figures)} |")
    print(json.dumps({"repeats": options.repeats, "load": os.getloadavg()[0], **medians}))


if __name__ == "__main__":
    main()
