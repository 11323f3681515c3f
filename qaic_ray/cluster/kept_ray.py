"""A Ray that `--keep-ray` leaves up on this machine, and the note by which commands find it.

The note is `kept-ray.json` in the cache folder, for its user alone. The Ray is one of
`ray_session.py`: a folder, a token, and a keeper that removes both when it has ended.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from ray._private.worker import RayContext

from qaic_ray import __version__
from qaic_ray.cards.inventory import CARD_RESOURCE, KEPT_LABEL
from qaic_ray.cluster.connection import (
    CARD_CPUS,
    OBJECT_STORE_BYTES,
    call_for,
    connect,
    first_line,
    read_settings,
)
from qaic_ray.cluster.dashboard import Dashboard
from qaic_ray.cluster.ray_session import (
    KEPT_NOTE,
    SESSION_VARIABLE,
    RaySession,
    access_variables,
    changed_environment,
    kill_marked,
    marked,
    users,
    using,
)
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import checked, parse_json
from qaic_ray.files.folders import cache_folder, locked
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts, tries

END_IT = "`qaic-ray ray stop` ends it"

# As `ray start` does, but without the server for Ray Client, which would take a fixed port. The
# address in its folder is where Ray sends the drivers of jobs: to any Ray of the machine otherwise.
_START = """
import json, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.utils import write_ray_address
params = RayParams(**json.loads(sys.argv[1]))
node = Node(params, head=True, shutdown_at_exit=False, spawn_reaper=False)
write_ray_address(node.gcs_address, params.temp_dir)
vital = {kind: node.all_processes[kind][0].process.pid for kind in ("gcs_server", "raylet")}
print(json.dumps([node.gcs_address, node.webui_url, vital]))
"""
_VITAL = {"gcs_server": "head process (GCS)", "raylet": "raylet"}
# What processes of a Ray read when they start; those of a kept one have read it.
_READ_AT_START = ("QAIC_", "HF_", "OMP_", "LD_LIBRARY_PATH", "PYTHONPATH")
_READ_BY_DRIVERS = ("QAIC_RAY_CACHE", "QAIC_RAY_SDK", SESSION_VARIABLE)


@dataclass(frozen=True)
class KeptRay:
    """What the note says.

    Attributes:
        folder: of its session; has the token.
        address: of its head, `127.0.0.1:port`.
        dashboard_url: of its dashboard, `http://127.0.0.1:port`.
        num_cards: how many it offers.
        auth_mode: its RAY_AUTH_MODE.
        user: the id of whose it is.
        made_by: versions (of qaic-ray, Ray, Python), `sys.prefix`, and a digest of each environment
            variable that its processes have read; another command must have the same.
        processes: its vital ones: their name, pid, and start in clock ticks after the boot.
    """

    folder: str
    address: str
    dashboard_url: str
    num_cards: int
    auth_mode: str
    user: int
    made_by: dict[str, str]
    processes: list[tuple[str, int, int]]

    @property
    def token_file(self) -> Path:
        """What it asks for is in there."""
        return Path(self.folder) / "token"

    def variables(self) -> dict[str, str | None]:
        """The environment by which this user's programs reach it; None stands for none."""
        return access_variables(self.token_file, self.auth_mode)

    def dashboard(self) -> Dashboard:
        """Its dashboard, without joining it."""
        asks = f"cat {shlex.quote(str(self.token_file))}" if self.auth_mode == "token" else None
        return Dashboard(self.dashboard_url, token_command=asks)

    def dead(self) -> str | None:
        """Which vital process of it has ended, as a sentence; does not call into Ray."""
        for name, pid, started in self.processes:
            if _start_of(pid) != started:
                return f"The {name} of the Ray that was kept has ended"
        return None

    def misfit(self, num_cards: int) -> str | None:
        """Why this command cannot use it, as a sentence with the remedy; None where it can."""
        if self.user != os.getuid():
            return f"The Ray that is kept is of another user (id {self.user}), who can end it."
        why = self._difference(num_cards)
        return None if why is None else f"{why}: {END_IT}."

    def _difference(self, num_cards: int) -> str | None:
        """What it has otherwise than this command: a sentence without its end."""
        for what, here in _made_by().items():
            there = self.made_by.get(what, "nothing")
            if here != there:
                is_variable = what.startswith("$")
                how = (
                    f"another {what[1:]}" if is_variable else f"{what} {there}, and here is {here}"
                )
                return f"The Ray that is kept was started with {how}"
        if extra := self.made_by.keys() - _made_by().keys():
            return f"The Ray that is kept was started with another {min(extra).lstrip('$')}"
        if num_cards > self.num_cards:
            return f"The Ray that is kept offers {self.num_cards} cards, and {num_cards} are wanted"
        return None

    @contextmanager
    def joined(self, name: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> Iterator[RayContext]:
        """Join it; it stays when the context is left.

        Raises:
            UsageError: it does not let this process in.
        """
        with using(self.folder):
            try:
                with changed_environment(self.variables()):
                    context = connect(name, address=self.address)
            except (OSError, RuntimeError, ValueError) as error:
                ray.shutdown()
                raise UsageError(
                    f"The Ray that is kept cannot be joined ({first_line(error)}): {END_IT}."
                ) from error
            try:
                yield context
            finally:
                call_for(timeouts.shutdown_s, ray.shutdown)
                read_settings()


def find() -> KeptRay | None:
    """The Ray that is kept, and lives; the note of one that has died is removed.

    Raises:
        UsageError: there is a note that is not this user's, or cannot be read.
    """
    path = _note()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(
            f"{path}, the note of a Ray that is kept, cannot be read ({error.strerror}): it is "
            "another user's, or no file; give QAIC_RAY_CACHE a folder of your own."
        ) from error
    with open(descriptor, encoding="utf-8") as stream:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise UsageError(
                f"{path}, the note of a Ray that is kept, is not yours alone: remove it, or give "
                "QAIC_RAY_CACHE a folder of your own."
            )
        text = stream.read()
    try:
        kept = checked(KeptRay, parse_json(text, str(path)), str(path))
    except UsageError as error:
        raise UsageError(
            f"{path}, the note of a Ray that is kept, was written by another version of qaic-ray: "
            "have that end it, or remove the note."
        ) from error
    if kept.dead() is not None:
        path.unlink(missing_ok=True)
        return None
    return kept


def usable(num_cards: int) -> tuple[KeptRay | None, str | None]:
    """The Ray that is kept, if this command can use it; else why not, as a sentence."""
    try:
        kept = find()
    except UsageError as error:
        return None, str(error)
    why = kept.misfit(num_cards) if kept is not None else None
    return (kept, None) if why is None else (None, why)


def start(num_cards: int, *, wanted: int = 0, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> KeptRay:
    """Start a Ray that stays, with its dashboard, and leave the note; or return the one there is.

    Args:
        num_cards: how many a new one offers.
        wanted: how many one that is there must offer.
        timeouts: those of its session are used.

    Raises:
        UsageError: one is kept that does not fit.
        QaicRayError: it does not start.
    """
    with locked(_note()):
        kept, refusal = usable(wanted)
        if refusal is not None:
            raise UsageError(refusal)
        if kept is not None:
            return kept
        for is_last in (False, True):  # see `connection.start`
            session = RaySession(timeouts)
            try:
                kept = _started(session, num_cards)
                _leave(kept)
                session.keep([pid for _, pid, _ in kept.processes])
                return kept
            except BaseException as error:
                _note().unlink(missing_ok=True)
                session.close()
                if is_last or not isinstance(error, QaicRayError):
                    raise
    raise AssertionError("the last attempt returns or raises")


def stop(*, force: bool, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> bool:
    """End the Ray that is kept, and nothing else; whether there was one.

    Args:
        force: also where commands use it; these end as they do when a Ray is lost.
        timeouts: `keeper_s` and `keeper_wait_s` are used.

    Raises:
        UsageError: commands use it.
        QaicRayError: it cannot be ended.
    """
    kept = find()
    if kept is None:
        return False
    if (pids := users(kept.folder)) and not force:
        those = ", ".join(map(str, sorted(pids)))
        raise UsageError(
            f"The Ray that is kept is in use (process {those}): wait until that has ended, or end "
            "both with --force."
        )
    pids = users(kept.folder, that_left=True)
    for _, pid, started in kept.processes:
        if _start_of(pid) == started:  # and no other that has its number now
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for is_last in tries(timeouts.keeper_wait_s, timeouts.poll_s):  # its keeper does the rest
        left = set(marked(kept.folder)) - pids
        if not (left or Path(kept.folder).exists()):
            break
        if is_last:
            kill_marked(kept.folder, timeouts.keeper_s)
            shutil.rmtree(kept.folder, ignore_errors=True)
            left = set(marked(kept.folder)) - pids
    _note().unlink(missing_ok=True)
    if left:
        raise QaicRayError(f"Processes of the Ray that was kept cannot be ended: {sorted(left)}.")
    return True


def _leave(kept: KeptRay) -> None:
    descriptor, name = tempfile.mkstemp(dir=_note().parent, prefix=f".{KEPT_NOTE}-")  # 0600
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(kept), indent=2) + "\n")
    os.replace(name, _note())


def _note() -> Path:
    return cache_folder() / KEPT_NOTE


def _started(session: RaySession, num_cards: int) -> KeptRay:
    """Start it in a child, which its processes outlive."""
    how = {
        "node_ip_address": "127.0.0.1",
        # Enough for as many actors as there are cards beside those that share all of this machine.
        "num_cpus": (os.cpu_count() or 1) + math.ceil(CARD_CPUS * num_cards) + 1,
        "resources": {CARD_RESOURCE: num_cards},
        "labels": {KEPT_LABEL: "true"},
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": None,  # 8265, or the next that is free
        "dashboard_agent_listen_port": 0,  # a head whose agent finds its port taken runs no jobs
        "object_store_memory": OBJECT_STORE_BYTES,
        "temp_dir": str(session.temp_dir),
    }
    with session.environment():
        mode = os.environ["RAY_AUTH_MODE"]
        child = subprocess.run(
            [sys.executable, "-c", _START, json.dumps(how)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=session.folder,
            start_new_session=True,  # a Ctrl-C of the command that began it is not for it
            check=False,
        )
    try:
        address, url, vital = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        said = child.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise QaicRayError(f"Ray did not start on this machine: {said[-1][:300]}") from error
    started = {kind: _start_of(pid) for kind, pid in vital.items()}
    processes = [(_VITAL[kind], vital[kind], at) for kind, at in started.items() if at is not None]
    if len(processes) < len(_VITAL):
        raise QaicRayError("Ray has ended as soon as it had started on this machine.")
    return KeptRay(
        folder=str(session.folder),
        address=address,
        dashboard_url=f"http://{url}",
        num_cards=num_cards,
        auth_mode=mode,
        user=os.getuid(),
        made_by=_made_by(),
        processes=processes,
    )


def _start_of(pid: int) -> int | None:
    """When a living process began, in clock ticks after the boot; proc(5)."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] != b"Z":
            return int(fields[19])
    return None


def _made_by() -> dict[str, str]:
    """What must be the same for a command to use it; variables begin with `$`."""
    variables = {
        f"${name}": hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:16]
        for name, value in os.environ.items()
        if name.startswith(_READ_AT_START) and name not in _READ_BY_DRIVERS
    }
    return {
        "qaic-ray": __version__,
        "Ray": ray.__version__,
        "Python": platform.python_version(),
        "the environment": sys.prefix,
        **variables,
    }
