"""What the user sees of jobs that a cluster runs by itself, and what such a job itself prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qaic_ray.cli.screen import Screen
from qaic_ray.documents import json_text
from qaic_ray.pipeline.submit_step import JobStatus, Submission, progress_line

if TYPE_CHECKING:
    from qaic_ray.rows import Row

PROGRESS_EVERY_S = 10.0

_COLOURS = {"running": "cyan", "done": "green", "failed": "red"}


class ProgressLog(Screen):
    """A screen for nobody: in place of answers how many there are, now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = 0
        self._failed_rows = 0
        self._next_s = 0.0

    def answered(self, row: Row) -> None:
        """Count a row."""
        self._rows += 1
        self._failed_rows += not row.ok
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + PROGRESS_EVERY_S
            sys.stderr.write(progress_line(self._rows, self._failed_rows) + "\n")


def show_submission(submission: Submission, *, as_json: bool) -> None:
    """Print the id, and beside it what was sent and what was not."""
    request, parcel = submission.request, submission.parcel
    note = Console(stderr=True, soft_wrap=True, highlight=False).print
    sent = ", ".join(f"{name} ({size:,} bytes)" for name, size in parcel.sent.items())
    note(f"[green]✓[/] sent {escape(sent)}")
    note(f"  runs in {escape(str(request.folder))} of the cluster's head")
    for path in parcel.expected:
        note(f"  [yellow]not sent[/], and must be there: {escape(path)}")
    at = "" if request.address is None else f" --address {request.address}"
    note(f"[dim]qaic-ray status|logs|stop {escape(submission.id + at)}[/]")
    write(submission.id + "\n")
    if as_json:
        _print_json(
            {
                "id": submission.id,
                "job": request.job.name,
                "folder": str(request.folder),
                "sent": parcel.sent,
                "expected": list(parcel.expected),
            }
        )


def show_jobs(found: Sequence[JobStatus], *, as_json: bool) -> None:
    """Print a table of jobs, and below it why those failed that did, and where results are."""
    table = Table()
    for column in ("id", "job", "state", "started", "took"):
        table.add_column(column)
    for column in ("rows done", "failed"):
        table.add_column(column, justify="right")
    out = Console(soft_wrap=True, highlight=False)
    for job in found:
        table.add_row(
            escape(job.id),
            escape(job.job),
            f"[{_COLOURS.get(job.state, 'yellow')}]{escape(job.state)}[/]",
            _when(job.started_s),
            _took(job),
            "" if job.rows is None else f"{job.rows:,}",
            "" if job.failed_rows is None else f"{job.failed_rows:,}",
        )
    if found:
        out.print(table)
    else:
        out.print("The cluster knows no detached job.")
    for job in found:
        if job.error:
            out.print(f"{escape(job.id)}: [red]{escape(job.error)}[/]")
        if job.folder:
            out.print(f"{escape(job.id)}: {escape(job.folder)}")
    if as_json:
        _print_json({"jobs": [asdict(job) for job in found]})


def _when(time_s: float | None) -> str:
    if time_s is None:
        return ""
    return datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _took(job: JobStatus) -> str:
    if job.started_s is None:
        return ""
    seconds = int((job.ended_s or time.time()) - job.started_s)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _print_json(document: dict[str, Any]) -> None:
    write(json_text(document) + "\n")


def write(text: str) -> None:
    """Put text on stdout as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()
