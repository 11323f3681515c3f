"""Folders appear whole or not at all, are built by one at a time, and replaced where ours."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from awaited import ended, joined, said

from qaic_ray.errors import UsageError
from qaic_ray.files.folders import (
    building,
    cache_folder,
    foreign_files,
    locked,
    new_file,
    write_whole,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from qaic_ray.files.folders import building
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


HOLD = """
import sys, time
from pathlib import Path
from qaic_ray.files.folders import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
COUNT = """
import sys
from pathlib import Path
from qaic_ray.files.folders import locked
target, counter = map(Path, sys.argv[1:3])
for _ in range(int(sys.argv[3])):
    with locked(target):
        number = int(counter.read_text())
        counter.write_text("")
        counter.write_text(str(number + 1))
"""


@contextmanager
def held(target: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        said(process)


def test_builders_by_different_paths_and_caches_wait_for_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    got = Event()

    def take() -> None:
        with locked(tmp_path / "link" / "x", wait_said_s=0.0):
            got.set()

    with held(tmp_path / "real" / "x", QAIC_RAY_CACHE=str(tmp_path / "theirs")) as holder:
        waiting = Thread(target=take)
        waiting.start()
        while not caplog.records:  # it says so from inside the wait
            assert not got.wait(0.01)
        os.kill(holder.pid, signal.SIGKILL)  # the kernel frees what it held
        assert got.wait(120)
        joined(waiting)
    host = os.uname().nodename
    assert f"which process {holder.pid} on {host} since 2" in caplog.text
    assert names(tmp_path / "real") == []


def test_no_lock_is_held_by_two_while_its_file_comes_and_goes(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "x"), str(counter), "60"]
    others = [subprocess.Popen(command) for _ in range(4)]
    assert [ended(other) for other in others] == [0] * 4
    assert counter.read_text() == "240"
    assert names(tmp_path) == ["counter"]


@pytest.mark.parametrize(("mode", "lock_mode"), [(0o755, 0o600), (0o775, 0o666), (0o1777, 0o666)])
def test_whoever_may_build_there_may_open_the_lock(
    tmp_path: Path, mode: int, lock_mode: int
) -> None:
    tmp_path.chmod(mode)
    with locked(tmp_path / "x"):
        assert stat.S_IMODE((tmp_path / ".x.lock").stat().st_mode) == lock_mode


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_what_is_no_lock_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    mine, lock = tmp_path / "mine", tmp_path / ".x.lock"
    mine.write_text("precious")
    if kind == "link":
        lock.symlink_to(mine)
    elif kind == "hard link":
        lock.hardlink_to(mine)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(UsageError, match=r"\.x\.lock"), locked(tmp_path / "x"):
        pytest.fail("it has no lock")
    assert mine.read_text() == "precious"
    assert names(tmp_path) == [".x.lock", "mine"]


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "x"):
        pass
    assert "has no locks (No locks available)" in caplog.text
    assert names(tmp_path) == []


def test_a_name_as_long_as_they_come_can_be_built(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    with locked(target):
        build(target, "new")
    assert names(tmp_path) == [target.name]


def test_only_leftovers_of_builders_are_swept(tmp_path: Path) -> None:
    mine = tmp_path / ".x.building-notes"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    (tmp_path / ".x.building-link").symlink_to(mine)
    (tmp_path / ".x.building-file").touch()
    build(tmp_path / "x", "new")
    left = [".x.building-file", ".x.building-link", ".x.building-notes", "x"]
    assert names(tmp_path) == left
    assert names(mine) == ["thesis.tex"]


def test_a_link_stays_and_what_it_means_is_built(tmp_path: Path) -> None:
    build(tmp_path / "far" / "real", "old")
    (tmp_path / "link").symlink_to("far/real")
    build(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "far" / "real") == ["new"]


def test_strangers_are_named_and_no_link_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "ours").mkdir(parents=True)
    (folder / "ours" / "a").touch()
    assert foreign_files(folder, {"ours/a"}.__contains__) == []
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to(".")
    (folder / "ours" / "b").touch()
    assert foreign_files(folder, {"ours/a"}.__contains__) == ["empty/", "loop", "ours/b"]
    assert len(foreign_files(folder, {"ours/a"}.__contains__, limit=2)) == 2


def test_no_write_follows_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(mine)
    write_whole(tmp_path / "a", "new")
    os.close(new_file(tmp_path / "b"))
    assert mine.read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()
    assert names(tmp_path) == ["a", "b", "mine"]
