"""The prompts of a run, from whatever it names, and what the input is known by when it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import user_path
from qaic_ray.formats.frozen_file import FrozenFile, InputChanged
from qaic_ray.formats.inputs.choice import RowChoice
from qaic_ray.formats.inputs.filesystems import is_uri
from qaic_ray.formats.inputs.many_files import FILES, ManyFiles
from qaic_ray.formats.inputs.named_files import (
    OPTION,
    is_plain_file,
    is_stream,
    named_files,
    parts_of,
)
from qaic_ray.formats.prompts import prompts_from_file, prompts_from_text
from qaic_ray.options import RunOptions
from qaic_ray.options.inputs import sample_of, shard_of
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.intake import STREAM_SOURCE, Fingerprint, file_source, text_source

STDIN = "-"


@dataclass(frozen=True)
class RunInput:
    """The prompts of a run, which can be read once, and their part of its fingerprint.

    `rows_guess` is about how many they are, where the input tells that before it is read.
    """

    source: Fingerprint
    prompts: Iterator[Prompt | Row]
    rows_guess: int | None = None


def open_run_input(run: RunOptions, before: Fingerprint | None = None) -> RunInput:
    """The prompts that a run names, and what they are known by.

    A file of this machine is read through now, its rows later.

    Args:
        run: names prompts, or has some.
        before: what the input was known by when the run that now goes on began.

    Raises:
        UsageError: where there are none, or they are not those of `before`.
    """
    _ = run.defaults  # refused before anything is read
    check_choice(run)
    if run.prompts is None or is_stream(run.prompts):
        return _of_text_or_stream(run)
    form, choice = run.prompts_format, row_choice(run)
    if choice == RowChoice(limit=run.max_prompts) and is_plain_file(run.prompts):
        return _of_one_file(run, before)
    named = named_files(run.prompts, any_name=form is not None)
    try:
        files = ManyFiles(named, form, choice, before if before and FILES in before else None)
    except InputChanged as error:
        raise _other_input(error) from error
    return RunInput(files.source, files.prompts(run.defaults, run.chat_options), files.rows_guess)


def check_choice(run: RunOptions) -> None:
    """See that rows of this input can be chosen as is wished.

    Raises:
        UsageError: they cannot.
    """
    is_of_files = run.prompts is not None and not is_stream(run.prompts)
    if not is_of_files and not (run.shard is None and run.sample is None):
        raise UsageError(
            "--shard and --sample are of files: prompts that are typed, and those of a stream, "
            "can only be limited, by --limit."
        )


def _of_text_or_stream(run: RunOptions) -> RunInput:
    if run.prompt is not None:
        texts = prompts_from_text(run.prompt)
        return RunInput(text_source(run.prompt), islice(texts, run.max_prompts))
    # A pipe can be read only once: its rows' digests are all there is.
    how = run.prompts_format, run.defaults, run.chat_options
    prompts = prompts_from_file(user_path(parts_of(run.prompts)[0], OPTION), *how)
    return RunInput(STREAM_SOURCE, islice(prompts, run.max_prompts))


def _of_one_file(run: RunOptions, before: Fingerprint | None) -> RunInput:
    """The prompts of a file, or of as much of it as the run that goes on began with."""
    path = user_path(parts_of(run.prompts)[0], OPTION)
    try:
        frozen = FrozenFile.of(path, None if before is None else before.get("bytes"))
    except InputChanged as error:
        raise _other_input(error) from error
    how = run.prompts_format, run.defaults, run.chat_options
    prompts = prompts_from_file(frozen.path, *how, frozen=frozen)
    guess = frozen.num_lines or None
    if guess is not None and run.max_prompts is not None:
        guess = min(guess, run.max_prompts)
    return RunInput(file_source(frozen), islice(prompts, run.max_prompts), guess)


def _other_input(error: InputChanged) -> UsageError:
    return UsageError(
        f"{error} Go on with a file whose answered rows are as they were, by --input FILE, or "
        "begin a new run."
    )


def row_choice(run: RunOptions) -> RowChoice:
    """Which rows of its input a run answers."""
    return RowChoice(
        shard=None if run.shard is None else shard_of(run.shard),
        sample=None if run.sample is None else sample_of(run.sample),
        sample_seed=run.sample_seed,
        limit=run.max_prompts,
    )


def with_paths(
    given: str | tuple[str, ...], changed: Callable[[str], str]
) -> str | tuple[str, ...]:
    """The parts of an input, those that are paths changed; stdin and URIs are as they were."""
    parts = [part if part == STDIN or is_uri(part) else changed(part) for part in parts_of(given)]
    return parts[0] if len(parts) == 1 else tuple(parts)


def absolute_sources(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The parts of an input as they are understood in every folder."""
    return with_paths(given, lambda part: str(user_path(part, OPTION).absolute()))


def beside(given: str | tuple[str, ...], folder: Path) -> str | tuple[str, ...]:
    """The parts of an input, whose relative paths start at a folder."""
    return with_paths(given, lambda part: str(folder / part))
