"""A job handed to a cluster, which runs it by itself: what is sent to it, and how far it is.

What is sent is the job and its prompts file, never a folder of the user's; everything else that a
job names by a path is to be at that path on the cluster.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray import __version__
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.formats.inputs.filesystems import is_uri
from qaic_ray.formats.inputs.named_files import is_stream, parts_of
from qaic_ray.options import Job
from qaic_ray.pipeline.job import dump_job
from qaic_ray.runs.run_input import with_paths

if TYPE_CHECKING:
    from qaic_ray.cluster.jobs import SubmittedJob, SubmittedJobs

MAX_SENT_BYTES = 64 * 2**20
"""Ray keeps what is sent in its head's memory, and its dashboard takes no more than 100 MiB."""
JOB_FILE = "job.yaml"
PROMPTS_FOLDER = "prompts"

_JOB_KEY, _FOLDER_KEY, _VERSION_KEY = "qaic_ray_job", "qaic_ray_folder", "qaic_ray_version"
_COMMAND_NOT_FOUND = 127
_STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "STOPPED": "stopped",
    "SUCCEEDED": "done",
    "FAILED": "failed",
}
_FIGURES = ("rows", "failed_rows", "folder")  # of a report, as it ends a log
_ERROR = re.compile(r"^qaic-ray: (?!\d+ rows done)(.+)$", re.MULTILINE)
_PROGRESS = re.compile(r"^qaic-ray: (\d+) rows done, (\d+) failed(?:; .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class SubmitRequest:
    """A job for a cluster.

    `folder` is where the job's relative paths start on the machine that runs it, `python` the
    interpreter there; without `send_prompts` the prompts file is read at its own path there.
    """

    job: Job
    folder: Path
    python: str
    send_prompts: bool = True


@dataclass(frozen=True)
class Parcel:
    """What of a job is sent (name -> bytes), and paths that must be there on the cluster."""

    sent: dict[str, int]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class JobStatus:
    """How far a job is; `rows` are those done, failed ones among them; None where nobody knows.

    `state` is waiting, running, done, failed or stopped; times are Unix times in seconds.
    """

    id: str
    job: str
    state: str
    started_s: float | None
    ended_s: float | None
    rows: int | None = None
    failed_rows: int | None = None
    folder: str | None = None
    error: str | None = None


def submit_step(request: SubmitRequest) -> tuple[str, Parcel]:
    """Hand a job in; its id, and what was sent.

    Raises:
        UsageError: for a job that cannot be sent, or a cluster that cannot be reached.
    """
    from qaic_ray.cluster.jobs import SubmittedJobs

    name, there = request.job.name, str(request.folder)
    metadata = {_JOB_KEY: name, _FOLDER_KEY: there, _VERSION_KEY: __version__}
    with tempfile.TemporaryDirectory(prefix="qaic-ray-") as made:
        folder = Path(made)
        parcel = pack(request, folder)
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
        submission_id = SubmittedJobs(request.job.ray.address).submit(
            entry_command(request),
            folder,
            submission_id=f"{name}-{stamp}-{secrets.token_hex(2)}",
            name=name,
            metadata=metadata,
        )
    return submission_id, parcel


def entry_command(request: SubmitRequest) -> list[str]:
    """What the cluster runs, in the folder that was sent."""
    # Not the script `qaic-ray`: PATH there may have another one, or none.
    program = "from qaic_ray.cli import main; main()"
    options = ["--folder", str(request.folder), "--address", "auto", "--no-stream", "--json"]
    return [request.python, "-c", program, "launch", JOB_FILE, *options]


def pack(request: SubmitRequest, folder: Path) -> Parcel:
    """Put a job and its prompts into `folder`, and say what else it needs.

    Raises:
        UsageError: for prompts that are not there, or cannot be sent.
    """
    job: Job = request.job
    expected: list[str] = []
    if job.run.prompts is not None:
        kept, expected = _prompts_there(job.run.prompts, folder, send=request.send_prompts)
        job = job.changed("run", prompts=kept)
    model = Path(job.model.name).expanduser()
    if model.exists():
        expected.append(str(model.absolute()))
        job = job.changed("model", name=expected[-1])
    if job.run.draft_qpc is not None:
        expected.append(str(request.folder / job.run.draft_qpc))
    (folder / JOB_FILE).write_text(dump_job(job), encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sent = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return Parcel(sent, tuple(expected))


def _prompts_there(
    given: str | tuple[str, ...], folder: Path, *, send: bool
) -> tuple[str | tuple[str, ...], list[str]]:
    """The input as the cluster's machine is to read it, and paths that must be there."""
    if is_stream(given):
        raise UsageError("A detached job has no stdin to read prompts from: name a file.")
    paths = [part for part in parts_of(given) if not is_uri(part)]
    if not send:
        return given, paths
    if len(paths) > 1:
        raise UsageError(
            "Only one file of prompts is sent: name URIs that the cluster reads, or paths that "
            "its machines see, with --no-send-prompts."
        )
    for path in map(Path, paths):
        _check_sendable(path)
        inside = folder / PROMPTS_FOLDER / path.name
        inside.parent.mkdir()
        shutil.copyfile(path, inside)
        sent = str(inside.relative_to(folder))
        given = with_paths(given, lambda _, sent=sent: sent)  # type: ignore[misc]
    return given, []


def job_statuses(address: str | None, submission_id: str | None = None) -> list[JobStatus]:
    """The jobs of ours that a cluster knows, the newest first; or the one of an id.

    Raises:
        UsageError: where there is no such job, or no such cluster.
    """
    from qaic_ray.cluster.jobs import SubmittedJobs

    jobs = SubmittedJobs(address)
    if submission_id is not None:
        return [_status(jobs, jobs.one(submission_id))]
    return [_status(jobs, job) for job in jobs.all() if _JOB_KEY in job.metadata]


def stop_job(address: str | None, submission_id: str) -> JobStatus:
    """End a job, if it has not ended; how far it came."""
    from qaic_ray.cluster.jobs import SubmittedJobs

    jobs = SubmittedJobs(address)
    return _status(jobs, jobs.stop(submission_id))


def progress_line(rows: int, failed_rows: int) -> str:
    """What a job that nobody watches prints now and then, for `job_statuses` to read."""
    return f"qaic-ray: {rows} rows done, {failed_rows} failed"


def read_status(job: SubmittedJob, log: str) -> JobStatus:
    """What a job and its log say together."""
    status = JobStatus(
        id=job.id,
        job=job.metadata.get(_JOB_KEY, ""),
        state=_STATES.get(job.state, job.state.lower()),
        started_s=job.started_s,
        ended_s=job.ended_s,
    )
    report = _report(log) if job.ended else None
    if report is not None:  # rows that failed are no failure of the job, whatever its exit code
        return replace(status, state="done", **{key: report[key] for key in _FIGURES})
    found = _PROGRESS.findall(log)
    if found:
        rows, failed_rows = map(int, found[-1])
        status = replace(status, rows=rows, failed_rows=failed_rows)
    return replace(status, error=_error(job, log)) if status.state == "failed" else status


def _status(jobs: SubmittedJobs, job: SubmittedJob) -> JobStatus:
    try:
        log = "" if job.state == "PENDING" else jobs.log(job.id)
    except QaicRayError:
        log = ""  # it went with its node; what Ray itself knows is still worth telling
    return read_status(job, log)


def _report(log: str) -> dict[str, Any] | None:
    """The figures that end the log of a job that came to its end."""
    try:
        document = json.loads(log.rstrip().rpartition("\n")[2])
    except (ValueError, RecursionError):
        return None
    is_report = isinstance(document, dict) and set(_FIGURES) <= set(document)
    return document if is_report else None


def _error(job: SubmittedJob, log: str) -> str:
    said = _ERROR.findall(log)
    if said:
        return str(said[-1])
    if job.exit_code == _COMMAND_NOT_FOUND:
        return "The cluster has no such Python: name the one with qaic-ray by launch --python."
    return " ".join(job.message.split())


def _check_sendable(prompts: Path) -> None:
    there = "the cluster's machines see it at this path, give --no-send-prompts"
    if prompts.is_dir():
        raise UsageError(f"{prompts} is a folder: only a file is sent; where {there}.")
    if not prompts.is_file():
        raise UsageError(f"There is no prompts file {prompts}; where {there}.")
    num_bytes = prompts.stat().st_size
    if num_bytes > MAX_SENT_BYTES:
        raise UsageError(
            f"{prompts} has {num_bytes / 2**20:.0f} MiB, and no more than "
            f"{MAX_SENT_BYTES / 2**20:.0f} MiB are sent: put it on a disk that the cluster's head "
            "sees; where it is at this path there, give --no-send-prompts."
        )
