"""The options of commands alone: they say what is done, or shown, now, and no job has them."""

from __future__ import annotations

from typing import ClassVar

from qaic_ray.option_types import PathText, Section, opt
from qaic_ray.options import FOLDER, MODEL_HELP

RESUME_LAST = "last"
"""What `--resume` means where nothing follows it: the run that began last and is not finished."""

PROGRAM = "What is run (needed, but with --resume)"


class ProgramOptions(Section):
    """What is run."""

    GROUP: ClassVar[str] = PROGRAM

    model_name: PathText | None = opt(None, MODEL_HELP, metavar="<name>")
    qpc: PathText | None = opt(None, "Folder of a compiled variant.")


class ShapesOptions(Section):
    """What stands in place of a grid's shapes."""

    specializations: PathText | None = opt(
        None,
        "A specializations.json, in place of the options for shapes below; the one of this "
        "folder is used where none of them is given.",
    )


class ResumeOptions(Section):
    """Whether a run goes on that stopped."""

    GROUP: ClassVar[str] = FOLDER

    resume: PathText | None = opt(
        None,
        "Go on where a run stopped: its folder, or nothing for the last unfinished one.",
        metavar="[RUN]",
        bare=RESUME_LAST,
        free=True,
    )
    retry_errors: bool = opt(False, "With --resume: its rows of errors once more.", free=True)


class JsonOptions(Section):
    """What is printed at the end."""

    as_json: bool = opt(
        False, "End stdout with one JSON object on one line.", flag="--json", free=True
    )


class ShowOptions(JsonOptions):
    """What is printed."""

    stream: bool = opt(True, "Print answers as they come.", free=True)


class SubmitOptions(Section):
    """How a job is handed to a cluster that runs it by itself."""

    GROUP: ClassVar[str] = "On a cluster"

    detach: bool = opt(False, "Let the cluster run it: see status, logs and stop.")
    folder: str | None = opt(
        None,
        "Where the job's relative paths start, on the machine that runs it.",
        shown="this folder",
    )
    python: str | None = opt(
        None,
        "With --detach: the Python on the cluster's head that has qaic-ray.",
        shown="this one's path",
    )
    send_prompts: bool = opt(
        True, "With --detach: send the prompts file, or read it at its path there."
    )


class JobsOptions(Section):
    """Which cluster's jobs."""

    address: str | None = opt(
        None,
        "The cluster's dashboard, http://host:8265, or its head, host:6379.",
        shown="this machine's cluster",
    )
