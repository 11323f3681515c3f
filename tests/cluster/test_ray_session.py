"""What a Ray of ours has for itself, and what is left of it when its driver is gone: nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from awaited import said

from qaic_ray.cluster.ray_session import RaySession, marked
from qaic_ray.errors import QaicRayError
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

DRIVER = """
import os, subprocess, sys
from qaic_ray.cluster.ray_session import RaySession
from qaic_ray.timeouts import DEFAULT_TIMEOUTS
session = RaySession(DEFAULT_TIMEOUTS)
with session.environment():
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(session.folder, child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder; pytest's own is too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="q", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        time.sleep(0.02)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_and_token_are_the_users_alone_and_go(base: Path) -> None:
    umask = os.umask(0)
    try:
        opened = RaySession(DEFAULT_TIMEOUTS)
    finally:
        os.umask(umask)
    assert opened.folder.parent == base
    assert (mode(opened.folder), mode(opened.token_file)) == (0o700, 0o600)
    assert len(opened.token_file.read_text()) == 64
    opened.close()
    assert list(base.iterdir()) == []


def test_the_environment_is_that_of_its_processes_only(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    before = dict(os.environ)
    opened = RaySession(DEFAULT_TIMEOUTS)
    try:
        with opened.environment():
            assert os.environ["RAY_AUTH_MODE"] == "token"
            assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(opened.token_file)
            assert "RAY_AUTH_TOKEN" not in os.environ
        assert dict(os.environ) == before
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as somebody chose
        with opened.environment():
            assert os.environ["RAY_AUTH_MODE"] == "disabled"
    finally:
        opened.close()


def driver(base: Path) -> tuple[subprocess.Popen[str], Path, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(base)},
    )
    assert process.stdout is not None
    folder, pid = process.stdout.readline().split()
    until(lambda: marked(folder, process.pid) == [int(pid)])
    return process, Path(folder), int(pid)


def test_a_killed_driver_leaves_no_process_and_no_folder(base: Path) -> None:
    process, folder, _ = driver(base)
    process.kill()
    said(process)
    until(lambda: not folder.exists())
    assert marked(str(folder)) == []


TITLED = """
import os, subprocess, sys
# As the agents of a Ray: nothing of the mark is left in the environment of the one that lives.
code = "import sys, time; log = open(sys.argv[1], 'a'); print('on', flush=True); time.sleep(600)"
command = [sys.executable, "-c", code, *sys.argv[1:]]
child = subprocess.Popen(command, env={}, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("parent_lives", [True, False])
def test_what_hides_its_environment_is_told_by_its_parent_or_its_log(
    base: Path, parent_lives: bool
) -> None:
    opened = RaySession(DEFAULT_TIMEOUTS)
    log = "/dev/null" if parent_lives else str(opened.folder / "agent.log")
    with opened.environment():
        parent = subprocess.Popen(
            [sys.executable, "-c", TITLED, log],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert parent.stdout is not None
    hidden = int(parent.stdout.readline())
    if not parent_lives:
        said(parent)
    with (opened.folder / "read along").open("w"), (opened.folder / "read along").open() as stream:
        assert hidden in marked(str(opened.folder))
        opened.close()
        assert stream.read() == ""  # whoever reads along lives on
    said(parent)
    assert not Path(f"/proc/{hidden}/fd").exists() or not cmdline(Path(f"/proc/{hidden}"))


def test_what_was_killed_with_its_keeper_is_swept_by_the_next(base: Path) -> None:
    process, folder, pid = driver(base)
    command = f"ray_session.py\0{folder}\0".encode()
    (guard,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and command in cmdline(entry)
    ]
    os.kill(guard, 9)
    process.kill()
    said(process)
    assert folder.exists()
    assert marked(str(folder)) == [pid]
    living, other, _ = driver(base)
    assert not folder.exists()
    assert marked(str(folder)) == []
    RaySession(DEFAULT_TIMEOUTS).close()
    assert other.exists()  # somebody has it
    living.kill()
    said(living)


def cmdline(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_temporary_folder_too_long_for_a_socket_is_passed_over(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = base / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    opened = RaySession(DEFAULT_TIMEOUTS, default_base=base)
    assert opened.folder.parent == base
    opened.close()
    with pytest.raises(QaicRayError, match=r"is too long; .*too long\): set TMPDIR to one\.$"):
        RaySession(DEFAULT_TIMEOUTS, default_base=long / "not-there")
