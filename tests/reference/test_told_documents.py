"""Fields of documents on the pages: those that the documents have, no more and no less."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import FolderMaker

from qaic_ray.cards.inventory import NodeCards
from qaic_ray.errors import RowError
from qaic_ray.formats import row_fields
from qaic_ray.formats.row_reader import Draft, OwnFields
from qaic_ray.inspect.run_status import RunStatus
from qaic_ray.metrics import Measurement
from qaic_ray.pipeline import run_record
from qaic_ray.pipeline.submit_step import JobStatus
from qaic_ray.reference.answers import ANSWERS, DEVICE, JOB_STATUS, RUN_STATUS
from qaic_ray.reference.markdown import Fields, Note
from qaic_ray.reference.rows import PROMPT, ROW, failed_row, sample_row
from qaic_ray.reference.run_files import COMPARISON, EVENTS, RAN, REPORT
from qaic_ray.report.comparison import compare
from qaic_ray.report.document import redraw
from qaic_ray.rows import ErrorClass, Prompt, Row, Sample
from qaic_ray.runs import history
from qaic_ray.runs.delivery import Proof
from qaic_ray.runs.report import RunSummary
from qaic_ray.runs.result import FleetResult
from qaic_ray.sampling_params import FIELDS, SamplingParams, TokenLogprob
from qaic_ray.sdk import Device


def paths(document: Any, told: Fields, place: str = "") -> Iterator[tuple[str, Any]]:
    """Where the values of a document are, down to what the table names."""
    inside = any(name.startswith((f"{place}.", f"{place}[].")) for name in told)
    if isinstance(document, dict) and (inside or not place):
        for key, value in document.items():
            yield from paths(value, told, f"{place}.{key}" if place else key)
    elif isinstance(document, list) and inside:
        for item in document:
            yield from paths(item, told, f"{place}[]")
    else:
        yield place, document


def check(document: Any, told: Fields) -> set[str]:
    """That each value of a document is told, with an example of its type; what it has."""
    found = set()
    for place, value in paths(document, told):
        assert place in told, f"{place} is not told"
        example = told[place].example
        same = isinstance(value, type(example)) or isinstance(example, type(value))
        numbers = isinstance(value, int | float) and isinstance(example, int | float)
        assert value is None or example is None or same or numbers, place
        found.add(place)
    return found


def every_table() -> Iterator[tuple[str, Fields]]:
    yield from {"prompt": PROMPT, "row": ROW, "report": REPORT, "ran": RAN}.items()
    yield "comparison", COMPARISON
    yield from ((name, told) for name, (_, told) in EVENTS.items())
    yield from ((name, told) for name, (_, told) in ANSWERS.items())


TABLES = list(every_table())


@pytest.mark.parametrize(("name", "told"), TABLES, ids=[name for name, _ in TABLES])
def test_a_meaning_is_a_sentence(name: str, told: dict[str, Note]) -> None:
    for field, (meaning, example, _) in told.items():
        assert meaning[0].isupper() or meaning[0] == "`", f"{name}: {field}"
        assert meaning.endswith("."), f"{name}: {field}"
        json.dumps(example)


# -- rows


def test_every_field_that_is_read_of_a_prompt_is_told() -> None:
    known = {*row_fields.PROMPT, *row_fields.CHAT, *row_fields.SPECIAL, "id"}
    assert known == set(PROMPT)
    assert set(FIELDS) - {"max_completion_tokens"} == {f.name for f in fields(SamplingParams)}


BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "best_of": {"n": 1},
    "id": {},
}


@pytest.mark.parametrize("name", PROMPT)
def test_the_example_of_a_field_is_taken(name: str) -> None:
    is_chat = name in (*row_fields.CHAT, "messages")
    turn = {"role": "user", "content": "Why?"}
    base: dict[str, Any] = {"messages": [turn]} if is_chat else {"prompt": "Why?"}
    document = base | BESIDE.get(name, {}) | {name: PROMPT[name].example}
    draft = Draft(0, json.dumps(document))
    prompt = OwnFields(SamplingParams()).read_row(draft, document)
    assert isinstance(prompt, Prompt)


@pytest.mark.parametrize("name", row_fields.NOT_OFFERED)
def test_a_field_that_is_refused_says_what_to_do(name: str) -> None:
    refused = row_fields.NOT_OFFERED[name]
    assert refused.instead
    with pytest.raises(RowError, match="is not offered"):
        refused.check(name, {"some": "thing"}, only_ours=True)


def full_row() -> Row:
    """A row that has every key."""
    token = TokenLogprob(7, -0.1, ((7, -0.1),))
    sample = Sample(" So.", (7,), sample_row().finish_reason)
    return replace(
        sample_row(),
        messages=({"role": "user", "content": "Why?"},),
        stop_reason="User:",
        reused_tokens=8,
        logprobs=(token,),
        prompt_logprobs=(None, token),
        choices=(sample,),
        error="It is so.",
        error_class=ErrorClass.DEVICE,
    )


def test_every_key_of_a_row_is_told() -> None:
    assert check(full_row().to_json(), ROW) == set(ROW)
    assert list(full_row().to_json()) == list(ROW)
    check(failed_row().to_json(), ROW)


# -- a run's files


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("told")
    for name, cards in (("before", 2), ("after", 4)):
        maker = FolderMaker(folder / name, cards=cards)
        maker.session(300)
        maker.session(30, pause_s=100.0)
    return [folder / "before", folder / "after"]


def summary(folder: Path) -> RunSummary:
    proof = Proof(3, 2, 1, "9f", "5d")
    result = FleetResult((), Measurement(), None, {})
    return RunSummary(result, "mine", "emulated SDK", folder, "m", "q", proof)


def test_every_key_of_a_report_is_told(runs: list[Path]) -> None:
    document = redraw(runs[0])
    ran = document["ran"]
    assert check(ran, RAN) | {"numerics"} == set(RAN)
    found = check(document, REPORT) | check(summary(runs[0]).document(), REPORT)
    assert found - {"proof", "energy"} == set(REPORT) - {"proof", "energy"}


def test_every_key_of_a_comparison_is_told(runs: list[Path]) -> None:
    assert check(compare(runs), COMPARISON) == set(COMPARISON)


def written_events(module: Any) -> Iterator[tuple[str, set[str]]]:
    """The events that the code of a module writes, and their keys that stand there."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        is_write = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_write and node.func.attr == "write" and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, {word.arg for word in node.keywords if word.arg}


def test_every_event_is_told() -> None:
    found: dict[str, set[str]] = {}
    for event, keys in [*written_events(history), *written_events(run_record)]:
        found.setdefault(event, set()).update(keys)
    assert set(found) == set(EVENTS)
    for event, keys in found.items():
        assert keys <= set(EVENTS[event][1]), event
        if event != "session_started":  # what is known of the program comes to these
            assert keys == set(EVENTS[event][1]), event


def test_what_a_session_begins_with_is_told(runs: list[Path]) -> None:
    begun = next(history.read_history(runs[0]))
    assert set(begun) - {"at", "event"} <= set(EVENTS["session_started"][1])


# -- what --json prints


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def test_what_status_prints_is_told() -> None:
    status = RunStatus("runs/mine")
    assert set(status.to_json()) == set(RUN_STATUS)
    assert names_of(JobStatus) == set(JOB_STATUS)


def test_what_devices_prints_is_told() -> None:
    assert names_of(Device) == set(DEVICE)
    told = ANSWERS["devices --address"][1]
    inner = {name.split(".")[1].removesuffix("[]") for name in told if name.startswith("nodes[].")}
    assert inner == names_of(NodeCards)
