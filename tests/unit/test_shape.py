"""The house rules that a machine can count: docstrings, sizes, room names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qaic_ray

PACKAGE = Path(qaic_ray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NO_ROOM = {"utils", "util", "common", "helpers", "base", "manager"}


def names(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_file_says_what_it_is_for_and_keeps_its_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    assert len(text.splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            lines -= len((ast.get_docstring(node) or "").splitlines())
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_no_room_without_a_purpose() -> None:
    found = {names(path) for path in FILES if path.stem in NO_ROOM or path.parent.name in NO_ROOM}
    assert found == set()


def test_the_architecture_page_names_every_file_outside_the_emulator() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("## Where things are")[1].split("```")[1]
    apart = {PACKAGE / "emulator"}
    expected = {
        path.name for path in FILES if path.name != "__init__.py" and not apart & set(path.parents)
    }
    assert {name for name in expected if name not in tree} == set()


def test_the_emulators_rooms_stay_small_and_its_classes_have_names_of_their_own() -> None:
    files = [path for path in FILES if PACKAGE / "emulator" in path.parents]
    assert len(files) <= 44
    for room in {path.parent for path in files}:
        inside = [path for path in files if path.parent == room]
        assert len(inside) <= 15, room
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in inside)
        assert lines <= 3000, room
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    classes = [n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    assert sorted(set(classes)) == sorted(classes)
