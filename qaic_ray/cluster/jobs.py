"""Jobs that a cluster runs by itself, through the Ray Jobs API: handed in, watched, read, stopped.

With `cluster.py` and `actors.py` the only room of Ray. Knows nothing of job files or of what a job
prints; never goes through Ray Client.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray.exceptions as ray_errors
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.job_submission import JobSubmissionClient

from qaic_ray.cluster.actors import first_line
from qaic_ray.errors import QaicRayError, UsageError

LIVE_STATES = ("PENDING", "RUNNING")
AGENT_TIMEOUT_S = 60.0
"""How long a head may take, from its start on, until it can take jobs."""

_PROBE_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.2
_AGENT_POLL_S = 1.0
# These go before an address that is given, in Ray; here they stand for one that is not.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# What an HTTP/2 connection begins with: a Ray head answers it, and a web server refuses it.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = b"\x04"


@dataclass(frozen=True)
class SubmittedJob:
    """A job as its cluster tells of it; times are Unix times in seconds.

    `state` is Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. `message` is Ray's own
    explanation of it, `metadata` what the job was handed in with.
    """

    id: str
    state: str
    message: str = ""
    started_s: float | None = None
    ended_s: float | None = None
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state not in LIVE_STATES


class SubmittedJobs:
    """The jobs of one cluster.

    Args:
        address: of the cluster's dashboard, `http://host:8265`, or of its head, `host:6379`; None
            or `auto` for what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, or else the cluster that
            this machine is part of.

    Raises:
        UsageError: where there is no cluster, it has no dashboard, or it wants a token.
    """

    def __init__(self, address: str | None) -> None:
        if address in (None, "", "auto"):
            given = (os.environ.get(name) for name in _ADDRESS_VARIABLES)
            address = next(filter(None, given), "auto")
        self._address = _checked(address or "auto")
        with self._explained(), _without(_ADDRESS_VARIABLES):
            # Ray's C++ half aborts the process where it wants a token and finds none.
            ensure_token_if_auth_enabled(create_token_if_missing=False)
            self._client = JobSubmissionClient(self._address)

    def submit(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        submission_id: str,
        metadata: Mapping[str, str],
    ) -> str:
        """Hand in a command, which the cluster runs in a copy of `folder`; returns its id.

        The command's words reach the program as they are: no shell sees what is in them.
        """
        submit = partial(
            self._client.submit_job,
            entrypoint=f"exec {shlex.join(command)}",
            runtime_env={"working_dir": str(folder)},
            submission_id=submission_id,
            metadata=dict(metadata),
        )
        with self._explained():
            return str(_once_an_agent_is_there(submit))

    def all(self) -> list[SubmittedJob]:
        """Every job that was handed in, the newest first."""
        with self._explained():
            found = [_job(d) for d in self._client.list_jobs() if d.submission_id]
        return sorted(found, key=lambda job: job.started_s or 0.0, reverse=True)

    def one(self, submission_id: str) -> SubmittedJob:
        """The job of that id.

        Raises:
            UsageError: where there is none.
        """
        with self._explained(submission_id):
            return _job(self._client.get_job_info(submission_id))

    def log(self, submission_id: str) -> str:
        """Everything that a job has printed, stdout and stderr."""
        with self._explained(submission_id):
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str, hear: Callable[[str], None]) -> None:
        """Tell what a job has printed, and then what it prints, piece by piece until it ends."""

        async def tail() -> None:
            async for piece in self._client.tail_job_logs(submission_id):
                hear(piece)

        self.one(submission_id)
        with self._explained(submission_id):
            asyncio.run(tail())

    def stop(self, submission_id: str) -> SubmittedJob:
        """End a job that has not ended, and wait for that; the job as it is then."""
        with self._explained(submission_id):
            self._client.stop_job(submission_id)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        while not (job := self.one(submission_id)).ended and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        return job

    @contextmanager
    def _explained(self, submission_id: str | None = None) -> Iterator[None]:
        """Say in one sentence what Ray says in a page."""
        where = "of this machine" if self._address == "auto" else f"at {self._address}"
        try:
            with _quiet():
                yield
        except ray_errors.AuthenticationError as error:
            raise UsageError(
                f"The Ray cluster {where} wants its token: copy ~/.ray/auth_token from its head "
                "to this machine, or put the token into RAY_AUTH_TOKEN, and set "
                "RAY_AUTH_MODE=token."
            ) from error
        except OSError as error:
            raise UsageError(
                f"No Ray dashboard answers for the cluster {where} ({first_line(error)}): start "
                "the head with `ray start --head --include-dashboard=true`, or, where it listens "
                "only there, run `ssh -L 8265:127.0.0.1:8265 HEAD` and give --address "
                "http://127.0.0.1:8265."
            ) from error
        except (RuntimeError, ValueError, KeyError) as error:
            if submission_id is not None and "does not exist" in str(error):
                raise UsageError(
                    f"The Ray cluster {where} knows no job {submission_id}: `qaic-ray status` "
                    "lists those it knows."
                ) from error
            raise QaicRayError(
                f"The Ray cluster {where} did not take the request: {first_line(error)}"
            ) from error


def _once_an_agent_is_there(submit: Callable[[], str]) -> str:
    """Hand a job in; a head that has just started has nobody to take it for a while."""
    deadline_s = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return submit()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() >= deadline_s:
                raise
        time.sleep(_AGENT_POLL_S)


def _checked(address: str) -> str:
    """The address as Ray's client takes it, after a look at who answers: Ray would wait long."""
    if address.startswith("ray://"):
        raise UsageError(
            f"{address} is for Ray Client: give the address of the dashboard, like "
            "http://host:8265, or of the head, like host:6379."
        )
    if "://" in address or address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(
            f"{address} is no address of a Ray cluster: write http://host:8265, the dashboard's, "
            "or host:6379, the head's."
        )
    try:
        where = (host.strip("[]"), int(port))
        with socket.create_connection(where, timeout=_PROBE_TIMEOUT_S) as connection:
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(4, socket.MSG_WAITALL)
    except (OSError, OverflowError) as error:
        raise UsageError(f"No Ray cluster answers at {address} ({error}).") from error
    if answer == b"HTTP":
        return f"http://{address}"
    if answer[3:] != _HTTP2_SETTINGS and "RAY_USE_TLS" not in os.environ:
        raise UsageError(f"What answers at {address} is neither a Ray head nor its dashboard.")
    return address


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what Ray's client tells of its own work."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how it calls aiohttp
            yield
    finally:
        logging.disable(before)


@contextmanager
def _without(variables: Sequence[str]) -> Iterator[None]:
    """Hide environment variables for a while."""
    hidden = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _job(details: Any) -> SubmittedJob:
    return SubmittedJob(
        id=details.submission_id,
        state=str(details.status.value),
        message=details.message or "",
        started_s=_seconds(details.start_time),
        ended_s=_seconds(details.end_time),
        exit_code=details.driver_exit_code,
        metadata=details.metadata or {},
    )


def _seconds(time_ms: int | None) -> float | None:
    return time_ms / 1000 if time_ms else None
