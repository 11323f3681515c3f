"""Tools and messages of a chat request, as pydantic models: their fields, and one sentence a fault.

Sources of names: the OpenAI interface. A field of an answer's message passes where a client sends
the message back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from qaic_ray.files.documents import must_be, shown
from qaic_ray.serve.api_errors import ApiError, bad_request
from qaic_ray.serve.body_model import BodyModel

MAX_NAME_CHARS = 64
_NAME = rf"^[a-zA-Z0-9_.-]{{1,{MAX_NAME_CHARS}}}$"
_ROLES = ("system", "developer", "user", "assistant", "tool")
_CHOICES = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
_EMPTY: tuple[object, ...] = (None, "", [], {}, False)
_OF_NO_EFFECT = frozenset({"annotations", "cache_control", "id", "status"})
"""Fields of messages and tools that change no answer."""

Name = Annotated[str, StringConstraints(pattern=_NAME)]
Checked = TypeVar("Checked", bound=BaseModel)


class ToolFunction(BodyModel):
    """What a tool is: its name, what it is for, and the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(BodyModel):
    """One of a request's `tools`."""

    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(BodyModel):
    """The name of a tool."""

    name: str


class NamedChoice(BodyModel):
    """A `tool_choice` that names a tool."""

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(BodyModel):
    """What a call of an earlier answer called."""

    name: str = Field(min_length=1)
    arguments: str


class CallBody(BodyModel):
    """A call of an earlier answer."""

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(BodyModel):
    """A part of a message's content."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class MessageBody(BodyModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str | None:
        """Its content as one text; None where it has none."""
        if self.content is None:
            return self.refusal
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or part.refusal or "" for part in self.content)


def read_tools(given: Sequence[Any], *, allow_unknown: bool = False) -> list[ToolBody]:
    """The tools of a request.

    Args:
        given: of the body.
        allow_unknown: whether fields that nobody knows pass.

    Raises:
        ApiError: one is wrong.
    """
    tools: list[ToolBody] = []
    names: set[str] = set()
    for number, one in enumerate(given):
        place = f"tools[{number}]"
        kind = one.get("type") if isinstance(one, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise bad_request(
                f"{place} is of the type {shown(kind)}: offered is function.", "tools"
            )
        tool = _checked(ToolBody, one, place, "tools")
        _refuse_unknown(tool, place, "tools", allow_unknown=allow_unknown)
        _refuse_unknown(tool.function, f"{place}.function", "tools", allow_unknown=allow_unknown)
        _check_parameters(tool.function, place)
        if tool.function.name in names:
            raise bad_request(
                f"{place} has the name {shown(tool.function.name)} of an earlier tool: give each "
                "tool a name of its own.",
                "tools",
            )
        names.add(tool.function.name)
        tools.append(tool)
    return tools


def read_choice(given: Any, names: Sequence[str]) -> str | NamedChoice:
    """A request's `tool_choice`: none, auto, required, or the name of a tool.

    Args:
        given: of the body; None where it has none.
        names: of the request's tools.

    Raises:
        ApiError: it is none of these, or there is nothing to choose from.
    """
    if given is None:
        return "auto" if names else "none"
    if isinstance(given, dict) and given.get("type") == "function":
        choice = _checked(NamedChoice, given, "tool_choice", "tool_choice")
        if choice.function.name not in names:
            offered = f"there are {', '.join(names)}" if names else "the request has no tools"
            raise bad_request(
                f"tool_choice names the tool {shown(choice.function.name)}: {offered}.",
                "tool_choice",
            )
        return choice
    if given not in ("none", "auto", "required"):
        raise bad_request(f"tool_choice is {shown(given)}: it is {_CHOICES}.", "tool_choice")
    if given == "required" and not names:
        raise bad_request("tool_choice is required and the request has no tools.", "tool_choice")
    return str(given)


def read_messages(given: Sequence[Any], *, allow_unknown: bool = False) -> list[MessageBody]:
    """The messages of a request.

    Args:
        given: of the body.
        allow_unknown: whether fields that nobody knows pass.

    Raises:
        ApiError: one is wrong.
    """
    messages: list[MessageBody] = []
    open_ids: set[str] = set()
    for number, one in enumerate(given):
        place = f"messages[{number}]"
        message = _message(one, place)
        _refuse_unknown(message, place, "messages", allow_unknown=allow_unknown)
        if message.role == "tool":
            _check_result(message, open_ids, place)
        else:
            open_ids = {call.id for call in message.tool_calls or ()}
        messages.append(message)
    return messages


def _message(given: Any, place: str) -> MessageBody:
    role = given.get("role") if isinstance(given, dict) else None
    if role == "function" or (isinstance(given, dict) and given.get("function_call")):
        raise bad_request(
            f"{place} is of the older form of calls: give tool_calls, and their results as "
            'messages of the role "tool".',
            "messages",
        )
    if isinstance(role, str) and role not in _ROLES:
        raise bad_request(
            f"{place}.role is {shown(role)}: roles are {', '.join(_ROLES)}.", "messages"
        )
    _check_parts(given, place)
    message = _checked(MessageBody, given, place, "messages")
    if message.tool_calls and message.role != "assistant":
        raise bad_request(f"{place} has tool_calls: only the assistant calls tools.", "messages")
    if message.text is None and not message.tool_calls:
        raise bad_request(f"{place}.content is missing: give a text.", "messages")
    _check_unicode(message, place)
    for call_number, call in enumerate(message.tool_calls or ()):
        if _object(call.function.arguments) is None:
            raise bad_request(
                f"{place}.tool_calls[{call_number}].function.arguments is no JSON object: "
                f"{shown(call.function.arguments)}.",
                "messages",
            )
    return message


def _check_parts(given: Any, place: str) -> None:
    content = given.get("content") if isinstance(given, dict) else None
    for number, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise bad_request(
                f"{place}.content[{number}] is of the type {shown(kind)}: the model reads text "
                "only.",
                "messages",
            )
        if isinstance(part, dict) and not isinstance(part.get(kind or "text"), str):
            raise bad_request(f"{place}.content[{number}] has no text.", "messages")


def _check_result(message: MessageBody, open_ids: set[str], place: str) -> None:
    if message.tool_call_id is None:
        raise bad_request(f"{place}.tool_call_id is missing: name the call it answers.", "messages")
    if message.tool_call_id not in open_ids:
        raise bad_request(
            f"{place} answers the call {shown(message.tool_call_id)}, which the assistant's "
            "message before it does not have.",
            "messages",
        )


def _check_unicode(message: MessageBody, place: str) -> None:
    texts = [message.text or "", message.name or ""]
    texts += [call.function.arguments + call.function.name for call in message.tool_calls or ()]
    if not all(map(_is_unicode, texts)):
        raise bad_request(
            f"{place} holds half of a surrogate pair, which is no character.", "messages"
        )


def _check_parameters(function: ToolFunction, place: str) -> None:
    schema = function.parameters
    if schema is None:
        return
    kind = schema.get("type", "object")
    if kind != "object" and kind != ["object"]:
        raise bad_request(
            f"{place}.function.parameters is a schema of {shown(kind)}: arguments are an object.",
            "tools",
        )
    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{place}.function.parameters is no JSON schema.", "tools") from error


def _checked(kind: type[Checked], given: Any, place: str, param: str) -> Checked:
    if not isinstance(given, Mapping):
        raise bad_request(f"{place} is {shown(given)}: give an object.", param)
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise _fault(error, place, param) from error
    except RecursionError as error:
        raise bad_request(f"{place} is nested too deep.", param) from error


def _fault(error: ValidationError, place: str, param: str) -> ApiError:
    first = error.errors(include_url=False)[0]
    for step in first["loc"]:
        if step in {"str", "list[TextPart]"}:  # of a union: no place in the body
            continue
        place += f"[{step}]" if isinstance(step, int) else f".{step}"
    if first["type"] == "missing":
        return bad_request(f"{place} is missing.", param)
    if first["type"] == "string_pattern_mismatch":
        return bad_request(
            f"{place} is {shown(first['input'])}: a name has 1 to {MAX_NAME_CHARS} letters, "
            "digits, _, - and dots.",
            param,
        )
    said = must_be(first) or first["msg"].removeprefix("Input ").rstrip(".")
    return bad_request(f"{place} is {shown(first['input'])}: it {said}.", param)


def _refuse_unknown(part: BodyModel, place: str, param: str, *, allow_unknown: bool) -> None:
    if allow_unknown:
        return
    for name, value in (part.model_extra or {}).items():
        if name not in _OF_NO_EFFECT and value not in _EMPTY:
            raise bad_request(
                f"{place} has the unknown field {shown(name)}: leave it out.",
                param,
                "unknown_field",
            )


def _object(text: str) -> dict[str, Any] | None:
    """The object that a JSON text holds; None where it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
