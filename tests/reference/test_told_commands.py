"""Commands and keys of a job on the pages: all of them, and each example is taken."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from command_lines import all_names, context_of, is_group, of_name

from qaic_ray.option_types import options_of
from qaic_ray.pipeline.job import dump_job, job_from
from qaic_ray.reference.commands import TYPED, commands_page, options_of_command
from qaic_ray.reference.job import job_page, keys_of, sections

NAMES = [name for name in all_names() if not is_group(of_name(name))]
BESIDE = {
    "[TARGET]": "smollm2-135m",
    "[MODEL]": "smollm2-135m",
}
"""What a command needs that has no entry in TYPED."""


@cache
def page_of_commands() -> str:
    return commands_page()


@cache
def page_of_jobs() -> str:
    return job_page()


def section_of(page: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_stands_there_with_every_option(name: str) -> None:
    section = section_of(page_of_commands(), f"qaic-ray {name}")
    for param in of_name(name).get_params(context_of(name)):
        if param.param_type_name == "argument" or param.hidden or "--help" in param.opts:
            continue
        spelled = [word for word in (*param.opts, *param.secondary_opts) if word.strip()]
        learnt = [word for word in spelled if word in section]
        assert learnt, param.opts


def options() -> Iterator[tuple[str, str, str]]:
    for name in NAMES:
        for entry, example in options_of_command(name, of_name(name)):
            if "--help" not in entry.names:
                yield name, entry.names[-1].split(" ")[0], example


OPTIONS = list(options())


@pytest.mark.parametrize(
    ("name", "option", "example"), OPTIONS, ids=[f"{n} {o}" for n, o, _ in OPTIONS]
)
def test_the_example_of_an_option_is_taken(
    name: str, option: str, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the call of the command's function, which is not run: every section is checked."""
    command = of_name(name)
    called: list[dict[str, Any]] = []
    monkeypatch.setattr(command._call, "_function", lambda **arguments: called.append(arguments))
    words = [*needed(name, option), *shlex.split(example)]
    words += ["--temperature", "0.7"] if option == "--n" else []  # several greedy ones are equal
    context = command.make_context("qaic-ray", words)
    context.command.invoke(context)
    assert len(called) == 1
    assert context.args == []


def needed(name: str, option: str) -> list[str]:
    """The arguments that the command asks for, without the one that is shown."""
    words: list[str] = []
    for param in of_name(name).get_params(context_of(name)):
        place = str(param.metavar or (param.name or "").upper())
        is_asked = param.required or (place in BESIDE and name in ("serve", "export"))
        if param.param_type_name == "option" and param.required and param.opts[0] != option:
            words += shlex.split(flag_named(name, param.opts[0]))
        if param.param_type_name == "argument" and is_asked and place.strip("[]") != option:
            words += shlex.split(TYPED.get(place) or BESIDE[place])
    if option in ("MODEL", "--model") and name == "export":
        return []
    return words


def flag_named(name: str, flag: str) -> str:
    """The example of an option of the same command."""
    return next(
        example
        for entry, example in options_of_command(name, of_name(name))
        if flag == entry.names[-1].split(" ")[0]
    )


# -- keys of a job


def test_every_key_of_a_job_stands_there() -> None:
    page = page_of_jobs()
    job = job_from({"name": "a", "model": {"name": "m"}}, source="job")
    document = yaml.safe_load(dump_job(job))

    def check(place: str, part: dict[str, Any]) -> None:
        section = section_of(page, place or "The job itself")
        for name, value in part.items():
            if f"\n## {place}{'.' if place else ''}{name}\n" in page:
                check(f"{place}{'.' if place else ''}{name}", value)
            else:
                assert f"| `{name}` |" in section, f"{place}.{name}"

    check("", document)


def test_the_blocks_of_sections_are_the_defaults() -> None:
    document: dict[str, Any] = {"name": "a"}
    for place, _ in sections():
        if place:
            blocks = re.findall(r"```yaml\n(.*?)```", section_of(page_of_jobs(), place), re.DOTALL)
            merge(document, yaml.safe_load(blocks[-1]))
    name = document["model"]["name"]
    assert job_from(document, source="job") == job_from(
        {"name": "a", "model": {"name": name}}, source="job"
    )


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def test_a_key_has_a_meaning_that_is_a_sentence() -> None:
    for place, kind in sections():
        told = options_of(kind)
        for name, *_ in keys_of(kind):
            assert re.search(r"\w.*[.)]$", told[name].help), f"{place}.{name}"
