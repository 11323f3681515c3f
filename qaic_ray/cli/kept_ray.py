"""`qaic-ray ray`: the Ray that `--keep-ray` left up on this machine."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray.cluster.kept_ray import KeptRay

ray_app = typer.Typer(help="The Ray that --keep-ray left up on this machine.")


@ray_app.command()
def show() -> None:
    """Say where its dashboard is, and how to get in."""
    for line in _kept().dashboard().ways_in(os.environ):
        typer.echo(line)


@ray_app.command()
def env() -> None:
    """Print what `ray status` and `ray job` need: eval "$(qaic-ray ray env)"."""
    kept = _kept()
    addresses = {"RAY_ADDRESS": kept.address, "RAY_API_SERVER_ADDRESS": kept.dashboard_url}
    for name, value in (addresses | kept.variables()).items():
        typer.echo(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")


@ray_app.command()
def stop(
    force: Annotated[bool, typer.Option("--force", help="Also where commands use it.")] = False,
) -> None:
    """End it, and nothing else."""
    from qaic_ray.cluster import kept_ray

    ended = kept_ray.stop(force=force)
    typer.echo("The Ray that was kept has ended." if ended else "No Ray is kept.", err=True)


def _kept() -> KeptRay:
    from qaic_ray.cluster.kept_ray import find

    kept = find()
    if kept is None:
        raise UsageError("No Ray is kept on this machine: --keep-ray leaves one up.")
    return kept
