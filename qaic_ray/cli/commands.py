"""The commands: each takes sections of options, and calls one function of a lower floor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from qaic_ray import __version__
from qaic_ray.cli.ending import Interrupted
from qaic_ray.cli.monitoring import monitoring
from qaic_ray.cli.parameters import Given, command, known_path
from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray.cli.command_options import (
        JobsOptions,
        JsonOptions,
        ProgramOptions,
        ResumeOptions,
        ShapesOptions,
        ShowOptions,
        SubmitOptions,
    )
    from qaic_ray.cli.screen import Screen
    from qaic_ray.options import (
        CompileOptions,
        EmulatorOptions,
        ExportOptions,
        Job,
        ModelOptions,
        RayOptions,
        RunOptions,
        SdkOptions,
    )
    from qaic_ray.pipeline.request import RunRequest
    from qaic_ray.pipeline.steps import SdkChoice


class _Commands(TyperGroup):
    """Lets an interruption through, of which typer would make an exit code of its own."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error)) from error


app = typer.Typer(
    name="qaic-ray",
    cls=_Commands,
    help="Run Llama-family models over every Cloud AI 100 card you own, with or without a card.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
emulator_app = typer.Typer(help="The emulated SDK: lay it down, run any program on it.")


options = SimpleNamespace(debug=False)
"""What stands before the command."""


def _version(value: bool) -> None:
    if value:
        typer.echo(f"qaic-ray {__version__}")
        raise typer.Exit


@app.callback()
def before(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Options of every command."""
    options.debug = debug


def _sdk_choice(sdk: SdkOptions, screen: Screen) -> SdkChoice:
    """The SDK that `--sdk` names, said on the screen."""
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.pipeline.steps import choose_sdk

    return choose_sdk(sdk.sdk, EmulatorOptions(), screen)


JobArgument = Annotated[
    Path, typer.Argument(callback=known_path, help="A job file, like jobs/smollm2.yaml.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key: run.generation_len=64."),
]


@command(app)
def launch(
    job: JobArgument,
    ray: RayOptions,
    submit: SubmitOptions,
    resuming: ResumeOptions,
    show: ShowOptions,
    overrides: SetOption = None,
) -> None:
    """Run a whole job: export, compile, run on every card, report."""
    from qaic_ray.cli.screen import ProgressLog, Screen
    from qaic_ray.pipeline.job import launch_job
    from qaic_ray.pipeline.job_file import load_job

    loaded = load_job(job, overrides or ())
    loaded = loaded.changed("ray", **{name: getattr(ray, name) for name in ray.model_fields_set})
    if submit.detach:
        _detach(loaded, submit, as_json=show.as_json)
        return
    if submit.folder is not None:
        _enter(Path(submit.folder))
    screen = Screen(stream=True) if show.stream else ProgressLog()
    resume = _folder_to_resume(resuming, loaded.run.output, screen, job=loaded.name)
    summary = launch_job(loaded, screen, resume=resume, retry_errors=resuming.retry_errors)
    screen.finish(summary, as_json=show.as_json)


def _folder_to_resume(
    resuming: ResumeOptions, output: str, screen: Screen, *, job: str = ""
) -> Path | None:
    """The folder of the run that goes on, of this job where one is named; None: a run begins."""
    from qaic_ray.cli.command_options import RESUME_LAST
    from qaic_ray.pipeline.request import last_unfinished

    if resuming.resume is None:
        if resuming.retry_errors:
            raise UsageError("--retry-errors is for --resume: give the folder of the run with it.")
        return None
    if resuming.resume != RESUME_LAST:
        return Path(resuming.resume)
    folder = last_unfinished(Path(output), job)
    if folder is None:
        screen.remark(f"No run {f'of {job} ' if job else ''}in {output} is unfinished.")
        raise typer.Exit
    return folder


def _enter(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    except OSError as error:
        raise UsageError(
            f"The folder {folder} cannot be used on {os.uname().nodename} ({error.strerror}): name "
            "one there with --folder."
        ) from error


def _detach(job: Job, submit: SubmitOptions, *, as_json: bool) -> None:
    """Hand a job to the cluster of its `ray.address`, and say what was sent."""
    from qaic_ray.cli.screen import show_submission
    from qaic_ray.pipeline.submit_step import SubmitRequest, submit_step

    folder, python = Path(submit.folder or ".").absolute(), submit.python or sys.executable
    request = SubmitRequest(job, job.ray.address, folder, python, submit.send_prompts)
    show_submission(submit_step(request), as_json=as_json)


@command(app)
def plan(job: JobArgument, overrides: SetOption = None) -> None:
    """Show what a job would compile, with the compiler's command lines; runs nothing."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.job import plan_job
    from qaic_ray.pipeline.job_file import load_job

    Screen().plan(plan_job(load_job(job, overrides or ())))


@command(app)
def export(
    model: ModelOptions,
    how: Annotated[ExportOptions, {"continuous_batching": False, "verify": "full"}],
    show: JsonOptions,
) -> None:
    """Make an ONNX model with its KV cache from a checkpoint, and check it against PyTorch."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.export_step import export_step

    screen = Screen()
    screen.exported(export_step(model, how, screen), as_json=show.as_json)


@command(app)
def compile(  # the recipe's word
    model_dir: Annotated[
        Path, typer.Argument(callback=known_path, help="Folder that export made (<base>-kv).")
    ],
    shapes: ShapesOptions,
    grid: CompileOptions,
    sdk: SdkOptions,
    show: JsonOptions,
) -> None:
    """Compile a model into QPCs: every combination of the lists, in parallel, each built once."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.compile_step import CompileRequest, compile_step, specializations_file

    screen = Screen()
    given = None if shapes.specializations is None else Path(shapes.specializations)
    file = specializations_file(given, grid)
    if file != given:
        screen.remark(f"{file} of this folder says the shapes, as in the published recipe.")
    request = CompileRequest(model_dir, grid, file)
    outcomes = compile_step(request, _sdk_choice(sdk, screen).here, screen)
    screen.compiled_all(outcomes, as_json=show.as_json)


@command(app)
def run(
    program: ProgramOptions,
    asked: RunOptions,
    resuming: ResumeOptions,
    ray: RayOptions,
    sdk: SdkOptions,
    show: ShowOptions,
    given: Given,
) -> None:
    """Answer prompts on every card, one Ray actor a card; print texts and tokens/s."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.run_step import run_step

    screen = Screen(stream=show.stream)
    if resuming.resume is not None:
        _refuse_changes(given, resuming.resume)
    resume = _folder_to_resume(resuming, asked.output, screen)
    request = _begun(program, asked) if resume is None else _resumed(resume, asked)
    request = replace(request, ray=ray, retry_errors=resuming.retry_errors)
    screen.finish(run_step(request, _sdk_choice(sdk, screen), screen), as_json=show.as_json)


def _begun(program: ProgramOptions, asked: RunOptions) -> RunRequest:
    """The request of a run that begins."""
    from qaic_ray.pipeline.request import RunRequest, resolved

    if program.model_name is None or program.qpc is None:
        raise UsageError("Give --model-name and --qpc, or --resume with the folder of a run.")
    return RunRequest("run", program.model_name, Path(program.qpc), resolved(asked))


def _resumed(folder: Path, asked: RunOptions) -> RunRequest:
    """The request of a run folder, with what may be said anew."""
    from qaic_ray.pipeline.request import read_request

    request = read_request(folder)
    anew = asked.model_fields_set & {"devices", "metrics"}
    request = request.with_run(**{name: getattr(asked, name) for name in anew})
    if "prompts" in asked.model_fields_set:
        request = request.with_run(prompt=None, prompts=asked.prompts)
        request = replace(request, new_input=True)
    return request


def _refuse_changes(given: Given, resume: str) -> None:
    """Only what changes no answer may be said anew of a run that goes on."""
    from qaic_ray.cli.command_options import RESUME_LAST

    is_last = resume == RESUME_LAST
    fixed = [flag for flag in given.fixed if not (is_last and flag == "--output")]
    if fixed:
        whose = "its folder" if is_last else resume
        free = [flag for flag in given.may_be_free if flag != "--resume"]
        raise UsageError(
            f"{fixed[0]} cannot be changed in the middle of a run: leave it out, {whose} knows it; "
            f"only {', '.join(free)} may stand beside --resume."
        )


@command(app)
def status(
    jobs: JobsOptions,
    show: JsonOptions,
    submission_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One job.", show_default="all")
    ] = None,
) -> None:
    """Show the jobs that a cluster runs, or ran, by itself."""
    from qaic_ray.cli.screen import show_jobs
    from qaic_ray.pipeline.submit_step import job_statuses

    show_jobs(job_statuses(jobs.address, submission_id), as_json=show.as_json)


IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As launch --detach printed it.")]


@command(app)
def logs(
    submission_id: IdArgument,
    jobs: JobsOptions,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
) -> None:
    """Print what a detached job has printed."""
    from qaic_ray.cli.screen import write
    from qaic_ray.cluster.jobs import SubmittedJobs

    submitted = SubmittedJobs(jobs.address)
    if follow:
        submitted.follow(submission_id, write)
    else:
        write(submitted.log(submission_id))


@command(app)
def stop(submission_id: IdArgument, jobs: JobsOptions, show: JsonOptions) -> None:
    """End a detached job; its cards are free then."""
    from qaic_ray.cli.screen import show_jobs
    from qaic_ray.pipeline.submit_step import stop_job

    show_jobs([stop_job(jobs.address, submission_id)], as_json=show.as_json)


@command(app)
def devices(ray: RayOptions, sdk: SdkOptions, show: JsonOptions) -> None:
    """List cards: status, SKU, free NSPs and DRAM; on a cluster also who holds them."""
    from qaic_ray.cli.screen import Screen

    screen = Screen()
    if ray.address is None:
        found = _sdk_choice(sdk, screen).here
        screen.devices(found, found.devices(), as_json=show.as_json)
        return
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.sdk import name_for_others

    with Cluster(0, address=ray.address) as cluster:
        nodes = cluster.inventory(name_for_others(sdk.sdk), EmulatorOptions())
        screen.inventory(nodes, cluster.problems(nodes), as_json=show.as_json)


command(app)(monitoring)
app.add_typer(emulator_app, name="emulator", no_args_is_help=True)


@command(emulator_app, "install")
def emulator_install(
    prefix: Annotated[
        Path,
        typer.Argument(callback=known_path, help="Folder to make, like ./sdk or /opt/qti-aic."),
    ],
    emulated: EmulatorOptions,
) -> None:
    """Lay the emulated SDK down as a folder."""
    from qaic_ray.sdk import install_emulated, open_sdk

    sdk = open_sdk(install_emulated(prefix, emulated))
    typer.echo(f"The {sdk.label} is at {sdk.root}: {emulated.cards} {emulated.sku} cards.")


@command(
    emulator_app,
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def emulator_run(
    words: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="-- COMMAND and its arguments.")
    ],
    sdk: Annotated[SdkOptions, {"sdk": "emulated"}],
) -> None:
    """Run any program with the emulated SDK on its paths; the exit code is the program's."""
    from qaic_ray.cli.screen import Screen

    found = _sdk_choice(sdk, Screen()).here
    environment = os.environ | {
        "PYTHONPATH": _before("PYTHONPATH", found.python_paths),
        "PATH": _before("PATH", (found.root / "exec", found.root / "tools")),
        "QAIC_RAY_SDK": str(found.root),
    }
    try:
        code = subprocess.run(words, env=environment, check=False).returncode
    except OSError as error:
        raise UsageError(f"Cannot run {words[0]}: {error.strerror}.") from error
    raise typer.Exit(code if code >= 0 else 128 - code)


def _before(variable: str, folders: Iterable[Path]) -> str:
    """A variable of paths, with folders put before those that it has."""
    own = os.environ.get(variable, "").split(os.pathsep)
    return os.pathsep.join([*map(str, folders), *filter(None, own)])
