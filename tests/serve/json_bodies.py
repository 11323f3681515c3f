"""Bodies of requests, right and wrong, drawn from the interface's own schemas and from none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]
DEEP = 3000
"""Brackets of a document that is nested too deep for a recursive reader."""
HUGE = (2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63) - 1, -1, 0)
NUMBERS = (0.0, -0.0, 1e-300, 1e308, -1e308, 0.5, 1.5, 100.0)

_texts = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(
    ["", "\x00", "\ud800", "\udc00x", "a" * 600, "{{ 1 }}", "<|im_start|>", "<end>", "\u202e", "é"]
)
_integers = st.integers(-2, 70) | st.sampled_from(HUGE)
_numbers = _integers | st.floats(0, 2) | st.sampled_from(NUMBERS)
_scalars = st.none() | st.booleans() | _numbers | _texts
_any = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)

_roles = st.sampled_from(["user", "assistant", "system", "developer", "tool", "nobody"]) | _texts
_parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", ""]), "text": _texts})
_messages = st.lists(
    st.fixed_dictionaries(
        {"role": _roles, "content": _texts | st.lists(_parts, max_size=2) | _any},
        optional={"name": _any, "tool_calls": _any, "tool_call_id": _texts, "extra": _any},
    ),
    min_size=0,
    max_size=3,
)
_json_schemas = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "string"}, {"enum": ["a", 1]}, {}, True])
    | st.dictionaries(st.sampled_from(["type", "$ref", "pattern", "minLength"]), _any, max_size=2),
    lambda inner: st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(_texts, inner, max_size=2)}
    ),
    max_leaves=3,
)
_formats = st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | st.fixed_dictionaries(
    {
        "type": st.just("json_schema"),
        "json_schema": st.fixed_dictionaries({"name": _texts, "schema": _json_schemas}) | _any,
    }
)
_constraints = st.dictionaries(
    st.sampled_from(["json", "regex", "choice", "grammar", "json_object", "structural_tag"]),
    _json_schemas | st.sampled_from(["[a-z]+", "(", 'start: "a"', "("]) | _any,
    min_size=1,
    max_size=2,
)
_tools = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": _texts, "parameters": _json_schemas}),
        }
    ),
    max_size=2,
)
_some = st.booleans()
_token_ids = st.integers(0, 258)
_said = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
RIGHT: Mapping[str, st.SearchStrategy[Any]] = {
    "prompt": _said
    | st.lists(_token_ids, min_size=1, max_size=9)
    | st.lists(_said, min_size=1, max_size=3)
    | st.lists(st.lists(_token_ids, min_size=1, max_size=4), min_size=1, max_size=3),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": _said}),
        min_size=1,
        max_size=2,
    ),
    "input": _said,
    "instructions": _said,
    "tokens": st.lists(_token_ids, max_size=9),
    "model": st.just("formula"),
    "max_tokens": st.integers(1, 8),
    "max_completion_tokens": st.integers(1, 8),
    "max_output_tokens": st.integers(1, 8),
    "temperature": st.sampled_from([0, 0.0, 0.7, 1, 2.0]),
    "top_p": st.sampled_from([0.1, 0.9, 1]),
    "top_k": st.sampled_from([-1, 0, 1, 7]),
    "min_p": st.sampled_from([0, 0.2]),
    "n": st.integers(1, 3),
    "seed": st.integers(0, 2**63 - 1),
    "stop": _said | st.lists(_said, max_size=3),
    "stop_token_ids": st.lists(_token_ids, max_size=3),
    "min_tokens": st.integers(0, 3),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(_token_ids.map(str), st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.lists(_token_ids, min_size=1, max_size=9),
    "bad_words": st.lists(_said, max_size=2),
    "logprobs": st.integers(0, 5) | _some,
    "top_logprobs": st.integers(0, 5),
    "stream": _some,
    "stream_options": st.fixed_dictionaries({"include_usage": _some}),
    "truncate_prompt_tokens": st.integers(-1, 9),
    "chat_template": st.none(),
    "chat_template_kwargs": st.dictionaries(_said, _scalars, max_size=2),
    "suffix": st.none() | st.just(""),
    "best_of": st.just(1),
    "truncation": st.just("disabled"),
    "reasoning_effort": st.sampled_from(["low", "high"]),
    "structured_outputs": st.sampled_from(
        [
            {"regex": "[a-c]{1,3}"},
            {"choice": ["yes", "no"]},
            {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
            {"grammar": 'start: "a" | "b"'},
            {"json_object": True},
        ]
    ),
    "response_format": st.sampled_from(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
        ]
    ),
    "text": st.sampled_from([{}, {"format": {"type": "text"}}]),
    "tools": st.just(
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    ),
    "tool_choice": st.sampled_from(["none", "auto", "required"]),
}
"""What fields may be; most bodies have these, so that they come as far as the cards."""
SPECIAL: Mapping[str, st.SearchStrategy[Any]] = {
    "messages": _messages,
    "tools": _tools,
    "tool_choice": st.sampled_from(["none", "auto", "required", "x"]) | _any,
    "response_format": _formats,
    "structured_outputs": _constraints,
    "input": _texts | _messages,
    "text": st.fixed_dictionaries({"format": _formats | _any}),
    "model": st.sampled_from(["formula", "formula", "gpt-4"]),
    "logit_bias": st.dictionaries(_integers.map(str) | _texts, _numbers, max_size=3),
}
"""Fields whose schema says little: objects of forms that are known elsewhere."""


def fitting(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    """Values of the types that a schema names, at the ends of what these can hold."""
    if "$ref" in schema:
        return fitting(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return st.one_of([fitting(one, root) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "string":
            return _texts
        case "integer":
            return _integers
        case "number":
            return _numbers
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            return st.lists(fitting(schema.get("items", {}), root), max_size=4)
        case "object" if "properties" in schema:
            return bodies(schema, root)
    return _any


def bodies(schema: Schema, root: Schema | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of a schema's fields: most of them as they should be, some as they should
    not, and now and then a field that nobody knows."""
    root = schema if root is None else root

    @st.composite
    def drawn(draw: st.DrawFn) -> dict[str, Any]:
        body: dict[str, Any] = {}
        required = schema.get("required", [])
        optional = draw(st.lists(st.sampled_from(sorted(schema["properties"])), max_size=5))
        for name in [*required, *optional]:
            known = SPECIAL.get(name, fitting(schema["properties"][name], root))
            kind = draw(st.integers(0, 29))
            if kind == 29:
                continue
            if kind <= 24:
                known = RIGHT.get(name, known)
            body[name] = draw(_any if kind == 28 else known)
        if draw(st.integers(0, 14)) == 14:
            body[draw(_texts | st.sampled_from(["user", "store", "best_of", "temprature"]))] = draw(
                _any
            )
        return body

    return drawn()


def dumped(document: Any, way: int) -> bytes:
    """The same as JSON, in one of the ways in which clients write it."""
    if way == 0:
        text = json.dumps(document, ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass")
    if way == 1:
        return json.dumps(document, indent=1).encode("utf-16")
    return json.dumps(document).encode()


@st.composite
def damaged(draw: st.DrawFn, schema: Schema) -> bytes:
    """A body as it must not be: cut off, bent, of other bytes, too deep, no object."""
    body = dumped(draw(bodies(schema)), draw(st.integers(0, 3)))
    match draw(st.integers(0, 8)):
        case 0:
            return body[: draw(st.integers(0, len(body)))]
        case 1:
            at = draw(st.integers(0, max(0, len(body) - 1)))
            return body[:at] + draw(st.binary(min_size=1, max_size=3)) + body[at + 1 :]
        case 2:
            return draw(st.binary(max_size=60))
        case 3:
            opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}")]))
            field = draw(st.sampled_from(sorted(schema["properties"]))).encode()
            return b'{"%s":%s0%s}' % (field, opening * DEEP, closing * DEEP)
        case 4:
            return dumped(draw(_any), 3)
        case 5:
            number = draw(st.sampled_from([b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"01"]))
            field = draw(st.sampled_from(sorted(schema["properties"]))).encode()
            return b'{"prompt":"a","%s":%s}' % (field, number)
        case 6:
            return b"\xef\xbb\xbf" + body
        case 7:
            return body + body
    return body
