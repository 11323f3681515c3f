"""A look at a run's prompts before it begins: how many they are, and how long."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from qaic_ray.errors import RowError
from qaic_ray.formats.inputs.named_files import NamedFile, is_stream, named_files
from qaic_ray.formats.lines import EmptyInput
from qaic_ray.formats.prompts import prompts_from_file, prompts_from_text
from qaic_ray.model.checkpoint import Checkpoint, load_tokenizer
from qaic_ray.options import RunOptions
from qaic_ray.options.inputs import sample_of, shard_of
from qaic_ray.rows import Prompt, Row
from qaic_ray.worker.prompt_encoder import PromptEncoder

SURVEYED_ROWS = 1000
"""Rows whose tokens are counted; a file of more is judged by them."""


@dataclass(frozen=True)
class Survey:
    """What is known of a run's prompts.

    `num_sequences` are the answers that are asked for, `n` to a prompt; None where there are more
    than were looked at, or nobody can tell. `longest_prompt` is in tokens, None for a stream.
    `longest_answer` is the largest `max_tokens` of a row, None where a row has no such bound.
    """

    num_sequences: int | None = None
    longest_prompt: int | None = None
    longest_answer: int | None = None


def survey(run: RunOptions, checkpoint: Checkpoint) -> Survey:
    """Look at a run's first prompts as the model will get them.

    Raises:
        UsageError: as reading them does.
    """
    items = _items(run)
    if items is None:
        return Survey()
    encoder = PromptEncoder(load_tokenizer(checkpoint), run)
    longest, num_sequences, answers = 0, 0, []
    for number, item in enumerate(islice(items, SURVEYED_ROWS + 1)):
        if number == SURVEYED_ROWS:
            num_sequences = -1
            break
        if isinstance(item, Row):
            continue
        try:
            longest = max(longest, len(encoder.ids(item)))
        except RowError:
            continue  # it will be a row of errors, and says why there
        params = item.sampling or run.defaults
        answers.append(params.max_tokens)
        num_sequences += params.n
    return Survey(
        None if num_sequences < 0 else num_sequences,
        longest,
        None if None in answers else max(filter(None, answers), default=None),
    )


def count_sequences(run: RunOptions, most: int) -> int | None:
    """The answers that a run's prompts ask for; None for more than `most`, and for a stream.

    Of a shard, or a share of the rows, it is what their part of the whole would be.

    Raises:
        UsageError: as reading them does.
    """
    items = _items(run)
    if items is None:
        return None
    size = None if run.sample is None else sample_of(run.sample)
    share = size if isinstance(size, float) else 1.0
    if run.shard is not None:
        share /= shard_of(run.shard)[1]
    number = 0
    for item in items:
        number += _num_answers(item, run)
        if number * share > most:
            return None
    return math.ceil(number * share)


def _num_answers(item: Prompt | Row, run: RunOptions) -> int:
    if isinstance(item, Row):
        return 0
    return (item.sampling or run.defaults).n


def _items(run: RunOptions) -> Iterator[Prompt | Row] | None:
    """The prompts; None where they can be read only once, or there are none to look at.

    Of a shard those of the whole, so that every shard of it gets the same program.
    """
    if run.prompt is not None:
        return islice(prompts_from_text(run.prompt), run.max_prompts)
    if run.prompts is None or is_stream(run.prompts):
        return None
    files = named_files(run.prompts, any_name=run.prompts_format is not None)
    bounds = [run.max_prompts, run.sample if isinstance(run.sample, int) else None]
    if run.shard is not None:  # each shard has so many
        bounds = [None if most is None else most * shard_of(run.shard)[1] for most in bounds]
    return islice(_of_files(files, run), min((m for m in bounds if m is not None), default=None))


def _of_files(files: Sequence[NamedFile], run: RunOptions) -> Iterator[Prompt | Row]:
    for file in files:
        try:
            yield from prompts_from_file(
                *(file.path, run.prompts_format, run.defaults, run.chat_options),
                frozen=file.remote,
            )
        except EmptyInput:
            if len(files) == 1:
                raise
