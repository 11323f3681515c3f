"""README.md: each way to install puts the command there, and `make demo` is the demo."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from pathlib import Path

import pytest
from page_blocks import ROOT, blocks_of

(INSTALL, *_) = [b.text for b in blocks_of(ROOT / "README.md") if b.kind == "sh"]


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in INSTALL.splitlines() if "pip install" in x])
def test_each_way_to_install_puts_the_command_there(tmp_path: Path, line: str) -> None:
    """Without what it needs: scripts/packages has that."""
    command = line.partition("  #")[0]
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    command = command.replace("make wheel &&", "make wheel --old-file .venv/.installed &&")
    command = re.sub(r"(?<!pip )\bpip install", f"{python} -m pip install -q --no-deps", command)
    # The address is this checkout's, as git is told.
    rewritten = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://HOST/qaic_ray.git",
    }
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=ROOT,
        env=os.environ | rewritten,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import qaic_ray, pathlib; print(pathlib.Path(qaic_ray.__file__).parent)"
    place = Path(subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path).strip())
    assert place.is_relative_to(tmp_path)
    assert (place / "jobs" / "smollm2.yaml").is_file()
    assert (tmp_path / "env" / "bin" / "qaic-ray").is_file()


def test_make_demo_is_the_demo() -> None:
    # These tests may be run by make, which then tells where it is.
    command = ["make", "--dry-run", "--no-print-directory", "demo"]
    planned = subprocess.check_output(command, cwd=ROOT, text=True)
    assert planned.splitlines()[-1] == ".venv/bin/qaic-ray demo"
