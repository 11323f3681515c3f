"""Start a Ray on this machine, or join one that runs; and what keeps one from that, in words."""

from __future__ import annotations

import math
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import ray
import ray.exceptions as ray_errors

from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.fleet.actors import CARD_CPUS, first_line
from qaic_ray.fleet.inventory import CARD_RESOURCE

OBJECT_STORE_BYTES = 256 * 2**20

_START_ATTEMPTS = 2
_PROBE_TIMEOUT_S = 5.0
# What an HTTP/2 connection begins with, and the type of the frame that answers it (RFC 9113, 3.4).
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = b"\x04"
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def start(num_cards: int, *, dashboard: bool) -> Any:
    """Start a Ray of this machine.

    On a busy machine Ray's own start-up timeout sometimes strikes (ray-project/ray#65983), so a
    start that fails is tried again, once.
    """
    failures = 0
    while True:
        try:
            return ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(CARD_CPUS * num_cards) + 1),
                resources={CARD_RESOURCE: num_cards} if num_cards else {},
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                **_QUIET,
            )
        except Exception as error:  # what Ray raises when it does not start is a bare Exception
            ray.shutdown()
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
    with tempfile.TemporaryFile() as said:
        try:
            with _native_stderr_to(said):
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
