"""The options of commands alone: they say what is done, or shown, now, and no job has them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from qaic_ray.option_types import Opt, PathText, Section
from qaic_ray.options import FOLDER, MODEL_HELP

RESUME_LAST = "last"
"""What `--resume` means where nothing follows it: the run that began last and is not finished."""

PROGRAM = "What is run (needed, but with --resume)"


class ProgramOptions(Section):
    """What is run."""

    GROUP: ClassVar[str] = PROGRAM

    model_name: Annotated[PathText | None, Opt(MODEL_HELP)] = None
    qpc: Annotated[PathText | None, Opt("Folder of a compiled variant.")] = None


class ShapesOptions(Section):
    """What stands in place of a grid's shapes."""

    specializations: Annotated[
        PathText | None,
        Opt(
            "A specializations.json, in place of the options for shapes below; the one of this "
            "folder is used where none of them is given."
        ),
    ] = None


class ResumeOptions(Section):
    """Whether a run goes on that stopped."""

    GROUP: ClassVar[str] = FOLDER

    resume: Annotated[
        PathText | None,
        Opt(
            "Go on where a run stopped: its folder, or nothing for the last unfinished one.",
            metavar="[RUN]",
            bare=RESUME_LAST,
            free=True,
        ),
    ] = None
    retry_errors: Annotated[
        bool, Opt("With --resume: its rows of errors once more.", free=True)
    ] = False


class JsonOptions(Section):
    """What is printed at the end."""

    as_json: Annotated[
        bool, Opt("End stdout with one JSON object on one line.", flag="--json", free=True)
    ] = False


class ShowOptions(JsonOptions):
    """What is printed."""

    stream: Annotated[bool, Opt("Print answers as they come.", free=True)] = True


class SubmitOptions(Section):
    """How a job is handed to a cluster that runs it by itself."""

    GROUP: ClassVar[str] = "On a cluster"

    detach: Annotated[bool, Opt("Let the cluster run it: see status, logs and stop.")] = False
    folder: Annotated[
        str | None,
        Opt(
            "Where the job's relative paths start, on the machine that runs it.",
            shown="this folder",
        ),
    ] = None
    python: Annotated[
        str | None,
        Opt(
            "With --detach: the Python on the cluster's head that has qaic-ray.",
            shown="this one's path",
        ),
    ] = None
    send_prompts: Annotated[
        bool, Opt("With --detach: send the prompts file, or read it at its path there.")
    ] = True


class JobsOptions(Section):
    """Which cluster's jobs."""

    address: Annotated[
        str | None,
        Opt(
            "The cluster's dashboard, http://host:8265, or its head, host:6379.",
            shown="this machine's cluster",
        ),
    ] = None
