"""The house rules that a machine can count: docstrings, sizes, room names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qaic_ray

PACKAGE = Path(qaic_ray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TOP = {
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "benchmarks",
    "configs",
    "constraints.txt",
    "docs",
    "examples",
    "jobs",
    "mkdocs.yml",
    "pyproject.toml",
    "qaic_ray",
    "scripts",
    "tests",
}
"""What stands beside the package; what a trial leaves there is not committed."""
NO_ROOM = {"utils", "util", "common", "helpers", "base", "manager"}


def names(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    """Every file of the package, parsed once."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=names)
def test_file_says_what_it_is_for_and_keeps_its_size(
    trees: dict[Path, ast.Module], path: Path
) -> None:
    tree = trees[path]
    assert ast.get_docstring(tree), "the module has no docstring"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            lines -= len((ast.get_docstring(node) or "").splitlines())
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_nothing_else_stands_at_the_top() -> None:
    root = PACKAGE.parent
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    kept = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert {name.partition("/")[0] for name in kept.stdout.splitlines()} <= TOP


def test_no_room_without_a_purpose() -> None:
    found = {names(path) for path in FILES if path.stem in NO_ROOM or path.parent.name in NO_ROOM}
    assert found == set()


def test_the_architecture_page_names_every_file_outside_the_emulator() -> None:
    page = (PACKAGE.parent / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("## Where things are")[1].split("```")[1]
    apart = {PACKAGE / "emulator"}
    expected = {
        path.name for path in FILES if path.name != "__init__.py" and not apart & set(path.parents)
    }
    assert {name for name in expected if name not in tree} == set()


@pytest.mark.parametrize("room", sorted({path.parent for path in FILES}), ids=names)
def test_a_room_stays_small(room: Path) -> None:
    inside = [path for path in FILES if path.parent == room]
    assert len(inside) <= 15
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in inside) <= 3000


@pytest.mark.parametrize("apart", [False, True], ids=["core", "emulator"])
def test_a_class_has_a_name_of_its_own(trees: dict[Path, ast.Module], apart: bool) -> None:
    inside = [t for path, t in trees.items() if (PACKAGE / "emulator" in path.parents) is apart]
    classes = [n.name for tree in inside for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    assert sorted(set(classes)) == sorted(classes)


def test_the_emulator_does_not_grow_files() -> None:
    rooms = [path.parent for path in FILES if PACKAGE / "emulator" in path.parents]
    step = [room for room in rooms if room.name in ("kernels", "step")]
    assert len(step) <= 22
    assert len(rooms) - len(step) <= 83


def test_a_module_says_what_it_is_in_few_words(trees: dict[Path, ast.Module]) -> None:
    said = {path: ast.get_docstring(tree) or "" for path, tree in trees.items()}
    assert {names(path): n for path, text in said.items() if (n := len(text.split())) > 120} == {}


def test_the_picture_of_the_floors_is_the_imports() -> None:
    floors = PACKAGE.parent / "scripts" / "floors"
    done = subprocess.run(
        [sys.executable, str(floors), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
