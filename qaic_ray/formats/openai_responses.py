"""A run's rows as lines of the OpenAI batch format's output and error files. Knows no run folder.

A row of a conversation is a `chat.completion`, any other a `text_completion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

REPLACEMENT = "\ufffd"


def token_number(token_id: int) -> str:
    """A token's name where its text is not known."""
    return f"token_id:{token_id}"


@dataclass(frozen=True)
class Origin:
    """What a response says of the run it comes from.

    Attributes:
        run: its name; ids are made of it and a row's index, so they are the same every time.
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

    Args:
        row: as `Row.to_json` gives it.
        origin: its run.
    """
    name = f"{origin.run}-{row['index']}"
    failed = "error" in row
    return {
        "id": f"batch_req_{name}",
        "custom_id": f"row-{row['index']}" if row["id"] is None else row["id"],
        "response": None if failed else _response(row, name, origin),
        "error": {"code": _error_code(row), "message": row["error"]} if failed else None,
    }


def _error_code(row: dict[str, Any]) -> str:
    return "request_failed" if row["error_class"] == "device" else "invalid_request"


def _response(row: dict[str, Any], name: str, origin: Origin) -> dict[str, Any]:
    is_chat = "messages" in row
    choice = _chat_choice if is_chat else _text_choice
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": origin.created,
        "model": origin.model,
        "choices": [
            {"index": index, **choice(answer, origin.token_text)}
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
    logprobs = answer.get("logprobs")
    return {
        "message": {"role": "assistant", "content": answer["text"], "refusal": None},
        "logprobs": None if logprobs is None else _chat_logprobs(logprobs, token_text),
        "finish_reason": answer["finish_reason"],
    }


def _text_choice(answer: dict[str, Any], token_text: Callable[[int], str]) -> dict[str, Any]:
    logprobs = answer.get("logprobs")
    return {
        "text": answer["text"],
        "logprobs": None if logprobs is None else _text_logprobs(logprobs, token_text),
        "finish_reason": answer["finish_reason"],
    }


def _chat_logprobs(
    logprobs: list[dict[str, Any]], token_text: Callable[[int], str]
) -> dict[str, Any]:
    def entry(token: dict[str, Any]) -> dict[str, Any]:
        text = token_text(token["token_id"])
        # Half a character has bytes, but its text does not tell which.
        utf8 = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": token["logprob"], "bytes": utf8}

    content = [
        {**entry(token), "top_logprobs": [entry(other) for other in token["top"]]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(
    logprobs: list[dict[str, Any]], token_text: Callable[[int], str]
) -> dict[str, Any]:
    texts = [token_text(token["token_id"]) for token in logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in logprobs],
        "top_logprobs": [_by_text(token["top"], token_text) for token in logprobs],
        "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
    }


def _by_text(tokens: list[dict[str, Any]], token_text: Callable[[int], str]) -> dict[str, float]:
    """Text to logprob; of several that read alike, the most likely one's."""
    logprobs: dict[str, float] = {}
    for token in tokens:
        logprobs.setdefault(token_text(token["token_id"]), token["logprob"])
    return logprobs
