"""Jobs that a cluster runs by itself, through the Ray Jobs API: submitted, followed, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray.exceptions as ray_errors
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.job_submission import JobDetails, JobSubmissionClient

from qaic_ray.cluster.connection import (
    JOB_NAME_KEY,
    first_line,
    read_settings,
    server_at,
    wants_token,
)
from qaic_ray.cluster.kept_ray import find as find_kept_ray
from qaic_ray.cluster.losses import last_line
from qaic_ray.cluster.ray_session import changed_environment
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.timeouts import DEFAULT_TIMEOUTS, Timeouts, tries

# These go before an address that is given, in Ray; here they stand for one that is not.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class SubmittedJob:
    """A job as its cluster describes it; times are Unix times in seconds.

    `state` is Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED. `message` is the
    line of Ray's explanation that tells most, `metadata` what the job was submitted with.
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
        """Whether it has ended, well or not."""
        return self.state not in ("PENDING", "RUNNING")


class SubmittedJobs:
    """The jobs of one cluster.

    Args:
        address: of the cluster's dashboard, `http://host:8265`, or of its head, `host:6379`; None
            or `auto` for what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, or else the Ray that is
            kept on this machine, or else the cluster that this machine is part of.
        timeouts: `probe_s`, `agent_s`, `stop_s` and their intervals are used.

    Raises:
        UsageError: where there is no cluster, it has no dashboard, or it wants a token.
    """

    def __init__(self, address: str | None, *, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> None:
        self._timeouts = timeouts
        kept = None
        if address in (None, "", "auto"):
            given = (os.environ.get(name) for name in _ADDRESS_VARIABLES)
            address = next(filter(None, given), "")
            kept = None if address else find_kept_ray()
        self._address = _checked(address or "auto", timeouts.probe_s)
        self._access = {} if kept is None else kept.variables()
        with self._explained(), changed_environment(dict.fromkeys(_ADDRESS_VARIABLES)):
            # Ray's C++ half aborts the process where it wants a token and finds none.
            ensure_token_if_auth_enabled(create_token_if_missing=False)
            url = self._address if kept is None else kept.dashboard_url
            self._client = JobSubmissionClient(url)

    def submit(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        submission_id: str,
        name: str,
        metadata: Mapping[str, str],
    ) -> str:
        """Submit a command, which the cluster runs in a copy of `folder`; return its id.

        The dashboard's list of jobs shows `name`.

        The command's words reach the program unchanged; no shell interprets them.
        """
        with self._explained():
            # A head that has just started has no agent for it for a while.
            for is_last in tries(self._timeouts.agent_s, self._timeouts.agent_poll_s):
                try:
                    return str(
                        self._client.submit_job(
                            entrypoint=f"exec {shlex.join(command)}",
                            runtime_env={"working_dir": str(folder)},
                            submission_id=submission_id,
                            metadata={JOB_NAME_KEY: name, **metadata},
                        )
                    )
                except RuntimeError as error:
                    if is_last or "No available agent" not in str(error):
                        raise
        raise AssertionError("the last try returns or raises")

    def all(self) -> list[SubmittedJob]:
        """Every job that was submitted, the newest first."""
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
        """Call `hear` with what a job has printed, and then with what it prints until it ends."""

        async def tail() -> None:
            async for piece in self._client.tail_job_logs(submission_id):
                hear(piece)

        self.one(submission_id)
        with self._explained(submission_id):
            asyncio.run(tail())

    def stop(self, submission_id: str) -> SubmittedJob:
        """Stop a job, wait up to `stop_s` for its end, and return it as it is then."""
        with self._explained(submission_id):
            self._client.stop_job(submission_id)
        for _ in tries(self._timeouts.stop_s, self._timeouts.poll_s):
            if (job := self.one(submission_id)).ended:
                break
        return job

    @contextmanager
    def _explained(self, submission_id: str | None = None) -> Iterator[None]:
        """Raise an error of one sentence for each that Ray's client raises."""
        where = "of this machine" if self._address == "auto" else f"at {self._address}"
        try:
            with _quiet(), changed_environment(self._access):
                if self._access:
                    read_settings()
                yield
        except ray_errors.AuthenticationError as error:
            raise wants_token(where) from error
        except OSError as error:
            raise UsageError(
                f"No Ray dashboard answers for the cluster {where} ({first_line(error)}): start "
                "the head with `ray start --head --include-dashboard=true`, or, where it listens "
                "only there, run `ssh -L 8265:127.0.0.1:8265 HEAD` and give --address "
                "http://127.0.0.1:8265."
            ) from error
        except (RuntimeError, ValueError, KeyError, ray_errors.RayError) as error:
            if submission_id is not None and "does not exist" in str(error):
                raise UsageError(
                    f"The Ray cluster {where} knows no job {submission_id}: `qaic-ray status` "
                    "lists those it knows."
                ) from error
            raise QaicRayError(
                f"The Ray cluster {where} did not take the request: {first_line(error)}"
            ) from error


def _checked(address: str, timeout_s: float) -> str:
    """The address as Ray's client takes it, after a look at what answers: Ray would wait long."""
    if address.startswith("ray://"):
        raise UsageError(
            f"{address} is for Ray Client: give the address of the dashboard, like "
            "http://host:8265, or of the head, like host:6379."
        )
    if "://" in address or address == "auto":
        return address
    form = "http://host:8265, the dashboard's, or host:6379, the head's"
    server = server_at(address, timeout_s, form=form)
    if server == "other":
        raise UsageError(f"What answers at {address} is neither a Ray head nor its dashboard.")
    return f"http://{address}" if server == "web" else address


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep log lines and warnings of Ray's client off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how it calls aiohttp
            yield
    finally:
        logging.disable(before)


def _job(details: JobDetails) -> SubmittedJob:
    return SubmittedJob(
        id=details.submission_id,
        state=str(details.status.value),
        message=last_line(details.message or ""),
        started_s=details.start_time and details.start_time / 1000,
        ended_s=details.end_time and details.end_time / 1000,
        exit_code=details.driver_exit_code,
        metadata=details.metadata or {},
    )
