"""Grammars that make a model call tools, in its own form of calls.

They are in llguidance's variant of Lark, with the arguments' JSON schemas inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from qaic_ray.files.documents import shown
from qaic_ray.serve.api_errors import bad_request
from qaic_ray.serve.tools.forms import HERMES, MISTRAL, CallForm
from qaic_ray.serve.tools.models import ToolFunction

# Templates print JSON as Python does, so a model was taught these.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def schema_for(
    tools: Sequence[ToolFunction],
    form: CallForm,
    token_ids: Mapping[str, int],
    *,
    parallel: bool = True,
) -> tuple[str, str]:
    """What makes an answer call one of these tools.

    Args:
        tools: that may be called; at least one.
        form: of the model's calls.
        token_ids: added tokens of the vocabulary by their texts. A marker that is one has to be
            written as this token.
        parallel: whether there may be several calls.

    Returns:
        The kind of structured output, `grammar`, and its text.

    Raises:
        ApiError: the schema of a tool cannot be kept to.
    """
    many = parallel and not form.one_call
    names, calls, rules = [], [], []
    for number, tool in enumerate(tools):
        schema = _schema(tool)
        rules.append(f"args{number}: %json {schema}")
        names.append(f"call{number}")
        calls.append(f"call{number}: {_quoted(_begun(tool.name, form))} args{number}")
        if form.separator:
            separator = _marker(form.separator, token_ids)
            calls[-1] = f"call{number}: {_quoted(tool.name)} {separator} args{number}"
    start = _start(form, token_ids, many=many)
    any_call = "any_call: " + " | ".join(names)
    return "grammar", "\n".join([start, any_call, *calls, *rules]) + "\n"


def _start(form: CallForm, token_ids: Mapping[str, int], *, many: bool) -> str:
    opening = _marker(form.opening, token_ids)
    if form.name == HERMES:
        call = f'{opening} "\\n" any_call "}}\\n" {_marker(form.closing, token_ids)}'
        return f'start: call{" more*" if many else ""}\ncall: {call}\nmore: "\\n" call'
    if form.name == MISTRAL and form.separator:
        return f"start: {'call+' if many else 'call'}\ncall: {opening} any_call"
    if form.name == MISTRAL:
        more = " more*" if many else ""
        inside = f'"[" any_call "}}"{more} "]"'
        return f'start: {opening} " "? {inside}\nmore: ", " any_call "}}"'
    return 'start: any_call "}"'


def _begun(name: str, form: CallForm) -> str:
    return f'{{"name": "{name}", "{form.key}": '


def _marker(text: str, token_ids: Mapping[str, int]) -> str:
    return f"<[{token_ids[text]}]>" if text in token_ids else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(tool: ToolFunction) -> str:
    """A tool's schema as the grammar has it; what the library does not know is left out of it.

    A tool that is `strict` is promised that its schema is kept, so that is refused there.
    """
    schema: dict[str, Any] = dict(tool.parameters or _NO_ARGUMENTS)
    schema["type"] = "object"
    schema["x-guidance"] = _SPACING | {"lenient": not tool.strict}
    text = json.dumps(schema, ensure_ascii=False)
    said = LLMatcher.validate_grammar(f"start: %json {text}")
    if said:
        reason = said.splitlines()[0].partition("JSON schema: ")[2] or said.splitlines()[0]
        remedy = ": change it, or leave strict out" if tool.strict else ""
        raise bad_request(
            f"The schema of the tool {shown(tool.name)} cannot be kept to ({reason}){remedy}.",
            "tools",
        )
    return text
