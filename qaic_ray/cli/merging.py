"""The command that joins the runs of shards."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.cli.flags.completion import run_names
from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray.cli import parameters


def merge(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run folders of all shards, quoted globs of them, or their names in runs.",
            autocompletion=run_names,
        ),
    ],
    where: parameters.MergeOptions,
    show: parameters.JsonOptions,
) -> None:
    """Join the finished runs of all shards: their rows in input order, with one proof."""
    from qaic_ray.cli.tables import write_json
    from qaic_ray.runs.report import count_text
    from qaic_ray.runs.shards.merge import PROOF_NAME, merge

    folders = _folders(runs)
    target = Path(where.output)
    proof = merge(folders, target, parts=where.output_parts, part_rows=where.part_rows)
    if show.as_json:
        write_json(proof)
        return
    typer.echo(
        f"{len(folders)} shards are merged in {target}: {count_text(proof['rows_in'])} rows in = "
        f"{count_text(proof['rows_ok'])} ok + {count_text(proof['rows_error'])} errors"
    )
    if where.output_parts is not None:
        typer.echo(f"parts  {where.output_parts}")
    typer.echo(f"proof  {target / PROOF_NAME}")


def _folders(words: list[str]) -> list[Path]:
    """The run folders that are meant, each once."""
    from qaic_ray.options import RunOptions
    from qaic_ray.pipeline.looking import find_run, known_run

    output = Path(RunOptions().output)
    found: dict[Path, Path] = {}
    for word in words:
        is_glob = glob.has_magic(word) and find_run(word, output) is None
        matches = sorted(glob.glob(str(Path(word).expanduser()))) if is_glob else [word]
        folders = [
            find_run(match, output) if is_glob else known_run(match, output) for match in matches
        ]
        kept = [folder for folder in folders if folder is not None]
        if not kept:
            raise UsageError(f"No run folder matches {word}: `qaic-ray runs` lists them.")
        found.update((folder.resolve(), folder) for folder in kept)
    return list(found.values())
