"""The commands that draw a run's report anew, compare runs, and compare what cards computed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.cli.flags.completion import run_names
from qaic_ray.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from qaic_ray.cli import parameters


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folder of a run in any state, or its name in runs.",
            autocompletion=run_names,
        ),
    ],
    page_options: parameters.PageOptions,
    show: parameters.JsonOptions,
) -> None:
    """Draw a run's report anew, from its folder; or compare several runs."""
    from qaic_ray.cli.tables import write_json
    from qaic_ray.options import RunOptions
    from qaic_ray.pipeline.looking import known_run

    output = Path(RunOptions().output)
    folders = [known_run(run, output) for run in runs]
    page = None if page_options.output is None else Path(page_options.output)
    if len(folders) == 1:
        from qaic_ray.report.document import redraw
        from qaic_ray.runs.report import tables

        document = redraw(folders[0], page)
        parts = tables(document, page)
    else:
        from qaic_ray.report.comparison import compare, comparison_page, comparison_tables
        from qaic_ray.report.document import write_page

        document = compare(folders)
        if page is not None:
            write_page(page, comparison_page(document))
        parts = comparison_tables(document, page)
    if show.as_json:
        write_json(document)
    else:
        _print(parts)


def compare(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A",
            help="A bundle that --record left, or a folder of outputs of qaic-runner.",
        ),
    ],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="The other one, such as that of an fp32 program.")
    ],
    how: parameters.ComparingOptions,
    show: parameters.JsonOptions,
) -> None:
    """Name the first execution, tensor and element in which two bundles differ."""
    from dataclasses import asdict

    from qaic_ray.bundles.compare import compare_bundles, read_bundle
    from qaic_ray.cli.tables import write_json

    found = compare_bundles(read_bundle(first), read_bundle(second), tolerance=how.tolerance)
    if show.as_json:
        write_json({"equal": found.difference is None, **asdict(found)})
    elif found.difference is not None:
        typer.echo(f"They differ in {found.difference.text}.")
    else:
        within = "equal" if how.tolerance is None else f"within {how.tolerance:g}"
        typer.echo(
            f"{found.executions} executions are {within}; the largest difference of two numbers "
            f"is {found.largest:g}."
        )
    if found.difference is not None:
        raise SystemExit(ExitCode.FAILED)


def _print(parts: Iterable[RenderableType]) -> None:
    from rich.console import Console

    out = Console(soft_wrap=True, highlight=False)
    for part in parts:
        out.print(part)
