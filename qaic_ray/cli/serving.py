"""`qaic-ray serve` and `qaic-ray key`."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Annotated

import typer

from qaic_ray.cli.app import SetOption, sdk_choice
from qaic_ray.errors import UsageError

if TYPE_CHECKING:
    from qaic_ray import options
    from qaic_ray.cli import parameters

OF_REQUESTS = dict.fromkeys(("sampling", "seed", "generation_len"), ...)
"""Options that requests say; what holds for those that do not is the model's or a job's."""


def serve(
    target: parameters.ServedOptions,
    how: options.ServeOptions,
    decoding: Annotated[options.Decoding, OF_REQUESTS],
    cards: options.CardOptions,
    shapes: parameters.PrepareOptions,
    ray: Annotated[options.RayOptions, {"dashboard": False}],
    sdk: options.SdkOptions,
    show: parameters.ViewOptions,
    overrides: SetOption = None,
) -> None:
    """Answer OpenAI clients on every card: completions, chat, responses, files and batches.

    What is missing is made first: the model is exported and compiled into the user's cache.
    """
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UsageError("Serving needs FastAPI and uvicorn: pip install 'qaic-ray[serve]'.")
    from qaic_ray import options
    from qaic_ray.cli.launching import live_screen
    from qaic_ray.pipeline.request import choose_sdk
    from qaic_ray.serve.serving import check_door, serve_model
    from qaic_ray.serve.target import ServeCall, served_job, served_model

    with live_screen(show) as screen:
        said = {
            name: getattr(part, name)
            for part in (decoding, cards)
            for name in part.model_fields_set
        }
        run = options.RunOptions(**said)
        asked = ServeCall(
            target.target, target.model_name, tuple(overrides or ()), run, shapes, how, ray
        )
        if asked.is_job:
            job = asked.job()
            choice = choose_sdk(
                sdk.sdk if "sdk" in sdk.model_fields_set else job.sdk, job.emulator, screen
            )
            check_door(job.serve)
            served = served_job(job, choice, screen)
        else:
            check_door(how)
            choice = sdk_choice(sdk, screen)
            served = served_model(asked, choice, screen)

        def ready(address: str) -> None:
            screen.serving(address, served.names, pid=os.getpid())

        log_json = show.log_format == "json"
        if served.options.ray_serve:
            from qaic_ray.serve.ray_serve.haproxy import choose

            choose(served.options, served.request.ray)  # before Ray Serve is imported
            from qaic_ray.serve.ray_serve.application import serve_on_ray

            serve_on_ray(served, choice, screen, on_ready=ready, log_json=log_json)
            return
        serve_model(served, choice, screen, on_ready=ready, log_json=log_json)


def key(
    name: Annotated[str, typer.Argument(help="Who gets it: letters, digits, dots, _ and -.")],
    show: parameters.JsonOptions,
) -> None:
    """Make an API key: the key on stderr, once, and its line for a file of keys on stdout."""
    from qaic_ray.cli.tables import write_json
    from qaic_ray.serve.http.keys import new_key

    made, line = new_key(name)
    if show.as_json:
        write_json({"name": name, "key": made, "line": line})
        return
    typer.echo(f"The key of {name}, which is kept nowhere: {made}", err=True)
    typer.echo(line)
