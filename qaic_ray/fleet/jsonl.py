"""Lines of JSON, as prompts: rows with fields, and requests of the OpenAI batch format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from qaic_ray.errors import RowError
from qaic_ray.fleet.openai_requests import BatchRequests, is_request
from qaic_ray.fleet.prompt_fields import (
    Document,
    Draft,
    OwnSampling,
    decoded,
    mistake,
    row_id,
    sampling_fields,
)
from qaic_ray.rows import Prompt, Row
from qaic_ray.sampling_params import SamplingParams


class FieldRows:
    """Reads rows that have a `prompt` or `messages`, an `id` and sampling fields.

    Args:
        sampling: the run's.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self._sampling = OwnSampling(sampling)

    def __call__(self, draft: Draft, document: Document) -> Prompt:
        """The prompt of a row.

        Raises:
            RowError: saying what is wrong with it.
        """
        draft.id = row_id(document)
        draft.read_prompt(document)
        for key in document:
            if error := mistake(key):
                raise RowError(error)
        return draft.prompt(self._sampling(sampling_fields(document)))


def prompts_from_json_lines(
    name: str, lines: Iterable[bytes], sampling: SamplingParams, *, only_requests: bool = False
) -> Iterator[Prompt | Row]:
    """An item for each line.

    Args:
        name: of the input, for its error rows.
        lines: without their ends.
        sampling: the run's.
        only_requests: every line is a request of the OpenAI batch format; otherwise those are that
            have a `custom_id` or a `body`, and neither `prompt` nor `messages`.
    """
    requests = BatchRequests(sampling)
    rows = FieldRows(sampling)
    for index, line in enumerate(lines):
        draft = Draft(index, line)
        item: Prompt | Row
        try:
            document = json_object(decoded(line))
            read = requests if only_requests or is_request(document) else rows
            item = read(draft, document)
        except RowError as error:
            item = draft.error_row(f"{name} line {index + 1}: {error}")
        yield item


def json_object(line: str) -> dict[str, Any]:
    """Read one line.

    Raises:
        RowError: saying what is wrong with it.
    """
    if not line.strip():
        raise RowError("The line is empty.")
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"Not JSON: {error.msg} at character {error.pos + 1}.") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise RowError(f"Not JSON that can be read: {error}.") from error
    if not isinstance(document, dict):
        raise RowError('Not a JSON object: write {"prompt": "..."}.')
    return document
