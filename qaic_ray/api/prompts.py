"""Prompts and conversations as programs for vLLM give them, into prompts of a fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, TypedDict, TypeGuard

from qaic_ray.api.sampling import VllmSampling
from qaic_ray.errors import ParameterError, RowError
from qaic_ray.files.documents import shown
from qaic_ray.formats.row_reader import Draft
from qaic_ray.rows import ChatOptions, Prompt


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids; its text, where there is one, is only shown."""

    prompt_token_ids: list[int]
    prompt: str


PromptType = str | TextPrompt | TokensPrompt | Sequence[int] | Mapping[str, Any]
"""One prompt."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages with `role` and `content`: a text, or parts of type text."""

_KNOWN = {"prompt", "prompt_token_ids"}
_PASSED = {"cache_salt", "type"}


def is_ids(value: object) -> TypeGuard[Sequence[int]]:
    """Whether this is one prompt of token ids."""
    return _is_list(value) and bool(value) and all(map(_is_whole, value))


def is_conversation(value: object) -> TypeGuard[Conversation]:
    """Whether this is one conversation."""
    return _is_list(value) and bool(value) and all(_is_message(m) for m in value)


def prompt_list(prompts: object, token_ids: object = None) -> list[Prompt]:
    """Prompts of whatever `generate` was given: one or several, texts, token ids or dictionaries.

    Args:
        prompts: as given.
        token_ids: those of the older parameter `prompt_token_ids`.

    Raises:
        ParameterError: naming the prompt that is none.
    """
    if token_ids is not None:
        both: Sequence[Any] = [token_ids] if is_ids(token_ids) else _listed(token_ids)
        given = [prompts] if isinstance(prompts, str) else _listed(prompts)
        if not given:
            given = [None] * len(both)
        if len(given) != len(both):
            raise ParameterError(
                f"There are {len(given)} prompts and {len(both)} lists of prompt_token_ids: give "
                "as many of one as of the other."
            )
        return [
            _tokens(number, ids, text or "")
            for number, (text, ids) in enumerate(zip(given, both, strict=True))
        ]
    if isinstance(prompts, str | Mapping) or is_ids(prompts):
        return [one_prompt(0, prompts)]
    if not _is_list(prompts):
        raise ParameterError(
            f"The prompts are {type(prompts).__name__}: give a text, token ids, a dictionary with "
            "prompt or prompt_token_ids, or a list of these."
        )
    return [one_prompt(number, prompt) for number, prompt in enumerate(prompts)]


def one_prompt(number: int, given: object) -> Prompt:
    """One prompt of its text, token ids or dictionary; errors name it by its number."""
    if isinstance(given, str):
        return _read(number, {"prompt": given})
    if _is_list(given):
        return _tokens(number, given, "")
    if not isinstance(given, Mapping):
        raise ParameterError(
            f"Prompt {number} is {type(given).__name__}: give a text, token ids, or a dictionary "
            "with prompt or prompt_token_ids."
        )
    unknown = [key for key in given if key not in _KNOWN | _PASSED and given[key] is not None]
    if unknown:
        raise ParameterError(
            f'Prompt {number} has "{str(unknown[0])[:80]}", which is not offered: only prompt or '
            "prompt_token_ids can be answered."
        )
    if given.get("prompt_token_ids") is not None:
        return _tokens(number, given["prompt_token_ids"], given.get("prompt") or "")
    return _read(number, {"prompt": given.get("prompt")})


def conversations(messages: object) -> list[Sequence[Mapping[str, Any]]]:
    """One conversation, or several, as several.

    Raises:
        ParameterError: for what is none.
    """
    if is_conversation(messages):
        return [messages]
    if not _is_list(messages) or not all(_is_list(one) for one in messages):
        raise ParameterError(
            'Messages are a list of {"role": ..., "content": ...}, or a list of such lists.'
        )
    return list(messages)


def chat_prompt(number: int, messages: Conversation, options: ChatOptions) -> Prompt:
    """The prompt of a conversation; errors name it by its number."""
    plain = [dict(message) if isinstance(message, Mapping) else message for message in messages]
    return replace(_read(number, {"messages": plain}), chat=options)


def chat_options(
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatOptions:
    """The options of conversations, by the arguments of `LLM.chat`."""
    if continue_final_message and add_generation_prompt:
        raise ParameterError(
            "continue_final_message and add_generation_prompt are both true: set one to False."
        )
    variables = dict(chat_template_kwargs or {})
    if tools:
        variables["tools"] = [dict(tool) for tool in tools]
    return ChatOptions(add_generation_prompt, continue_final_message, variables)


def refuse_lora(lora_request: object) -> None:
    """Refuse an adapter."""
    if lora_request is not None:
        raise ParameterError("lora_request is not offered: merge the adapter into the model.")


def paired(
    num_prompts: int, given: VllmSampling | Sequence[VllmSampling] | None, default: VllmSampling
) -> list[VllmSampling]:
    """Parameters for each prompt: one for all, or one each.

    Raises:
        ParameterError: where there are not as many as prompts.
    """
    if given is None or isinstance(given, VllmSampling):
        return [given or default] * num_prompts
    if not _is_list(given) or not all(isinstance(one, VllmSampling) for one in given):
        raise ParameterError(
            f"sampling_params is {shown(given)}: give one SamplingParams, or a list of them."
        )
    if len(given) != num_prompts:
        raise ParameterError(
            f"There are {num_prompts} prompts and {len(given)} sampling_params: give one for all, "
            "or one for each."
        )
    return list(given)


def _read(number: int, document: dict[str, Any]) -> Prompt:
    draft = Draft(number, "")
    try:
        draft.read_prompt(document)
        return draft.prompt()
    except RowError as error:
        raise ParameterError(f"Prompt {number}: {error}") from error


def _tokens(number: int, ids: object, text: str) -> Prompt:
    if not _is_list(ids) or not ids or not all(_is_whole(i) and i >= 0 for i in ids):
        raise ParameterError(
            f"Prompt {number} has {shown(ids)} for its token ids: give a list of whole numbers "
            "from 0 on, at least one."
        )
    return Prompt(number, text, token_ids=tuple(int(i) for i in ids))


def _listed(value: object) -> Sequence[Any]:
    return value if _is_list(value) else []


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value
