"""Variables, exit codes, errors and routes on the pages: all that the code has."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import qaic_ray
from qaic_ray import errors
from qaic_ray.environment import GROUPS
from qaic_ray.errors import ExitCode, QaicRayError
from qaic_ray.reference.environment import environment_page
from qaic_ray.reference.errors import (
    EXAMPLES,
    ROOMS,
    code_meanings,
    error_classes,
    errors_page,
    exit_codes_page,
    sentences,
)
from qaic_ray.reference.http import BODIES, field_row, http_page, routes
from qaic_ray.serve.api_errors import STATUSES


@cache
def page_of_errors() -> str:
    return errors_page()


PACKAGE = Path(qaic_ray.__file__).parent
OUR_OWN = {"QAIC_RAY_SESSION", "QAIC_EMULATOR_TIMING_ACTIVE"}
"""Set by a process of ours for those that it starts, and by nobody else."""
KNOWN = {variable.name: variable for group in GROUPS.values() for variable in group}


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    """Every module of the package."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def constants(tree: ast.AST) -> dict[str, tuple[str, ...]]:
    """Names that stand for a text, or for several."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            texts = [v.value for v in values if isinstance(v, ast.Constant)]
            if texts and all(isinstance(text, str) for text in texts):
                found[node.targets[0].id] = tuple(map(str, texts))
    return found


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def asked(tree: ast.AST) -> Iterator[ast.expr]:
    """What a module asks its environment for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            owner, name = node.func.value, node.func.attr
            if is_environ(owner) and name in ("get", "setdefault", "pop"):
                yield node.args[0]
            if name == "getenv":
                yield node.args[0]
        elif isinstance(node, ast.Subscript) and is_environ(node.value):
            yield node.slice
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            yield node.left


def read_variables(trees: dict[Path, ast.Module]) -> set[str]:
    of_modules = {path: constants(tree) for path, tree in trees.items()}
    of_any = {name: texts for own in of_modules.values() for name, texts in own.items()}
    found: set[str] = set()
    for path, tree in trees.items():
        for node in asked(tree):
            if isinstance(node, ast.Constant):
                found.add(str(node.value))
            elif isinstance(node, ast.Name):
                own = of_modules[path].get(node.id)
                found.update(own or of_any.get(node.id, ()))
    return set(filter(None, found))


def test_every_variable_that_is_read_is_told(trees: dict[Path, ast.Module]) -> None:
    found = read_variables(trees)
    assert {"QAIC_RAY_SDK", "QAIC_EMULATOR_TIMING", "QAIC_EMULATOR_FAULTS", "TERM"} <= found
    assert found - OUR_OWN <= set(KNOWN)


def test_every_variable_that_is_told_is_in_the_code(trees: dict[Path, ast.Module]) -> None:
    """Or, where another library reads it, in a page that says for what."""
    pages = (p for p in (PACKAGE.parent / "docs").rglob("*.md") if p.parent.name != "reference")
    own = PACKAGE / "environment.py"
    text = "".join(p.read_text("utf-8") for p in (*trees, *pages) if p != own)
    left = {name for name in KNOWN if name not in text and not name[4:].islower()}
    assert left - {"GOOGLE_APPLICATION_CREDENTIALS"} == set()
    page = environment_page()
    assert all(f"`{name}`" in page for name in KNOWN)


def test_a_variable_has_its_meaning_default_and_example() -> None:
    for variable in KNOWN.values():
        assert variable.meaning.endswith("."), variable.name
        assert variable.default, variable.name
        assert variable.example, variable.name


# -- exit codes and errors


def test_every_exit_code_is_told_with_a_case() -> None:
    page = exit_codes_page()
    about = code_meanings()
    for code in ExitCode:
        assert f"| `{code.value}` | {code.name} | {about[code.name]} | {EXAMPLES[code]} |" in page


def test_every_class_of_errors_is_told() -> None:
    page = page_of_errors()
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, QaicRayError):
            assert kind in error_classes()
            assert f"| `{name}` |" in page


def matched_by_tests() -> Iterator[str]:
    """Plain texts that tests match errors of ours with."""
    names = "|".join(kind.__name__ for kind in error_classes())
    called = re.compile(rf"raises\((?:{names}), match=\"([^\"\\]{{12,}})\"")
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for text in called.findall(path.read_text(encoding="utf-8")):
            if not re.search(r"[\^$*+?\[\]{}|()]|\.[^ ]", text):
                yield text


def test_sentences_that_tests_meet_are_on_the_page() -> None:
    """Those that fill nothing of the caller's in; the others are met with another value."""
    plain = re.sub("‹.*?›", "‹›", page_of_errors().replace("\\", ""))
    assert len(sentences()) > 400
    assert len({text for text in matched_by_tests() if text in plain}) > 40


@pytest.mark.parametrize(
    "typed",
    [
        "There is no job file ‹given› here, and none of that name comes with qaic-ray",
        "Give a model and a prompt, like",
        "The number of NSPs must be from 1 to",
        "cannot be changed in the middle of a run",
        "The prompt is empty.",
        "is not a language model with its KV cache as inputs",
    ],
)
def test_a_sentence_that_people_meet_is_found(typed: str) -> None:
    assert typed in page_of_errors().replace("\\", "")


def test_every_error_of_a_request_is_found_by_its_room(trees: dict[Path, ast.Module]) -> None:
    """A room whose errors nobody sorted would be left out."""
    names = {kind.__name__ for kind in error_classes()}
    for path, tree in trees.items():
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", "")
                assert name not in names or room in ROOMS, f"{path}: {name}"


# -- routes


def test_every_route_is_told() -> None:
    page = http_page()
    found = list(routes())
    assert len(found) > 15
    for method, path, about in found:
        assert f"| `{method} {path}` |" in page
        assert about, path


def test_every_status_of_the_server_is_told(trees: dict[Path, ast.Module]) -> None:
    text = "".join(p.read_text("utf-8") for p in trees if PACKAGE / "serve" in p.parents)
    used = set(map(int, re.findall(r"ApiError\(\s*(\d{3})", text)))
    assert used <= set(STATUSES)
    assert all(f"| `{status}` |" in page_of_errors() for status in STATUSES)


FIELDS = [(kind, name) for kinds in BODIES.values() for kind in kinds for name in kind.model_fields]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{k.__name__}.{n}" for k, n in FIELDS])
def test_a_field_of_a_body_has_a_meaning_and_an_example_that_is_taken(
    kind: type[BaseModel], name: str
) -> None:
    _, meaning, _, example = field_row(kind, name)
    assert meaning
    document: dict[str, Any] = {
        other: field.examples[0]
        for other, field in kind.model_fields.items()
        if field.is_required() and field.examples
    }
    document[name] = json.loads(example.strip("` "))
    kind.model_validate(document)
