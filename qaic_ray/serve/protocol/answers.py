"""Rows as the bodies of answers. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qaic_ray.rows import FinishReason, Row, Sample
from qaic_ray.sampling_params import TokenLogprob
from qaic_ray.serve import api_errors
from qaic_ray.serve.protocol.asked import CHAT, COMPLETIONS, RESPONSES, Asked
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.logprobs import LogprobWriter

OBJECTS = {COMPLETIONS: "text_completion", CHAT: "chat.completion", RESPONSES: "response"}
PREFIXES = {COMPLETIONS: "cmpl-", CHAT: "chatcmpl-", RESPONSES: "resp_"}


def answer_body(
    asked: Asked, rows: Sequence[Row], context: ModelContext, *, request_id: str, created: int
) -> dict[str, Any]:
    """The body of an answer.

    Args:
        asked: the request.
        rows: of its prompts, in their order.
        context: that the request was read with.
        request_id: its name; the answer's id is made of it.
        created: Unix time in seconds.

    Raises:
        ApiError: a row has no answer.
    """
    for row in rows:
        if not row.ok:
            raise api_errors.of_row(row)
    answer_id = PREFIXES[asked.endpoint] + request_id
    if asked.endpoint == RESPONSES:
        return response_body(asked, rows, answer_id=answer_id, created=created)
    choices: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        for sample in samples_of(row):
            index = len(choices)
            if asked.endpoint == CHAT:
                seed = asked.call_seed(answer_id, index)
                choices.append(_chat_choice(asked, sample, context, index=index, seed=seed))
            else:
                choices.append(_completion_choice(asked, context, number, row=row, sample=sample))
                choices[-1]["index"] = index
    return {
        "id": answer_id,
        "object": OBJECTS[asked.endpoint],
        "created": created,
        "model": asked.model,
        "choices": choices,
        "usage": usage(rows, drops_answer=asked.drops_answer),
    }


def samples_of(row: Row) -> Sequence[Sample | Row]:
    """The answers of a row."""
    return row.choices or (row,)


def usage(rows: Sequence[Row], *, drops_answer: bool = False) -> dict[str, Any]:
    """What rows took, in tokens; a prompt with several samples counts once."""
    completion = 0 if drops_answer else sum(row.generated_tokens for row in rows)
    return usage_of(
        sum(row.prompt_tokens for row in rows),
        completion,
        sum(row.reused_tokens for row in rows),
    )


def usage_of(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """The interface's object of these numbers of tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_word(sample: Sample | Row) -> str:
    """Why an answer ended, in the interface's words."""
    return "length" if sample.finish_reason is FinishReason.LENGTH else "stop"


def _completion_choice(
    asked: Asked, context: ModelContext, number: int, *, row: Row, sample: Sample | Row
) -> dict[str, Any]:
    text, logprobs = sample.text, sample.logprobs or ()
    token_ids: Sequence[int] = sample.token_ids
    if asked.drops_answer:
        text, logprobs, token_ids = "", (), ()
    prefix = asked.texts[number] if asked.echo else ""
    choice: dict[str, Any] = {
        "index": 0,
        "text": prefix + text,
        "logprobs": None,
        "finish_reason": "length" if asked.drops_answer else finish_word(sample),
        "stop_reason": sample.stop_reason,
    }
    if asked.num_logprobs is not None:
        writer = LogprobWriter(context.texts, asked.num_logprobs, as_ids=asked.ids_as_tokens)
        entries: list[TokenLogprob | None] = [*logprobs]
        if asked.echo:
            entries = [*(row.prompt_logprobs or ()), *entries]
            if entries and entries[0] is None:
                first = (asked.prompts[number].token_ids or (0,))[0]
                writer.unscored(first)
                entries = entries[1:]
        for entry in entries:
            if entry is not None:
                writer.add(entry)
        choice["logprobs"] = writer.legacy()
    if row.prompt_logprobs is not None and not asked.echo:
        choice["prompt_logprobs"] = prompt_logprobs(row, context)
    if asked.shows_ids:
        choice["token_ids"] = list(token_ids)
        choice["prompt_token_ids"] = list(asked.prompts[number].token_ids or ())
    return choice


def _chat_choice(
    asked: Asked, sample: Sample | Row, context: ModelContext, *, index: int, seed: str
) -> dict[str, Any]:
    assert asked.conversation is not None
    message, finish = asked.conversation.message_of(sample.text, finish_word(sample), seed)
    logprobs = None
    if asked.num_logprobs is not None:
        writer = LogprobWriter(context.texts, asked.num_logprobs, as_ids=asked.ids_as_tokens)
        content = [writer.chat(entry) for entry in sample.logprobs or ()]
        logprobs = {"content": content, "refusal": None}
    choice = {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": sample.stop_reason,
    }
    if asked.shows_ids:
        choice["token_ids"] = list(sample.token_ids)
    return choice


def prompt_logprobs(row: Row, context: ModelContext) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt's tokens as vLLM gives them: by token id, ranked."""
    found: list[dict[str, Any] | None] = []
    for entry in row.prompt_logprobs or ():
        if entry is None:
            found.append(None)
            continue
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, start=1)}
        every = {entry.token_id: entry.logprob, **dict(entry.top)}
        found.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": ranks.get(token_id),
                    "decoded_token": context.texts.text(token_id),
                }
                for token_id, logprob in every.items()
            }
        )
    return found


# -- responses


def response_body(
    asked: Asked,
    rows: Sequence[Row],
    *,
    answer_id: str,
    created: int,
    status: str | None = None,
) -> dict[str, Any]:
    """The object of a response; without rows it is in progress."""
    sample = next(iter(_first_samples(rows)), None)
    if status is None:
        is_cut = sample is not None and sample.finish_reason is FinishReason.LENGTH
        status = "incomplete" if is_cut else "completed"
    body = asked.body
    output = [] if sample is None else [output_item(answer_id, sample.text, status)]
    total = usage(rows)
    return {
        "id": answer_id,
        "object": "response",
        "created_at": created,
        "status": status,
        "model": asked.model,
        "output": output,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "temperature": body.get("temperature"),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "usage": None
        if sample is None
        else {
            "input_tokens": total["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": total["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": total["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": total["total_tokens"],
        },
    }


def _first_samples(rows: Sequence[Row]) -> Iterator[Sample | Row]:
    for row in rows:
        yield from samples_of(row)


def output_item(answer_id: str, text: str, status: str) -> dict[str, Any]:
    """The message of a response."""
    return {
        "id": message_id(answer_id),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [text_part(text)],
    }


def message_id(answer_id: str) -> str:
    """The id of a response's one message."""
    return f"msg_{answer_id.partition('_')[2]}"


def text_part(text: str) -> dict[str, Any]:
    """A part of a response's message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
