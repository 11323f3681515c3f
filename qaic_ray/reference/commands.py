"""The page of commands: each option of each, with its default and an example."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from qaic_ray.cli.commands import command_tree
from qaic_ray.cli.flags.flag import Flag
from qaic_ray.cli.flags.page import HelpEntry
from qaic_ray.reference.markdown import block, code, page, section, table
from qaic_ray.shipped.job_schema import sample_of

TYPED = {
    "PATH": "smollm2-135m-kv",
    "JOB": "smollm2",
    "MODEL_DIR": "smollm2-135m-kv",
    "NAME": "mine",
    "RUN...": "runs/before runs/after",
    "FOLDER": "./monitoring",
    "WHAT": "smollm2-20261129-090500",
    "A": "runs/a/bundles/card-0",
    "B": "runs/b/bundles/card-0",
    "RUN": "smollm2-20261129-090500",
    "ROW": "0",
    "PREFIX": "./sdk",
    "COMMAND": "-- qaic-util -q",
    "--set": "--set run.generation_len=64",
    "--from": "--from chat",
    "--model": "--model org/model",
}
"""Examples of what is no option of the tree, by its name."""


def commands_page() -> str:
    """docs/reference/commands.md."""
    return page(
        "Commands",
        "A command is typed as `qaic-ray COMMAND`. `qaic-ray help COMMAND` prints the same as this "
        "page. A flag of several words may be written with underscores too, as in the old scripts. "
        "What stands behind `also` is another name of the flag. An option that is not given has "
        "its default. `qaic-ray --install-completion` lets a shell complete commands, options and "
        "names of runs.",
        section("Before the command", _table(*_entries("", command_tree()))),
        *(
            section(
                f"qaic-ray {name}",
                command.help or "",
                block("sh", command.epilog or ""),
                _table(*_entries(name, command)),
            )
            for name, command in all_commands()
        ),
    )


def all_commands() -> Iterator[tuple[str, Any]]:
    """Each command that can be run, in the order of use."""
    top = command_tree()
    for name in top.list_commands(None):
        command = top.commands[name]
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", c) for inner, c in command.commands.items())
        else:
            yield name, command


def options_of_command(name: str, command: Any) -> Iterator[tuple[HelpEntry, str]]:
    """What the help has of each option, and how it is written on a line.

    Raises:
        LookupError: an option has no example.
    """
    context = command.make_context(name or "qaic-ray", [], resilient_parsing=True)
    entries = (entry for _, panel in command.page(context).panels for entry in panel)
    call = getattr(command, "_call", None)
    flags = {flag.shown_names[-1]: flag for flag in call.flags if flag.shown_names} if call else {}
    places = (
        {flag.opt.argument.strip("[]"): flag for flag in call.flags if flag.opt.hidden}
        if call
        else {}
    )
    for entry in entries:
        last = entry.names[-1].split(" ")[0]
        if last in flags:
            yield entry, flag_example(flags[last])
        elif entry.names[0] in places:
            flag = places[entry.names[0]]
            yield entry, _word(flag, _sample(flag))
        else:
            yield entry, _typed(entry)


def flag_example(flag: Flag) -> str:
    """A flag with a value, as a shell takes it."""
    if flag.value.kind is bool:
        return f"--no-{flag.flag[2:]}" if flag.default is True else flag.flag
    if flag.opt.bare:
        return f"{flag.flag} {_sample(flag)}"
    return f"{flag.flag} {_word(flag, _sample(flag))}"


def _sample(flag: Flag) -> Any:
    if flag.opt.example and not flag.opt.repeated:
        return flag.opt.example
    return sample_of(flag.opt, flag.value, flag.default)


def _word(flag: Flag, sample: Any) -> str:
    if isinstance(sample, list | tuple):
        sample = sample[0] if flag.opt.repeated else ",".join(map(str, sample))
    if isinstance(sample, dict):
        sample = json.dumps(sample)
    return shlex.quote(str(sample))


def _typed(entry: HelpEntry) -> str:
    """Of an option that is no section's: a switch, or what the table above has."""
    names = [name.split(" ")[0] for name in entry.names]
    for name in names:
        if name in TYPED:
            return TYPED[name]
    if " " not in entry.names[-1] and names[-1].startswith("--"):
        return names[-1]
    raise LookupError(f"{entry.names} has no example: give it one in TYPED.")


def _entries(name: str, command: Any) -> Iterator[tuple[HelpEntry, str]]:
    found = _of_root(command) if not name else options_of_command(name, command)
    return ((entry, example) for entry, example in found if "--help" not in entry.names)


def _of_root(command: Any) -> Iterator[tuple[HelpEntry, str]]:
    from qaic_ray.cli.flags.page import entry_of

    for param in command.get_params(command.make_context("qaic-ray", [], resilient_parsing=True)):
        if "--help" not in param.opts:
            entry = entry_of(param)
            yield entry, entry.names[-1].split(" ")[0]


def _table(*entries: tuple[HelpEntry, str]) -> Iterator[str]:
    rows = (
        (code(", ".join(entry.names)), text_of(entry), default_of(entry), code(example))
        for entry, example in entries
    )
    return table(("option", "meaning", "default", "example"), rows)


def default_of(entry: HelpEntry) -> str:
    """As the help has it; a dash where there is none."""
    said = [note.removeprefix("default: ") for note in entry.notes if note.startswith("default: ")]
    return "required" if "required" in entry.notes else "".join(said) or "–"


def text_of(entry: HelpEntry) -> str:
    """What it does, its other names, and the variable that is read in its place."""
    others = [n for n in entry.notes if not n.startswith("default: ") and n != "required"]
    return " ".join([entry.text, *(f"[{note}]" for note in others)])
