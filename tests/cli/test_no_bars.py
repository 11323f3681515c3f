"""Other libraries' progress bars stay away from a command's stderr, in every process of it."""

from __future__ import annotations

import subprocess
import sys

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
commands.app = lambda: subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
main()
"""


def test_bars_of_libraries_that_a_command_uses_are_off() -> None:
    plain = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=120
    )
    assert plain.stderr.count("Loading weights: 100%") == 3
    ours = subprocess.run(
        [sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True, timeout=120
    )
    assert (ours.stdout, ours.stderr) == ("", "")
