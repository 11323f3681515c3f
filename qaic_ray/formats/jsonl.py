"""JSON objects as prompts: rows with fields, and requests of the OpenAI batch format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from qaic_ray.errors import RowError
from qaic_ray.formats.openai_requests import BatchRequests, is_request
from qaic_ray.formats.prompt_fields import Document, Draft, decoded, row_id
from qaic_ray.formats.row_fields import OwnFields, read_fields
from qaic_ray.rows import Prompt, Row


class FieldRows:
    """Reads rows that have a `prompt` or `messages`, an `id` and fields of their own.

    Args:
        own: the fields that the run says.
    """

    def __init__(self, own: OwnFields) -> None:
        self._own = own

    def __call__(self, draft: Draft, document: Document) -> Prompt:
        """The prompt of a row.

        Raises:
            RowError: saying what is wrong with it.
        """
        draft.id = row_id(document)
        draft.read_prompt(document)
        asked = read_fields(document, is_chat=draft.messages is not None)
        return draft.prompt(self._own.sampling(asked), self._own.chat(asked))


def prompts_from_json(
    name: str, documents: Iterable[bytes], own: OwnFields, *, only_requests: bool = False
) -> Iterator[Prompt | Row]:
    """An item for each document.

    Args:
        name: of the input and of what a document is in it, for its error rows: `p.jsonl line`.
        documents: JSON objects, as text.
        own: the fields that the run says.
        only_requests: all are requests of the OpenAI batch format; otherwise those are that have a
            `custom_id` or a `body`, and neither `prompt` nor `messages`.
    """
    requests = BatchRequests(own)
    rows = FieldRows(own)

    def prompt(draft: Draft, text: bytes) -> Prompt:
        document = json_object(decoded(text))
        read = requests if only_requests or is_request(document) else rows
        return read(draft, document)

    for index, text in enumerate(documents):
        draft = Draft(index, text)
        yield draft.read(prompt, text, f"{name} {index + 1}: ")


def json_object(text: str) -> dict[str, Any]:
    """Read one document.

    Raises:
        RowError: saying what is wrong with it.
    """
    if not text.strip():
        raise RowError("The line is empty.")
    try:
        document = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowError(f"Not JSON: {error.msg} at character {error.pos + 1}.") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise RowError(f"Not JSON that can be read: {error}.") from error
    if not isinstance(document, dict):
        raise RowError('Not a JSON object: write {"prompt": "..."}.')
    return document


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise RowError(f'It has "{twice[:80]}" twice: keep one of them.')
    return document


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once)
