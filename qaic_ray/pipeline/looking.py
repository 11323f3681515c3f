"""Looks at what runs, or ran, here or as a job of a cluster; stops it; reads its logs.

What the user names is a run folder, the name of one in the folder of runs, a folder of runs, or the
id of a job that was handed to a cluster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaic_ray.cluster.ray_session import KEPT_NOTE
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import user_path
from qaic_ray.files.folders import cache_folder
from qaic_ray.formats.inputs.filesystems import is_uri
from qaic_ray.formats.inputs.named_files import is_stream, named_files, parts_of
from qaic_ray.inspect.holder import holder_of, stop_driver
from qaic_ray.inspect.run_status import RUNNING, RunStatus, RunWatch, run_folders
from qaic_ray.pipeline.request import REQUEST_NAME, read_request
from qaic_ray.pipeline.submit_step import job_statuses
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

if TYPE_CHECKING:
    from qaic_ray.pipeline.submit_step import JobStatus

SHOWN_RUNS = 20
"""Of a folder of runs `status` shows those that are not done, and of the others so many."""
COUNT_S = 1.0
MAX_COUNTED_BYTES = 256 * 2**20
"""An input is counted for so long, and where it is no longer than this: a look must be quick."""
FOLLOW_S = 0.5

# Where Ray notes the cluster that this machine is part of, and what else may name one.
_CURRENT_CLUSTER = Path("ray/ray_current_cluster")
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Statuses:
    """What was found: runs by their folders, and jobs of a cluster.

    `hidden` counts runs that are done and not among them; `remark` says why no cluster was asked.
    """

    runs: Sequence[RunStatus]
    jobs: Sequence[JobStatus]
    hidden: int = 0
    remark: str = ""

    @property
    def is_running(self) -> bool:
        """Whether anything goes on."""
        return any(run.state == RUNNING for run in self.runs) or any(
            job.state in ("running", "waiting") for job in self.jobs
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "runs": [run.to_json() for run in self.runs],
            "jobs": [vars(job) for job in self.jobs],
            "runs_not_shown": self.hidden,
        }


class StatusLook:
    """Looks at what the user named, once or again and again.

    Args:
        what: as the module says; None for the runs in `output` and the cluster's jobs.
        address: of the cluster, as `SubmittedJobs` takes it.
        output: the folder of runs.

    Raises:
        UsageError: there is no such run, and no such job.
    """

    def __init__(self, what: str | None, address: str | None, output: Path) -> None:
        self._what, self._address, self._output = what, address, output
        self._run = None if what is None else find_run(what, output)
        self._folder: Path | None = None
        if what is None:
            self._folder = output
        elif self._run is None and Path(what).is_dir():
            self._folder = Path(what)
        self._watches: dict[Path, RunWatch] = {}

    def look(self) -> Statuses:
        """How far everything is now."""
        if self._run is not None:
            return Statuses([self._status(self._run)], [])
        if self._folder is None:
            return Statuses([], self._job())
        runs, hidden = self._in_folder(self._folder)
        jobs, remark = ([], "") if self._what is not None else self._jobs()
        return Statuses(runs, jobs, hidden, remark)

    def _job(self) -> list[JobStatus]:
        with of_a_job(str(self._what), self._address, self._output):
            return job_statuses(self._address, self._what)

    def _in_folder(self, folder: Path) -> tuple[list[RunStatus], int]:
        statuses = [self._status(run) for run in run_folders(folder, REQUEST_NAME)]
        open_ = [status for status in statuses if status.state != "done"]
        shown = {s.folder for s in [*open_, *statuses[:SHOWN_RUNS]]}
        kept = [status for status in statuses if status.folder in shown]
        return kept, len(statuses) - len(kept)

    def _status(self, folder: Path) -> RunStatus:
        if folder not in self._watches:
            self._watches[folder] = RunWatch(folder, REQUEST_NAME, total_rows)
        return self._watches[folder].look()

    def _jobs(self) -> tuple[list[JobStatus], str]:
        if self._address is None and not knows_cluster():
            return [], ""
        try:
            return job_statuses(self._address), ""
        except QaicRayError as error:
            if self._address is not None:
                raise  # it was asked for
            return [], f"The cluster's jobs are not listed: {error}"


def knows_cluster() -> bool:
    """Whether something on this machine names a Ray cluster; asking one takes Ray seconds."""
    if any(map(os.environ.get, _ADDRESS_VARIABLES)) or (cache_folder() / KEPT_NOTE).exists():
        return True
    return (Path(os.environ.get("RAY_TMPDIR", "/tmp")) / _CURRENT_CLUSTER).exists()


def find_run(what: str, output: Path) -> Path | None:
    """The run folder that is meant: its path, or its name in `output`; None if there is none."""
    path = user_path(what, "The run")
    for folder in (path, output / what):
        if (folder / REQUEST_NAME).is_file():
            return folder
    return None


@contextmanager
def of_a_job(what: str, address: str | None, output: Path) -> Iterator[None]:
    """Say of what is no run that nothing is known of it as a job either, where that is so."""
    try:
        yield
    except UsageError as error:
        if address is not None:
            raise
        raise UsageError(
            f"{what} is no run folder, {output} has none of that name, and of a job nothing is "
            f"known: {error}"
        ) from error


def known_run(what: str, output: Path) -> Path:
    """The run folder that is meant.

    Raises:
        UsageError: there is none.
    """
    folder = find_run(what, output)
    if folder is None:
        raise UsageError(
            f"{what} is not the folder of a run, and there is none of that name in {output}: "
            "`qaic-ray runs` lists them."
        )
    return folder


def listed_runs(output: Path) -> list[RunStatus]:
    """Every run in a folder, the newest first.

    Raises:
        UsageError: there is no such folder.
    """
    if not output.is_dir():
        raise UsageError(f"There is no folder {output}: name the one that holds the runs.")
    folders = run_folders(output, REQUEST_NAME)
    return [RunWatch(folder, REQUEST_NAME, total_rows).look() for folder in folders]


def total_rows(folder: Path) -> int | None:
    """The rows of a run's input, read as the run reads them; None where that takes long."""
    try:
        request = read_request(folder)
        if request.run.prompts is not None and not _is_small(request.run.prompts):
            return None
        deadline_s = time.monotonic() + COUNT_S
        count = 0
        for count, _ in enumerate(request.open_input().prompts, start=1):
            if not count % 256 and time.monotonic() > deadline_s:
                return None
    except (QaicRayError, OSError):
        return None
    return count


def _is_small(given: str | tuple[str, ...]) -> bool:
    """Whether an input is files of this machine that are quickly read through."""
    if is_stream(given) or any(map(is_uri, parts_of(given))):
        return False
    files = named_files(given, any_name=True)
    return sum(file.num_bytes for file in files) <= MAX_COUNTED_BYTES


def stop(what: str, address: str | None, output: Path) -> Statuses:
    """End a run's driver, or a job; how far it came.

    Raises:
        UsageError: there is neither, or nobody works on the run.
    """
    from qaic_ray.pipeline.submit_step import stop_job

    folder = find_run(what, output)
    if folder is None:
        with of_a_job(what, address, output):
            return Statuses([], [stop_job(address, what)])
    has_ended = stop_driver(folder, DEFAULT_TIMEOUTS.stop_s)
    status = RunWatch(folder, REQUEST_NAME, total_rows).look()
    remark = "" if has_ended else "It was told to end, and saves what it has."
    return Statuses([status], [], remark=remark)


# -- logs


def run_logs(folder: Path, hear: Callable[[str], None], *, follow: bool) -> bool:
    """Give what is in the logs of a run folder, each file under its name; then what comes.

    Args:
        folder: the run's.
        hear: gets pieces of text.
        follow: go on as long as somebody works on the run.

    Returns:
        Whether there was anything.
    """
    read: dict[Path, int] = {}
    last: Path | None = None
    while True:
        is_running = follow and holder_of(folder) is not None  # before its last words are read
        for path in sorted(path for path in (folder / "logs").rglob("*") if path.is_file()):
            text = _new_text(path, read)
            if text:
                hear(f"==> {path.relative_to(folder)} <==\n{text}" if path != last else text)
                last = path
        if not is_running:
            return last is not None
        time.sleep(FOLLOW_S)


def _new_text(path: Path, read: dict[Path, int]) -> str:
    with path.open("rb") as stream:
        stream.seek(read.get(path, 0))
        data = stream.read()
    read[path] = read.get(path, 0) + len(data)
    return data.decode(errors="replace")
