"""The command that writes a job to begin with."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qaic_ray.cli import parameters


def init(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Of the job; its files are NAME.yaml and NAME-prompts.jsonl."
        ),
    ],
    show: parameters.JsonOptions,
    begin_with: Annotated[
        str, typer.Option("--from", metavar="<job>", help="The job that it is made of, like chat.")
    ] = "start",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="<name>",
            help="Local folder, hub id, .gguf file, or smollm2-135m.",
            show_default="that job's",
        ),
    ] = None,
) -> None:
    """Write a job and its prompts into this folder: few keys, each explained, ready to run."""
    from qaic_ray.cli.screen import write
    from qaic_ray.files.documents import json_text
    from qaic_ray.shipped.new_job import write_job

    new = write_job(name, begin_with=begin_with, model=model)
    file = shlex.quote(str(new.path))
    if show.as_json:
        document = {"job": str(new.path), "prompts": str(new.prompts), "model": new.model}
        write(json_text(document) + "\n")
        return
    write(
        f"{new.path} is a job on {new.model}, and {new.prompts} its prompts. Change them as you "
        "like, then\n\n"
        f"    qaic-ray plan {file}      # what it would compile\n"
        f"    qaic-ray launch {file}    # export, compile, run on every card, report\n"
    )
