"""`qaic-opstats`: turns the raw statistics of `qaic-runner` into summaries and traces.

Covered: `--qpc`, `--input-dir`, `--output-dir`, `--summary`, `--trace`, with host times, also of
operators as onnxruntime ran them. Accepted without effect: `--merge-mq-traces`, `--flow-events`.
Not covered: cycles, cores and engines of a device.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Sequence

from ..container import QpcError, read_qpc
from ..qaic.raw_stats import RawStatsError, parse, summary, trace


def main(argv: Sequence[str]) -> int:
    """Run the tool; 1 where there is nothing to read or a file is damaged."""
    parser = argparse.ArgumentParser(prog="qaic-opstats")
    parser.add_argument("--qpc", required=True)
    parser.add_argument("--input-dir", required=True, type=Path)
    parser.add_argument("--output-dir", default=".", type=Path)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--trace", action="store_true")
    for option in ("--merge-mq-traces", "--flow-events"):
        parser.add_argument(option, help="accepted, no effect here")
    asked = parser.parse_args(list(argv))
    try:
        read_qpc(asked.qpc)
        return _decode(asked)
    except (QpcError, RawStatsError, OSError) as error:
        print(f"qaic-opstats: {error}", file=sys.stderr)
        return 1


def _decode(asked: argparse.Namespace) -> int:
    files = sorted(asked.input_dir.glob("*.bin"))
    if not files:
        raise RawStatsError(
            f"{asked.input_dir} holds no raw statistics: run qaic-runner with "
            "--aic-profiling-type raw_device_stats first"
        )
    os.makedirs(asked.output_dir, exist_ok=True)
    both = not asked.summary and not asked.trace
    for path in files:
        stats = parse(path.read_bytes(), str(path))
        made = {}
        if asked.summary or both:
            made["summary.txt"] = summary(stats.network, stats.events)
        if asked.trace or both:
            made["trace.json"] = trace(stats.events)
        for ending, text in made.items():
            target = asked.output_dir / f"{path.stem}.qaic-opstats.{ending}"
            print(f"Writing file:{target}")
            target.write_text(text, "utf-8")
    return 0
