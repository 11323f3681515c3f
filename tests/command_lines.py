"""The commands of `qaic-ray` as typer has them, for tests that ask something of each."""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

import typer

from qaic_ray.cli.commands import app


@cache
def of_name(name: str) -> Any:
    """The command that words name; the whole program for none."""
    command = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    return command


def is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def all_names() -> list[str]:
    """Of every group and command; the first is the program's own."""

    def below(name: str) -> list[str]:
        command = of_name(name)
        inner = command.commands if is_group(command) else ()
        return [name, *(found for word in inner for found in below(f"{name} {word}".strip()))]

    return below("")


def context_of(name: str) -> Any:
    """As if the words had been typed, and nothing behind them."""
    context = None
    words = name.split()
    for depth in range(len(words) + 1):
        command = of_name(" ".join(words[:depth]))
        word = words[depth - 1] if depth else "qaic-ray"
        context = command.make_context(word, ["x"], parent=context, resilient_parsing=True)
    return context


def examples_of(name: str) -> list[str]:
    """The lines of shell that its help page has."""
    return (of_name(name).epilog or "").splitlines()


def words_of(example: str) -> list[str]:
    """The words of a command line behind `qaic-ray`, also of one within `eval "$( )"`."""
    words = shlex.split(example)
    if words[0] == "eval":
        (inner,) = words[1:]
        words = shlex.split(inner.removeprefix("$(").removesuffix(")"))
    assert words[0] == "qaic-ray"
    return words[1:]
