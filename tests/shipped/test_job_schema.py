"""The JSON schema of jobs says of a document what the loader says of it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from qaic_ray.errors import JobError, UsageError
from qaic_ray.files.documents import parse_yaml
from qaic_ray.option_types import OptionValue, Section
from qaic_ray.options import Job
from qaic_ray.pipeline.job import job_from
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.shipped.job_schema import SCHEMA_NAME, give_schema, job_schema, sections
from qaic_ray.shipped.jobs import shipped_jobs

BEYOND = (
    r"job: compile: ",  # whether a grid's shapes fit together is arithmetic
    r"compile\.[a-z_]+ needs export",
    r"structured_outputs\.\w+ cannot be followed",
    r"run\.date: ",  # a schema knows a date's form, and not its months
    r"has a NUL|no path",
    r"run\.shard: must be K/N with K from 1 to N",  # that K is at most N
)
"""What no schema can say."""


@cache
def validator() -> Any:
    schema = job_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def loader_says(document: dict[str, Any]) -> tuple[Job | None, str]:
    try:
        return job_from(document, source="job"), ""
    except JobError as error:
        return None, str(error)


def document_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = parse_yaml(shipped_jobs()[name].read_text("utf-8"), name)
    return found


@pytest.mark.parametrize("name", shipped_jobs())
def test_every_shipped_job_is_valid(name: str) -> None:
    validator().validate(document_of(name))


def test_the_whole_job_with_every_default_is_valid() -> None:
    job = job_from({"name": "a", "model": {"name": "m"}}, source="job")
    document = {"name": "a", **job.model_dump(mode="json")}
    validator().validate(document)
    assert loader_says(document)[0] == job


def test_every_key_is_in_the_schema_with_its_meaning_and_an_example() -> None:
    schema = job_schema()
    definitions = schema["$defs"]
    for kind in sections(Job):
        found = schema if kind is Job else definitions[kind.__name__]
        assert set(found["properties"]) == set(kind.model_fields)
        assert found["additionalProperties"] is False
        for name, field in kind.model_fields.items():
            inner = OptionValue(field).kind
            is_section = isinstance(inner, type) and issubclass(inner, Section)
            if not is_section and inner is not SamplingParams and name != "sampling":
                assert found["properties"][name]["description"], name
                assert found["properties"][name]["examples"], name
    sampling = definitions["Sampling"]["anyOf"][0]["properties"]
    own = {field.name for field in fields(SamplingParams)} - {"max_tokens"}
    assert set(sampling) == own
    assert all(field["description"] and field["examples"] for field in sampling.values())


def leaves(schema: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Each key with its schema."""
    definitions = job_schema()["$defs"]
    for name, found in schema["properties"].items():
        inner = definitions[found["$ref"].rpartition("/")[2]] if "$ref" in found else found
        if name == "sampling":
            inner = inner["anyOf"][0]
        if "properties" in inner:
            yield from leaves(inner, (*place, name))
        else:
            yield (*place, name), inner


LEAVES = list(leaves(job_schema()))


@pytest.mark.parametrize(("place", "schema"), LEAVES, ids=[".".join(p) for p, _ in LEAVES])
def test_the_example_of_a_key_is_taken_and_is_not_its_default(
    place: tuple[str, ...], schema: dict[str, Any]
) -> None:
    (example,) = schema["examples"]
    document = base()
    if place[-1] == "n":
        put(document, (*place[:-1], "temperature"), 0.7)
    if place[-1] == "num_speculative_tokens":
        put(document, ("export", "logits"), "num_logits_to_keep")
    if place[-1] == "comp_ctx_lengths":
        put(document, ("export", "comp_ctx_lengths"), True)
        put(document, ("compile", "comp_ctx_lengths"), [512, 1024])
    if place[-1] == "prefill_rows":
        put(document, ("compile", "batch_size"), 8)
    if place == ("export", "io"):
        put(document, ("export", "continuous_batching"), False)
    put(document, place, example)
    job, said = loader_says(document)
    assert job is not None, said
    validator().validate(document)


def base() -> dict[str, Any]:
    return {"name": "mine", "model": {"name": "smollm2-135m"}}


def put(document: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for part in place[:-1]:
        inner = document.get(part)
        document[part] = inner = inner if isinstance(inner, dict) else {}
        document = inner
    document[place[-1]] = value


# -- in an editor


def test_a_job_gets_the_schema_and_stays_as_it_was(tmp_path: Path) -> None:
    job = tmp_path / "mine.yaml"
    text = shipped_jobs()["start"].read_text("utf-8")
    job.write_text(text, encoding="utf-8")
    for _ in range(2):  # once more changes nothing
        assert give_schema(job) == tmp_path / SCHEMA_NAME
        assert job.read_text("utf-8") == f"# yaml-language-server: $schema={SCHEMA_NAME}\n{text}"
        assert json.loads((tmp_path / SCHEMA_NAME).read_text("utf-8")) == job_schema()


def test_a_schema_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    job, schema = tmp_path / "mine.yaml", tmp_path / SCHEMA_NAME
    job.write_text("name: mine\n")
    schema.write_text("{}")
    with pytest.raises(UsageError, match="move it away"):
        give_schema(job)
    assert (job.read_text(), schema.read_text()) == ("name: mine\n", "{}")


def test_a_job_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no file .*none\.yaml: `qaic-ray init none` makes one"):
        give_schema(tmp_path / "none.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mine.json", '{"name": "mine"}', "write the job as YAML"),
        ("mine.yaml", "[1, 2]", "is no job"),
        ("mine.yaml", "text", "is no job"),
        ("mine.yaml", "a: [", "is not YAML"),
    ],
)
def test_what_is_no_job_is_left_alone(tmp_path: Path, name: str, text: str, words: str) -> None:
    job = tmp_path / name
    job.write_text(text)
    with pytest.raises(UsageError, match=words):
        give_schema(job)
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


# -- mutated jobs

NUMBERS = st.integers(-3, 40) | st.sampled_from([64, 128, 2048, 2**31 - 1, 2**31, 2**63, -(2**40)])
FLOATS = st.floats(-3, 130, allow_nan=False).filter(lambda f: not f.is_integer())
TEXTS = st.sampled_from(
    ["", "auto", "all", "off", "mx6", "fp8", "32+64", "32+33", "a b", "../up", "last", "x", "-"]
)


def values_for(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Right and wrong values of a key: its words, the ends of its bounds, and any others."""
    near: list[Any] = list(schema.get("examples", ()))
    for part in (schema, *schema.get("anyOf", ())):
        near += part.get("enum", ())
        for bound in ("minimum", "maximum", "exclusiveMinimum"):
            if bound in part:
                near += [part[bound], part[bound] - 1, part[bound] + 1]
    near = [v for v in near if not (isinstance(v, float) and v.is_integer())]
    one = st.sampled_from(near) if near else TEXTS
    any_one = one | NUMBERS | FLOATS | TEXTS | st.booleans() | st.none()
    listed = st.lists(any_one, max_size=4) | st.lists(one, min_size=1, max_size=3)
    objects = st.dictionaries(st.sampled_from(["1", "a", "regex", "choice"]), any_one, max_size=2)
    return one | one | any_one | listed | objects


@st.composite
def mutated_jobs(draw: st.DrawFn) -> dict[str, Any]:
    start = draw(st.sampled_from([None, *shipped_jobs()]))
    document = base() if start is None else copy.deepcopy(document_of(start))
    for _ in range(draw(st.integers(1, 3))):
        place, schema = draw(st.sampled_from(LEAVES))
        how = draw(st.integers(0, 12))
        if how == 0:
            place = (*place[:-1], draw(st.sampled_from(["unknown", "nam", "max_tokens", ""])))
        elif how == 1:
            place = place[: draw(st.integers(1, len(place)))]
        put(document, place, draw(values_for(schema)))
    if draw(st.integers(0, 20)) == 0:
        document.pop(draw(st.sampled_from(sorted(document))))
    return document


def is_converted(given: Any, dumped: Any) -> bool:
    """Whether the loader took something for another value than it is: "4" for 4, MX6 for mx6."""
    if isinstance(given, dict) and isinstance(dumped, dict):
        return any(is_converted(value, dumped.get(key)) for key, value in given.items())
    if isinstance(given, list) and isinstance(dumped, list) and len(given) == len(dumped):
        return any(map(is_converted, given, dumped))
    if not isinstance(given, list) and isinstance(dumped, list):
        return given is not None and [given] != dumped  # one value for a list of one
    same_type = {type(given), type(dumped)} in ({int, float}, {type(given)})
    return not (same_type and given == dumped)


def check_agreement(document: dict[str, Any]) -> None:
    job, said = loader_says(document)
    faults = [f"{e.json_path}: {e.message[:100]}" for e in validator().iter_errors(document)]
    note(f"{said or 'taken'}; {faults}")
    if job is None:
        assert faults or any(re.search(pattern, said) for pattern in BEYOND)
    elif faults:
        assert is_converted(document, {"name": job.name, **job.model_dump(mode="json")})


@given(mutated_jobs())
def test_the_schema_and_the_loader_agree(document: dict[str, Any]) -> None:
    check_agreement(document)


@pytest.mark.parametrize(("place", "schema"), LEAVES, ids=[".".join(p) for p, _ in LEAVES])
@settings(max_examples=max(5, settings.default.max_examples // 4))
@given(data=st.data())
def test_they_agree_on_each_key(
    place: tuple[str, ...], schema: dict[str, Any], data: st.DataObject
) -> None:
    document = base()
    put(document, place, data.draw(values_for(schema)))
    check_agreement(document)
