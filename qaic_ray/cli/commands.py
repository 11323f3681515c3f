"""The commands: each takes sections of options, and calls one function of a lower floor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from qaic_ray import __version__
from qaic_ray.cli.kept_ray import ray_app
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import user_path

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli import parameters
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.request import SdkChoice


class Interrupted(Exception):
    """Carries an interruption past typer, which would make an exit code of its own of it."""

    def __init__(self, interruption: KeyboardInterrupt) -> None:
        super().__init__()
        self.interruption = interruption


class _Commands(TyperGroup):
    """Lets an interruption through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(error) from error


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


switches = SimpleNamespace(debug=False)
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
    switches.debug = debug


class _FromTree(TyperCommand):
    """A command that reads its parameters when it is asked for them."""

    function: Callable[..., None]

    @cached_property
    def _call(self) -> parameters.CommandCall:
        from qaic_ray.cli.parameters import CommandCall

        return CommandCall(self.function)

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, `--help` among them."""
        if not self.params:
            whole = typer.Typer(add_completion=False)
            whole.command()(self._call.as_function())
            made = typer.main.get_command(whole)
            self.params, self.callback = made.params, made.callback
        return list(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write out the flags that may stand without a value, as typer's may not, then parse.

        What is refused is named as it was typed, with dashes or underscores.
        """
        typed = {word.partition("=")[0] for word in args}
        for flag in self._call.flags:
            flag.flag = next((word for word in flag.spellings if word in typed), flag.flag)
        is_last = [word.startswith("-") for word in args[1:]] + [True]
        flags = self._call.flags
        bare = {word: flag.opt.bare for flag in flags if flag.opt.bare for word in flag.spellings}
        full = [
            f"{word}={bare[word]}" if ends and word in bare else word
            for word, ends in zip(args, is_last, strict=False)
        ]
        return list(super().parse_args(ctx, full))


def command(app: typer.Typer, name: str | None = None, **how: Any) -> Callable[[Any], Any]:
    """The decorator of a function that is a command; see the module's docstring."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def listed() -> None:
            """Stands for the function in the list of commands."""

        listed.__doc__ = function.__doc__
        cls = type("_Command", (_FromTree,), {"function": staticmethod(function)})
        app.command(name or function.__name__, cls=cls, **how)(listed)
        return function

    return register


def known_path(parameter: typer.CallbackParam, value: Path) -> Path:
    """The callback of arguments that are paths: `~` put in, or one sentence."""
    return user_path(value, str(parameter.name))


def _sdk_choice(sdk: options.SdkOptions, screen: Screen) -> SdkChoice:
    """The SDK that `--sdk` names, said on the screen."""
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.pipeline.request import choose_sdk

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
    ray: options.RayOptions,
    submit: parameters.SubmitOptions,
    resuming: parameters.ResumeOptions,
    show: parameters.ShowOptions,
    overrides: SetOption = None,
) -> None:
    """Run a whole job: export, compile, run on every card, report."""
    from qaic_ray.cli.screen import ProgressLog, Screen
    from qaic_ray.pipeline.job import launch_job, load_job
    from qaic_ray.pipeline.submit_step import SubmitRequest, submit_step

    loaded = load_job(job, overrides or ())
    loaded = loaded.changed("ray", **{name: getattr(ray, name) for name in ray.model_fields_set})
    if submit.detach:
        folder, python = Path(submit.folder or ".").absolute(), submit.python or sys.executable
        request = SubmitRequest(loaded, folder, python, submit.send_prompts)
        Screen(as_json=show.as_json).submitted(request, *submit_step(request))
        return
    if submit.folder is not None:
        _enter(Path(submit.folder))
    kind = Screen if show.stream else ProgressLog
    screen = kind(stream=show.stream, as_json=show.as_json)
    resume = _folder_to_resume(resuming, loaded.run.output, screen, job=loaded.name)
    summary = launch_job(loaded, screen, resume=resume, retry_errors=resuming.retry_errors)
    screen.finish(summary)


def _folder_to_resume(
    resuming: parameters.ResumeOptions, output: str, screen: Screen, *, job: str = ""
) -> Path | None:
    """The folder of the run that goes on, of this job where one is named; None: a run begins."""
    from qaic_ray.cli.parameters import RESUME_LAST
    from qaic_ray.pipeline.request import REQUEST_NAME
    from qaic_ray.runs.report import last_unfinished

    if resuming.resume is None:
        if resuming.retry_errors:
            raise UsageError("--retry-errors is for --resume: give the folder of the run with it.")
        return None
    if resuming.resume != RESUME_LAST:
        return Path(resuming.resume)
    folder = last_unfinished(Path(output), REQUEST_NAME, job)
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


@command(app)
def plan(job: JobArgument, overrides: SetOption = None) -> None:
    """Show what a job would compile, with the compiler's command lines; runs nothing."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.job import load_job, plan_job

    Screen().plan(plan_job(load_job(job, overrides or ())))


@command(app)
def export(
    model: options.ModelOptions,
    how: Annotated[options.ExportOptions, {"continuous_batching": False, "verify": "full"}],
    show: parameters.JsonOptions,
) -> None:
    """Make an ONNX model with its KV cache from a checkpoint, and check it against PyTorch."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.job import export_step

    screen = Screen(as_json=show.as_json)
    screen.exported(export_step(model, how, screen))


@command(app)
def compile(  # the recipe's word
    model_dir: Annotated[
        Path, typer.Argument(callback=known_path, help="Folder that export made (<base>-kv).")
    ],
    shapes: parameters.ShapesOptions,
    grid: options.CompileOptions,
    ray: Annotated[options.LocalRayOptions, {"dashboard": False}],
    sdk: options.SdkOptions,
    show: parameters.JsonOptions,
) -> None:
    """Compile a model into QPCs: every combination of the lists, in parallel, each built once."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.compile_step import compile_step, requested_builds, specializations_file

    screen = Screen(as_json=show.as_json)
    given = None if shapes.specializations is None else Path(shapes.specializations)
    file = specializations_file(given, grid)
    if file != given:
        screen.remark(f"{file} of this folder says the shapes, as in the published recipe.")
    builds = requested_builds(model_dir, grid, _sdk_choice(sdk, screen).here, file)
    outcomes = compile_step(builds, grid.parallel, screen, ray)
    screen.compiled_all(outcomes)


@command(app)
def run(
    program: parameters.ProgramOptions,
    asked: options.RunOptions,
    resuming: parameters.ResumeOptions,
    ray: Annotated[options.RayOptions, {"dashboard": False}],
    sdk: options.SdkOptions,
    show: parameters.ShowOptions,
    given: parameters.Given,
) -> None:
    """Answer prompts on every card, one Ray actor a card; print texts and tokens/s."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.request import RunRequest, resolved, resumed
    from qaic_ray.pipeline.run_step import run_step

    screen = Screen(stream=show.stream, as_json=show.as_json)
    if resuming.resume is not None:
        given.refuse_changes(resuming.resume)
    resume = _folder_to_resume(resuming, asked.output, screen)
    if resume is not None:
        request = resumed(resume, asked)
    elif program.model_name is None or program.qpc is None:
        raise UsageError("Give --model-name and --qpc, or --resume with the folder of a run.")
    else:
        request = RunRequest("run", program.model_name, Path(program.qpc), resolved(asked))
    request = replace(request, ray=ray, retry_errors=resuming.retry_errors)
    screen.finish(run_step(request, _sdk_choice(sdk, screen), screen))


@command(app)
def status(
    jobs: parameters.JobsOptions,
    show: parameters.JsonOptions,
    submission_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One job.", show_default="all")
    ] = None,
) -> None:
    """Show the jobs that a cluster runs, or ran, by itself."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.submit_step import job_statuses

    Screen(as_json=show.as_json).jobs(job_statuses(jobs.address, submission_id))


IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As launch --detach printed it.")]


@command(app)
def logs(
    submission_id: IdArgument,
    jobs: parameters.JobsOptions,
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
def stop(
    submission_id: IdArgument, jobs: parameters.JobsOptions, show: parameters.JsonOptions
) -> None:
    """End a detached job; its cards are free then."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.submit_step import stop_job

    Screen(as_json=show.as_json).jobs([stop_job(jobs.address, submission_id)])


@command(app)
def devices(
    ray: options.ClusterOptions, sdk: options.SdkOptions, show: parameters.JsonOptions
) -> None:
    """List cards: status, SKU, free NSPs and DRAM; on a cluster also who holds them."""
    from qaic_ray.cli.screen import Screen

    screen = Screen(as_json=show.as_json)
    if ray.address is None:
        found = _sdk_choice(sdk, screen).here
        screen.devices(found, found.devices())
        return
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.sdk import name_for_others

    with Cluster(0, address=ray.address) as cluster:
        nodes = cluster.inventory(name_for_others(sdk.sdk), EmulatorOptions())
        screen.inventory(nodes, cluster.problems(nodes))


app.add_typer(emulator_app, name="emulator", no_args_is_help=True)
app.add_typer(ray_app, name="ray", no_args_is_help=True)


@command(emulator_app, "install")
def emulator_install(
    prefix: Annotated[
        Path,
        typer.Argument(callback=known_path, help="Folder to make, like ./sdk or /opt/qti-aic."),
    ],
    emulated: options.EmulatorOptions,
) -> None:
    """Lay the emulated SDK down as a folder."""
    from qaic_ray.sdk import install_emulated, open_sdk

    sdk = open_sdk(install_emulated(prefix, emulated))
    typer.echo(f"The {sdk.label} is at {sdk.root}: {emulated.cards} {emulated.sku} cards.")


@command(
    emulator_app, "run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def emulator_run(
    words: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="-- COMMAND and its arguments.")
    ],
    sdk: Annotated[options.SdkOptions, {"sdk": "emulated"}],
) -> None:
    """Run any program with the emulated SDK on its paths; the exit code is the program's."""
    from qaic_ray.cli.screen import Screen

    found = _sdk_choice(sdk, Screen()).here
    try:
        code = subprocess.run(words, env=found.environment(), check=False).returncode
    except OSError as error:
        raise UsageError(f"Cannot run {words[0]}: {error.strerror}.") from error
    raise typer.Exit(code if code >= 0 else 128 - code)
