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
    # The emulated SDK's util.py is named for the vendor's qaic-util.
    found = {names(path) for path in FILES if path.stem in NO_ROOM or path.parent.name in NO_ROOM}
    assert found <= {"emulator/util.py"}


def test_the_architecture_page_names_every_file_outside_the_emulator() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("## Where things are")[1].split("```")[1]
    apart = {PACKAGE / "emulator"}
    expected = {
        path.name for path in FILES if path.name != "__init__.py" and not apart & set(path.parents)
    }
    assert {name for name in expected if name not in tree} == set()
