"""JSON objects as prompts: one a line, or the items of one array.

An object has:

- `prompt`, a text, or `messages`, a conversation as the OpenAI interface has it: objects with
  `role` and `content`, both strings; content may be a list of parts of type `text`, which are
  joined. A conversation goes through the model's chat template.
- `id`, a string or a whole number, if wanted.
- Sampling fields (`SamplingParams`: `temperature`, `max_tokens`, `seed`, `stop`, ...), in place of
  the run's; null leaves the run's value.
- Fields of the chat template, and of other programs; see `row_fields.py`.
- Keys of the user's own.

Or it is a request of the OpenAI batch format; see `openai_batch.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from qaic_ray.errors import RowError
from qaic_ray.formats.lines import LIMITS, PromptInput
from qaic_ray.formats.openai_batch import BatchRequests, is_request
from qaic_ray.formats.prompt_fields import Draft
from qaic_ray.formats.row_fields import OwnFields
from qaic_ray.rows import Prompt, Row

_STRUCTURE = re.compile(rb'["\\{}\[\],]')
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPENING, _CLOSING = b"{[", b"}]"


def prompts_from_json(
    name: str,
    documents: Iterable[bytes],
    own: OwnFields,
    *,
    only_requests: bool = False,
    max_bytes: int = LIMITS.num_bytes,
) -> Iterator[Prompt | Row]:
    """An item for each document.

    Args:
        name: of the input and of what a document is in it, for its error rows: `p.jsonl line`.
        documents: JSON objects, as text.
        own: the fields that the run says.
        only_requests: all are requests of the OpenAI batch format; otherwise those are that have a
            `custom_id` or a `body`, and neither `prompt` nor `messages`.
        max_bytes: the longest document.
    """
    requests = BatchRequests(own)

    def prompt(draft: Draft, _: None) -> Prompt:
        document = json_object(draft.decoded())
        read = requests.read if only_requests or is_request(document) else own.read_row
        return read(draft, document)

    for index, text in enumerate(documents):
        yield Draft(index, text, max_bytes).read(prompt, None, f"{name} {index + 1}: ")


def json_object(text: str) -> dict[str, Any]:
    """Parse one document.

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


class _ArrayScanner:
    """Where in a JSON array the reading is, from one chunk of text to the next."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_text = False
        self._skipped_at = -1

    def cuts(self, chunk: bytes) -> Iterator[int]:
        """Where in the chunk the array begins, its items end, and it ends itself."""
        for match in _STRUCTURE.finditer(chunk):
            at, byte = match.start(), match.group()[0]
            if at == self._skipped_at:
                continue
            if self._in_text:
                if byte == _BACKSLASH:
                    self._skipped_at = at + 1
                self._in_text = byte != _QUOTE
            elif byte == _QUOTE:
                self._in_text = True
            elif byte in _OPENING:
                self.depth += 1
                if self.depth == 1:
                    yield at
            elif byte in _CLOSING:
                self.depth -= 1
                if self.depth == 0:
                    yield at
            elif byte == _COMMA and self.depth == 1:
                yield at
        self._skipped_at -= len(chunk)


def array_items(source: PromptInput) -> Iterator[bytes]:
    """The items of the JSON array that an input holds, each as text as soon as it has come.

    Only brackets and quotes are looked at, so an item that is not JSON spoils no other one, as long
    as its brackets close. Of an item over the limit only the beginning is given, one byte more than
    the limit.

    Raises:
        QaicRayError: while reading, also where the array does not end, or something follows it.
    """
    scanner, num_items, has_ended = _ArrayScanner(), 0, False
    most = source.limits.num_bytes + 1
    item, item_bytes = bytearray(), 0
    for chunk in source.chunks():
        start = 0
        for at in () if has_ended else scanner.cuts(chunk):
            item += chunk[start:at][: most - len(item)]
            text = bytes(item).strip()
            item, item_bytes, start = bytearray(), 0, at + 1
            has_ended = scanner.depth == 0
            if (text or not has_ended) and chunk[at : at + 1] != b"[":
                yield text
                num_items += 1
                source.last = f"item {num_items}"
            if has_ended:
                break
        rest = chunk[start:]
        if has_ended and rest.strip():
            raise source.broken("something stands behind the JSON array")
        item += rest[: most - len(item)]
        item_bytes += len(rest)
        if item_bytes > source.limits.skipped_bytes:
            raise source.broken(source.limits.endless)
    if not has_ended:
        raise source.broken("the JSON array does not end")
