"""Time, memory and size of the report of a large run.

    python benchmarks/report.py [--rows N] [--cards N] [--keep FOLDER]

Makes the folder of a run of N rows (100,000) as a killed and resumed run leaves it, then draws its
report from the folder in a process of its own. Prints a table, and one JSON object as its last
line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"seconds": 15.0, "page_mb": 5.0, "peak_mb": 1000.0}


def make(folder: Path, rows: int, cards: int) -> None:
    """A run of two sessions, the first of which was killed."""
    sys.path.append(str(ROOT / "tests"))
    from run_folders import FolderMaker

    maker = FolderMaker(folder, cards=cards, slots=16, losses=max(2, cards // 2))
    maker.session(rows // 2, ends=False)
    maker.session(rows - rows // 2, pause_s=40_000.0)


def draw(folder: Path) -> dict[str, Any]:
    """The report, in this process."""
    start_s = time.perf_counter()
    from qaic_ray.report.document import redraw

    document = redraw(folder)
    return {
        "rows": document["rows"],
        "seconds": round(time.perf_counter() - start_s, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
        "page_mb": round((folder / "report.html").stat().st_size / 1e6, 3),
        "json_mb": round((folder / "report.json").stat().st_size / 1e6, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="leave the run there")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make(options.make, options.rows, options.cards)
        return
    if options.draw is not None:
        print(json.dumps(draw(options.draw)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / "run"
        # Each in a process of its own: what one holds is not the other's memory.
        sizes = ["--rows", str(options.rows), "--cards", str(options.cards)]
        subprocess.run([sys.executable, __file__, "--make", str(folder), *sizes], check=True)
        command = [sys.executable, __file__, "--draw", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        found["journal_mb"] = round(
            sum(path.stat().st_size for path in (folder / "journal").glob("*")) / 1e6, 1
        )
    table = Table("figure", "measured", "at most")
    for name, value in found.items():
        table.add_row(name, f"{value:,}", f"{LIMITS[name]:g}" if name in LIMITS else "")
    Console().print(table)
    print(json.dumps(found | {"ok": all(found[name] <= most for name, most in LIMITS.items())}))


if __name__ == "__main__":
    main()
