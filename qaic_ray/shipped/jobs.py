"""The jobs that come with the package, found by name."""

from __future__ import annotations

import os
from pathlib import Path

from qaic_ray.errors import JobError

SHIPPED = Path(__file__).parents[1] / "jobs"
"""Their folder: that of the repository, or a copy in an installed package."""


def shipped_jobs() -> dict[str, Path]:
    """The job files that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"), key=lambda p: p.stem)}


def job_file(given: Path) -> Path:
    """The file of a job: the path that is given, or the shipped job of that name.

    A file here goes before a shipped job.

    Raises:
        JobError: there is neither.
    """
    if os.path.lexists(given):
        return given
    shipped = shipped_jobs()
    is_name = len(given.parts) == 1 and not given.suffix
    if is_name and given.name in shipped:
        return shipped[given.name]
    if is_name:
        raise JobError(
            f"There is no job file {given} here, and none of that name comes with qaic-ray: "
            f"{', '.join(shipped)}."
        )
    if given.stem in shipped:
        raise JobError(
            f"There is no file {given}; the job that comes with qaic-ray is {given.stem}, without "
            "a folder and without .yaml."
        )
    raise JobError(f"There is no file {given}: name a job file, or one of {', '.join(shipped)}.")
