"""README.md typed as it stands: its commands do what it shows, and each way to install installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```console\n\$ (.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)
INSTALL, RECIPE = re.findall(r"^```sh\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)


def typed(line: str, cwd: Path, **more: str) -> str:
    """What a person sees who types the line, on both streams."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", line],
        cwd=cwd,
        env=os.environ
        | {"PATH": path, "RAY_AUTH_MODE": "disabled", "QAIC_RAY_SDK": "emulated"}
        | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def pattern(line: str) -> re.Pattern[str]:
    """A line of the page as it may be elsewhere: with other numbers, in another home."""
    words = re.escape(line.strip()).replace("\\ ", " ")
    words = re.sub(r"/home/you(/\\\.cache/qaic\\-ray)?|\d{8}\\-\d{6}", r"\\S*", words)
    number = r"[\\d.,]+"
    words = re.sub(r"(?<=[ (])\d+(,\d+)*(\\\.\d+)?(?= )", number, words)
    return re.compile(re.sub(r"\+ m?s\b", "+ m?s", words))


@pytest.mark.parametrize(("command", "lines"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_of_the_first_page_prints_what_the_page_shows(
    tmp_path: Path, command: str, lines: str
) -> None:
    assert len(lines.splitlines()) == 3
    seen = typed(command, tmp_path)
    for line in lines.splitlines():
        assert pattern(line).search(seen), f"{line!r} is not in {seen}"


def test_the_recipes_user_gets_from_the_model_to_its_answers(tmp_path: Path) -> None:
    shapes = ROOT / "configs" / "specializations" / "pl256-cl2048-bs1.json"
    shutil.copy(shapes, tmp_path / "specializations.json")
    program = "qpc/smollm2-135m-kv-256pl-2048cl-14c-1BS-mx6"
    lines = RECIPE.replace("QPC", program).replace("MODEL", "smollm2-135m")
    seen = typed(lines, tmp_path, EDITOR="true")
    assert "Paris" in typed(
        f'qaic-ray run smollm2-135m --qpc {program} "The capital of France is"', tmp_path
    )
    assert "merged" in seen


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
    typed(command, ROOT, **rewritten)
    code = "import qaic_ray, pathlib; print(pathlib.Path(qaic_ray.__file__).parent)"
    place = Path(subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path).strip())
    assert place.is_relative_to(tmp_path)
    assert (place / "jobs" / "smollm2.yaml").is_file()
    assert (tmp_path / "env" / "bin" / "qaic-ray").is_file()


def test_make_demo_is_the_demo() -> None:
    planned = subprocess.check_output(["make", "--dry-run", "demo"], cwd=ROOT, text=True)
    assert planned.splitlines()[-1] == ".venv/bin/qaic-ray demo"
