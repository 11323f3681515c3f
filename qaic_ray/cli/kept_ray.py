"""`qaic-ray ray`: the Ray that `--keep-ray` left up on this machine."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qaic_ray.cli.app import Commands, command
from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray.cli import parameters
    from qaic_ray.cluster.kept_ray import KeptRay

ray_app = typer.Typer(
    cls=Commands,
    help="The Ray that --keep-ray left up on this machine.",
    epilog="""qaic-ray ray show
qaic-ray ray stop""",
)


@command(ray_app, example="qaic-ray ray show")
def show(how: parameters.JsonOptions) -> None:
    """Say where its dashboard is, and how to get in."""
    kept = _kept()
    ways_in = kept.dashboard().ways_in(os.environ)
    if how.as_json:
        _write_json({"address": kept.address, "dashboard": kept.dashboard_url, "ways_in": ways_in})
        return
    for line in ways_in:
        typer.echo(line)


@command(ray_app, example='eval "$(qaic-ray ray env)"')
def env(how: parameters.JsonOptions) -> None:
    """Print what `ray status` and `ray job` need, for a shell."""
    kept = _kept()
    addresses = {"RAY_ADDRESS": kept.address, "RAY_API_SERVER_ADDRESS": kept.dashboard_url}
    variables = addresses | kept.variables()
    if how.as_json:
        _write_json(variables)
        return
    for name, value in variables.items():
        typer.echo(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")


@command(ray_app, example="qaic-ray ray stop")
def stop(
    how: parameters.JsonOptions,
    force: Annotated[bool, typer.Option("--force", help="Also where commands use it.")] = False,
) -> None:
    """End it, and nothing else."""
    from qaic_ray.cluster import kept_ray

    ended = kept_ray.stop(force=force)
    if how.as_json:
        _write_json({"ended": ended})
    typer.echo("The Ray that was kept has ended." if ended else "No Ray is kept.", err=True)


def _write_json(document: dict[str, Any]) -> None:
    from qaic_ray.cli.tables import write_json

    write_json(document)


def _kept() -> KeptRay:
    from qaic_ray.cluster.kept_ray import find

    kept = find()
    if kept is None:
        raise UsageError("No Ray is kept on this machine: --keep-ray leaves one up.")
    return kept
