"""The commands that look: what runs, what ran, one row of it, cards and machines; and stop."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.cli.app import command, known_path, sdk_choice
from qaic_ray.cli.flags.completion import run_names
from qaic_ray.errors import ExitCode

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli import parameters
    from qaic_ray.pipeline.looking import Statuses, StatusLook

WATCH_S = 1.0
WATCH_LOG_S = 10.0
"""How often `--watch` says how far it is: on a terminal, and off one."""

looking = typer.Typer()

WhatArgument = Annotated[
    str,
    typer.Argument(
        metavar="WHAT",
        help="A run folder, the name of one in runs, or the id of a detached job.",
        autocompletion=run_names,
    ),
]


@command(
    looking,
    example="""qaic-ray status
qaic-ray status smollm2-20261129-090500 --watch""",
)
def status(
    jobs: parameters.JobsOptions,
    where: parameters.RunsOptions,
    show: parameters.JsonOptions,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[WHAT]",
            help="A run folder, the name of one in runs, a folder of runs, or the id of a detached "
            "job.",
            show_default="the runs in runs, and the cluster's jobs",
            autocompletion=run_names,
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Draw it again every second, until it ends.")
    ] = False,
) -> None:
    """Show how far runs are, here or on a cluster: going on, stopped, or done."""
    from qaic_ray.pipeline.looking import StatusLook

    output = Path(where.output)
    look = StatusLook(what, jobs.address, output)
    if watch:
        _watch(look, ends=what is not None, as_json=show.as_json)
    else:
        _show(look.look(), output, as_json=show.as_json)


def _show(found: Statuses, output: Path, *, as_json: bool) -> None:
    from qaic_ray.cli import tables

    if as_json:
        tables.write_json(found.to_json())
    elif found.runs or found.jobs or found.remark:
        tables.draw(lambda width: tables.status_table(found, width))
    else:
        tables.draw(lambda _: f"There is nothing to show: no run in {output}, no detached job.")


def _watch(look: StatusLook, *, ends: bool, as_json: bool) -> None:
    """Show it again and again; `ends`: until what was named does not run any more."""
    from rich.live import Live

    from qaic_ray.cli import tables
    from qaic_ray.cli.screen import write

    found = look.look()
    if as_json or not tables.can_redraw():
        while True:
            if as_json:
                tables.write_json(found.to_json())
            else:
                write(f"{time.strftime('%H:%M:%S')} {tables.status_line(found)}\n")
            if ends and not found.is_running:
                return
            time.sleep(WATCH_S if as_json else WATCH_LOG_S)
            found = look.look()
    out = tables.console()
    with Live(console=out, auto_refresh=False) as live:
        while True:
            live.update(tables.status_table(found, out.width), refresh=True)
            if ends and not found.is_running:
                return
            time.sleep(WATCH_S)
            found = look.look()


@command(looking, example="qaic-ray logs smollm2-20261129-090500 --follow")
def logs(
    what: WhatArgument,
    jobs: parameters.JobsOptions,
    where: parameters.RunsOptions,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run or job ends.")
    ] = False,
) -> None:
    """Print the logs of a run's folder, or what a detached job has printed."""
    from qaic_ray.cli.screen import write
    from qaic_ray.pipeline.looking import find_run, of_a_job, run_logs

    output = Path(where.output)
    folder = find_run(what, output)
    if folder is not None:
        if not run_logs(folder, write, follow=follow):
            sys.stderr.write(f"There are no logs in {folder / 'logs'}.\n")
        return
    from qaic_ray.cluster.jobs import SubmittedJobs

    with of_a_job(what, jobs.address, output):
        submitted = SubmittedJobs(jobs.address)
        if follow:
            submitted.follow(what, write)
        else:
            write(submitted.log(what))


@command(looking, example="qaic-ray stop smollm2-20261129-090500")
def stop(
    what: WhatArgument,
    jobs: parameters.JobsOptions,
    where: parameters.RunsOptions,
    show: parameters.JsonOptions,
) -> None:
    """End a run, which can be resumed, or a detached job; its cards are free then."""
    from qaic_ray.pipeline.looking import stop as stop_it

    output = Path(where.output)
    _show(stop_it(what, jobs.address, output), output, as_json=show.as_json)


@command(
    looking,
    example="""qaic-ray runs
qaic-ray runs elsewhere --json""",
)
def runs(where: parameters.ListedRunsOptions, show: parameters.JsonOptions) -> None:
    """List the runs of a folder, the newest first."""
    from qaic_ray.cli import tables
    from qaic_ray.pipeline.looking import listed_runs

    found = listed_runs(Path(where.output))
    if show.as_json:
        tables.write_json({"runs": [run.to_json() for run in found]})
    elif found:
        tables.draw(lambda width: tables.runs_table(found, width))
    else:
        tables.draw(lambda _: f"There is no run in {where.output}.")


@command(
    looking,
    example="""qaic-ray show smollm2-20261129-090500 0
qaic-ray show runs/smollm2-20261129-090500 0 --json""",
)
def show(
    run: Annotated[
        str,
        typer.Argument(help="A run folder, or the name of one in runs.", autocompletion=run_names),
    ],
    row: Annotated[str, typer.Argument(help="The row's index, from 0, or its id.")],
    where: parameters.RunsOptions,
    how: parameters.JsonOptions,
) -> None:
    """Show one row of a run: the prompt as the model got it, its ids, card, times and end."""
    from qaic_ray.cli import tables
    from qaic_ray.pipeline.row_view import show_row

    view = show_row(run, row, Path(where.output))
    if how.as_json:
        tables.write_json(view.to_json())
    else:
        tables.draw(lambda _: tables.row_lines(view))


@command(
    looking,
    example="""qaic-ray devices
qaic-ray devices --sdk emulated --json""",
)
def devices(
    ray: options.ClusterOptions, sdk: options.SdkOptions, show: parameters.JsonOptions
) -> None:
    """List cards: status, SKU, free NSPs and DRAM; on a cluster also who holds them."""
    from qaic_ray.cli.screen import Screen

    screen = Screen(as_json=show.as_json)
    if ray.address is None:
        found = sdk_choice(sdk, screen).here
        screen.devices(found, found.devices())
        return
    from qaic_ray.cluster.cluster import Cluster
    from qaic_ray.options import EmulatorOptions
    from qaic_ray.sdk import name_for_others

    with Cluster(0, address=ray.address) as cluster:
        nodes = cluster.inventory(name_for_others(sdk.sdk), EmulatorOptions())
        screen.inventory(nodes, cluster.problems(nodes))


@command(
    looking,
    example="""qaic-ray doctor
qaic-ray doctor --sdk emulated --try-cards""",
)
def doctor(
    ray: options.ClusterOptions,
    sdk: options.SdkOptions,
    show: parameters.JsonOptions,
    try_cards: Annotated[
        bool,
        typer.Option(
            "--try-cards", help="Also run a program with a known answer on every card that is free."
        ),
    ] = False,
) -> None:
    """Find out what keeps this machine, or a cluster's, from working; each with its remedy."""
    from qaic_ray.cli import tables
    from qaic_ray.pipeline.doctor_step import doctor_step

    found = doctor_step(sdk.sdk, ray.address, Path.cwd(), tries_cards=try_cards)
    if show.as_json:
        tables.write_json(found.to_json())
    else:
        tables.draw(lambda _: tables.findings_table(found.findings))
    if not found.is_well:
        raise SystemExit(ExitCode.FAILED)


@command(
    looking,
    example="""qaic-ray check smollm2-135m-kv
qaic-ray check specializations.json --sdk-version 1.20 --convert converted""",
)
def check(
    path: Annotated[
        Path,
        typer.Argument(
            callback=known_path,
            help="An ONNX file, a specializations.json, a custom IO list, an MDP file, a QPC, or a "
            "folder of export, compile or QEfficient.",
        ),
    ],
    target: parameters.CheckOptions,
    sdk: options.SdkOptions,
    show: parameters.JsonOptions,
) -> None:
    """Find out what a compiler or card would refuse of a file or folder, or do slowly, and why."""
    from qaic_ray.check.check_step import CheckAsked, as_folder, check_step
    from qaic_ray.cli import tables

    asked = CheckAsked(
        path, sdk.sdk, target.sdk_version or "", target.sku or "", as_folder(target.convert)
    )
    found = check_step(asked)
    if show.as_json:
        tables.write_json(found.to_json())
    else:
        tables.draw(lambda _: tables.check_table(found))
    if not found.is_well:
        raise SystemExit(ExitCode.FAILED)
