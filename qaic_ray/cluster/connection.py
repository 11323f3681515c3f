"""Start a Ray on this machine, join one that runs, and notice when it is gone.

Uses what is private to Ray for that: its signal handlers, the interface it listens on, its token.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

import ray
import ray._private.utils
import ray._private.worker
import ray._raylet
import ray.exceptions as ray_errors
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.worker import RayContext
from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY, JobInfoStorageClient
from ray.job_config import JobConfig

from qaic_ray import interruption
from qaic_ray.cards.inventory import CARD_RESOURCE
from qaic_ray.cluster.ray_session import RaySession
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts

CARD_CPUS = 0.1
"""The least an actor asks of its node, so that a node with few cores still holds all its cards. Ray
sets OMP_NUM_THREADS to what is asked, or to 1, and that is what an emulated card computes with."""
OBJECT_STORE_BYTES = 256 * 2**20

JOB_NAME_KEY = "job_name"
"""Of a job's metadata: what the dashboard's list of jobs shows as its name."""

_VITAL = {"raylet": "raylet", "gcs_server": "head process (GCS)"}
# What an HTTP/2 connection begins with, and the type of the frame that answers it (RFC 9113, 3.4).
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = b"\x04"
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
# What processes print comes to the driver for `worker_logs.py`; `_silence` keeps it off stdout.
_QUIET = {"log_to_driver": True, "logging_level": "ERROR"}


@dataclass(frozen=True)
class OwnRay:
    """A Ray that was started here; `context` is what `ray.init` gave."""

    context: RayContext
    session: RaySession
    timeouts: Timeouts

    def dead(self) -> str | None:
        """Which vital process of Ray has died, as a sentence; does not call into Ray."""
        node = ray._private.worker._global_node
        for kind, process in node.dead_processes() if node is not None else ():
            if kind in _VITAL:
                how = process.returncode
                by = signal.Signals(-how).name if how < 0 else f"exit code {how}"
                return f"The {_VITAL[kind]} of the Ray that was started here died ({by})"
        return None

    def end(self) -> None:
        """Shut it down, and kill its processes that remain."""
        _end(self.session, self.timeouts)
        read_settings()


def start(num_cards: int, *, dashboard: bool, name: str, timeouts: Timeouts) -> OwnRay:
    """Start a Ray of this machine, for this process alone.

    It listens on the loopback interface and accepts clients that have its token. A start that fails
    is tried once more, as Ray's start-up timeout sometimes strikes on a busy machine
    (ray-project/ray#65983).
    """
    for is_last in (False, True):
        session = RaySession(timeouts)
        try:
            with session.environment():
                context = connect(
                    name,
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, math.ceil(CARD_CPUS * num_cards) + 1),
                    resources={CARD_RESOURCE: num_cards} if num_cards else {},
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(session.temp_dir),
                )
            node = str(context.address_info["node_ip_address"])  # on whose interface it listens
            if not node.startswith("127.") and node != "::1":
                raise QaicRayError(
                    f"Ray {ray.__version__} would listen on {node}, for others to come in: "
                    "install the version that qaic-ray was tested with."
                )
            return OwnRay(context, session, timeouts)
        except BaseException as error:
            _end(session, timeouts)
            # What Ray raises when it does not start is a bare Exception.
            if not isinstance(error, Exception) or isinstance(error, QaicRayError):
                raise
            if is_last:
                raise QaicRayError(f"Ray did not start on this machine: {error}") from error
    raise AssertionError("the last attempt returns or raises")


def connect(name: str, **how: Any) -> RayContext:
    """`ray.init` for a Ray of ours on this machine, by what the environment says of it now."""
    with _on_loopback(), _signals_are_ours():
        read_settings()
        _silence()
        return ray.init(job_config=_named(name), **how, **_QUIET)


def join(address: str, timeouts: Timeouts, *, name: str) -> RayContext:
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
        server = server_at(
            address,
            timeouts.probe_s,
            form="host:port, or auto",
            remedy=": start one with `ray start --head`, or leave --address out to start one here",
        )
        if server != "head":
            raise UsageError(
                f"What answers at {address} is no Ray head: its port is 6379 where none was "
                "chosen, and 8265 is its dashboard's."
            )
    _silence()
    with tempfile.TemporaryFile() as said, ExitStack() as around:
        if _is_on_loopback_alone(address, timeouts):
            around.enter_context(_on_loopback())
        try:
            with _native_stderr_to(said), _signals_are_ours():
                context = ray.init(address=address, job_config=_named(name), **_QUIET)
        except (ray_errors.AuthenticationError, OSError, RuntimeError, ValueError) as error:
            ray.shutdown()
            said.seek(0)
            refused = isinstance(error, ray_errors.AuthenticationError)
            if refused or b"InvalidAuthToken" in said.read():
                raise wants_token(f"at {address}") from error
            raise UsageError(
                f"The Ray cluster at {address} could not be joined ({first_line(error)}): run on "
                f"one of its machines, with its version of Ray; here it is {ray.__version__}."
            ) from error
    if address == "auto" and _is_of_another_job():
        joined = ray.get_runtime_context().gcs_address
        ray.shutdown()
        raise UsageError(
            f"Ray has sent this job to another Ray, at {joined}, for several run on this machine: "
            "start the job's with `ray start`, or be it the only one."
        )
    return context


def _is_of_another_job() -> bool:
    """Whether this is the driver of a submitted job that the joined Ray does not know.

    Ray tells a driver the address that its own Ray has left on the machine, or else that of any.
    """
    told = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    submission_id = told.get("metadata", {}).get(JOB_ID_METADATA_KEY)
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submission_id).encode()
    head, jobs = ray._private.worker.global_worker.gcs_client, ray_constants.KV_NAMESPACE_JOB
    return submission_id is not None and not head.internal_kv_exists(key, jobs)


def _end(session: RaySession, timeouts: Timeouts) -> None:
    if call_for(timeouts.shutdown_s, ray.shutdown):
        session.close()
    else:
        session.kill()  # Ray goes on writing in this process: the folder is removed after its end


def _named(name: str) -> JobConfig:
    return JobConfig(metadata={JOB_NAME_KEY: name})


@contextmanager
def _signals_are_ours() -> Iterator[None]:
    """Keep Ray from handling SIGTERM: it would print a stack, and exit with its own code.

    It sets its handler twice, in Python and, when it connects, in C++.
    """
    if threading.current_thread() is not threading.main_thread():
        with interruption.sigterm_kept():
            yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    connect = ray._private.worker.connect

    def connect_and_give_back(*arguments: object, **options: object) -> object:
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
    """Keep messages of Ray's processes off stdout; there are pages of them when one dies.

    They are in Ray's logs, and the errors of this package say what matters of them.
    """
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def read_settings() -> None:
    """Have Ray read its settings and its token from the environment again."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _native_stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Write to `file` what Ray's C++ code would write to the terminal."""
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _is_on_loopback_alone(address: str, timeouts: Timeouts) -> bool:
    """Whether a head on this machine, as 127.0.0.1 in `address` says, is not at its other address.

    That is where Ray would look for it, for ever.
    """
    host, _, port = address.rpartition(":")
    if host not in _LOOPBACK_HOSTS:
        return False
    try:
        server_at(f"{ray.util.get_node_ip_address()}:{port}", timeouts.probe_s)
    except UsageError:
        return True
    return False


Server = Literal["head", "web", "other"]
"""What answers at an address: a gRPC server, as a Ray head is (with RAY_USE_TLS whatever is not
seen to be another); an HTTP server, as a Ray dashboard is; or neither."""


def server_at(
    address: str, timeout_s: float, *, form: str = "host:port", remedy: str = ""
) -> Server:
    """Find out what answers at `host:port`; Ray itself would wait for minutes.

    Args:
        address: as somebody wrote it.
        timeout_s: an answer comes within this, or nothing is there.
        form: how to write an address, for the error.
        remedy: what to do where nothing answers, for the error.

    Raises:
        UsageError: for what is no address, or where nothing answers.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise UsageError(f"{address} is no address of a Ray cluster: write {form}.")
    where = (host.strip("[]"), int(port))
    try:
        with socket.create_connection(where, timeout=timeout_s) as connection:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(4, socket.MSG_WAITALL)
    except (OSError, OverflowError) as error:  # there is no port 70000
        raise UsageError(f"No Ray cluster answers at {address} ({error}){remedy}.") from error
    if answer == b"HTTP":
        return "web"
    is_head = answer[3:] == _HTTP2_SETTINGS or "RAY_USE_TLS" in os.environ
    return "head" if is_head else "other"


def wants_token(where: str) -> UsageError:
    """The error for a cluster that does not let this process in."""
    return UsageError(
        f"The Ray cluster {where} wants its token: copy ~/.ray/auth_token from its head to this "
        "machine, or put the token into RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text; Ray's have pages."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class ClusterWatch:
    """Notices that Ray is gone, until `close`; then it interrupts the main thread.

    A call into a Ray that is gone may never return, so this has threads of its own. Made in another
    thread than the main one, it interrupts nothing.

    Args:
        dead: called every `watch_s`; returns a sentence when Ray is gone; must not call into Ray.
        ask: called every `ask_s` in a thread of its own, for a Ray whose processes are elsewhere;
            a call into Ray that returns False, or does not return, when that is gone.
        what: the cluster's name, for the sentence about its silence.
        on_loss: called once, before the interruption.
        timeouts: `watch_s`, `ask_s` and `silent_s` are used.
    """

    def __init__(
        self,
        *,
        dead: Callable[[], str | None] = lambda: None,
        ask: Callable[[], object] | None = None,
        what: str = "The Ray cluster",
        on_loss: Callable[[], None] = lambda: None,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self.loss: str | None = None
        """A sentence that says what is gone; None while nothing is."""
        self._dead = dead
        self._what = what
        self._on_loss = on_loss
        self._timeouts = timeouts
        self._interrupts = interruption.can_interrupt()
        self._answered_s = time.monotonic() if ask is not None else math.inf
        self._closed = threading.Event()
        if ask is not None:
            threading.Thread(target=self._ask_on, args=(ask,), name="ask Ray", daemon=True).start()
        self._thread = threading.Thread(target=self._watch, name="watch Ray", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; nothing is interrupted after this."""
        self._closed.set()
        self._thread.join()
        interruption.clear_loss()

    def _watch(self) -> None:
        while not self._closed.wait(self._timeouts.watch_s):
            self.loss = self._dead() or self._silence()
            if self.loss is not None:
                self._on_loss()
                if self._interrupts and not self._closed.is_set():
                    interruption.report_loss(self.loss)
                return

    def _silence(self) -> str | None:
        silent_s = time.monotonic() - self._answered_s
        if silent_s < self._timeouts.silent_s:
            return None
        return f"{self._what} has not answered for {silent_s:.0f} s"

    def _ask_on(self, ask: Callable[[], object]) -> None:
        while not self._closed.wait(self._timeouts.ask_s):
            if ask():
                self._answered_s = time.monotonic()


def call_for(timeout_s: float, call: Callable[[], object]) -> bool:
    """Make a call in a thread of its own; return whether it returned within `timeout_s`."""
    thread = threading.Thread(target=call, name="call Ray", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return not thread.is_alive()
