"""A request's body, checked and turned into prompts for the fleet. No sockets, no waiting.

A field that changes the answer and is not offered is refused by its name, one that changes nothing
passes, and one that nobody knows is refused unless the server lets it pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qaic_ray.errors import RowError, UsageError
from qaic_ray.files.documents import first_error, shown
from qaic_ray.formats import row_fields
from qaic_ray.formats.row_fields import check_unicode
from qaic_ray.rows import ChatOptions, Prompt
from qaic_ray.sampling_params import MAX_LOGPROBS, SamplingParams
from qaic_ray.serve.api_errors import ApiError, bad_request
from qaic_ray.serve.conversations import Conversation, read_conversation
from qaic_ray.serve.models import (
    SAMPLING,
    ChatBody,
    CompletionBody,
    ResponseBody,
    SamplingBody,
)
from qaic_ray.serve.structured import structured_fields
from qaic_ray.serve.token_texts import TokenTexts
from qaic_ray.worker.prompt_encoder import PromptEncoder

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
ENDPOINTS = (COMPLETIONS, CHAT, RESPONSES)
"""Those that a batch may name too."""

COMPLETION_TOKENS = 16
"""Most tokens of a completion that does not say how many: the interface's own default."""
MAX_PROMPTS = 2048
"""Prompts of one request."""

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class ModelContext:
    """What requests are read with.

    Attributes:
        names: of the model; the first is the one that answers show.
        encoder: renders and tokenizes.
        ctx_len: tokens of a context.
        vocab_size: token ids are below it.
        defaults: sampling parameters of a request that says nothing.
        allow_unknown: whether fields that nobody knows pass.
        created: Unix time in seconds at which the server began.
    """

    names: tuple[str, ...]
    encoder: PromptEncoder
    ctx_len: int
    vocab_size: int
    defaults: SamplingParams
    tool_form: str | None = None
    allow_unknown: bool = False
    created: int = 0
    texts: TokenTexts = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", TokenTexts(self.encoder.tokenizer))

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"The model {shown(name)} is not served here: it is {', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
        endpoint: the route.
        prompts: in order; each has its token ids, and asks for `n` samples by its sampling.
        model: the name that the answer shows.
        texts: of the prompts, for `echo`; empty where nobody asked.
        stream: whether the answer is told while it comes.
        include_usage: whether a stream ends with what was used.
        continuous_usage: whether each of its chunks has it too.
        echo: whether completions begin with their prompts.
        num_logprobs: how many alternatives each token's log-probabilities list; None for none.
        drops_answer: whether the one token that was made is not wanted: only the prompt is scored.
        shows_ids: whether token ids are given back.
        ids_as_tokens: whether tokens are written `token_id:N`.
        conversation: what a chat's answer needs of its tools; None elsewhere.
        body: the request's own fields, for the parts of an answer that repeat them.
    """

    endpoint: str
    prompts: tuple[Prompt, ...]
    model: str
    texts: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    num_logprobs: int | None = None
    drops_answer: bool = False
    shows_ids: bool = False
    ids_as_tokens: bool = False
    conversation: Conversation | None = None
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples of each prompt."""
        sampling = self.prompts[0].sampling
        return 1 if sampling is None else sampling.n

    def in_background(self) -> Asked:
        """The same as work that nobody waits for."""
        return replace(self, prompts=tuple(replace(p, background=True) for p in self.prompts))


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


def body_of(kind: type[Body], document: Mapping[str, Any]) -> Body:
    """A body's fields, of the right types.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    try:
        return kind.model_validate(dict(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or None
        if first["type"] == "missing":
            raise bad_request(f"{name} is missing.", name) from error
        raise bad_request(f"{first_error(error)}.", str(first["loc"][0])) from error
    except RecursionError as error:
        raise bad_request("The body is nested too deep.") from error


def check_others(body: BaseModel, context: ModelContext) -> None:
    """Refuse the fields of a body that its model does not have, unless they change nothing."""
    for name, value in (body.model_extra or {}).items():
        if value is None or name in row_fields.NO_EFFECT:
            continue
        if name in row_fields.NOT_OFFERED:
            with refusing(name):
                row_fields.NOT_OFFERED[name].check(name, value, only_ours=True)
        elif not context.allow_unknown:
            known = [*type(body).model_fields, *row_fields.NO_EFFECT]
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out."
            raise bad_request(f"Unknown field {shown(name)}: {hint}", name, "unknown_field")


class refusing:  # noqa: N801 - used like a function
    """A context in which an error of a row's fields is one of the request."""

    def __init__(self, param: str | None = None) -> None:
        self._param = param

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RowError | UsageError):
            said = str(error)
            first = said.partition(" ")[0].strip('"')
            known = first in SamplingBody.model_fields or first in SAMPLING
            raise bad_request(said, self._param or (first if known else None)) from error


# -- completions


def _completion(document: Mapping[str, Any], context: ModelContext) -> Asked:
    body = body_of(CompletionBody, document)
    context.check_model(body.model)
    check_others(body, context)
    if body.suffix:
        raise bad_request("suffix is not offered: an answer only follows its prompt.", "suffix")
    if body.best_of not in (None, 1, body.n):
        raise bad_request("best_of is not offered: n says how many answers there are.", "best_of")
    fields = _sampling_fields(body)
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
    params = _params(context, fields)
    texts, ids = _prompts(body, context)
    return Asked(
        COMPLETIONS,
        tuple(_prompt(number, one, params, context, body) for number, one in enumerate(ids)),
        context.names[0] if body.model is None else body.model,
        texts=tuple(texts),
        echo=bool(body.echo),
        num_logprobs=body.logprobs,
        drops_answer=drops_answer,
        body=document,
        **_stream_fields(body),
    )


def _prompts(
    body: CompletionBody, context: ModelContext
) -> tuple[list[str], list[Sequence[int]]]:
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
    texts, ids = [], []
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
        _refuse_unknown_ids(ids, context)
        texts = [text or tokenizer.decode(one) for text, one in zip(texts, ids, strict=True)]
    return texts, ids


# -- chat


def _chat(document: Mapping[str, Any], context: ModelContext) -> Asked:
    body = body_of(ChatBody, document)
    context.check_model(body.model)
    check_others(body, context)
    if body.echo:
        raise bad_request("echo is for completions: a chat's answer is a message.", "echo")
    if body.chat_template is not None:
        raise bad_request(
            "chat_template is not offered: start the server with --chat-template.", "chat_template"
        )
    fields = _sampling_fields(body)
    if body.max_completion_tokens is not None:
        fields["max_tokens"] = body.max_completion_tokens
    fields.setdefault("max_tokens", None)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    conversation = read_conversation(body, context.tool_form)
    fields |= conversation.sampling_fields
    params = _params(context, fields)
    ids = _rendered(conversation, _chat_options(body, context), context)
    prompt = _prompt(0, ids, params, context, body)
    return Asked(
        CHAT,
        (prompt,),
        context.names[0] if body.model is None else body.model,
        num_logprobs=params.logprobs if body.logprobs else None,
        conversation=conversation,
        body=document,
        **_stream_fields(body),
    )


def _chat_options(body: ChatBody, context: ModelContext) -> ChatOptions:
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


# -- all


def _stream_fields(body: SamplingBody) -> dict[str, Any]:
    options = body.stream_options
    if options is not None and not body.stream:
        raise bad_request("stream_options is for stream: true.", "stream_options")
    return {
        "stream": bool(body.stream),
        "include_usage": options is not None and options.include_usage,
        "continuous_usage": options is not None and options.continuous_usage_stats,
        "shows_ids": bool(body.return_token_ids),
        "ids_as_tokens": bool(body.return_tokens_as_token_ids),
    }


def _sampling_fields(body: SamplingBody) -> dict[str, Any]:
    """The fields of `SamplingParams` that a body has, by our names."""
    given = {name: getattr(body, name) for name in sorted(SAMPLING & body.model_fields_set)}
    fields = {name: value for name, value in given.items() if value is not None}
    if body.response_format is not None:
        if body.structured_outputs is not None:
            raise bad_request(
                "response_format and structured_outputs both say the answer's form: give one.",
                "response_format",
            )
        fields |= structured_fields(body.response_format)
    return fields


def _params(context: ModelContext, fields: Mapping[str, Any]) -> SamplingParams:
    if (asked := fields.get("logprobs")) is not None and asked > MAX_LOGPROBS:
        name = "top_logprobs" if "max_tokens" not in fields else "logprobs"
        raise bad_request(f"{name} is {asked}: it is at most {MAX_LOGPROBS}.", name)
    with refusing():
        return context.defaults.updated(fields)


def _prompt(
    number: int,
    ids: Sequence[int],
    params: SamplingParams,
    context: ModelContext,
    body: SamplingBody,
) -> Prompt:
    """A prompt of token ids that fits the context with its answer.

    Its text is not given along: nobody behind the server reads it.
    """
    keep = body.truncate_prompt_tokens
    if keep is not None:
        if keep < -1 or keep == 0:
            raise bad_request(
                "truncate_prompt_tokens is a number of tokens, or -1 for a whole context.",
                "truncate_prompt_tokens",
            )
        ids = ids[-(context.ctx_len if keep == -1 else keep) :]
    _refuse_unknown_ids([ids], context)
    room = context.ctx_len - len(ids) + 1  # the last token of an answer is never fed back
    wanted = params.max_tokens if body.model_fields_set & _LENGTHS else None
    if room < 1 or (wanted is not None and wanted > room):
        beside = f" and {wanted} of the answer" if wanted is not None else ""
        raise bad_request(
            f"This model's context has {context.ctx_len} tokens, and {len(ids)} of the prompt"
            f"{beside} were asked for: shorten one of them.",
            "messages" if isinstance(body, ChatBody) else "prompt",
            "context_length_exceeded",
        )
    return Prompt(number, "", sampling=params, stream=bool(body.stream), token_ids=tuple(ids))


_LENGTHS = {"max_tokens", "max_completion_tokens"}


def _refuse_unknown_ids(prompts: Sequence[Sequence[int]], context: ModelContext) -> None:
    for ids in prompts:
        if not ids:
            raise bad_request("The prompt is empty: it has no token to start from.", "prompt")
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= context.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise bad_request(
                f"prompt holds the token id {wrong}: the model has 0 to {context.vocab_size - 1}.",
                "prompt",
            )
