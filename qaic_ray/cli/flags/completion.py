"""What a shell offers for the word at the cursor, from what lies here: quick, and never an error.

Where nothing is offered the shell completes names of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

MAX_OFFERED = 200
"""Nobody reads more."""

Words = Callable[[typer.Context, str], list[str]]


def words_for(choices: Iterable[object], completes: str = "") -> Words | None:
    """What completes a value: one of a few words, or a kind that `Opt.completes` names."""
    words = [str(choice) for choice in choices]
    if words:
        return lambda ctx, incomplete: _beginning(words, incomplete)
    return {"models": models, "runs": run_folders}.get(completes)


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """The models that have a name, and those of the hub that are here."""
    from qaic_ray.model.sources import NAMED_MODELS

    return _beginning([*NAMED_MODELS, *sorted(_hub_models())], incomplete)


def jobs(ctx: typer.Context, incomplete: str) -> list[str]:
    """The job files here and in jobs, and the names of those that come along."""
    from qaic_ray.shipped.jobs import shipped_jobs

    here = [str(path) for path in (*_inside(".", "*.yaml"), *_inside("jobs", "*.yaml"))]
    return _beginning([*sorted(here), *shipped_jobs()], incomplete)


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The runs in the folder of runs, by name; by path where one was begun."""
    folders = _run_folders(ctx)
    return _beginning([path.name for path in folders], incomplete) or _beginning(
        map(str, folders), incomplete
    )


def run_folders(ctx: typer.Context, incomplete: str) -> list[str]:
    """The same, by path."""
    return _beginning(map(str, _run_folders(ctx)), incomplete)


def _run_folders(ctx: typer.Context) -> list[Path]:
    output = ctx.params.get("output")
    requests = _inside(output if isinstance(output, str) else "runs", "*/request.yaml")
    return sorted((path.parent for path in requests), reverse=True)


def _inside(folder: str, pattern: str) -> list[Path]:
    try:
        return list(Path(folder).glob(pattern))
    except OSError:  # it may not be read: nothing to offer
        return []


def _hub_models() -> Iterable[str]:
    """The ids of models in the hub's cache, where the hub's own variables put it."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    names = (path.name.split("--", 2) for path in _inside(str(cache), "models--*--*"))
    return (f"{owner}/{model}" for _, owner, model in names)


def _beginning(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)][:MAX_OFFERED]
