"""The commands and their options, each a few lines over one function of a lower floor."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qaic_ray import __version__
from qaic_ray.cli.cluster_commands import (
    DetachOption,
    FolderOption,
    PythonOption,
    SendPromptsOption,
    detached,
    enter,
    logs,
    status,
    stop,
)
from qaic_ray.cli.compile_command import compile
from qaic_ray.cli.ending import Interrupted
from qaic_ray.cli.options import JsonOption, ModelOption, SdkOption, find_sdk, known_path
from qaic_ray.cli.run_command import (
    RESUME_LAST,
    Resumable,
    ResumeOption,
    RetryOption,
    StreamOption,
    run,
)
from qaic_ray.errors import UsageError


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
app.add_typer(emulator_app, name="emulator", no_args_is_help=True)


@dataclass
class GlobalOptions:
    """What stands before the command."""

    debug: bool = False


options = GlobalOptions()


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


KvDtypeOption = Annotated[
    str, typer.Option("--kv-dtype", help="KV cache on the card: float16 or mxint8.")
]
LogitsOption = Annotated[
    str, typer.Option(help="Of which tokens: last, all or num_logits_to_keep.")
]
NextTokensOption = Annotated[
    bool, typer.Option("--next-tokens", help="Token ids as output, in place of logits.")
]

ExportedOption = Annotated[
    Path | None,
    typer.Option(
        callback=known_path,
        help="Folder to write; its name is the model's.",
        show_default="<base>-kv",
    ),
]
ComputedOption = Annotated[
    bool, typer.Option("--comp-ctx-lengths", help="An input for how much context is computed.")
]


@app.command(cls=Resumable)
def launch(
    job: Annotated[
        Path, typer.Argument(callback=known_path, help="A job file, like jobs/smollm2.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key: run.generation_len=64."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, instead of a local one.")
    ] = None,
    detach: DetachOption = False,
    folder: FolderOption = None,
    python: PythonOption = None,
    send_prompts: SendPromptsOption = True,
    resume: ResumeOption = None,
    retry_errors: RetryOption = False,
    stream: StreamOption = True,
    as_json: JsonOption = False,
) -> None:
    """Run a whole job: export, compile, run on every card, report."""
    from qaic_ray.cli.job_screen import ProgressLog
    from qaic_ray.cli.screen import Screen
    from qaic_ray.config import load_job
    from qaic_ray.pipeline.job import launch_job
    from qaic_ray.pipeline.request import last_unfinished

    changes = [*(overrides or ())]
    if address is not None:
        changes.append(f"ray.address={json.dumps(address)}")
    loaded = load_job(job, changes)
    if detach:
        detached(loaded, folder, python, send_prompts=send_prompts, as_json=as_json)
        return
    if folder is not None:
        enter(folder)
    screen = Screen(stream=True) if stream else ProgressLog()
    if retry_errors and resume is None:
        raise UsageError("--retry-errors is for --resume: give the folder of the run with it.")
    if resume == RESUME_LAST:
        resume = last_unfinished(Path(loaded.run.output), loaded.name)
        if resume is None:
            screen.remark(f"No run of {loaded.name} in {loaded.run.output} is unfinished.")
            return
    summary = launch_job(loaded, screen, resume=resume, retry_errors=retry_errors)
    screen.finish(summary, as_json=as_json)


@app.command()
def plan(
    job: Annotated[Path, typer.Argument(callback=known_path, help="A job file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")
    ] = None,
) -> None:
    """Show what a job would compile, with the compiler's command lines; runs nothing."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.config import load_job
    from qaic_ray.pipeline.job import plan_job

    loaded = load_job(job, overrides or ())
    Screen().plan(plan_job(loaded))


@app.command()
def export(
    model_name: ModelOption,
    model_class: Annotated[
        str, typer.Option("--model-class", "--model_class", help="As in the published recipe.")
    ] = "LlamaForCausalLM",
    output: ExportedOption = None,
    io: Annotated[
        str, typer.Option(help="The interface: position-ids, or cache-index as the recipe's.")
    ] = "position-ids",
    continuous_batching: Annotated[
        bool,
        typer.Option("--continuous-batching", help="Slots, refilled while others run."),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(help="17, or 13 for SDKs up to Apps 1.20.", show_default="by the interface"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Weights in the files: float32 or float16.")
    ] = "float32",
    kv_dtype: KvDtypeOption = "float16",
    logits: LogitsOption = "last",
    next_tokens: NextTokensOption = False,
    replicate_kv_heads: Annotated[
        int, typer.Option("--replicate-kv-heads", help="Copies of each head, for device groups.")
    ] = 1,
    comp_ctx_lengths: ComputedOption = False,
    verify: Annotated[
        str, typer.Option(help="Check against PyTorch: full, quick or off.")
    ] = "full",
    as_json: JsonOption = False,
) -> None:
    """Make an ONNX model with its KV cache from a checkpoint, and check it against PyTorch."""
    from qaic_ray.cli.screen import Screen
    from qaic_ray.config import job_from
    from qaic_ray.pipeline.export_step import export_step

    document = {
        "name": "export",
        "model": {"name": model_name, "model_class": model_class},
        "export": {
            "output": None if output is None else str(output),
            "io": io,
            "continuous_batching": continuous_batching,
            "opset": opset,
            "dtype": dtype,
            "kv_dtype": kv_dtype,
            "logits": logits,
            "next_tokens": next_tokens,
            "replicate_kv_heads": replicate_kv_heads,
            "comp_ctx_lengths": comp_ctx_lengths,
            "verify": verify,
        },
    }
    screen = Screen()
    job = job_from(document, source="export")
    screen.exported(export_step(job.model, job.export, screen), as_json=as_json)


app.command()(compile)
app.command(cls=Resumable)(run)
app.command()(status)
app.command()(logs)
app.command()(stop)


@app.command()
def devices(
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster: the cards of all its nodes.")
    ] = None,
    sdk: SdkOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """List cards: status, SKU, free NSPs and DRAM; on a cluster also who holds them."""
    from qaic_ray.cli.screen import Screen

    screen = Screen()
    if address is None:
        found = find_sdk(sdk, screen)
        screen.devices(found, found.devices(), as_json=as_json)
        return
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.config import EmulatorPart
    from qaic_ray.pipeline.devices import emulated_cards
    from qaic_ray.sdk import name_for_others

    with Cluster(0, address=address) as cluster:
        nodes = cluster.inventory(name_for_others(sdk), emulated_cards(EmulatorPart()))
        screen.inventory(nodes, cluster.problems(nodes), as_json=as_json)


@emulator_app.command("install")
def emulator_install(
    prefix: Annotated[
        Path,
        typer.Argument(callback=known_path, help="Folder to make, like ./sdk or /opt/qti-aic."),
    ],
    apps_version: Annotated[
        str | None, typer.Option(help="1.14.2, 1.17, 1.20, 1.21.6 or 1.22.")
    ] = None,
    cards: Annotated[int | None, typer.Option(min=1, help="How many cards.")] = None,
    sku: Annotated[str | None, typer.Option(help="standard, pro or ultra.")] = None,
) -> None:
    """Lay the emulated SDK down as a folder."""
    from qaic_ray.config import emulator_from
    from qaic_ray.pipeline.devices import emulated_cards
    from qaic_ray.sdk import install_emulated, open_sdk

    given = {"apps_version": apps_version, "cards": cards, "sku": sku}
    part = emulator_from({key: value for key, value in given.items() if value is not None})
    sdk = open_sdk(install_emulated(prefix, emulated_cards(part)))
    typer.echo(f"The {sdk.label} is at {sdk.root}: {part.cards} {part.sku} cards.")


@emulator_app.command(
    "run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def emulator_run(
    command: Annotated[list[str], typer.Argument(help="-- COMMAND and its arguments.")],
    sdk: SdkOption = "emulated",
) -> None:
    """Run any program with the emulated SDK on its paths; the exit code is the program's."""
    from qaic_ray.cli.screen import Screen

    found = find_sdk(sdk, Screen())
    environment = dict(os.environ)
    paths = [str(path) for path in found.python_paths]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *_entries("PYTHONPATH")])
    folders = [str(found.root / "exec"), str(found.root / "tools")]
    environment["PATH"] = os.pathsep.join([*folders, *_entries("PATH")])
    environment["QAIC_RAY_SDK"] = str(found.root)
    try:
        code = subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        raise UsageError(f"Cannot run {command[0]}: {error.strerror}.") from error
    raise typer.Exit(code if code >= 0 else 128 - code)


def _entries(variable: str) -> list[str]:
    return [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]
