"""Bodies of requests, as pydantic models: their fields and types, which the OpenAPI page shows.

What a sampling field may be is decided where sampling parameters are (`sampling_params.py`).
Sources of names: the OpenAI interface, and vLLM's extensions of it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from qaic_ray.serve.body_model import BodyModel

Number = int | float

_TOOL = {"type": "function", "function": {"name": "weather"}}
_TURN = {"role": "user", "content": "Why is it so?"}
_NO_THINKING = {"enable_thinking": False}


def said(meaning: str, example: Any, *, default: Any = None, **bounds: Any) -> Any:
    """A field of a body with what people read of it.

    What the sampling fields mean is said where sampling parameters are.

    Args:
        meaning: a sentence.
        example: a value.
        default: `...` for a field that must be there.
        bounds: as pydantic takes them.
    """
    return Field(default, description=meaning, examples=[example], **bounds)


class StreamOptions(BodyModel):
    """What a stream tells besides its text."""

    include_usage: bool = said("End the stream with the counts of tokens.", True, default=False)
    continuous_usage_stats: bool = said("Give the counts with each chunk.", True, default=False)


class SamplingBody(BodyModel):
    """Fields that say how tokens are chosen, and where an answer ends."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str | None = said("One of /v1/models; may be left out.", "smollm2-135m")
    max_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = said(
        "text, json_object or json_schema.", {"type": "json_object"}
    )
    stream: bool | None = said("Send the answer while it comes, as server-sent events.", True)
    stream_options: StreamOptions | None = said("What a stream tells too.", {"include_usage": True})
    truncate_prompt_tokens: int | None = said(
        "Keep the prompt's last tokens; -1: a whole context.", 256
    )
    return_token_ids: bool | None = said("Give token ids beside the text.", True)
    return_tokens_as_token_ids: bool | None = said("Write tokens of logprobs as token_id:ID.", True)


SAMPLING = frozenset(
    {
        *("max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop"),
        *("stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
        *("allowed_token_ids", "bad_words", "prompt_logprobs", "structured_outputs"),
    }
)
"""Fields that are `SamplingParams`' own."""


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = said(
        "A text or token ids, or several.", "My name is", default=...
    )
    echo: bool | None = said("Give the prompt before the answer.", True)
    logprobs: int | None = said("Give logprobs of each token, and of so many likeliest ones.", 5)
    suffix: str | None = said("Not offered: an answer only follows its prompt.", "")
    best_of: int | None = said("Allowed where it is 1, or as much as n.", 1)
    add_special_tokens: bool | None = said("Begin as the tokenizer begins a text.", True)


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = said(
        "Turns: each has a role and a content.",
        [_TURN],
        default=...,
        min_length=1,
    )
    max_completion_tokens: int | None = said("Another name of max_tokens.", 64)
    logprobs: bool | None = said("Give logprobs of each token.", True)
    top_logprobs: int | None = said("With logprobs: those of so many likeliest tokens too.", 5)
    tools: list[dict[str, Any]] | None = said("Tools that the model may call.", [_TOOL])
    tool_choice: str | dict[str, Any] | None = said("auto, none, required, or a function.", "auto")
    parallel_tool_calls: bool | None = said("false: one call at most.", False)
    add_generation_prompt: bool | None = said("Let the assistant begin its answer.", False)
    continue_final_message: bool | None = said("Go on with the last message.", True)
    chat_template: str | None = said("Not offered: see --chat-template.", None)
    chat_template_kwargs: dict[str, Any] | None = said("Variables of the template.", _NO_THINKING)
    reasoning_effort: str | None = said("A variable for the chat template.", "low")
    echo: bool | None = said("Only false: there is no echo of a chat.", False)
    add_special_tokens: bool | None = said("Only false: the template has them.", False)


class ResponseBody(BodyModel):
    """POST /v1/responses, in its plain text form."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str | None = said("One of /v1/models; may be left out.", "smollm2-135m")
    input: str | list[dict[str, Any]] = said("A text, or turns.", "Why is it so?", default=...)
    instructions: str | None = said("The system message.", "Answer in one sentence.")
    max_output_tokens: int | None = said("Most tokens of the answer.", 64)
    temperature: Number | None = said("Divides the logits; 0 is greedy.", 0.7)
    top_p: Number | None = said("Draw of tokens that are together this probable.", 0.9)
    stream: bool | None = said("Send the answer while it comes, as server-sent events.", True)
    text: dict[str, Any] | None = said(
        "The form of the answer.", {"format": {"type": "json_object"}}
    )
    tools: list[dict[str, Any]] | None = said("Only an empty list: tools are for chats.", [])
    truncation: Literal["auto", "disabled"] | None = said(
        "disabled: too long is an error.", "disabled"
    )


class TokenizeBody(BodyModel):
    """POST /tokenize."""

    model: str | None = said("One of /v1/models; may be left out.", "smollm2-135m")
    prompt: str | None = said("A text. Either this or messages is needed.", "Why is it so?")
    messages: list[dict[str, Any]] | None = said("A conversation.", [_TURN])
    add_special_tokens: bool | None = said("Begin as the model's tokenizer begins a text.", False)
    return_token_strs: bool | None = said("Give the text of each token too.", True)
    add_generation_prompt: bool | None = said("Let the assistant begin its answer.", False)
    continue_final_message: bool | None = said("Go on with the last message.", True)
    chat_template: str | None = said("Not offered: see --chat-template.", None)
    chat_template_kwargs: dict[str, Any] | None = said("Variables of the template.", _NO_THINKING)
    tools: list[dict[str, Any]] | None = said("Tools that the template shows.", [_TOOL])


class DetokenizeBody(BodyModel):
    """POST /detokenize."""

    model: str | None = said("One of /v1/models; may be left out.", "smollm2-135m")
    tokens: list[int] = said("Token ids.", [2437, 338], default=...)
