"""An option is declared once: a flag of two commands is one declaration, or means two things.

What an option says is read where it is written, so that a copy of its words is found too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pydantic import BaseModel

import qaic_ray
from qaic_ray.option_types import Section, opt, same

PACKAGE = Path(qaic_ray.__file__).parent

OTHER_MEANING = {
    "--address": "a cluster's head for who joins it, its dashboard for who asks it for jobs",
    "--batch-size": "many for a grid, one for a program that is made",
    "--comp-ctx-lengths": "an input of a model; the contexts of a program",
    "--ctx-len": "what a grid compiles; what a run expects of its program",
    "--folder": "of what a server keeps; where a job's paths start; of the demonstration",
    "--model-name": "the model that runs; the one of a QPC that is served",
    "--output": "each command's own result",
    "--sku": "of emulated cards; of the cards that an artifact is for",
}
"""Flags that different sections declare for themselves, and why that is right."""


class Declared(NamedTuple):
    """A declaration as it is written: its flag, what it says, and where."""

    flag: str
    help: str
    where: str


def declarations() -> Iterator[Declared]:
    """Those of sections (`opt(default, help, ...)`), and of commands (`typer.Option(...)`)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if PACKAGE / "emulator" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                yield from of_field(node, node.value, path.name)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option":
                yield from of_command(node, path.name)


def of_field(node: ast.AnnAssign, call: ast.Call, file: str) -> Iterator[Declared]:
    if ast.unparse(call.func) == "opt":
        named = {word.arg: word.value for word in call.keywords}
        flag: object = f"--{ast.unparse(node.target).replace('_', '-')}"
        if "flag" in named:
            flag = ast.literal_eval(named["flag"])
        if flag is not None:  # else it is a job's key only
            yield Declared(str(flag), ast.unparse(call.args[1]), f"{file}:{node.lineno}")


def of_command(call: ast.Call, file: str) -> Iterator[Declared]:
    words = [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
    for flag in [word for word in words if word.startswith("--")]:  # none: it is made of a section
        (told,) = [word.value for word in call.keywords if word.arg == "help"]
        yield Declared(flag.partition("/")[0], ast.unparse(told), f"{file}:{call.lineno}")


def test_a_flag_is_declared_once_or_means_another_thing() -> None:
    found = defaultdict(list)
    for one in declarations():
        found[one.flag].append(one.where)
    assert len(found) > 60  # the scan sees them
    several = {flag: where for flag, where in found.items() if len(where) > 1}
    assert {f: where for f, where in several.items() if f not in OTHER_MEANING} == {}
    assert OTHER_MEANING.keys() - several.keys() == set()


def test_no_two_declarations_say_the_same() -> None:
    found = defaultdict(list)
    for one in declarations():
        found[one.help].append(one.where)
    assert {told: where for told, where in found.items() if len(where) > 1} == {}


# -- how an option is taken over


class First(Section):
    """Declares an option."""

    number: int = opt(7, "How many.", short="-n", sample=8, group="Some")


class Second(Section):
    """Has it too."""

    number: int = same(First, "number", default=9, group="Others")


def test_what_is_taken_over_is_as_it_was_but_for_what_is_named() -> None:
    assert (First().number, Second().number) == (7, 9)
    first, second = (kind.model_fields["number"] for kind in (First, Second))
    assert first.description == second.description == "How many."
    assert first.json_schema_extra == {"opt": {"short": "-n", "sample": 8, "group": "Some"}}
    assert second.json_schema_extra == {"opt": {"short": "-n", "sample": 8, "group": "Others"}}


@pytest.mark.parametrize("kind", [First, Second])
def test_neither_is_changed_by_the_other(kind: type[BaseModel]) -> None:
    assert kind.model_validate({"number": 3}).model_dump() == {"number": 3}
