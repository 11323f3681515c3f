"""Jobs that a cluster runs by itself: `launch --detach`, `status`, `logs`, `stop`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.cli.options import JsonOption
from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray.config import Job

DETACHED = "On a cluster"
DetachOption = Annotated[
    bool,
    typer.Option(
        "--detach",
        help="Let the cluster run it: see status, logs and stop.",
        rich_help_panel=DETACHED,
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option(
        help="Where the job's relative paths start, on the machine that runs it.",
        show_default="this folder",
        rich_help_panel=DETACHED,
    ),
]
PythonOption = Annotated[
    str | None,
    typer.Option(
        help="With --detach: the Python on the cluster's head that has qaic-ray.",
        show_default="this one's path",
        rich_help_panel=DETACHED,
    ),
]
SendPromptsOption = Annotated[
    bool,
    typer.Option(
        help="With --detach: send the prompts file, or read it at its path there.",
        rich_help_panel=DETACHED,
    ),
]
JobAddressOption = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, http://host:8265, or its head, host:6379.",
        show_default="this machine's cluster",
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As launch --detach printed it.")]


def enter(folder: Path) -> None:
    """Make a folder the current one; it is made where there is none.

    Raises:
        UsageError: where that cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    except OSError as error:
        raise UsageError(
            f"The folder {folder} cannot be used on {os.uname().nodename} ({error.strerror}): name "
            "one there with --folder."
        ) from error


def detached(
    job: Job, folder: Path | None, python: str | None, *, send_prompts: bool, as_json: bool
) -> None:
    """Hand a job to the cluster of its `ray.address`, and say what was sent."""
    from qaic_ray.cli.job_screen import show_submission
    from qaic_ray.pipeline.submit_step import SubmitRequest, submit_step

    request = SubmitRequest(
        job,
        job.ray.address,
        Path.cwd() if folder is None else folder.absolute(),
        python=python or sys.executable,
        send_prompts=send_prompts,
    )
    show_submission(submit_step(request), as_json=as_json)


def status(
    submission_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One job.", show_default="all")
    ] = None,
    address: JobAddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the jobs that a cluster runs, or ran, by itself."""
    from qaic_ray.cli.job_screen import show_jobs
    from qaic_ray.pipeline.submit_step import job_statuses

    show_jobs(job_statuses(address, submission_id), as_json=as_json)


def logs(
    submission_id: IdArgument,
    address: JobAddressOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
) -> None:
    """Print what a detached job has printed."""
    from qaic_ray.cli.job_screen import write
    from qaic_ray.cluster.jobs import SubmittedJobs

    jobs = SubmittedJobs(address)
    if follow:
        jobs.follow(submission_id, write)
    else:
        write(jobs.log(submission_id))


def stop(
    submission_id: IdArgument, address: JobAddressOption = None, as_json: JsonOption = False
) -> None:
    """End a detached job; its cards are free then."""
    from qaic_ray.cli.job_screen import show_jobs
    from qaic_ray.pipeline.submit_step import stop_job

    show_jobs([stop_job(address, submission_id)], as_json=as_json)
