"""The folder and the token of a Ray that we start, and the keeper process that removes them.

The folder belongs to this user alone, and its path is short enough for the sockets in it. It is
removed with its Ray, however the driver ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from qaic_ray.cluster import keeper
from qaic_ray.errors import QaicRayError
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts

MAX_FOLDER_CHARS = 34
"""The name of a socket has at most 107 bytes (unix(7)), and Ray puts up to 73 behind the folder."""
DEFAULT_BASE = Path("/tmp")

_LOCK = "lock"
_TOKEN = "token"


class RaySession:
    """The folder of a Ray; it is there until `close` or until this process has ended.

    Args:
        timeouts: `keeper_s`, `keeper_wait_s` and `session_s` are used.
        default_base: where the folder goes if the user's temporary folder has too long a path.
    """

    def __init__(
        self, timeouts: Timeouts = DEFAULT_TIMEOUTS, *, default_base: Path = DEFAULT_BASE
    ) -> None:
        self._timeouts = timeouts
        self.folder = _new_folder(default_base, timeouts)
        self.temp_dir = self.folder / "r"
        """For Ray's own folders, which it makes readable for everybody."""
        self.token_file = self.folder / _TOKEN
        # Held as long as this process runs; without it others know the folder as left behind.
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        token = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(token, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(32))
        self._keeper = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", keeper.__file__),
                *(str(self.folder), str(os.getpid()), str(timeouts.keeper_s)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # it holds no pipe of ours open
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Variables to add to the environment of this Ray's processes.

        RAY_AUTH_MODE stays as the user has set it.
        """
        mode = environment.get("RAY_AUTH_MODE", "token")
        return {
            keeper.SESSION_VARIABLE: str(self.folder),
            # Ray's word for: this machine only, and all of it on the loopback interface.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": mode,
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
        }

    def environment(self) -> AbstractContextManager[None]:
        """A context in which processes that are started belong to the session."""
        # A token in the environment would go before the file's, and is of another Ray.
        return changed_environment({**self.variables(os.environ), "RAY_AUTH_TOKEN": None})

    def kill(self) -> None:
        """Kill every process of this Ray."""
        keeper.kill_marked(str(self.folder), self._timeouts.keeper_s)

    def close(self) -> None:
        """End the processes that are left of this Ray, and remove the folder."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(self._timeouts.keeper_wait_s)
        except subprocess.TimeoutExpired as error:
            raise QaicRayError(
                f"Processes of Ray cannot be ended: see which have {self.folder} in their command."
            ) from error
        finally:
            os.close(self._lock)


@contextmanager
def changed_environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables in this context; those with None are not there."""
    kept = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(kept)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _new_folder(default_base: Path, timeouts: Timeouts) -> Path:
    chosen = Path(tempfile.gettempdir()).absolute()
    room = MAX_FOLDER_CHARS - len(f"/{_prefix()}12345678")
    problems = []
    for base in dict.fromkeys((chosen, default_base)):
        if len(os.fsencode(base)) > room:
            problems.append(f"{base} is too long")
            continue
        _sweep(base, timeouts)
        try:
            return Path(tempfile.mkdtemp(prefix=_prefix(), dir=base))  # 0700
        except OSError as error:
            problems.append(f"{base}: {error.strerror}")
    raise QaicRayError(
        f"Ray's sockets need a temporary folder with a path of at most {room} characters, and "
        f"there is none ({'; '.join(problems)}): set TMPDIR to one."
    )


def _prefix() -> str:
    return f"qaic-ray-{os.getuid()}-"


def _sweep(base: Path, timeouts: Timeouts) -> None:
    """Remove folders whose process was killed together with its keeper."""
    for folder in base.glob(f"{_prefix()}*"):
        with suppress(OSError):
            status = folder.lstat()
            is_ours = status.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink()
            if is_ours and _is_left(folder, status.st_mtime, timeouts.session_s):
                keeper.kill_marked(str(folder), timeouts.keeper_s)
                shutil.rmtree(folder)


def _is_left(folder: Path, made_s: float, being_made_s: float) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return time.time() - made_s > being_made_s
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
