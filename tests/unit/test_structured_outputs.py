"""The form of an answer as people write it: what is taken, what is refused, and how."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from qaic_ray.errors import RowError
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.sampling_params.structured_outputs import (
    MAX_GRAMMAR_CHARS,
    StructuredOutputs,
    document_of_response_format,
)

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    "document",
    [
        {"json": SCHEMA},
        {"json": True},
        {"json_object": True},
        {"json_object": True, "disable_any_whitespace": True},
        {"json": SCHEMA, "whitespace_pattern": "[ ]?"},
        {"regex": r"\d{3}-\d{4}"},
        {"regex": ""},
        {"choice": ["yes", 'say "no"\n', "é😀"]},
        {"grammar": 'start: "a" | /b+/'},
        {"grammar": 'root ::= "a" | [b-c]+'},
    ],
)
def test_what_is_written_is_read_and_written_again(document: dict[str, Any]) -> None:
    asked = StructuredOutputs.read(document)
    assert asked is not None
    assert asked.document() == document
    assert StructuredOutputs.read(json.loads(json.dumps(asked.document()))) == asked
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert hash(asked) == hash(StructuredOutputs.read(document))


def test_keys_that_say_nothing_change_nothing() -> None:
    document = {"regex": "a", "json": None, "choice": None, "json_object": False}
    others = {"structural_tag": None, "disable_additional_properties": False}
    others |= {"disable_fallback": True, "whitespace_pattern": None}
    assert StructuredOutputs.read({**document, **others}) == StructuredOutputs(regex="a")
    assert StructuredOutputs.read(None) is None
    text = StructuredOutputs.read({"json": json.dumps(SCHEMA)})
    assert text == StructuredOutputs.read({"json": SCHEMA})


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({}, "structured_outputs has none of its kinds: give exactly one of json, json_object"),
        ({"json_object": False}, "has none of its kinds"),
        ({"regex": "a", "choice": ["b"]}, "has both regex and choice: give exactly one of"),
        ({"regex": 3}, "structured_outputs.regex is 3; allowed is a text."),
        ({"json_object": 1}, "structured_outputs.json_object is 1; allowed is true or false."),
        ({"choice": []}, "structured_outputs.choice must be a list of one text or more."),
        ({"choice": "abc"}, "structured_outputs.choice must be a list of one text or more."),
        ({"choice": [1]}, "structured_outputs.choice must be a list of texts."),
        (
            {"json": [1]},
            r"structured_outputs.json is \[1\]; allowed is a JSON schema, or its text.",
        ),
        ({"json": {"a": {1}}}, "structured_outputs.json holds what JSON has not: .*set"),
        ({"structural_tag": "{}"}, "structural_tag is not offered: write its form as a grammar."),
        ({"regx": "a"}, "structured_outputs has no 'regx': known are json, json_object"),
        ("a", "structured_outputs is 'a'; allowed is an object like {\"regex\""),
        ({"regex": "("}, "structured_outputs.regex cannot be followed: unclosed group."),
        ({"regex": "(?=a)b"}, "regex cannot be followed: look-around, .*, is not supported."),
        ({"regex": "\ud83d"}, "structured_outputs.regex holds half of a surrogate pair"),
        ({"json": {"type": "strin"}}, "json cannot be followed: Invalid type: strin."),
        ({"json": False}, "json cannot be followed: Unsatisfiable schema"),
        ({"json": "{"}, "json cannot be followed: EOF while parsing"),
        ({"json": {"not": {}}}, r'json cannot be followed: Unimplemented keys: \["not"\].'),
        ({"json": {"$ref": "http://x/y"}}, "json cannot be followed: Resource 'http://x/y'"),
        ({"grammar": "start: foo"}, "grammar cannot be followed: .*unknown name: .foo"),
        ({"grammar": ""}, "grammar cannot be followed: No 'root' rule found."),
        ({"grammar": 'root ::= "a'}, "grammar cannot be followed: Unexpected end of input"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "is longer than 262144 characters: shorten it."),
        ({"choice": ["a" * MAX_GRAMMAR_CHARS, "b"]}, "choice is longer than 262144 characters"),
    ],
)
def test_refusals_are_one_sentence(document: Any, sentence: str) -> None:
    with pytest.raises(RowError, match=sentence) as caught:
        SamplingParams().updated({"structured_outputs": document})
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"type": "text"}, None),
        ({}, None),
        (None, None),
        ({"type": "json_object"}, {"json_object": True}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
            {"json": SCHEMA},
        ),
    ],
)
def test_response_format_means(document: Any, expected: Any) -> None:
    assert document_of_response_format(document) == expected


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"type": "xml"}, "response_format is .*; allowed is an object whose type is text"),
        ("json", "response_format is 'json'; allowed"),
        ({"type": "json_schema"}, 'response_format needs "json_schema": {"name"'),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "response_format needs"),
    ],
)
def test_response_format_refuses(document: Any, sentence: str) -> None:
    with pytest.raises(RowError, match=sentence):
        document_of_response_format(document)
