"""A request's body, checked and turned into prompts for the fleet. No sockets, no waiting.

A field that changes the answer and is not offered is refused by its name, one that changes nothing
passes, and one that nobody knows is refused unless the server lets it pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qaic_ray.formats import row_fields
from qaic_ray.formats.row_fields import check_unicode
from qaic_ray.rows import ChatOptions, Prompt
from qaic_ray.serve.api_errors import bad_request
from qaic_ray.serve.protocol.asked import CHAT, COMPLETIONS, RESPONSES, Asked
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.conversations import Conversation, read_conversation
from qaic_ray.serve.protocol.fields import (
    body_of,
    check_ids,
    check_others,
    checked_params,
    prompt_of,
    refusing,
    sampling_fields,
    stream_fields,
)
from qaic_ray.serve.protocol.models import ChatBody, CompletionBody, ResponseBody

COMPLETION_TOKENS = 16
"""Most tokens of a completion that does not say how many: the interface's own default."""
MAX_PROMPTS = 2048
"""Prompts of one request."""


def read_request(endpoint: str, body: Mapping[str, Any], context: ModelContext) -> Asked:
    """The request of a body.

    Args:
        endpoint: one of `ENDPOINTS`.
        body: a JSON object.
        context: what it is read with.

    Raises:
        ApiError: it is refused.
    """
    return _READERS[endpoint](body, context)


# -- completions


def _completion(document: Mapping[str, Any], context: ModelContext) -> Asked:
    body = body_of(CompletionBody, document)
    context.check_model(body.model)
    check_others(body, context)
    if body.suffix:
        raise bad_request("suffix is not offered: an answer only follows its prompt.", "suffix")
    if body.best_of not in (None, 1, body.n):
        raise bad_request("best_of is not offered: n says how many answers there are.", "best_of")
    fields = sampling_fields(body)
    fields.setdefault("max_tokens", COMPLETION_TOKENS)
    drops_answer = fields["max_tokens"] == 0
    if drops_answer:
        if not body.echo:
            raise bad_request("max_tokens is 0: that is for echo alone, to score a prompt.")
        fields["max_tokens"] = 1
    if body.logprobs is not None:
        fields["logprobs"] = body.logprobs
        if body.echo:
            fields.setdefault("prompt_logprobs", body.logprobs)
    params = checked_params(context, fields)
    texts, ids = _prompts(body, context)
    return Asked(
        COMPLETIONS,
        tuple(
            prompt_of(number, one, params, context=context, body=body)
            for number, one in enumerate(ids)
        ),
        context.names[0] if body.model is None else body.model,
        texts=tuple(texts),
        echo=bool(body.echo),
        num_logprobs=body.logprobs,
        drops_answer=drops_answer,
        body=document,
        **stream_fields(body),
    )


def _prompts(body: CompletionBody, context: ModelContext) -> tuple[list[str], list[Sequence[int]]]:
    """The texts of the prompts, those that are needed, and their token ids."""
    given = body.prompt
    several: Sequence[Any] = given if isinstance(given, list) else [given]
    if several and isinstance(several[0], int):
        several = [several]
    if not several or len(several) > MAX_PROMPTS:
        raise bad_request(
            f"prompt holds {len(several)} prompts: 1 to {MAX_PROMPTS} are answered at once.",
            "prompt",
        )
    tokenizer = context.encoder.tokenizer
    texts: list[str] = []
    ids: list[Sequence[int]] = []
    for one in several:
        if isinstance(one, str):
            with refusing("prompt"):
                check_unicode("prompt", one)
                ids.append(tokenizer.encode(one, adds_special=body.add_special_tokens is not False))
            texts.append(one)
        else:
            ids.append(one)
            texts.append("")
    if body.echo:
        for prompt_ids in ids:
            check_ids(prompt_ids, context, "prompt")
        texts = [text or tokenizer.decode(one) for text, one in zip(texts, ids, strict=True)]
    return texts, ids


# -- chat


def _chat(document: Mapping[str, Any], context: ModelContext) -> Asked:
    body = body_of(ChatBody, document)
    context.check_model(body.model)
    check_others(body, context)
    if body.echo:
        raise bad_request("echo is for completions: a chat's answer is a message.", "echo")
    _refuse_template(body)
    fields = sampling_fields(body)
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = body.max_completion_tokens
    fields.setdefault("max_tokens", None)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    conversation = read_conversation(body, context)
    fields |= conversation.answer_fields
    params = checked_params(context, fields, "top_logprobs")
    ids = _rendered(conversation, _chat_options(body), context)
    prompt = prompt_of(0, ids, params, context=context, body=body)
    return Asked(
        CHAT,
        (prompt,),
        context.names[0] if body.model is None else body.model,
        num_logprobs=params.logprobs if body.logprobs else None,
        conversation=conversation,
        body=document,
        **stream_fields(body),
    )


def chat_ids(body: ChatBody, context: ModelContext) -> Sequence[int]:
    """The token ids of a request's conversation.

    Raises:
        ApiError: it cannot be rendered.
    """
    check_others(body, context)
    _refuse_template(body)
    conversation = read_conversation(body, context)
    return _rendered(conversation, _chat_options(body), context)


def _refuse_template(body: ChatBody) -> None:
    if body.chat_template is not None:
        raise bad_request(
            "chat_template is not offered: start the server with --chat-template.", "chat_template"
        )


def _chat_options(body: ChatBody) -> ChatOptions:
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt are both true: keep one.",
            "continue_final_message",
        )
    kwargs = dict(body.chat_template_kwargs or {})
    with refusing("chat_template_kwargs"):
        row_fields.chat_value("chat_template_kwargs", "chat_template_kwargs", kwargs)
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    begins = body.add_generation_prompt
    return ChatOptions(not goes_on if begins is None else begins, goes_on, kwargs)


def _rendered(
    conversation: Conversation, options: ChatOptions, context: ModelContext
) -> Sequence[int]:
    kwargs = {**options.template_kwargs, **conversation.template_kwargs}
    prompt = Prompt(
        0,
        "",
        messages=tuple(conversation.messages),
        chat=replace(options, template_kwargs=kwargs),
    )
    with refusing("messages"):
        return context.encoder.ids(prompt)


# -- responses


def _response(document: Mapping[str, Any], context: ModelContext) -> Asked:
    body = body_of(ResponseBody, document)
    context.check_model(body.model)
    check_others(body, context)
    if body.tools:
        raise bad_request("tools are for /v1/chat/completions.", "tools")
    if body.truncation == "auto":
        raise bad_request("truncation auto is not offered: shorten the input.", "truncation")
    messages = [{"role": "user", "content": body.input}]
    if isinstance(body.input, list):
        messages = [_input_message(number, one) for number, one in enumerate(body.input)]
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "response_format": _text_format(body.text or {}),
    }
    asked = _chat({name: value for name, value in chat.items() if value is not None}, context)
    return replace(asked, endpoint=RESPONSES, body=document)


def _input_message(number: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A message of the interface's `input`, as chat has it."""
    if given.get("type", "message") != "message":
        raise bad_request(f"input.{number} is no message, and only text is answered.", "input")
    content = given.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("input_text", "output_text", "text"):
                raise bad_request(f"input.{number} is no text, and only that is read.", "input")
            parts.append({"type": "text", "text": part.get("text")})
        content = parts
    return {"role": given.get("role"), "content": content}


def _text_format(text: Mapping[str, Any]) -> dict[str, Any] | None:
    form = text.get("format")
    if not isinstance(form, Mapping):
        return None
    if form.get("type") == "json_schema":
        inner = {name: value for name, value in form.items() if name != "type"}
        return {"type": "json_schema", "json_schema": inner}
    return dict(form)


_READERS: dict[str, Callable[[Mapping[str, Any], ModelContext], Asked]] = {
    COMPLETIONS: _completion,
    CHAT: _chat,
    RESPONSES: _response,
}
