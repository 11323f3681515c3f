"""How a job is launched and a run shown, by every command that does so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli import parameters
    from qaic_ray.cli.answers import Streaming
    from qaic_ray.cli.screen import Screen


def with_ray(job: options.Job, ray: options.RayOptions) -> options.Job:
    """The job with what the command line says of Ray."""
    return job.changed("ray", **{name: getattr(ray, name) for name in ray.model_fields_set})


def launch_here(
    loaded: options.Job,
    resuming: parameters.ResumeOptions,
    show: parameters.ShowOptions,
    *,
    has_new_prompts: bool = False,
) -> None:
    """Run a job from its export to its report; exit code 1 when rows failed.

    Args:
        loaded: the job.
        resuming: the run that goes on, if one does.
        show: how it is shown.
        has_new_prompts: whether a run that goes on gets another input than it began with.
    """
    from qaic_ray.pipeline.job import launch_job

    with live_screen(show) as screen:
        resume = folder_to_resume(resuming, loaded.run.output, screen, job=loaded.name)
        screen.show_answers(streaming(show, loaded.run.prompt))
        summary = launch_job(
            loaded,
            screen,
            resume=resume,
            retry_errors=resuming.retry_errors,
            new_input=resume is not None and has_new_prompts,
            stop_if_errors=share(show),
        )
        screen.finish(summary)


def live_screen(show: parameters.ViewOptions) -> Screen:
    """A screen that draws as it is asked to."""
    from qaic_ray.cli.screen import Screen

    return Screen(as_json=show.as_json, verbose=show.verbose, log_json=show.log_format == "json")


def share(show: parameters.ShowOptions) -> float | None:
    """The share of failed rows that ends a run early."""
    return None if show.stop_if_errors is None else float(show.stop_if_errors)


def streaming(show: parameters.ShowOptions, prompt: str | None) -> Streaming:
    """How answers are printed of a run of that prompt, or of a file where it is None."""
    from qaic_ray.cli.answers import Streaming, chosen

    asked = Streaming.NONE if show.no_stream else Streaming(show.stream)
    if show.as_json:
        if asked is Streaming.TOKENS:
            raise UsageError(
                "--stream tokens is for people: with --json take rows or ordered, or neither."
            )
        return Streaming.NONE if asked is Streaming.AUTO else asked
    return chosen(asked, prompt=prompt, is_terminal=sys.stdout.isatty())


def folder_to_resume(
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
        screen.nothing_to_do(f"No run {f'of {job} ' if job else ''}in {output} is unfinished.")
        raise typer.Exit
    return folder
