"""Run folders as they lie there: how many rows are safe in one, and which one is to go on.

Reads them only, and takes none that another process is writing to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qaic_ray.documents import read_object
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.runs.journal import JOURNAL_NAME, LOCK_NAME

REPORT_NAME = "report.json"

_ROW_INDEX = re.compile(rb'"row":\{"index":(\d+)')


def safe_rows(run_folder: Path) -> int:
    """How many rows of the input a run folder's journal has an answer for."""
    indexes = set()
    for path in sorted((run_folder / JOURNAL_NAME).glob("*.jsonl")):
        with path.open("rb", buffering=2**20) as stream:
            for line in stream:
                found = _ROW_INDEX.search(line)
                if found and line.endswith(b"\n"):
                    indexes.add(int(found[1]))
    return len(indexes)


def is_finished(run_folder: Path) -> bool:
    """Whether nothing is left to be done of a run: its report is there, and says so."""
    try:
        return read_object(run_folder / REPORT_NAME)["goes_on"] is False
    except (UsageError, KeyError):
        return False


def last_unfinished(output: Path, request_name: str, job: str = "") -> Path | None:
    """The run that began last of those in `output` that can go on; None where there is none.

    Args:
        output: the folder of run folders.
        request_name: the file by which a run folder is known; written when the run begins.
        job: only runs of this job.
    """
    for folder in _newest_first(output, request_name, job):
        if not (is_finished(folder) or _is_held(folder)):
            return folder
    return None


def _newest_first(output: Path, request_name: str, job: str) -> Iterator[Path]:
    begun = []
    for request in output.glob(f"*/{request_name}"):
        with suppress(OSError):  # it is being removed just now
            begun.append((request.stat().st_mtime_ns, request.parent))
    for _, folder in sorted(begun, reverse=True):
        if not job or folder.name.startswith(f"{job}-"):
            yield folder


def _is_held(folder: Path) -> bool:
    """Whether another process has it; as the journal's own lock tells."""
    try:
        with FileLock(folder / LOCK_NAME, timeout=0):
            return False
    except Timeout:
        return True
    except OSError as error:
        raise QaicRayError(f"{folder} cannot be looked at: {error.strerror}.") from error
