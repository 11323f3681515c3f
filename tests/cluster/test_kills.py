"""The short form of `benchmarks/kills.py`: whatever is killed, nothing is lost or left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.parametrize(
    "num_kills",
    [
        # In the fast tier: tests/road/test_ends.py and test_resume_road.py.
        pytest.param(5, marks=pytest.mark.slow),
        # Every kind of blow; each is one or two starts of a Ray.
        pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(2400)]),
    ],
)
def test_whatever_is_killed_nothing_is_lost_or_left(num_kills: int) -> None:
    command = [sys.executable, str(KILLS), "--kills", str(num_kills), "--rows", "60"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["kills"] == num_kills
