"""The commands of a block, held against the command line, the Makefile and the scripts."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
import yaml
from command_lines import is_group
from page_blocks import ROOT, Block

from qaic_ray.cli.commands import app
from qaic_ray.errors import QaicRayError
from qaic_ray.pipeline.job import load_job
from qaic_ray.shipped.jobs import shipped_jobs

_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1(.*?\n)(?:.*?\n)??\2\n", re.DOTALL)
_BETWEEN = {"&&", "||", ";", "|", "&", "(", ")", "$(", "\n", "do", "then", "until", "while", "!"}
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*$|\.\.\.$")


def command_words(text: str) -> Iterator[list[str]]:
    """Each command of some lines of shell, in words; words that redirect are left out."""
    text = _HEREDOC.sub(r"\3", text).replace("\\\n", " ")
    for line in text.splitlines():
        yield from _of_line(line)
        for inner in re.findall(r"\$\(([^()]*)\)", line):
            yield from _of_line(inner)


def _of_line(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&<>")
    lexer.whitespace_split = True
    words: list[str] = []
    skipped = False
    for word in lexer:
        if word in _BETWEEN:
            if words:
                yield words
            words = []
        elif skipped or set(word) <= set("<>&"):
            skipped = not skipped
            if skipped and words and words[-1] in ("1", "2"):
                words.pop()
        elif words or not re.match(r"[A-Za-z_]\w*=", word):
            words.append(word)
    if words:
        yield words


def check_commands(block: Block, files: Sequence[str]) -> None:
    """Hold the commands of a block against what there is.

    Args:
        block: of sh or console.
        files: that the page has saved so far.

    Raises:
        AssertionError: a command, option, value, target, script or extra that there is not.
    """
    for command in block.commands:
        for words in command_words(command.text):
            program, *rest = words
            if program == "qaic-ray":
                _parsed(rest, block.page, exits=block.notes.get("exit code"))
            elif program == "make":
                _made(rest)
            elif program == "pip" and rest[:1] == ["install"]:
                _installed(rest[1:])
            elif re.match(r"(\./)?scripts/\w+$", program):
                assert (ROOT / program).is_file(), f"there is no {program}"
            elif program in ("python", "python3", ".venv/bin/python") and rest[:1]:
                _is_there(rest[0], files)


@cache
def _program() -> Any:
    """The command line, in which every command only reads its options."""
    return typer.main.get_command(app)


def _parsed(words: Sequence[str], page: Path, *, exits: str | None) -> None:
    """The command and its options, read and checked by the command line itself."""
    command, rest = _program(), [word for word in words if word != "--debug"]
    asks_for_help = rest[:1] == ["help"] or bool({"-h", "--help"} & set(rest))
    rest = rest[rest[:1] == ["help"] :]
    while is_group(command) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    if is_group(command) or asks_for_help:
        return
    try:
        context = command.make_context(" ".join(words), rest)
        command._call._function = _only_read
        command.invoke(context)
    except Exception as error:
        if exits:
            return
        message = getattr(error, "message", str(error))
        raise AssertionError(f"qaic-ray {shlex.join(words)}: {message}") from error
    assert context.args == [], f"{words}: {context.args}"
    if command.name in ("launch", "plan") and not exits:
        _job_is_read(context.params, words, page)


def _only_read(**_: object) -> None:
    """In place of what a command does."""


def _job_is_read(params: dict[str, Any], words: Sequence[str], page: Path) -> None:
    """The keys that `--set` names, where the job is one that comes along."""
    sets = [after for word, after in pairwise(words) if word == "--set"]
    name = next((str(value) for value in params.values() if str(value) in shipped_jobs()), None)
    if name is None:
        return
    try:
        load_job(shipped_jobs()[name], sets)
    except QaicRayError as error:
        raise AssertionError(f"{page.name}: {shlex.join(words)}: {error}") from error


@cache
def _targets() -> frozenset[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([\w-]+):", text, re.MULTILINE))


def _made(words: Sequence[str]) -> None:
    for word in words:
        assert "=" in word or word in _targets(), f"make has no {word}"


@cache
def _extras() -> frozenset[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return frozenset(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def _installed(words: Sequence[str]) -> None:
    for word in words:
        found = re.match(r"(?:\.|qaic[-_]ray[^\[]*)\[([\w,]+)\]", word)
        asked = set(found.group(1).split(",")) if found else set()
        assert asked <= _extras(), f"qaic-ray has no extra {asked - _extras()}"


def _is_there(word: str, files: Sequence[str]) -> None:
    if word.startswith("-") or _PLACEHOLDER.match(word):
        return
    assert word in files or (ROOT / word).is_file(), f"nobody has written {word}"


def check_text(block: Block) -> None:
    """Read a block that is no command: a program, YAML, JSON.

    Raises:
        AssertionError: it cannot be read, or names what `qaic_ray` has not.
    """
    try:
        if block.kind == "python":
            _names_are_there(ast.parse(block.text))
        elif block.kind == "yaml":
            yaml.safe_load(block.text)
        elif block.kind == "json":
            json.loads(block.text)
        elif block.kind == "jsonl":
            for line in block.text.splitlines():
                json.loads(line)
    except (SyntaxError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise AssertionError(f"{block.place}: {error}") from error


def _names_are_there(program: ast.Module) -> None:
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qaic_ray"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "qaic_ray"
        ):
            module = importlib.import_module("qaic_ray")
            assert hasattr(module, node.attr), f"qaic_ray has no {node.attr}"
