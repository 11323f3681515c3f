"""The page of job files: each key with its default, what is allowed, its meaning and an example."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from qaic_ray import option_schemas as schemas
from qaic_ray.contract import MAX_SIZE
from qaic_ray.option_types import Opt, OptionValue, Section, options_of
from qaic_ray.options import Job
from qaic_ray.reference.markdown import block, code, page, section, table
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.shipped.job_schema import SCHEMA_NAME, job_schema, sample_of
from qaic_ray.shipped.jobs import shipped_jobs

OF_RUN = "max_tokens"
"""A field of a row that a job has under another name, run.generation_len."""


def job_page() -> str:
    """docs/reference/job.md."""
    schema = job_schema()
    return page(
        "Job file",
        "A job is a YAML file. It holds all three steps of the road: export, compile, run. "
        "`qaic-ray init mine` writes one, `qaic-ray plan mine.yaml` shows what it would do, and "
        "`qaic-ray launch mine.yaml` does it.",
        "`name` and `model.name` are needed. A key that is not given has its default. An unknown "
        "key is refused, and the nearest known one is named. `--set run.generation_len=64` changes "
        "a key for one launch. A relative path of `run.prompts` or `run.chat_template` starts at "
        "the job file. All other relative paths start at the current folder.",
        "Where a key takes a list, one value stands for a list of one.",
        section(
            "In an editor",
            f"[{SCHEMA_NAME}]({SCHEMA_NAME}) is the JSON schema of job files. With it an editor "
            "completes keys, shows their meaning, and marks mistakes while you type. This writes "
            "the schema beside a job, and names it in the job's first line:",
            block("sh", "qaic-ray schema mine.yaml"),
            "The line is read by every editor with the YAML language server (VS Code, Neovim, "
            "Emacs, JetBrains):",
            block("yaml", f"# yaml-language-server: $schema={SCHEMA_NAME}"),
            "`qaic-ray schema` alone prints the schema. It wants values as they are meant: numbers "
            "without quotes, and words in small letters. Whether a path exists, and whether the "
            "shapes of a grid fit together, is found out when the job is read.",
        ),
        section("A job that runs", block("yaml", shipped_text("start"))),
        *(_section(place, kind, schema) for place, kind in sections()),
    )


def shipped_text(name: str) -> str:
    """The text of a job that comes along."""
    return Path(shipped_jobs()[name]).read_text(encoding="utf-8")


def sections() -> Iterator[tuple[str, Any]]:
    """The parts of a job by their keys, and the job itself first."""
    yield "", Job
    yield from _inside(Job, "")


def _inside(kind: Any, place: str) -> Iterator[tuple[str, Any]]:
    for name, field in kind.__pydantic_fields__.items():
        inner = OptionValue(field).kind
        if hasattr(inner, "__pydantic_fields__"):
            yield f"{place}{name}", inner
            yield from _inside(inner, f"{place}{name}.")


def keys_of(kind: Any) -> Iterator[tuple[str, Opt, OptionValue, Any]]:
    """The keys of a section that are no sections: name, entry, type and default."""
    entries = options_of(kind)
    for name, field in kind.__pydantic_fields__.items():
        option = OptionValue(field)
        if not hasattr(option.kind, "__pydantic_fields__") and name != OF_RUN:
            yield name, entries[name], option, ... if field.is_required() else field.default


def _section(place: str, kind: Any, schema: dict[str, Any]) -> Iterator[str]:
    inner = schema["$defs"].get(kind.__name__, schema)
    said = (kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    rows = (
        (
            code(name),
            entry.help,
            default_key(default, entry),
            entry.allowed.replace(f" to {MAX_SIZE}", "")
            if kind is SamplingParams
            else allowed_text(inner["properties"][name], is_path=option.is_path),
            code(f"{name}: {yaml_text(sample_of(entry, option, default))}"),
        )
        for name, entry, option, default in keys_of(kind)
    )
    return section(
        place or "The job itself",
        *([f"{said} A mapping under the key {code(place)}."] if place else []),
        table(("key", "meaning", "default", "allowed", "example"), rows),
        *(
            ["With every key at its default:", block("yaml", _defaults(place, kind))]
            if place
            else []
        ),
    )


def default_key(default: Any, entry: Opt) -> str:
    """The default in the words of a job file."""
    if default is ...:
        return "required"
    if entry.shown:
        return entry.shown
    plain = _plain(default)
    return "–" if plain is None else code(yaml_text(plain))


def allowed_text(schema: dict[str, Any], *, is_path: bool = False) -> str:
    """What a JSON schema allows, in words; null is left out."""
    parts = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    for known, said in _SAID:
        if parts == known.get("anyOf") or ("pattern" in known and known in (schema, *parts)):
            return said
    if parts:
        if len(parts) == 2 and parts[1].get("items") == parts[0]:
            return f"one or a list of: {allowed_text(parts[0])}"
        return " or ".join(allowed_text(part, is_path=is_path) for part in parts)
    if "enum" in schema or "const" in schema:
        words = schema.get("enum", [schema.get("const")])
        return ", ".join(code(yaml_text(word)) for word in words)
    kind = schema.get("type", "string")
    if kind in ("integer", "number"):
        return _number(schema, "a whole number" if kind == "integer" else "a number")
    if kind == "array":
        return f"a list of: {allowed_text(schema['items'])}"
    if kind == "string" and is_path:
        return "a path"
    return {"boolean": "true or false", "object": "a mapping"}.get(kind, "a text")


_SAID = (
    (schemas.PROMPT_LEN, "a power of two, or several like `32+64`"),
    (schemas.DEVICES, "`all`, an id from 0, or a list of ids"),
    (schemas.DATE, "a date, or a date and time"),
    (schemas.SOURCES, "a path, a glob or a URI, or a list of them"),
    (schemas.SHARD, "K/N, with K from 1 to N"),
    (schemas.SAMPLE, "a number of rows, or a share like `5%`"),
)


def _number(schema: dict[str, Any], said: str) -> str:
    if "exclusiveMinimum" in schema:
        said += f" above {schema['exclusiveMinimum']}"
    if "minimum" in schema:
        said += f" from {schema['minimum']}"
    most = schema.get("maximum", MAX_SIZE)
    return said if most >= MAX_SIZE else f"{said} to {most}"


def _defaults(place: str, kind: type[Section]) -> str:
    document: Any = {
        name: sample_of(entry, option, default) if default is ... else _plain(default)
        for name, entry, option, default in keys_of(kind)
    }
    for part in reversed(place.split(".")):
        document = {part: document}
    return yaml_text(document, flow=False)


def _plain(default: Any) -> Any:
    if isinstance(default, Enum):
        return default.value
    if isinstance(default, tuple):
        return [_plain(one) for one in default]
    return default


class _JobDumper(yaml.SafeDumper):
    """Writes lists on one line, as people write them in a job."""


_JobDumper.add_representer(
    list, lambda dumper, given: dumper.represent_sequence("tag:yaml.org,2002:seq", given, True)
)


def yaml_text(given: Any, *, flow: bool = True) -> str:
    """A value as a job file has it, on one line unless `flow` is False."""
    text = yaml.dump(
        given,
        Dumper=_JobDumper,
        default_flow_style=flow and isinstance(given, list | dict),
        sort_keys=False,
        allow_unicode=True,
        width=10**6,
    )
    return text.removesuffix("...\n").strip() if flow else text
