"""Start a Ray on this machine, or join one that runs; and what keeps one from that, in words.

What is private to Ray in that is here: whose signals they are, where it listens, who is let in.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

import ray
import ray._private.utils
import ray._private.worker
import ray._raylet
import ray.exceptions as ray_errors
from ray._private import ray_constants

from qaic_ray.cards.inventory import CARD_RESOURCE
from qaic_ray.cluster.actors import CARD_CPUS, first_line
from qaic_ray.cluster.ray_session import RaySession, environment_of
from qaic_ray.cluster.watch import call_for
from qaic_ray.errors import QaicRayError, UsageError

OBJECT_STORE_BYTES = 256 * 2**20

SHUTDOWN_TIMEOUT_S = 10.0
"""Of a Ray whose head is gone it takes seven seconds, and may take for ever."""

_VITAL = {"raylet": "raylet", "gcs_server": "head process (GCS)"}
_START_ATTEMPTS = 2
_PROBE_TIMEOUT_S = 5.0
# What an HTTP/2 connection begins with, and the type of the frame that answers it (RFC 9113, 3.4).
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = b"\x04"
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


@dataclass(frozen=True)
class OwnRay:
    """A Ray that was started here; `context` is what `ray.init` gave."""

    context: Any
    session: RaySession

    def dead(self) -> str | None:
        """Which process that all rests on has died, as a sentence; does not call into Ray."""
        node = ray._private.worker._global_node
        for kind, process in node.dead_processes() if node is not None else ():
            if kind in _VITAL:
                how = process.returncode
                by = signal.Signals(-how).name if how < 0 else f"exit code {how}"
                return f"The {_VITAL[kind]} of the Ray that was started here died ({by})"
        return None

    def end(self) -> None:
        """Shut it down, and end whatever of it does not."""
        _end(self.session)
        _read_settings()


def start(num_cards: int, *, dashboard: bool) -> OwnRay:
    """Start a Ray of this machine, for this process alone.

    It listens on the loopback interface and lets in who has its token. On a busy machine Ray's own
    start-up timeout sometimes strikes (ray-project/ray#65983), so a start that fails is tried
    again, once.
    """
    failures = 0
    while True:
        session = RaySession()
        try:
            with environment_of(session), _on_loopback(), _signals_are_ours():
                _read_settings()
                _silence()
                context = ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, math.ceil(CARD_CPUS * num_cards) + 1),
                    resources={CARD_RESOURCE: num_cards} if num_cards else {},
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(session.temp_dir),
                    **_QUIET,
                )
            _check_loopback(context)
            return OwnRay(context, session)
        except BaseException as error:
            _end(session)
            # What Ray raises when it does not start is a bare Exception.
            if not isinstance(error, Exception) or isinstance(error, QaicRayError):
                raise
            failures += 1
            if failures == _START_ATTEMPTS:
                raise QaicRayError(f"Ray did not start on this machine: {error}") from error


def join(address: str) -> Any:
    """Join the Ray at `host:port`, or the one of this machine for `auto`.

    Raises:
        UsageError: where there is none, or none that lets this process in.
    """
    if address.startswith("ray://"):
        raise UsageError(
            f"{address} is for Ray Client, which is too slow for this: run on a machine of the "
            "cluster, with --address auto."
        )
    if address != "auto":
        _probe(address)
    _silence()
    with tempfile.TemporaryFile() as said:
        try:
            with _native_stderr_to(said), _signals_are_ours():
                return ray.init(address=address, **_QUIET)
        except (ray_errors.AuthenticationError, OSError, RuntimeError, ValueError) as error:
            ray.shutdown()
            said.seek(0)
            refused = isinstance(error, ray_errors.AuthenticationError)
            if refused or b"InvalidAuthToken" in said.read():
                raise UsageError(
                    f"The Ray cluster at {address} wants its token: copy ~/.ray/auth_token from "
                    "its head to this machine, or put the token into RAY_AUTH_TOKEN, and set "
                    "RAY_AUTH_MODE=token."
                ) from error
            raise UsageError(
                f"The Ray cluster at {address} could not be joined ({first_line(error)}): run on "
                f"one of its machines, with its version of Ray; here it is {ray.__version__}."
            ) from error


def _end(session: RaySession) -> None:
    if call_for(SHUTDOWN_TIMEOUT_S, ray.shutdown):
        session.close()
    else:
        session.kill()  # Ray goes on writing in this process: the folder is removed after its end


def leave() -> None:
    """Leave a Ray that was joined."""
    call_for(SHUTDOWN_TIMEOUT_S, ray.shutdown)


@contextmanager
def _signals_are_ours() -> Iterator[None]:
    """Keep Ray from taking SIGTERM for itself: it would print a stack, and exit by its own code.

    It takes it twice, in Python and, when it connects, in its C++ half.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    connect = ray._private.worker.connect

    def connect_and_give_back(*arguments: Any, **options: Any) -> Any:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return connect(*arguments, **options)
        finally:
            signal.signal(signal.SIGTERM, ours)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    with ExitStack() as patches:
        for place, name, value in (
            (ray._private.utils, "set_sigterm_handler", lambda _: None),
            (ray._private.worker, "connect", connect_and_give_back),
        ):
            patches.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray take the loopback interface's address for this machine's."""
    kept = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray is imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


def _silence() -> None:
    """Keep from stdout what Ray's processes want told, pages of it when one dies.

    It is in their logs, and what matters of it an error of ours says.
    """
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _check_loopback(context: Any) -> None:
    """Every port of a Ray is where the address of its node is."""
    address = str(context.address_info["node_ip_address"])
    if not address.startswith("127.") and address != "::1":
        raise QaicRayError(
            f"Ray {ray.__version__} would listen on {address}, for others to come in: install the "
            "version that qaic-ray was tested with."
        )


def _read_settings() -> None:
    """Have Ray read its settings and its token from the environment again."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _native_stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Keep what Ray's C++ half writes to the terminal, past Python."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _probe(address: str) -> None:
    """Ask whether a gRPC server answers there, as a Ray head is one: Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"{address} is no address of a Ray cluster: write host:port, or auto.")
    try:
        where = (host.strip("[]"), int(port))
        with socket.create_connection(where, timeout=_PROBE_TIMEOUT_S) as connection:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(4, socket.MSG_WAITALL)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"No Ray cluster answers at {address} ({error}): start one with `ray start --head`, or "
            "leave --address out to start one here."
        ) from error
    if answer[3:] != _HTTP2_SETTINGS and "RAY_USE_TLS" not in os.environ:
        raise UsageError(
            f"What answers at {address} is no Ray head: its port is 6379 where none was chosen, "
            "and 8265 is its dashboard's."
        )
