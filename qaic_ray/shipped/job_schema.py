"""The JSON schema of job files, which editors complete and check them by.

It is made of the option tree. It says types, bounds and words, and what `Section.RULES` say; that a
path exists or a grid fits together is found out when a job is read. It wants values as they are
meant: numbers without quotes, and words in small letters.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from qaic_ray.errors import UsageError
from qaic_ray.files.documents import json_text, parse_yaml, read_object, read_text
from qaic_ray.files.folders import write_whole
from qaic_ray.option_types import Opt, OptionValue, Section, options_of
from qaic_ray.options import Job
from qaic_ray.sampling_params import GREEDY_BELOW, SamplingParams
from qaic_ray.sampling_params.structured_outputs import FIELD as STRUCTURED
from qaic_ray.sampling_params.structured_outputs import SCHEMA as STRUCTURED_SCHEMA

SCHEMA_NAME = "job.schema.json"
SCHEMA_ID = "https://qaic-ray.invalid/job.schema.json"
"""Marks a file as this schema; nothing is fetched from there."""

_DIALECT = "http://json-schema.org/draft-07/schema#"
_MODELINE = "# yaml-language-server: $schema="
_OF_RUN = "max_tokens"  # it is run.generation_len in a job
_LISTS = ("stop", "stop_token_ids", "bad_words")
_OR_ONE = ("stop", "bad_words")


def job_schema() -> dict[str, Any]:
    """The schema, as a JSON object of draft 7 with the `$defs` of later ones."""
    found = Job.model_json_schema()
    words = {name: part for name, part in found["$defs"].items() if "enum" in part}
    made: dict[str, Any] = _inlined(found, words)
    definitions = {name: found for name, found in made.pop("$defs").items() if name not in words}
    for kind in sections(Job):
        _complete(made if kind is Job else definitions[kind.__name__], kind)
    definitions["Sampling"] = _sampling()
    definitions["RunOptions"]["properties"]["sampling"] = {"$ref": "#/$defs/Sampling"}
    about = {"$schema": _DIALECT, "$id": SCHEMA_ID, "title": "A job of qaic-ray"}
    return about | made | {"title": about["title"], "$defs": definitions}


def schema_text() -> str:
    """The schema as a file has it."""
    return json_text(job_schema(), indent=2) + "\n"


def give_schema(job: Path) -> Path:
    """Write the schema beside a job file, and its name into the file's first line, for editors.

    Returns:
        The schema's file.

    Raises:
        UsageError: there is no such file, it is no job, or another schema has that name; nothing
            is written.
    """
    path = job.resolve()
    text = read_text(path, makes=f"qaic-ray init {shlex.quote(path.stem)}")
    if path.suffix == ".json":
        raise UsageError(
            f"{path} is JSON, which has no place for the schema's name: write the job as YAML."
        )
    if not isinstance(parse_yaml(text, str(path)), dict | None):
        raise UsageError(f"{path} is no job: a job is a mapping with at least 'name' and 'model'.")
    schema = path.with_name(SCHEMA_NAME)
    if schema.exists() and read_object(schema).get("$id") != SCHEMA_ID:
        raise UsageError(
            f"{schema} is there already, and no schema of qaic-ray's jobs: move it away."
        )
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith(_MODELINE)]
    try:
        write_whole(schema, schema_text())
        write_whole(path, "".join([f"{_MODELINE}{SCHEMA_NAME}\n", *kept]))
    except OSError as error:
        raise UsageError(
            f"{error.filename or path} cannot be written: {error.strerror}."
        ) from error
    return schema


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    """A section and those in it."""
    yield kind
    for field in kind.model_fields.values():
        inner = OptionValue(field).kind
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from sections(inner)


def sample_of(entry: Opt, value: OptionValue, default: Any) -> Any:
    """A value of an option as a job has it, other than the default where that can be.

    Raises:
        LookupError: nothing says one: give the option a `sample`.
    """
    if entry.sample is not None:
        return entry.sample
    if entry.example:
        if value.item is not None and not entry.example.startswith("{"):
            return [yaml.safe_load(part) for part in entry.example.split(",")]
        is_text = value.kind is str
        return entry.example if is_text else yaml.safe_load(entry.example)
    default = default.value if isinstance(default, Enum) else default
    if value.kind is bool:
        return not default
    if value.words:
        return next(
            word for word in reversed(value.words) if word != default or len(value.words) < 2
        )
    if isinstance(default, int | float) and default > 0:
        return default * 2
    if isinstance(default, str):
        return default
    raise LookupError(f"Nothing shows a value of {entry.help!r}: give it a sample.")


def _inlined(schema: Any, words: dict[str, Any]) -> Any:
    """A schema with lists of words in the place of references, beside which nothing is read."""
    if isinstance(schema, list):
        return [_inlined(part, words) for part in schema]
    if not isinstance(schema, dict):
        return schema
    name = schema.get("$ref", "").rpartition("/")[2]
    if name in words:
        return {"enum": words[name]["enum"], **{k: v for k, v in schema.items() if k != "$ref"}}
    return {key: _inlined(value, words) for key, value in schema.items()}


def _complete(found: dict[str, Any], kind: type) -> None:
    """Put into the schema of a section what pydantic does not: examples, and rules of our own."""
    entries = options_of(kind)
    for name, schema in found["properties"].items():
        schema.pop("title", None)
        schema.pop("opt", None)
        if name in entries:
            field = kind.__pydantic_fields__[name]  # type: ignore[attr-defined]
            schema["examples"] = [sample_of(entries[name], OptionValue(field), field.default)]
    found.pop("title", None)
    if rules := getattr(kind, "RULES", ()):
        found["allOf"] = list(rules)


def _sampling() -> dict[str, Any]:
    """Of the mapping that a job has in place of `SamplingParams`."""
    found = TypeAdapter(SamplingParams).json_schema()
    fields = found["properties"]
    del fields[_OF_RUN]
    _complete(found, SamplingParams)
    for name in _LISTS:
        items = fields[name]["items"]
        fields[name]["type"] = ["array", "null"]
        if name in _OR_ONE:
            fields[name] = _or(fields[name], items)
    bias = fields["logit_bias"]["items"]["prefixItems"][1]
    most = fields["logit_bias"]["maxItems"]
    fields["logit_bias"] = _kept(fields["logit_bias"]) | {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": bias,
        "maxProperties": most,
    }
    fields[STRUCTURED] = _kept(fields[STRUCTURED]) | STRUCTURED_SCHEMA
    greedy = {"required": ["temperature"], "properties": {"temperature": {"minimum": GREEDY_BELOW}}}
    several = {"required": ["n"], "properties": {"n": {"minimum": 2}}}
    found["allOf"] = [{"if": several, "then": greedy}]
    found["additionalProperties"] = False
    return {"anyOf": [{**found, "type": "object"}, {"type": "null"}]}


def _or(listed: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """One value in the place of a list of one."""
    kept = _kept(listed)
    return kept | {"anyOf": [items, {k: v for k, v in listed.items() if k not in kept}]}


def _kept(schema: dict[str, Any]) -> dict[str, Any]:
    """What people read of it."""
    return {k: schema[k] for k in ("description", "default", "examples") if k in schema}
