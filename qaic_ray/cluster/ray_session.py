"""The folder and the token of a Ray that we start, and the keeper process that removes them.

The folder belongs to this user alone, and its path is short enough for the sockets in it. Its
keeper, which this file is as a program, removes it however the driver ends:

    python ray_session.py FOLDER DRIVER TIMEOUT_S

It waits until stdin ends or the process DRIVER does; or, once a line on stdin names processes of a
Ray that is kept, until one of these does. Then it kills every process that was started with
QAIC_RAY_SESSION=FOLDER in its environment, with all that these started, and removes FOLDER, each
for up to TIMEOUT_S. It imports the standard library alone.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qaic_ray.timeouts import Timeouts

SESSION_VARIABLE = "QAIC_RAY_SESSION"
KEPT_NOTE = "kept-ray.json"
"""Of the cache folder: by it a Ray that is kept is found; see `kept_ray.py`."""
MAX_FOLDER_CHARS = 34
"""The name of a socket has at most 107 bytes (unix(7)), and Ray puts up to 73 behind the folder."""
DEFAULT_BASE = Path("/tmp")

_LOCK = "lock"
_USERS = "users"
_HAS_LEFT = b"left"
_PREFIX = f"qaic-ray-{os.getuid()}-"
_PAUSE_S = 0.1


class RaySession:
    """The folder of a Ray; it is there until `close` or until this process has ended.

    Args:
        timeouts: `keeper_s`, `keeper_wait_s` and `session_s` are used.
        default_base: where the folder goes if the user's temporary folder has too long a path.
    """

    def __init__(self, timeouts: Timeouts, *, default_base: Path = DEFAULT_BASE) -> None:
        import subprocess

        self._timeouts = timeouts
        self.folder = _new_folder(default_base, timeouts)
        self.temp_dir = self.folder / "r"
        """For Ray's own folders, which it makes readable for everybody."""
        self.token_file = self.folder / "token"
        # Held as long as this process runs; without it others know the folder as left behind.
        # Read-only: who has a file of the folder open for writing is taken for a part of Ray.
        self._lock = os.open(self.folder / _LOCK, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        token = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(token, "w", encoding="ascii") as stream:
            stream.write(os.urandom(32).hex())
        self._keeper = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", __file__),
                *(str(self.folder), str(os.getpid()), str(timeouts.keeper_s)),
            ],
            stdin=subprocess.PIPE,
            pass_fds=(self._lock,),  # a Ray that is kept outlives this process
            stdout=subprocess.DEVNULL,  # it holds no pipe of ours open
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def environment(self) -> AbstractContextManager[None]:
        """A context in which processes that are started belong to the session.

        RAY_AUTH_MODE stays as the user has set it.
        """
        mode = os.environ.get("RAY_AUTH_MODE", "token")
        access = access_variables(self.token_file, mode)
        return changed_environment({SESSION_VARIABLE: str(self.folder), **access})

    def keep(self, pids: Sequence[int]) -> None:
        """Let the Ray and its folder live as long as these processes of it do."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(f"{' '.join(map(str, pids))}\n".encode())
        self._keeper.stdin.close()
        os.close(self._lock)

    def kill(self) -> None:
        """Kill every process of this Ray."""
        kill_marked(str(self.folder), self._timeouts.keeper_s)

    def close(self) -> None:
        """End the processes that are left of this Ray, and remove the folder."""
        from subprocess import TimeoutExpired

        from qaic_ray.errors import QaicRayError

        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(self._timeouts.keeper_wait_s)
        except TimeoutExpired as error:
            raise QaicRayError(
                f"Processes of Ray cannot be ended: see which have {self.folder} in their command."
            ) from error
        finally:
            os.close(self._lock)


def access_variables(token_file: Path, mode: str) -> dict[str, str | None]:
    """The environment by which a program of this user reaches a Ray of ours on this machine."""
    return {
        # Ray's word for: this machine only, and all of it on the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": mode,
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_AUTH_TOKEN": None,  # it would go before the file's, and is of another Ray
    }


@contextmanager
def using(folder: str) -> Iterator[None]:
    """Count this process among those that use the Ray in `folder`.

    It is no part of that Ray as long as it lives: Ray's logs may stay open in it.
    """
    marks = Path(folder, _USERS)
    marks.mkdir(mode=0o700, exist_ok=True)
    mark = os.open(marks / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    fcntl.flock(mark, fcntl.LOCK_SH)  # never closed; shared, as a process may use it twice
    try:
        yield
    finally:
        os.write(mark, _HAS_LEFT)


def users(folder: str, *, that_left: bool = False) -> set[int]:
    """The processes that use the Ray in `folder`; also those that did, and still live."""
    found = set()
    with suppress(FileNotFoundError):
        for mark in list(Path(folder, _USERS).iterdir()):
            with suppress(FileNotFoundError):
                if not _is_left(mark) and (that_left or not mark.read_bytes()):
                    found.add(int(mark.name))
    return found


@contextmanager
def changed_environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables in this context; those with None are not there."""
    kept = {name: os.environ.pop(name, None) for name in variables}
    try:
        os.environ.update({name: value for name, value in variables.items() if value is not None})
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _new_folder(default_base: Path, timeouts: Timeouts) -> Path:
    import tempfile

    from qaic_ray.errors import QaicRayError

    chosen = Path(tempfile.gettempdir()).absolute()
    room = MAX_FOLDER_CHARS - len(f"/{_PREFIX}12345678")
    problems = []
    for base in dict.fromkeys((chosen, default_base)):
        if len(os.fsencode(base)) > room:
            problems.append(f"{base} is too long")
            continue
        _sweep(base, timeouts)
        try:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))  # 0700
        except OSError as error:
            problems.append(f"{base}: {error.strerror}")
    raise QaicRayError(
        f"Ray's sockets need a temporary folder with a path of at most {room} characters, and "
        f"there is none ({'; '.join(problems)}): set TMPDIR to one."
    )


def _sweep(base: Path, timeouts: Timeouts) -> None:
    """Remove folders whose process was killed together with its keeper."""
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            is_ours = status.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink()
            if is_ours and _is_left_behind(folder, status.st_mtime, timeouts.session_s):
                kill_marked(str(folder), timeouts.keeper_s)
                shutil.rmtree(folder)


def _is_left_behind(folder: Path, made_s: float, being_made_s: float) -> bool:
    try:
        return _is_left(folder / _LOCK)
    except FileNotFoundError:
        return time.time() - made_s > being_made_s


def _is_left(file: Path) -> bool:
    """Whether nobody has this file locked any more."""
    lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def marked(folder: str, driver: int = 0) -> list[int]:
    """The living processes that belong to the session in `folder`, but for its drivers.

    Some of Ray's processes overwrite their environment with a title. They are known by their
    parents, or by the files of the folder that they have open.
    """
    mark = f"{SESSION_VARIABLE}={folder}".encode()
    found = set()
    parents = {}
    spared = {os.getpid(), driver} | users(folder, that_left=True)
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) not in spared:
            with suppress(OSError):
                process = Path("/proc", name)
                stat = process.joinpath("stat").read_bytes()
                parents[int(name)] = int(stat.rpartition(b")")[2].split()[1])
                environment = process.joinpath("environ").read_bytes()  # of a zombie: empty
                if mark in environment.split(b"\0") or _writes_into(process, folder):
                    found.add(int(name))
    children = found
    while children:
        children = {pid for pid, parent in parents.items() if parent in children} - found
        found |= children
    return sorted(found)


def _writes_into(process: Path, folder: str) -> bool:
    """Whether it has a file of the folder open for writing; others may read the logs."""
    for fd in os.listdir(f"{process}/fd"):
        with suppress(OSError):  # it was closed just now
            if os.readlink(f"{process}/fd/{fd}").startswith(f"{folder}/"):
                with open(f"{process}/fdinfo/{fd}", encoding="ascii") as stream:
                    flags = dict(line.split(":", 1) for line in stream)["flags"]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


def kill_marked(folder: str, timeout_s: float, driver: int = 0) -> None:
    """Kill them until two looks in a row have found none: a process may be starting another."""
    deadline_s = time.monotonic() + timeout_s
    num_empty = 0
    while num_empty < 2 and time.monotonic() < deadline_s:
        pids = marked(folder, driver)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        num_empty = 0 if pids else num_empty + 1
        time.sleep(_PAUSE_S)


def _is_written(fd: int) -> bool:
    """Whether it has something to be read, or its end."""
    return bool(select.select([fd], [], [], 0)[0])


def main() -> None:
    """Wait, kill, remove."""
    folder, driver, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the driver must not end this before it
    with suppress(ProcessLookupError):
        select.select([sys.stdin.fileno(), os.pidfd_open(driver)], [], [])
    if kept := sys.stdin.readline().split() if _is_written(sys.stdin.fileno()) else []:
        driver = 0
        with suppress(ProcessLookupError):
            select.select([os.pidfd_open(int(pid)) for pid in kept], [], [])
    kill_marked(folder, timeout_s, driver)
    deadline_s = time.monotonic() + timeout_s
    while os.path.exists(folder) and time.monotonic() < deadline_s:
        shutil.rmtree(folder, ignore_errors=True)  # what is being written there meanwhile
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
