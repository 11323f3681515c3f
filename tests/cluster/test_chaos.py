"""The short form of `benchmarks/chaos.py`: everything is killed, no row is lost or different."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

# In the fast tier: test_resume_road.py, test_two_nodes.py and test_healing.py.
SHORT = pytest.param(80, 1, 2, id="short", marks=pytest.mark.slow)
LONGER = pytest.param(160, 2, 4, id="longer", marks=pytest.mark.slow)
CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.parametrize(("num_prompts", "driver_kills", "actor_kills"), [SHORT, LONGER])
def test_a_run_under_fire_gives_what_an_undisturbed_one_gives(
    num_prompts: int, driver_kills: int, actor_kills: int
) -> None:
    command = [sys.executable, str(CHAOS), "--prompts", str(num_prompts)]
    command += ["--driver-kills", str(driver_kills), "--actor-kills", str(actor_kills)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["drivers_killed"] == driver_kills
    assert report["nodes_killed"] == 1
    assert report["actors_killed"] == actor_kills
