"""The commands that do something: each takes sections of options, and calls one function below."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qaic_ray.cli.app import (
    Commands,
    Interrupted,
    SetOption,
    app,
    command,
    known_path,
    sdk_choice,
    switches,
)
from qaic_ray.cli.flags.completion import jobs
from qaic_ray.cli.kept_ray import ray_app
from qaic_ray.cli.launching import (
    folder_to_resume,
    launch_here,
    live_screen,
    share,
    streaming,
    with_ray,
)
from qaic_ray.cli.looking import looking
from qaic_ray.cli.merging import merge
from qaic_ray.cli.monitoring import monitoring
from qaic_ray.cli.new_job import demo, init, schema
from qaic_ray.cli.reporting import compare, report
from qaic_ray.cli.serving import key, serve
from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli import parameters
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.request import RunRequest, SdkChoice


__all__ = ["Interrupted", "app", "command_tree", "switches"]

emulator_app = typer.Typer(
    cls=Commands,
    help="The emulated SDK: lay it down, run any program on it.",
    epilog="""qaic-ray emulator install ./sdk
qaic-ray emulator run -- qaic-util -q""",
)

JobArgument = Annotated[
    Path,
    typer.Argument(
        callback=known_path,
        help="A job file, or the name of a job that comes along, like smollm2.",
        autocompletion=jobs,
    ),
]


@command(
    app,
    example="""qaic-ray launch smollm2
qaic-ray launch smollm2 -i prompts.jsonl --max-tokens 64
qaic-ray launch jobs/smollm2.yaml --resume""",
)
def launch(
    job: JobArgument,
    changes: parameters.JobChanges,
    ray: options.RayOptions,
    submit: parameters.SubmitOptions,
    resuming: parameters.ResumeOptions,
    show: parameters.ShowOptions,
    overrides: SetOption = None,
) -> None:
    """Run a whole job: export, compile, run on every card, report."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.job import load_job
    from qaic_ray.pipeline.submit_step import SubmitRequest, submit_step

    loaded = load_job(job, overrides or (), changes=changes.values)
    loaded = with_ray(loaded, ray)
    if submit.detach:
        folder, python = Path(submit.folder or ".").absolute(), submit.python or sys.executable
        request = SubmitRequest(loaded, folder, python, submit.send_prompts)
        Screen(as_json=show.as_json).submitted(request, *submit_step(request))
        return
    if submit.folder is not None:
        _enter(Path(submit.folder))
    launch_here(loaded, resuming, show, has_new_prompts="run.prompts" in changes.values)


def _enter(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    except OSError as error:
        raise UsageError(
            f"The folder {folder} cannot be used on {os.uname().nodename} ({error.strerror}): name "
            "one there with --folder."
        ) from error


@command(
    app,
    example="""qaic-ray plan smollm2
qaic-ray plan jobs/smollm2.yaml --set compile.num_cores=7 --json""",
)
def plan(
    job: JobArgument,
    changes: parameters.JobChanges,
    show: parameters.JsonOptions,
    overrides: SetOption = None,
) -> None:
    """Show what a job would compile, with the compiler's command lines; runs nothing."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.pipeline.job import load_job, plan_job

    loaded = load_job(job, overrides or (), changes=changes.values)
    Screen(as_json=show.as_json).plan(plan_job(loaded))


@command(
    app,
    example="""qaic-ray export smollm2-135m
qaic-ray export ./my-llama -o my-llama-kv --verify quick""",
)
def export(
    model: options.ModelOptions,
    how: Annotated[options.ExportOptions, {"continuous_batching": False, "verify": "full"}],
    show: parameters.ViewOptions,
) -> None:
    """Make an ONNX model with its KV cache from a checkpoint, and check it against PyTorch."""
    from qaic_ray.pipeline.export_step import export_step

    with live_screen(show) as screen:
        screen.exported(export_step(model, how, screen))


@command(
    app,
    example="""qaic-ray compile smollm2-135m-kv
qaic-ray compile smollm2-135m-kv mx6 7 --batch-size 1,8 -o qpcs""",
)
def compile(  # the recipe's word
    model_dir: Annotated[
        Path, typer.Argument(callback=known_path, help="Folder that export made (<base>-kv).")
    ],
    shapes: parameters.ShapesOptions,
    grid: options.CompileOptions,
    ray: Annotated[options.LocalRayOptions, {"dashboard": False}],
    sdk: options.SdkOptions,
    show: parameters.ViewOptions,
) -> None:
    """Compile a model into QPCs: every combination of the lists, in parallel, each built once."""
    from qaic_ray.compile.layout import QEFFICIENT_FOLDER
    from qaic_ray.compile.recipe_names import link_recipe_names
    from qaic_ray.compile.store import Build
    from qaic_ray.option_types import Layout
    from qaic_ray.pipeline.compile_step import compile_step, requested_builds, specializations_file

    with live_screen(show) as screen:
        given = None if shapes.specializations is None else Path(shapes.specializations)
        file = specializations_file(given, grid)
        if file != given:
            screen.remark(f"{file} of this folder says the shapes, as in the published recipe.")
        builds = requested_builds(model_dir, grid, sdk_choice(sdk, screen).here, file)
        outcomes = compile_step(builds, grid.parallel, screen, ray)
        # Of several nobody could say which has the name.
        if len(builds) == 1 and isinstance(outcomes[0][1], Build):
            for remark in link_recipe_names(builds[0]):
                screen.remark(remark)
        if grid.layout is Layout.QEFFICIENT and isinstance(outcomes[0][1], Build):
            screen.note(f"QEfficient's commands take {outcomes[0][1].path / QEFFICIENT_FOLDER}.")
        screen.compiled_all(outcomes)


@command(
    app,
    example="""qaic-ray run smollm2-135m "The capital of France is"
qaic-ray run smollm2-135m -i prompts.jsonl -o runs --max-tokens 64
qaic-ray run --resume""",
)
def run(
    program: parameters.ProgramOptions,
    asked: options.RunOptions,
    shapes: parameters.PrepareOptions,
    resuming: parameters.ResumeOptions,
    ray: Annotated[options.RayOptions, {"dashboard": False}],
    sdk: options.SdkOptions,
    show: parameters.ShowOptions,
    given: parameters.Given,
) -> None:
    """Answer prompts on every card that they need; print texts and tokens/s.

    What is missing is made first: the model is exported and compiled into the user's cache.
    """
    from qaic_ray.pipeline.local_cards import check_named
    from qaic_ray.pipeline.request import resumed
    from qaic_ray.pipeline.run_step import run_step

    with live_screen(show) as screen:
        if resuming.resume is not None:
            given.refuse_changes(resuming.resume)
        resume = folder_to_resume(resuming, asked.output, screen)
        choice = sdk_choice(sdk, screen)
        if resume is not None:
            request = resumed(resume, asked)
        else:
            if ray.address is None and asked.devices != "all":
                check_named(asked.devices, choice)  # before minutes of compiling
            request = _new_run(program, asked, shapes, sdk=choice, screen=screen)
        request = replace(
            request,
            ray=ray,
            retry_errors=resuming.retry_errors,
            stop_if_errors=share(show),
        )
        screen.show_answers(streaming(show, request.run.prompt))
        if show.no_stream and request.run.prompt is not None and not show.as_json:
            screen.remark(
                "--no-stream prints no answers, they are in outputs.jsonl of the run folder; "
                "--stream ordered prints each when it is whole, as the recipe's --no-stream did."
            )
        screen.finish(run_step(request, choice, screen))


def _new_run(
    program: parameters.ProgramOptions,
    asked: options.RunOptions,
    shapes: parameters.PrepareOptions,
    *,
    sdk: SdkChoice,
    screen: Screen,
) -> RunRequest:
    """What `run` is asked to do, with the QPC that is given, or is made now."""
    from qaic_ray import options
    from qaic_ray.formats.prompts import one_prompt
    from qaic_ray.pipeline.prepare_step import prepare_for
    from qaic_ray.pipeline.request import RunRequest, resolved, with_typed_bound

    if program.text is not None:
        if asked.prompts is not None and Path(program.text).exists():
            raise UsageError(
                f"{program.text} stands behind --input and is no prompt: put a glob between "
                "quotes, or write -i before each file."
            )
        if asked.prompt is not None:
            raise UsageError("The prompt is given twice, by --prompt too: give it once.")
        asked = asked.model_copy(update={"prompt": one_prompt(program.text)})
    if program.model_name is None:
        raise UsageError(
            'Give a model and a prompt, like `qaic-ray run smollm2-135m "My name is"`, or --resume '
            "with the folder of a run."
        )
    request = RunRequest("run", program.model_name, Path(), with_typed_bound(resolved(asked)))
    request.check_prompts()
    request.check_parts()
    if program.qpc is not None:
        if said := ", ".join(f"--{name.replace('_', '-')}" for name in shapes.model_fields_set):
            raise UsageError(f"{said} is of a program that is made: leave it, or --qpc, out.")
        return replace(request, qpc=Path(program.qpc))
    model = options.ModelOptions(name=program.model_name)
    return replace(request, qpc=prepare_for(model, request.run, shapes, sdk=sdk, listener=screen))


command(
    app,
    example="""qaic-ray demo
qaic-ray demo --device-id 0 --no-stream""",
)(demo)
command(
    app,
    example="""qaic-ray init mine
qaic-ray init tour --from chat --model org/model""",
)(init)
command(
    app,
    example="""qaic-ray schema
qaic-ray schema mine.yaml""",
)(schema)
command(
    app,
    example="""qaic-ray report smollm2-20261129-090500
qaic-ray report runs/before runs/after -o both.html""",
)(report)
command(
    app,
    example="""qaic-ray merge 'shards/run-*' -o merged
qaic-ray merge runs/a runs/b -o merged --output-parts s3://bucket/merged""",
)(merge)

command(
    app,
    example="""qaic-ray compare runs/a/bundles/card-0 runs/b/bundles/card-0
qaic-ray compare bundle fp32-bundle --tolerance 0.05""",
)(compare)
command(app, example="qaic-ray monitoring ./monitoring")(monitoring)
command(
    app,
    example="""qaic-ray serve smollm2-135m
qaic-ray serve ./qpc -m org/model --port 9000
qaic-ray serve jobs/serve.yaml --host 0.0.0.0 --api-keys keys.txt""",
)(serve)
command(app, example="qaic-ray key alice")(key)
# The commands that only look follow those that do something, in the help too.
app.registered_commands += looking.registered_commands
app.add_typer(emulator_app, name="emulator")
app.add_typer(ray_app, name="ray")


@command(
    emulator_app,
    "install",
    example="""qaic-ray emulator install ./sdk
qaic-ray emulator install ./sdk --cards 8 --sku ultra""",
)
def emulator_install(
    prefix: Annotated[
        Path,
        typer.Argument(callback=known_path, help="Folder to make, like ./sdk or /opt/qti-aic."),
    ],
    emulated: options.EmulatorOptions,
    show: parameters.JsonOptions,
) -> None:
    """Lay the emulated SDK down as a folder."""
    from qaic_ray.sdk import install_emulated, open_sdk

    sdk = open_sdk(install_emulated(prefix, emulated))
    if show.as_json:
        from qaic_ray.cli.tables import write_json

        write_json({"sdk": sdk.label, "root": str(sdk.root), "cards": emulated.cards})
        return
    typer.echo(f"The {sdk.label} is at {sdk.root}: {emulated.cards} {emulated.sku} cards.")


@command(
    emulator_app,
    "run",
    example="""qaic-ray emulator run -- qaic-util -q
qaic-ray emulator run -- python my_program.py""",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def emulator_run(
    words: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="-- COMMAND and its arguments.")
    ],
    sdk: Annotated[options.SdkOptions, {"sdk": "emulated"}],
) -> None:
    """Run any program with the emulated SDK on its paths; the exit code is the program's."""
    from qaic_ray.cli.screen import Screen

    found = sdk_choice(sdk, Screen()).here
    try:
        code = subprocess.run(words, env=found.environment(), check=False).returncode
    except OSError as error:
        raise UsageError(f"Cannot run {words[0]}: {error.strerror}.") from error
    raise typer.Exit(code if code >= 0 else 128 - code)


def command_tree() -> Any:
    """All commands, as click has them."""
    return typer.main.get_command(app)
