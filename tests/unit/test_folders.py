"""Folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qaic_ray.folders import building, cache_folder, locked

KILLED = """
import os, signal, sys
from pathlib import Path
from qaic_ray.folders import building
with building(Path(sys.argv[1])) as fresh:
    (fresh / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model[1]"


def build(target: Path, name: str) -> None:
    with building(target) as fresh:
        (fresh / name).touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_takes_the_place_of_the_old_folder(target: Path) -> None:
    build(target, "old")
    build(target, "new")
    assert names(target) == ["new"]
    assert names(target.parent) == [target.name]


def test_an_error_leaves_the_old_folder(target: Path) -> None:
    build(target, "old")
    with pytest.raises(FileNotFoundError), building(target) as fresh:
        (fresh / "half" / "way").touch()
    assert names(target) == ["old"]
    assert names(target.parent) == [target.name]


def test_a_kill_leaves_the_old_folder_and_the_next_builder_sweeps(target: Path) -> None:
    build(target, "old")
    result = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert names(target) == ["old"]
    assert len(names(target.parent)) == 2
    build(target, "new")
    assert names(target.parent) == [target.name]


def test_lock_lies_with_the_target_and_goes_with_its_holder(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_RAY_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    with locked(target):
        assert names(target.parent) == [f".{target.name}.lock"]
    assert names(target.parent) == []
    assert not os.path.lexists(cache_folder())
