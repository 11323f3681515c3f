"""The sdist and the wheel: what they hold, and, in the slow tier, that they install and work."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "packages"
GOOD = {"qaic_ray/py.typed", "qaic_ray/__main__.py", "qaic_ray-0.1.0.dist-info/METADATA"}


@pytest.fixture(scope="module")
def packages() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_what_a_wheel_lacks_or_should_not_have_is_named(packages: dict[str, Any]) -> None:
    wanted = {"jobs/a.yaml"}
    problems = packages["problems_of_wheel"]
    assert problems(GOOD | {"qaic_ray/jobs/a.yaml"}, wanted) == []
    bad = GOOD | {"tests/test_a.py", "qaic_ray/__pycache__/a.pyc"}
    assert problems(bad - {"qaic_ray/py.typed"}, wanted) == [
        "it lacks jobs/a.yaml",
        "it lacks qaic_ray/py.typed",
        "it has tests, which is no part of the package",
        "it has qaic_ray/__pycache__/a.pyc",
        "it has tests/test_a.py",
    ]


def test_a_wheel_is_to_have_all_jobs_and_configs(packages: dict[str, Any]) -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("jobs", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert packages["shipped_files"]() == there
    assert {"jobs/smollm2.yaml", "jobs/prompts/english.jsonl"} <= there


def test_every_folder_of_the_package_that_holds_data_is_in_the_packages_metadata() -> None:
    """A new kind of file beside the code is left out of a wheel without a word."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is of Python 3.11")
    import tomllib

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)["tool"]["setuptools"]["package-data"]
    package = ROOT / "qaic_ray"
    links = [path for path in package.iterdir() if path.is_symlink()]
    assert {path.name for path in links} == {"jobs", "configs"}
    found = set()
    for top in (package, *links):
        for path in top.rglob("*"):
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                found.add(path.relative_to(ROOT))
    for path in found:
        patterns = data.get(".".join(path.parent.parts), [])
        assert any(path.match(pattern) for pattern in patterns), f"{path} is in no wheel"
    assert len(found) >= 15


def test_a_python_that_is_not_here_is_none(packages: dict[str, Any]) -> None:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = packages["find_python"](here)
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"Python {here}.")
    assert packages["find_python"]("3.99") is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_packages_install_and_work_in_clean_environments_of_every_python_here() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    works = [line for line in done.stdout.splitlines() if ": works" in line]
    assert len(works) >= 2
    if "Python 3.11 pip full" in done.stdout:
        assert "Python 3.11 pip full: works, a job launched" in done.stdout
