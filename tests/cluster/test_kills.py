"""The short form of `benchmarks/kills.py`: whatever is killed, nothing is lost or left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Ten kills are ten to twenty starts of a Ray.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def test_whatever_is_killed_nothing_is_lost_or_left() -> None:
    command = [sys.executable, str(KILLS), "--kills", "10", "--rows", "60"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["kills"] == 10
