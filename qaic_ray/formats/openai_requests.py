"""Requests of the OpenAI batch format, as prompts. Knows no files.

A request is `{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`:

- `url` is `/v1/completions`, with a text as the body's `prompt`, or `/v1/chat/completions`, with
  its `messages`.
- `custom_id` becomes the row's id. It is a text, and no two lines have the same.
- `model` is whatever the file's author called it: the run's model answers, and the response names
  that one. But one run has one model, so all lines must name the same.
- The body's other fields are those of all formats, and what it leaves open is the run's. In a
  conversation `logprobs` is true or false and `top_logprobs` how many.
- No key of a body is the file's author's own: one that is not known is an error.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left

from qaic_ray.errors import RowError
from qaic_ray.formats.prompt_fields import Document, Draft, check_unicode, json_type
from qaic_ray.formats.row_fields import OwnFields, read_fields
from qaic_ray.rows import Prompt

COMPLETIONS_URL = "/v1/completions"
CHAT_URL = "/v1/chat/completions"

_PROMPT_FIELD = {COMPLETIONS_URL: "prompt", CHAT_URL: "messages"}


def is_request(document: Document) -> bool:
    """Whether a line of JSON means to be a request, and not a row with a prompt."""
    if "prompt" in document or "messages" in document:
        return False
    return "custom_id" in document or "body" in document


class BatchRequests:
    """Reads the requests of one file.

    Args:
        own: the fields that the run says.
    """

    def __init__(self, own: OwnFields) -> None:
        self._own = own
        self._ids = _DistinctIds()
        self._model: str | None = None

    def __call__(self, draft: Draft, document: Document) -> Prompt:
        """The prompt of a request.

        Raises:
            RowError: saying what is wrong with it.
        """
        draft.id = _custom_id(document)
        if not self._ids.add(draft.id):
            raise RowError(
                f'"custom_id" is {_shown(draft.id)}, and so is that of an earlier line: give each '
                "its own."
            )
        if (method := document.get("method")) != "POST":
            raise RowError(f'"method" is {_shown(method)}; allowed is "POST".')
        url = document.get("url")
        if not isinstance(url, str) or url not in _PROMPT_FIELD:
            raise RowError(
                f'"url" is {_shown(url)}; allowed are "{COMPLETIONS_URL}" and "{CHAT_URL}".'
            )
        body = document.get("body")
        if not isinstance(body, dict):
            raise RowError(f'"body" is {json_type(body)}, not an object.')
        field = _PROMPT_FIELD[url]
        if body.get(field) is None:
            raise RowError(f'There is no "{field}" in the body, which {url} needs.')
        draft.read_prompt(body)
        self._check_model(body.get("model"))
        is_chat = url == CHAT_URL
        if is_chat and not isinstance(body.get("logprobs", False), bool | None):
            raise RowError(f'"logprobs" is {json_type(body["logprobs"])}, not true or false.')
        asked = read_fields(body, is_chat=is_chat, only_ours=True)
        return draft.prompt(self._own.sampling(asked), self._own.chat(asked))

    def _check_model(self, model: object) -> None:
        if model is None:
            return
        if not isinstance(model, str):
            raise RowError(f'"model" is {json_type(model)}, not a string.')
        if self._model is None:
            self._model = model
        elif model != self._model:
            raise RowError(
                f'"model" is {_shown(model)}, and that of the lines before is '
                f"{_shown(self._model)}: one run has one model, so make a file for each."
            )


def _custom_id(document: Document) -> str:
    if "custom_id" not in document:
        raise RowError('There is no "custom_id" in it.')
    id_ = document["custom_id"]
    if not isinstance(id_, str):
        raise RowError(f'"custom_id" is {json_type(id_)}, not a string.')
    if not id_:
        raise RowError('"custom_id" is empty.')
    check_unicode("custom_id", id_)
    return id_


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 80 else f'"{value[:80]}..."'
    return json_type(value)


class _DistinctIds:
    """Which ids there were: nine bytes for each, so that ten million are no matter.

    An id is known by 64 bits of its digest; that two of ten million have the same has a chance of
    three in a million.
    """

    def __init__(self) -> None:
        self._buckets = [array("Q") for _ in range(4096)]  # each sorted

    def add(self, id_: str) -> bool:
        """Take an id; return whether it is new."""
        digest = int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest(), "little")
        bucket = self._buckets[digest % len(self._buckets)]
        at = bisect_left(bucket, digest)
        if at < len(bucket) and bucket[at] == digest:
            return False
        bucket.insert(at, digest)
        return True
