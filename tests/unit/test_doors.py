"""What importing and `--help` may load, and what they cost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("ray", "torch", "onnxruntime", "onnx", "transformers", "numpy", "numba", "pydantic")


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "code",
    [
        "import qaic_ray",
        "import qaic_ray.cli.commands",
        "import sys; from qaic_ray.cli.commands import app; sys.argv = ['qaic-ray', '--help']\n"
        "try: app()\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code).isdisjoint(HEAVY)


# What a worker loads for its first conversation: tests/text.
def test_worker_loads_no_torch_and_no_transformers() -> None:
    assert loaded_by("import qaic_ray.worker.worker").isdisjoint(
        {"ray", "torch", "transformers", "numba"}
    )


def test_help_answers_and_names_every_command() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from qaic_ray.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("launch", "plan", "export", "compile", "run", "devices", "emulator"):
        assert command in result.stdout
