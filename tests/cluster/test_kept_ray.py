"""The note of a Ray that is kept: who may use it, when it is gone, and what ends it. No Ray."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from marked_processes import until

from qaic_ray.cluster import kept_ray
from qaic_ray.cluster.kept_ray import KeptRay
from qaic_ray.cluster.ray_session import RaySession, users, using
from qaic_ray.errors import UsageError
from qaic_ray.timeouts import DEFAULT_TIMEOUTS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAIC_RAY_CACHE", str(tmp_path))
    return tmp_path


@contextmanager
def sleeping(**how: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"], **how)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def kept_by(pid: int, folder: str = "/nowhere") -> KeptRay:
    started = kept_ray._start_of(pid)
    assert started is not None
    made_by = kept_ray._made_by()
    return KeptRay(
        folder, "127.0.0.1:1", "http://127.0.0.1:2", 4, "token", os.getuid(), made_by,
        [("raylet", pid, started)],
    )  # fmt: skip


def leave(kept: KeptRay) -> Path:
    kept_ray._leave(kept)
    return kept_ray._note()


def test_the_note_is_its_users_alone_and_is_found_while_its_ray_lives(cache: Path) -> None:
    assert kept_ray.find() is None
    with sleeping() as process:
        kept = kept_by(process.pid)
        path = leave(kept)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.parent == cache
        assert kept_ray.find() == kept
        assert kept_ray.usable(4) == (kept, None)
    assert kept_ray.find() is None
    assert not path.exists()
    assert list(cache.iterdir()) == []


def test_another_process_with_its_number_is_not_it(cache: Path) -> None:
    with sleeping() as process:
        (name, pid, started), *_ = kept_by(process.pid).processes
        path = leave(replace(kept_by(pid), processes=[(name, pid, started - 1)]))
        assert not kept_ray.stop(force=True)
        assert process.poll() is None
    assert not path.exists()


@pytest.mark.parametrize("spoil", ["open to others", "a link", "of another version"])
def test_a_note_that_may_be_anybodys_is_refused(cache: Path, spoil: str) -> None:
    with sleeping() as process:
        path = leave(kept_by(process.pid))
        if spoil == "open to others":
            path.chmod(0o644)
        elif spoil == "a link":
            path.symlink_to(path.rename(cache / "elsewhere"))
        else:
            document = asdict(kept_by(process.pid))
            path.write_text(json.dumps({**document, "processes": "1, 2"}))
        with pytest.raises(UsageError, match=r"the note of a Ray that is kept, "):
            kept_ray.find()
        kept, refusal = kept_ray.usable(0)
        assert kept is None
        assert refusal is not None
        assert str(path) in refusal


def test_one_that_does_not_fit_is_refused_in_a_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sleeping() as process:
        kept = kept_by(process.pid)

        def refusal(num_cards: int = 0, **changes: object) -> str:
            leave(replace(kept, **changes))  # type: ignore[arg-type]
            found, why = kept_ray.usable(num_cards)
            assert found is None
            assert why is not None
            # Who cannot end it is not told to.
            assert why.endswith(": `qaic-ray ray stop` ends it.") is ("user" not in changes)
            return why

        versions = {"qaic-ray": "0.0.1", "Ray": "2.59.0", "Python": "3.9.1", "the environment": "/"}
        for what, version in versions.items():
            why = refusal(made_by=kept.made_by | {what: version})
            assert f"with {what} {version}, and here is {kept.made_by[what]}" in why
        assert "of another user (id 12345)" in refusal(user=12345)
        assert "offers 4 cards, and 8 are wanted" in refusal(num_cards=8)
        secret = "hf_of_somebody"
        monkeypatch.setenv("HF_TOKEN", secret)
        assert "with another HF_TOKEN" in refusal()
        with_it = kept_by(process.pid)
        assert secret not in leave(with_it).read_text()
        assert kept_ray.usable(0) == (with_it, None)
        monkeypatch.delenv("HF_TOKEN")
        assert "with another HF_TOKEN" in refusal(made_by=with_it.made_by)
        with pytest.raises(UsageError, match="another HF_TOKEN"):
            kept_ray.start(1)


USER = """
import sys
from qaic_ray.cluster.ray_session import using
with using(sys.argv[1]):
    log = open(sys.argv[1] + "/driver.log", "a")
    print("on", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["stopped", pytest.param("it died", marks=pytest.mark.slow)])
def test_it_lives_without_who_began_it_and_ends_with_all_that_is_its_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What it began is of it, by a mark in the environment; a command that uses it is not."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    session = RaySession(DEFAULT_TIMEOUTS)
    folder = str(session.folder)
    with session.environment():
        head = subprocess.Popen(["sleep", "600"])
        worker = subprocess.Popen(["sleep", "600"])
    user = subprocess.Popen(
        [sys.executable, "-c", USER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with sleeping() as other:
        leave(kept_by(head.pid, folder))
        session.keep([head.pid])
        assert user.stdout is not None
        assert user.stdout.readline() == b"on\n"
        assert users(folder) == {user.pid}
        with pytest.raises(UsageError, match=rf"in use \(process {user.pid}\).*--force"):
            kept_ray.stop(force=False)
        assert session.folder.exists()
        if how == "stopped":
            assert kept_ray.stop(force=True)
        else:
            head.kill()
        head.wait(60)
        worker.wait(60)
        until(lambda: not session.folder.exists())
        assert kept_ray.find() is None
        assert user.poll() is None
        assert other.poll() is None
    user.communicate()
    assert user.returncode == 0
    session._keeper.wait(60)


def test_who_uses_it_is_counted_while_it_does_and_is_never_a_part_of_it(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert users(folder) == set()
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "4194304").touch()  # of a process that was killed
    for _ in range(2):
        with using(folder):
            assert users(folder) == {os.getpid()}
        assert users(folder) == set()
        assert users(folder, that_left=True) == {os.getpid()}


def test_a_session_that_nobody_keeps_ends_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    session = RaySession(DEFAULT_TIMEOUTS)
    session.kill()  # not its keeper too
    session.close()
    assert not session.folder.exists()
