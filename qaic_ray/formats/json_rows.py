"""JSON objects as prompts, one a line or the items of one array; and the OpenAI batch format.

An object has `prompt`, a text, or `messages`, a conversation as the OpenAI interface has it:
objects with `role` and `content`, both strings; content may be a list of parts of type `text`,
which are joined. It may have an `id`, sampling fields in place of the run's, fields of the chat
template and of other programs (`row_fields.py`), and keys of the user's own. Or it is a request;
see `BatchRequests`.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from qaic_ray.errors import RowError
from qaic_ray.formats import lines
from qaic_ray.formats.lines import PromptInput
from qaic_ray.formats.row_fields import Document, as_type, check_unicode, json_type
from qaic_ray.formats.row_range import ALL_ROWS, RowRange
from qaic_ray.formats.row_reader import Draft, OwnFields
from qaic_ray.rows import Prompt, Row

COMPLETIONS_URL = "/v1/completions"
CHAT_URL = "/v1/chat/completions"
REPLACEMENT = "\ufffd"

_PROMPT_FIELD = {COMPLETIONS_URL: "prompt", CHAT_URL: "messages"}
_STRUCTURE = re.compile(rb'["\\{}\[\],]')
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPENING, _CLOSING = b"{[", b"}]"


def prompts_from_json(
    name: str,
    documents: Iterable[bytes],
    own: OwnFields,
    *,
    only_requests: bool = False,
    rows: RowRange = ALL_ROWS,
) -> Iterator[Prompt | Row]:
    """An item for each document that is read.

    Args:
        name: of the input and of what a document is in it, for its error rows: `p.jsonl line`.
        documents: JSON objects, as text.
        own: the fields that the run says.
        only_requests: all are requests of the OpenAI batch format; otherwise those are that have a
            `custom_id` or a `body`, and neither `prompt` nor `messages`.
        rows: which documents are read.
    """
    requests = BatchRequests(own)

    def prompt(draft: Draft, _: None) -> Prompt:
        document = json_object(draft.decoded())
        read = requests.read if only_requests or is_request(document) else own.read_row
        return read(draft, document)

    for index, text in rows.of(documents):
        yield Draft(index, text).read(prompt, None, f"{name} {index + 1}: ")


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
    most = lines.MAX_LINE_BYTES + 1
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
        if item_bytes > lines.MAX_SKIPPED_BYTES:
            raise source.broken()
    if not has_ended:
        raise source.broken("the JSON array does not end")


# -- the OpenAI batch format


def is_request(document: Document) -> bool:
    """Whether a JSON object is a request, and not a row with a prompt."""
    if "prompt" in document or "messages" in document:
        return False
    return "custom_id" in document or "body" in document


class BatchRequests:
    """Reads the requests of one file: `{"custom_id", "method": "POST", "url", "body": {...}}`.

    - `url` is `/v1/completions`, with a text as the body's `prompt`, or `/v1/chat/completions`,
      with its `messages`.
    - `custom_id` becomes the row's id. It is a text, and no two lines have the same.
    - `model` may be any name, the same in all lines. The run's model answers, and the response
      names that one.
    - The body's other fields are those of all formats, and the run's hold for the rest. In a
      conversation `logprobs` is true or false and `top_logprobs` how many. A field that is not
      known is an error.
    """

    def __init__(self, own: OwnFields) -> None:
        self._own = own
        self._ids = _DistinctIds()
        self._model: str | None = None

    def read(self, draft: Draft, document: Document) -> Prompt:
        """The prompt of a request.

        Raises:
            RowError: saying what is wrong with it.
        """
        if "custom_id" not in document:
            raise RowError('There is no "custom_id" in it.')
        id_ = as_type(str, '"custom_id"', document["custom_id"])
        if not id_:
            raise RowError('"custom_id" is empty.')
        check_unicode("custom_id", id_)
        draft.id = id_
        if not self._ids.add(id_):
            raise RowError(
                f'"custom_id" is {_shown(id_)}, and so is that of an earlier line: give each '
                "its own."
            )
        if (method := document.get("method")) != "POST":
            raise RowError(f'"method" is {_shown(method)}; allowed is "POST".')
        url = document.get("url")
        if not isinstance(url, str) or url not in _PROMPT_FIELD:
            raise RowError(
                f'"url" is {_shown(url)}; allowed are "{COMPLETIONS_URL}" and "{CHAT_URL}".'
            )
        body = as_type(dict, '"body"', document.get("body"))
        field = _PROMPT_FIELD[url]
        if body.get(field) is None:
            raise RowError(f'There is no "{field}" in the body, which {url} needs.')
        draft.read_prompt(body)
        self._check_model(body.get("model"))
        if url == CHAT_URL and body.get("logprobs") is not None:
            as_type(bool, '"logprobs"', body["logprobs"])
        return self._own.prompt(draft, body, only_ours=True)

    def _check_model(self, model: object) -> None:
        if model is None:
            return
        if self._model is None:
            self._model = as_type(str, '"model"', model)
        elif as_type(str, '"model"', model) != self._model:
            raise RowError(
                f'"model" is {_shown(model)}, and that of the lines before is '
                f"{_shown(self._model)}: one run has one model, so make a file for each."
            )


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 80 else f'"{value[:80]}..."'
    return json_type(value)


class _DistinctIds:
    """The ids so far, at nine bytes each, for inputs of ten million rows.

    An id is known by 64 bits of its digest: two of ten million share them with a chance of three in
    a million.
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


def token_number(token_id: int) -> str:
    """What stands for a token whose text is not known."""
    return f"token_id:{token_id}"


@dataclass(frozen=True)
class Origin:
    """The run that a response comes from.

    Attributes:
        run: its name; with a row's index it makes the ids, so they are the same every time.
        model: the model that answered.
        created: when, in seconds since 1970.
        token_text: a token's text, for logprobs.
    """

    run: str
    model: str
    created: int
    token_text: Callable[[int], str] = token_number


def response_line(row: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """A line of the output file, or of the error file for a row that failed.

    A row of a conversation is a `chat.completion`, any other a `text_completion`.

    Args:
        row: as `Row.to_json` gives it.
        origin: its run.
    """
    name = f"{origin.run}-{row['index']}"
    line = {
        "id": f"batch_req_{name}",
        "custom_id": f"row-{row['index']}" if row["id"] is None else row["id"],
    }
    if "error" not in row:
        return {**line, "response": _response(row, name, origin), "error": None}
    code = "request_failed" if row["error_class"] == "device" else "invalid_request"
    return {**line, "response": None, "error": {"code": code, "message": row["error"]}}


def _response(row: dict[str, Any], name: str, origin: Origin) -> dict[str, Any]:
    kind, choice = ("cmpl", _text_choice) if "messages" not in row else ("chatcmpl", _chat_choice)
    body = {
        "id": f"{kind}-{name}",
        "object": "text_completion" if kind == "cmpl" else "chat.completion",
        "created": origin.created,
        "model": origin.model,
        "choices": [
            {
                "index": index,
                **choice(answer, origin.token_text),
                "finish_reason": answer["finish_reason"],
            }
            for index, answer in enumerate(row.get("choices") or [row])
        ],
        "usage": {
            "prompt_tokens": row["prompt_tokens"],
            "completion_tokens": row["generated_tokens"],
            "total_tokens": row["prompt_tokens"] + row["generated_tokens"],
        },
    }
    return {"status_code": 200, "request_id": f"req_{name}", "body": body}


def _chat_choice(answer: dict[str, Any], token_text: Callable[[int], str]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer["text"], "refusal": None}

    def entry(token: dict[str, Any]) -> dict[str, Any]:
        text = token_text(token["token_id"])
        # Half a character has bytes, but its text does not tell which.
        utf8 = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": token["logprob"], "bytes": utf8}

    if (logprobs := answer.get("logprobs")) is not None:
        content = [
            {**entry(token), "top_logprobs": list(map(entry, token["top"]))} for token in logprobs
        ]
        logprobs = {"content": content, "refusal": None}
    return {"message": message, "logprobs": logprobs}


def _text_choice(answer: dict[str, Any], token_text: Callable[[int], str]) -> dict[str, Any]:
    if (logprobs := answer.get("logprobs")) is not None:
        texts = [token_text(token["token_id"]) for token in logprobs]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [token["logprob"] for token in logprobs],
            "top_logprobs": [_by_text(token["top"], token_text) for token in logprobs],
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }
    return {"text": answer["text"], "logprobs": logprobs}


def _by_text(tokens: list[dict[str, Any]], token_text: Callable[[int], str]) -> dict[str, float]:
    """Text to logprob; of several that read alike, the most likely one's."""
    logprobs: dict[str, float] = {}
    for token in tokens:
        logprobs.setdefault(token_text(token["token_id"]), token["logprob"])
    return logprobs
