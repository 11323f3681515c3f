"""Grammars that make a model call tools, or call them rightly, in its own form of calls.

They are in llguidance's variant of Lark, with the arguments' JSON schemas inside.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
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
    otherwise: str | None = None,
) -> tuple[str, str]:
    """What makes an answer call one of these tools.

    Args:
        tools: that may be called; at least one.
        form: of the model's calls.
        token_ids: added tokens of the vocabulary by their texts. A marker that is one has to be
            written as this token.
        parallel: whether there may be several calls.
        otherwise: a JSON schema that an answer without a call keeps to; not for a bare form, whose
            calls are JSON too.

    Returns:
        The kind of structured output, `grammar`, and its text.

    Raises:
        ApiError: the schema of a tool cannot be kept to.
    """
    many = parallel and not form.one_call
    rules = [*_call_rules(form, token_ids, many=many), *_tool_rules(tools, form, token_ids)]
    if otherwise is None:
        return _grammar("start: calls", *rules)
    return _grammar("start: calls | answer", f"answer: %json {otherwise}", *rules)


def guard_for(
    tools: Sequence[ToolFunction],
    form: CallForm,
    token_ids: Mapping[str, int],
    *,
    parallel: bool = True,
    text_ids: Collection[int] = (),
) -> tuple[str, str]:
    """What lets an answer be any text, in which calls keep the schemas of their tools.

    Arguments are those of `schema_for`, and `text_ids`: added tokens that a text may have.
    """
    many = parallel and not form.one_call
    rules = [*_call_rules(form, token_ids, many=many), *_tool_rules(tools, form, token_ids)]
    if form.is_bare:
        opening = f"<[{token_ids[form.opening]}]>? " if form.opening in token_ids else ""
        return _grammar(f"start: {opening}calls | TEXT", r"TEXT: /[^{\s](?s:.*)/", *rules)
    often = "*" if many else "?"
    if form.opening in token_ids:
        others = "".join(f" | <[{id_}]>" for id_ in sorted(text_ids))
        text = f"text: (TEXT{others})*"
        return _grammar(f"start: text (call text){often}", text, "TEXT: /(?s:.+)/", *rules)
    head = f"head[lazy]: TEXT {_quoted(form.opening)}"
    return _grammar(
        f"start: (head body){often} tail", head, "tail: TEXT", "TEXT: /(?s:.*)/", *rules
    )


def _grammar(*rules: str) -> tuple[str, str]:
    return "grammar", "\n".join(rules) + "\n"


def _tool_rules(
    tools: Sequence[ToolFunction], form: CallForm, token_ids: Mapping[str, int]
) -> list[str]:
    """The beginnings of calls, up to the end of their arguments."""
    numbers = range(len(tools))
    rules = ["any_call: " + " | ".join(f"call{number}" for number in numbers)]
    for number, tool in enumerate(tools):
        begun = _quoted(_begun(tool.name, form))
        if form.separator:
            begun = f"{_quoted(tool.name)} {_marker(form.separator, token_ids)}"
        rules.append(f"call{number}: {begun} args{number}")
        rules.append(f"args{number}: %json {_schema(tool)}")
    return rules


def _call_rules(form: CallForm, token_ids: Mapping[str, int], *, many: bool) -> list[str]:
    """All calls of an answer, one with its marker, and one without."""
    more = ""
    if form.name == HERMES:
        body = f'"\\n" any_call "}}\\n" {_marker(form.closing, token_ids)}'
        more = ' ("\\n" call)*'
    elif form.name == MISTRAL and form.separator:
        body, more = "any_call", " call*"
    elif form.name == MISTRAL:
        body = '" "? "[" any_call "}"' + (' (", " any_call "}")*' if many else "") + ' "]"'
    else:
        return ["calls: call", 'call: any_call "}"']
    calls = f"calls: call{more if many else ''}"
    return [calls, f"call: {_marker(form.opening, token_ids)} body", f"body: {body}"]


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
    said = _fault(text)
    if said:
        reason = said.splitlines()[0].partition("JSON schema: ")[2] or said.splitlines()[0]
        remedy = ": change it, or leave strict out" if tool.strict else ""
        raise bad_request(
            f"The schema of the tool {shown(tool.name)} cannot be kept to ({reason}){remedy}.",
            "tools",
        )
    return text


@lru_cache(maxsize=1024)  # a client sends the same tools with every request
def _fault(schema: str) -> str:
    """What the library says of a schema that it cannot follow; empty where it can."""
    return LLMatcher.validate_grammar(f"start: %json {schema}")
