"""The commands that a newcomer begins with: a demonstration, and a job to be changed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.cli.launching import launch_here, live_screen, with_ray
from qaic_ray.files.documents import user_path

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli import parameters


def demo(
    place: parameters.DemoOptions,
    ray: options.RayOptions,
    sdk: options.SdkOptions,
    show: parameters.ShowOptions,
) -> None:
    """Show it all on a small model, SmolLM2-135M: export, compile, run on four cards, report."""
    from qaic_ray.cli.parameters import ResumeOptions
    from qaic_ray.files.folders import cache_folder
    from qaic_ray.pipeline.job import beside_prepared, load_job
    from qaic_ray.shipped.jobs import shipped_jobs

    folder = Path(place.folder).absolute() if place.folder else cache_folder() / "demo"
    job = with_ray(load_job(shipped_jobs()["smollm2"]), ray)
    job = job.model_copy(update={name: getattr(sdk, name) for name in sdk.model_fields_set})
    job = job.changed("run", output=str(folder / "runs"), devices=place.devices)
    at = folder
    if not place.folder:
        job = beside_prepared(job)
        at = cache_folder()
    if job.export.output is None:
        job = job.changed("export", output=str(folder / f"{job.model.name}-kv"))
        job = job.changed("compile", output=str(folder / "qpc"))
    launch_here(job, ResumeOptions(), show)
    with live_screen(show) as screen:
        screen.remark(
            f"All of it is in {at}, where another demo finds it. A job of your own: "
            "`qaic-ray init NAME`."
        )


def init(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Of the job; its files are NAME.yaml and NAME-prompts.jsonl."
        ),
    ],
    show: parameters.JsonOptions,
    begin_with: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="JOB",
            help="The job that it is made of, like chat.",
            show_default="start",
        ),
    ] = "start",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
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
        f"    qaic-ray schema {file}    # let your editor check it, and complete its keys\n"
    )


def schema(
    show: parameters.JsonOptions,
    job: Annotated[
        Path | None,
        typer.Argument(
            metavar="[JOB]",
            help="A job file of yours: the schema is written beside it, and its first line names "
            "it, so that editors check and complete it.",
            show_default="print the schema",
        ),
    ] = None,
) -> None:
    """Print the JSON schema of job files, or give it to a job for editors."""
    from qaic_ray.cli.screen import write
    from qaic_ray.files.documents import json_text
    from qaic_ray.shipped.job_schema import give_schema, job_schema, schema_text

    if job is None:
        write(json_text(job_schema()) + "\n" if show.as_json else schema_text())
        return
    written = give_schema(user_path(job, "JOB"))
    if show.as_json:
        write(json_text({"job": str(job), "schema": str(written)}) + "\n")
        return
    write(
        f"Editors with a YAML language server check {job} by {written.name} beside it, and "
        "complete its keys.\n"
    )
