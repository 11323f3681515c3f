"""Other libraries' progress bars stay away from a command's stderr, in every process of it."""

from __future__ import annotations

import os
import subprocess
import sys

from qaic_ray.cli import NO_BARS

CHILD = """
import sys
from huggingface_hub.utils import tqdm as hub_tqdm
from tqdm.auto import tqdm
from transformers.utils import logging
for bars in (tqdm, hub_tqdm, logging.tqdm):
    for _ in bars(range(3), desc="Loading weights"):
        pass
"""
COMMAND = f"""
import subprocess, sys
from qaic_ray.cli import commands, main
commands.app = lambda **_: subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
main()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In an environment that no other test's command has changed."""
    environment = {name: value for name, value in os.environ.items() if name not in NO_BARS}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_bars_of_libraries_that_a_command_uses_are_off() -> None:
    plain = run(CHILD)
    assert plain.stderr.count("Loading weights: 100%") == 3
    ours = run(COMMAND)
    assert (ours.stdout, ours.stderr) == ("", "")
