"""What is wrong with a command line, in one sentence: what was meant perhaps, and where it says."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from qaic_ray.files.documents import shown

# Typer has click inside it, or beside it, by its version: its classes are found by one that it
# names.
LineMistake: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

PROGRAM = "qaic-ray"

_EXTRA = re.compile(r"extra argument(?:s|\(s\))? \((.*)\)$", re.DOTALL)
_OTHER_WORDS = {
    "ls": "runs", "list": "runs", "ps": "status", "top": "status", "kill": "stop",
    "cancel": "stop", "generate": "run", "infer": "run", "chat": "run", "prompt": "run",
    "build": "compile", "convert": "export", "start": "launch", "submit": "launch",
    "check": "doctor", "info": "doctor", "cards": "devices", "tail": "logs", "new": "init",
    "diff": "compare", "resume": "run", "generateONNX.py": "export", "runModel.py": "run",
    "compileModel.sh": "compile", "join": "merge", "concat": "merge",
}  # fmt: skip
"""Commands as other programs call them."""


def sentence(error: Any) -> str:
    """What is to be said of an error of click's."""
    context = getattr(error, "ctx", None)
    if context is None:
        return f"{error.format_message().rstrip('.')}."
    return f"{_said(error, context, _name(context))} `{context.command_path} -h` says more."


def _name(context: Any) -> str:
    """A command without the program's name, which begins the sentence already."""
    program = context.find_root().command_path
    return context.command_path.removeprefix(program).strip() or PROGRAM


def _said(error: Any, context: Any, name: str) -> str:
    kind = type(error).__name__
    if kind == "NoSuchOption":
        return f"{name} has no option {error.option_name}{_near_option(error.option_name, context)}"
    if kind == "BadOptionUsage":
        return _value(error, context)
    if kind == "MissingParameter":
        about = (error.param.help or "").rstrip(".")
        return f"{name} needs {spelled(error.param)}{f' ({_lower(about)})' if about else ''}."
    if kind == "UsageError" and error.message.startswith("Got unexpected extra"):
        return _too_much(error, context, name)
    if kind == "UsageError" and error.message.startswith("Missing command"):
        return f"{name} needs a command."
    return f"{error.format_message().rstrip('.')}."


def no_command(context: Any, typed: str, known: Sequence[str]) -> str:
    """What is said of a word that is none of a group's commands."""
    name, path = _name(context), context.command_path
    no = f"There is no command {shown(typed)}{'' if name == PROGRAM else f' of {name}'}"
    near = _OTHER_WORDS.get(typed)
    near = near if near in known else _nearest(typed, known)
    return f"{no}{f'; did you mean {near}?' if near else '.'} `{path} -h` lists them."


def spelled(param: Any) -> str:
    """A parameter by the name that people learn."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper()).strip("[]")
    return str(param.opts[0])


def _near_option(typed: str, context: Any) -> str:
    options = [p for p in context.command.get_params(context) if not getattr(p, "hidden", True)]
    # An alias that is near stands for the name that people learn.
    learnt = {name: p.opts[0] for p in options for name in p.opts if name.startswith("--")}
    learnt |= {name: name for p in options for name in p.secondary_opts}
    program = context.find_root()
    if typed in _names(program.command, program):
        return f"; it stands before the command: `{program.command_path} {typed} {_name(context)}`."
    for name, command in getattr(context.command, "commands", {}).items():
        if typed in _names(command, context):
            return f"; it stands behind a command: `{context.command_path} {name} {typed}`."
    near = _nearest(typed.replace("_", "-"), learnt)
    return f"; did you mean {learnt[near]}?" if near else "."


def _names(command: Any, context: Any) -> set[str]:
    """Every option of a command, by each of its names."""
    return {name for param in command.get_params(context) for name in param.opts}


def _value(error: Any, context: Any) -> str:
    name = error.option_name
    params = context.command.get_params(context)
    param = next((p for p in params if name in (*p.opts, *p.secondary_opts)), None)
    if param is None or param.is_flag:
        return f"{name} takes no value."
    return f"{name} needs a value behind it."


def _too_much(error: Any, context: Any, name: str) -> str:
    found = _EXTRA.search(error.message)
    extra = found[1] if found else ""
    arguments = [
        spelled(param)
        for param in context.command.get_params(context)
        if param.param_type_name == "argument"
    ]
    takes = f"takes {' and '.join(arguments)}" if arguments else "takes options only"
    quoted = " (a text of several words stands between quotes)" if len(arguments) > 1 else ""
    return f"{name} {takes}, and has no place for {shown(extra)}{quoted}."


def _nearest(word: str, known: Iterable[str]) -> str | None:
    # Without dashes, which all options have in common: `--model` is no near word of `--nope`.
    bare = {name.lstrip("-"): name for name in known}
    found = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.6)
    return bare[found[0]] if found else None


def _lower(text: str) -> str:
    """A help text within a sentence; a name keeps its capitals."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]
