"""What form an answer must have: a JSON schema, any JSON object, a regex, a choice, a grammar.

The names are vLLM's. Grammars are llguidance's: its Lark dialect, or the GBNF of llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qaic_ray.errors import RowError
from qaic_ray.files.documents import shown

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_GRAMMAR_CHARS = 2**18
"""Of a schema, a regex, a grammar, or all choices together."""

KINDS = ("json", "json_object", "regex", "choice", "grammar")
"""Exactly one of these is given."""

FIELD = "structured_outputs"


def _given(kind: str) -> dict[str, Any]:
    return {"required": [kind], "properties": {kind: {"not": {"enum": [None, False, []]}}}}


_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_SWITCH: dict[str, Any] = {"type": ["boolean", "null"]}
_OBJECT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "json": {"type": ["object", "string", "boolean", "null"]},
        "json_object": _SWITCH,
        "regex": _TEXT,
        "choice": {"type": ["array", "null"], "items": {"type": "string"}, "minItems": 1},
        "grammar": _TEXT,
        "disable_any_whitespace": _SWITCH,
        "whitespace_pattern": _TEXT,
        "disable_fallback": {},
    },
    "oneOf": [_given(kind) for kind in KINDS],
}
SCHEMA: dict[str, Any] = {"anyOf": [_OBJECT, {"type": "null"}]}
"""What `StructuredOutputs.read` takes, as far as a JSON schema can say it."""

_NOT_OFFERED = {
    "structural_tag": "write its form as a grammar",
    "disable_additional_properties": 'write "additionalProperties": false into the schema',
}
_NEUTRAL = (None, False)
_FIRST_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)
_MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class StructuredOutputs:
    """The form of an answer; made by `read` from what people write, and checked when it is made.

    Attributes:
        json: text of a JSON schema.
        json_object: any JSON object.
        regex: of the whole answer, in the syntax of Rust's regex library.
        choice: texts, one of which is the answer.
        grammar: in Lark or GBNF.
        disable_any_whitespace: no white space between the tokens of JSON.
        whitespace_pattern: a regex of the white space that may be there.

    Raises:
        RowError: for none or several of the kinds, and for one that cannot be followed.
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            _check(name, getattr(self, name), str, "a text")
        for name in ("json_object", "disable_any_whitespace"):
            _check(name, getattr(self, name), bool, "true or false")
        if not all(isinstance(text, str) for text in self.choice):
            raise RowError(f"{FIELD}.choice must be a list of texts.")
        given = [name for name in KINDS if getattr(self, name) not in (None, False, ())]
        if len(given) != 1:
            said = f"has both {' and '.join(given)}" if given else "has none of its kinds"
            raise RowError(f"{FIELD} {said}: give exactly one of {', '.join(KINDS)}.")
        texts = (self.json, self.regex, self.grammar, self.whitespace_pattern, *self.choice)
        if sum(len(text) for text in texts if text) > MAX_GRAMMAR_CHARS:
            raise RowError(
                f"{FIELD}.{given[0]} is longer than {MAX_GRAMMAR_CHARS} characters: shorten it."
            )
        _refuse_unfollowable(self, given[0])

    @classmethod
    def read(cls, document: Any) -> StructuredOutputs | None:
        """What a document in vLLM's form says; None for null, and one of this class as it is.

        Raises:
            RowError: as on construction, and for a key that is not known or not offered.
        """
        if document is None or isinstance(document, cls):
            return document
        if not isinstance(document, Mapping):
            raise RowError(
                f'{FIELD} is {shown(document)}; allowed is an object like {{"regex": "[a-z]+"}}.'
            )
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {}
        for key, value in document.items():
            if key in known:
                if value is not None:
                    given[key] = value
            elif key == "disable_fallback":  # there is one library, and so none to fall back to
                continue
            elif key not in _NOT_OFFERED:
                raise RowError(f"{FIELD} has no {shown(key)}: known are {', '.join(KINDS)}.")
            elif value not in _NEUTRAL:
                raise RowError(f"{FIELD}.{key} is not offered: {_NOT_OFFERED[key]}.")
        if "json" in given and not isinstance(given["json"], str):
            given["json"] = _schema_text(given["json"])
        if "choice" in given:
            if not isinstance(given["choice"], (list, tuple)) or not given["choice"]:
                raise RowError(f"{FIELD}.choice must be a list of one text or more.")
            given["choice"] = tuple(given["choice"])
        return cls(**given)

    def document(self) -> dict[str, Any]:
        """What `read` makes the same of; JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        said = {name: value for name, value in values.items() if value not in (None, False, ())}
        if self.choice:
            said["choice"] = list(self.choice)
        if self.json is not None:
            said["json"] = json.loads(self.json)
        return said

    @property
    def grammar_text(self) -> str:
        """The same in llguidance's own form."""
        return _grammar_text(self)


def document_of_response_format(document: Any) -> dict[str, Any] | None:
    """The document for `StructuredOutputs.read` of the OpenAI interface's `response_format`.

    Returns:
        None for the type `text`, which leaves an answer free.

    Raises:
        RowError: for a type that is not `text`, `json_object` or `json_schema`, or no schema.
    """
    kind = document.get("type") if isinstance(document, Mapping) else None
    if document in ({}, None) or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise RowError(
            f"response_format is {shown(document)}; allowed is an object whose type is text, "
            "json_object or json_schema."
        )
    outer = document.get("json_schema")
    schema = outer.get("schema") if isinstance(outer, Mapping) else None
    if not isinstance(schema, (Mapping, bool)):
        raise RowError('response_format needs "json_schema": {"name": ..., "schema": {...}}.')
    return {"json": schema}


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, (Mapping, bool)):
        raise RowError(f"{FIELD}.json is {shown(schema)}; allowed is a JSON schema, or its text.")
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{FIELD}.json holds what JSON has not: {error}.") from error


def _check(name: str, value: object, kind: type, called: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise RowError(f"{FIELD}.{name} is {shown(value)}; allowed is {called}.")


@lru_cache(maxsize=256)  # the rows of a file often have the same
def _grammar_text(asked: StructuredOutputs) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if asked.json is not None or asked.json_object:
        schema = asked.json if asked.json is not None else '{"type": "object"}'
        if schema.strip() in ("true", "false"):  # which has no place for options
            return LLMatcher.grammar_from_json_schema(schema)
        options: JsonCompileOptions = {"whitespace_flexible": not asked.disable_any_whitespace}
        if asked.whitespace_pattern is not None:
            options["whitespace_pattern"] = asked.whitespace_pattern
        return LLMatcher.grammar_from_json_schema(schema, defaults=options)
    if asked.regex is not None:
        return LLMatcher.grammar_from_regex(asked.regex)
    if asked.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(asked.grammar))
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in asked.choice)
    return LLMatcher.grammar_from_lark(f"start: {texts}")


@lru_cache(maxsize=256)  # requests of one program have the same again and again
def _refuse_unfollowable(asked: StructuredOutputs, kind: str) -> None:
    from llguidance import LLMatcher

    try:
        for text in (asked.json, asked.regex, asked.grammar, asked.whitespace_pattern):
            (text or "").encode()
        "".join(asked.choice).encode()
        said = LLMatcher.validate_grammar(_grammar_text(asked))
    except UnicodeEncodeError as error:
        raise RowError(f"{FIELD}.{kind} holds half of a surrogate pair, no character.") from error
    except Exception as error:  # the library raises nothing narrower
        raise RowError(_unfollowable(kind, str(error))) from error
    if said:
        raise RowError(_unfollowable(kind, said))


def _unfollowable(kind: str, said: str) -> str:
    # A message has the place on lines of its own; its last words say what is wrong.
    found = _FIRST_ERROR.search(said)
    reason = found.group(1) if found else (said.splitlines() or ["nothing can be made of it"])[0]
    shortened = " ".join(reason.split())[:_MAX_REASON_CHARS].rstrip(".:")
    return f"{FIELD}.{kind} cannot be followed: {shortened}."
