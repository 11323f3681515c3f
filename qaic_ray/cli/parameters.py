"""Options that no job has, as they say what is done or shown now, and what a command is told of
the words on its line.

`qaic_ray.cli.flags` makes flags of them, and of the option tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qaic_ray import options
from qaic_ray.errors import UsageError
from qaic_ray.option_types import (
    Devices,
    NumCores,
    PathText,
    PositiveInt,
    PrecisionName,
    Section,
    Share,
    opt,
    same,
)

RESUME_LAST = "last"
"""What `--resume` means where nothing follows it: the run that began last and is not finished."""

PROGRAM = "What is run"
JOB = "In place of what the job says"
CLUSTER = "On a cluster"
PRINTED = "What is printed"
GENERAL = "General"

_GRID = options.CompileOptions
_ONE: dict[str, Any] = {"default": None, "argument": "", "example": ""}
_RUNS = options.RunOptions.model_fields["output"].default

JOB_KEYS = (
    *("model.name", "run.prompt", "run.prompts", "run.shard", "run.generation_len"),
    *("run.devices", "sdk", "run.output"),
)
"""Keys of a job that have flags in the commands that take one; `--set` changes any."""


class ProgramOptions(Section):
    """What is run."""

    GROUP: ClassVar[str] = PROGRAM

    model_name: PathText | None = opt(
        None, options.MODEL_HELP, argument="[MODEL]", **options.MODEL_NAMES, sample="smollm2-135m"
    )
    text: str | None = opt(
        None,
        "One prompt, in which a | is text.",
        argument="[PROMPT]",
        hidden=True,
        sample="The capital of France is",
    )
    qpc: PathText | None = opt(
        None,
        "Folder of a compiled variant; without it one is made, in the user's cache, and found "
        "there the next time.",
        sample="qpc/my-llama",
    )


class PrepareOptions(options.VariantChoice):
    """The program that is made where no QPC is given."""

    GROUP: ClassVar[str] = "The program that is made where no --qpc is given"

    precision: PrecisionName | None = same(_GRID, "precision", shown="mx6", **_ONE)
    num_cores: NumCores | None = same(_GRID, "num_cores", shown="all of a card", sample=7, **_ONE)
    batch_size: PositiveInt | None = opt(
        None,
        "Prompts that a card answers side by side.",
        shown="1 for one prompt, else 8",
        sample=8,
    )


class ServedOptions(Section):
    """What is served."""

    GROUP: ClassVar[str] = PROGRAM

    target: PathText = opt(
        ...,
        "A model (folder, hub id, .gguf file, smollm2-135m), the folder of a QPC, a job file or a "
        "shipped job's name.",
        argument="[TARGET]",
        flag="--target",
        hidden=True,
        sample="smollm2-135m",
    )
    model_name: PathText | None = opt(
        None,
        "With the folder of a QPC: its model.",
        **{**options.MODEL_NAMES, "argument": ""},
        sample="org/model",
    )


class ShapesOptions(Section):
    """What stands in place of a grid's shapes."""

    specializations: PathText | None = opt(
        None,
        "A specializations.json, in place of the options for shapes below; the one of this "
        "folder is used where none of them is given.",
        sample="specializations.json",
    )


class ResumeOptions(Section):
    """Whether a run goes on that stopped."""

    GROUP: ClassVar[str] = options.FOLDER

    resume: PathText | None = opt(
        None,
        "Go on where a run stopped: its folder, or nothing for the last unfinished one.",
        metavar="[RUN]",
        bare=RESUME_LAST,
        completes="runs",
        free=True,
        sample="runs/mine-20261129-090500",
    )
    retry_errors: bool = opt(False, "With --resume: its rows of errors once more.", free=True)


class JsonOptions(Section):
    """Whether stdout is for programs."""

    GROUP: ClassVar[str] = GENERAL

    as_json: bool = opt(False, "Print JSON on stdout, and nothing else.", flag="--json", free=True)


class ViewOptions(JsonOptions):
    """What is shown while something goes on."""

    GROUP: ClassVar[str] = GENERAL

    verbose: bool = opt(False, "Show a line a card too.", short="-v", free=True)
    log_format: Literal["text", "json"] = opt(
        "text", "How lines on stderr are written where it is no terminal.", free=True
    )


class ShowOptions(ViewOptions):
    """What is printed."""

    stream: Literal["auto", "rows", "ordered", "tokens"] = opt(
        "auto",
        "Print answers as they end, in input order, or one's text as it is generated. auto: a "
        "single prompt's tokens or rows on a terminal, else ordered. With --json, rows and ordered "
        "print a line of JSON a row.",
        bare="ordered",
        group=PRINTED,
        free=True,
    )
    no_stream: bool = opt(False, "Print no answers.", group=PRINTED, free=True)
    stop_if_errors: Share | None = opt(
        None,
        "End the run early where that share of at least 20 rows failed.",
        example="20%",
        metavar="SHARE",
        group=options.FOLDER,
        free=True,
    )


class SubmitOptions(Section):
    """How a job is handed to a cluster that runs it by itself."""

    GROUP: ClassVar[str] = CLUSTER

    detach: bool = opt(False, "Let the cluster run it: see status, logs and stop.")
    folder: str | None = opt(
        None,
        "Where the job's relative paths start, on the machine that runs it.",
        metavar="PATH",
        shown="this folder",
        sample="/shared/me",
    )
    python: str | None = opt(
        None,
        "With --detach: the Python on the cluster's head that has qaic-ray.",
        metavar="PATH",
        shown="this one's path",
        sample="/opt/qaic-ray/bin/python",
    )
    send_prompts: bool = opt(
        True, "With --detach: send the prompts file, or read it at its path there."
    )


class DemoOptions(Section):
    """Where the demonstration runs, and on which cards."""

    folder: PathText | None = opt(
        None,
        "Where its model, QPCs and run are kept.",
        shown="demo in the user's cache",
        sample="demo",
    )
    devices: Devices = same(options.CardOptions, "devices", default=(0, 1, 2, 3), group="")


class JobsOptions(Section):
    """Which cluster's jobs."""

    address: str | None = opt(
        None,
        "The cluster's dashboard, http://host:8265, or its head, host:6379.",
        environment=("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"),
        shown="this machine's cluster",
        sample="http://127.0.0.1:8265",
    )


class RunsOptions(Section):
    """Where runs are looked for."""

    output: PathText = opt(_RUNS, "The folder of runs, as run's --output.", short="-o")


class ListedRunsOptions(RunsOptions):
    """The same of a command that takes nothing else."""

    output: PathText = same(RunsOptions, "output", argument="[FOLDER]")


class PageOptions(Section):
    """Where a page is written."""

    output: PathText | None = opt(
        None,
        "Write the page there.",
        aliases=("--html",),
        short="-o",
        metavar="FILE",
        shown="report.html of the run's folder",
        sample="both.html",
    )


class ComparingOptions(Section):
    """How far apart two bundles may be."""

    tolerance: float | None = opt(
        None,
        "How far numbers may be apart, and beside it which share of B's; without it no bit may "
        "differ.",
        ge=0,
        sample=0.05,
    )


class MergeOptions(Section):
    """Where the rows of shards are joined."""

    output: PathText = opt(
        "merged",
        "Folder to make: outputs.jsonl, errors.jsonl and proof.json; an earlier merge there is "
        "replaced.",
        short="-o",
        metavar="FOLDER",
        sample="answers",
    )
    output_parts: PathText | None = same(options.RunOptions, "output_parts", group="")
    part_rows: PositiveInt = same(options.RunOptions, "part_rows", group="")


class CheckOptions(Section):
    """What an artifact is for, and where it is converted to."""

    GROUP: ClassVar[str] = PROGRAM

    sdk_version: str | None = opt(
        None,
        "Apps version of the compiler.",
        metavar="VERSION",
        shown="that of the SDK here",
        sample="1.20",
    )
    sku: str | None = opt(
        None,
        "Kind of card: standard, pro or ultra.",
        metavar="NAME",
        shown="that of the cards here",
        sample="standard",
    )
    convert: PathText | None = opt(
        None,
        "New folder for the files that can be converted.",
        metavar="FOLDER",
        sample="converted",
    )


@dataclass(frozen=True)
class Given:
    """The flags that stand on the command line, but for those of `Opt.free`; and all of these."""

    fixed: tuple[str, ...] = ()
    may_be_free: tuple[str, ...] = ()

    def refuse_changes(self, resume: str) -> None:
        """Only what changes no answer may be said anew of a run that goes on."""
        is_last = resume == RESUME_LAST
        fixed = [flag for flag in self.fixed if not (is_last and flag == "--output")]
        if fixed:
            whose = "its folder" if is_last else resume
            free = [flag for flag in self.may_be_free if flag != "--resume"]
            raise UsageError(
                f"{fixed[0]} cannot be changed in the middle of a run: leave it out, {whose} knows "
                f"it; only {', '.join(free)} may stand beside --resume."
            )


@dataclass(frozen=True)
class JobChanges:
    """Keys of a job that the command line says in place of the file: dotted key -> value."""

    values: Mapping[str, Any]
