"""The short form of `benchmarks/chaos.py`: everything is killed, no row is lost or different."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


def test_a_run_under_fire_gives_what_an_undisturbed_one_gives() -> None:
    command = [sys.executable, str(CHAOS), "--prompts", "160", "--driver-kills", "2"]
    command += ["--actor-kills", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["drivers_killed"] == 2
    assert report["nodes_killed"] == 1
    assert report["actors_killed"] == 4
