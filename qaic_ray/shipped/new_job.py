"""A new job and its prompts, written as files: made of one that comes with the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import first_error, parse_yaml, read_text, shown
from qaic_ray.options import Job
from qaic_ray.shipped.jobs import SHIPPED, shipped_jobs

FIRST = "start"
"""The job that a new one is made of, where no other is named."""


@dataclass(frozen=True)
class NewJob:
    """A job file that was written, and its prompts beside it."""

    path: Path
    prompts: Path
    model: str


def write_job(name: str, *, begin_with: str = FIRST, model: str | None = None) -> NewJob:
    """Write a job and its prompts into the current folder, made of a shipped job.

    Args:
        name: of the job; the files are `NAME.yaml` and `NAME-prompts.jsonl`.
        begin_with: the name of the shipped job. Its comments are kept.
        model: in place of that job's.

    Raises:
        UsageError: no such job, a name or model that no job can have, or files that are there
            already; nothing is written.
    """
    name = name.removesuffix(".yaml")
    if model is not None and not model.strip():
        raise UsageError("The model has no name: give a folder, a hub id, a .gguf file or a name.")
    shipped = shipped_jobs()
    if begin_with not in shipped:
        raise UsageError(f"No job {shown(begin_with)} comes with qaic-ray: {', '.join(shipped)}.")
    text = read_text(shipped[begin_with])
    begun: dict[str, Any] = parse_yaml(text, begin_with)
    prompts = SHIPPED / begun["run"]["prompts"]
    changes = {
        ("name",): name,
        ("model", "name"): begun["model"]["name"] if model is None else model,
        ("run", "prompts"): f"{name}-prompts{prompts.suffix}",
    }
    text = _changed(text, changes)
    try:
        job = Job.model_validate(parse_yaml(text, name))
    except ValidationError as error:
        if error.errors()[0]["loc"] == ("name",):
            raise UsageError(
                f"A job cannot be called {shown(name)}: a name is letters, digits, dots, _ and -, "
                "and the files are written into the current folder."
            ) from error
        raise UsageError(f"No job can be written: {first_error(error)}") from error
    new = NewJob(Path(f"{name}.yaml"), Path(changes["run", "prompts"]), job.model.name)
    _write_new({new.prompts: read_text(prompts), new.path: text})
    return new


def _changed(text: str, changes: Mapping[tuple[str, ...], str]) -> str:
    """A YAML document with other values at some keys, and all else, comments too, as it was."""
    document = yaml.compose(text, yaml.SafeLoader)
    spans = {keys: (node.start_mark.index, node.end_mark.index) for keys, node in _nodes(document)}
    for keys, value in sorted(changes.items(), key=lambda change: -spans[change[0]][0]):
        begin, end = spans[keys]
        # In a list of one it is written so that it reads back as text, whatever it is.
        written = yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True)
        text = f"{text[:begin]}{written.strip()[1:-1]}{text[end:]}"
    return text


def _nodes(node: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield place, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _nodes(value, (*place, key.value))


def _write_new(texts: Mapping[Path, str]) -> None:
    """Write files where none are, all or none."""
    written: list[Path] = []
    try:
        for path, text in texts.items():
            with path.open("x", encoding="utf-8") as stream:
                written.append(path)
                stream.write(text)
    except (OSError, KeyboardInterrupt) as error:
        for path in written:
            with suppress(OSError):
                path.unlink()
        if isinstance(error, FileExistsError):
            raise UsageError(
                f"{error.filename} is there already: give another name, or move it away."
            ) from error
        if isinstance(error, OSError):
            raise UsageError(
                f"{error.filename or next(iter(texts))} cannot be written: {error.strerror}."
            ) from error
        raise
