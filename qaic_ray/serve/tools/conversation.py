"""Messages and tools in the shape that chat templates take; transformers' is the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from qaic_ray.serve.tools.deltas import SHORT_ID_CHARS
from qaic_ray.serve.tools.models import MessageBody, ToolBody

_DEVELOPER = "developer"


def template_messages(
    messages: Sequence[MessageBody], template: str, *, short_ids: bool = False
) -> list[dict[str, Any]]:
    """Messages for a chat template.

    Their content is one text. Arguments of calls are objects, which templates print as JSON. The
    role `developer` is `system` for a template that does not know it. A key that a message does
    not have is left out: templates ask whether it is there.

    Args:
        messages: of the request.
        template: the Jinja text.
        short_ids: whether the template refuses call ids that are not nine letters and digits.
    """
    roles = {} if _DEVELOPER in template else {_DEVELOPER: "system"}
    return [_message(one, roles.get(one.role, one.role), short_ids) for one in messages]


def template_tools(tools: Sequence[ToolBody]) -> list[dict[str, Any]]:
    """Tools for a chat template, keys in the order that models were taught; without `strict`."""
    result = []
    for tool in tools:
        function: dict[str, Any] = {"name": tool.function.name}
        if tool.function.description is not None:
            function["description"] = tool.function.description
        if tool.function.parameters is not None:
            function["parameters"] = tool.function.parameters
        result.append({"type": "function", "function": function})
    return result


def _message(message: MessageBody, role: str, short_ids: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"role": role, "content": message.text or ""}
    for key in ("name", "reasoning_content", "reasoning"):
        if (value := getattr(message, key)) is not None:
            result[key] = value
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": _id(call.id, short_ids),
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.loads(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = _id(message.tool_call_id, short_ids)
    return result


def _id(given: str, short: bool) -> str:
    """The id of a call, or one in its place that a template of short ids takes."""
    if not short or (len(given) == SHORT_ID_CHARS and given.isascii() and given.isalnum()):
        return given
    return hashlib.blake2b(given.encode(), digest_size=8).hexdigest()[:SHORT_ID_CHARS]
