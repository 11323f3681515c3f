"""Many rows in shards by drivers of their own, one killed, merged: the benchmark in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "many_rows.py"


@pytest.mark.slow
@pytest.mark.parametrize("where", [[], ["--s3"]], ids=["here", "s3"])
def test_every_row_is_there_once_after_a_kill(where: list[str]) -> None:
    """It ends with an error where a row or a digest is another one than was laid."""
    options = ["--rows", "40000", "--files", "16", "--part-rows", "1500", *where]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["rows"] == 40000
    assert figures["part_files"] == 4 * 7
    assert len(figures["drivers"]) == 5
