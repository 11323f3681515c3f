"""Requests of the OpenAI batch format, as prompts. Knows no files.

A request is `{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`:

- `url` is `/v1/completions`, with a text as the body's `prompt`, or `/v1/chat/completions`, with
  its `messages`.
- `custom_id` becomes the row's id. It is a text, and no two lines have the same.
- `model` is whatever the file's author called it: the run's model answers, and the response names
  that one. But one run has one model, so all lines must name the same.
- The body's sampling fields are `SamplingParams`', and what it leaves open is the run's, as in all
  formats. In a conversation `logprobs` is true or false and `top_logprobs` how many.
- What changes no answer (`user`, `metadata`, ...) is not looked at. All else that asks for
  something (`tools`, `logit_bias`, `stream`, ...) is an error.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from typing import Any

from qaic_ray.errors import RowError
from qaic_ray.fleet.prompt_fields import (
    Document,
    Draft,
    OwnSampling,
    check_unicode,
    json_type,
    mistake,
    sampling_fields,
)
from qaic_ray.rows import Prompt
from qaic_ray.sampling_params import FIELDS, SamplingParams

COMPLETIONS_URL = "/v1/completions"
CHAT_URL = "/v1/chat/completions"

_PROMPT_FIELD = {COMPLETIONS_URL: "prompt", CHAT_URL: "messages"}

_READ = frozenset([*FIELDS, "model", "prompt", "messages"])

_WITHOUT_EFFECT = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "stream_options", "user",
})  # fmt: skip

_AS_IF_ABSENT: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
}
"""Values that ask for nothing."""


def is_request(document: Document) -> bool:
    """Whether a line of JSON means to be a request, and not a row with a prompt."""
    if "prompt" in document or "messages" in document:
        return False
    return "custom_id" in document or "body" in document


class BatchRequests:
    """Reads the requests of one file.

    Args:
        sampling: the run's.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self._sampling = OwnSampling(sampling)
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
        for key, value in body.items():
            if key not in _READ and not (is_chat and key == "top_logprobs"):
                _check_key(key, value)
        fields = _chat_fields(body) if is_chat else sampling_fields(body)
        return draft.prompt(self._sampling(fields))

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


def _chat_fields(body: Document) -> dict[str, Any]:
    fields = sampling_fields(body)
    wanted = fields.pop("logprobs", False)
    if not isinstance(wanted, bool):
        raise RowError(f'"logprobs" is {json_type(wanted)}, not true or false.')
    num_top = body.get("top_logprobs")
    if wanted:
        fields["logprobs"] = 0 if num_top is None else num_top
    elif num_top is not None:
        raise RowError('"top_logprobs" needs "logprobs": true.')
    return fields


def _check_key(key: str, value: object) -> None:
    """Refuse what asks for something that is not done."""
    if value is None or key in _WITHOUT_EFFECT or value in _AS_IF_ABSENT.get(key, ()):
        return
    if key == "stream":
        raise RowError('"stream" is not offered: a batch is answered in one piece.')
    raise RowError(
        mistake(key) or f'"{key}" is not offered, and the answer would be another: leave it out.'
    )


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
