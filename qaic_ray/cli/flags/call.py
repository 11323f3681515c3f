"""A command's parameters, made of the sections of options that its function takes, and its call.

A function `def run(run: RunOptions, sdk: SdkOptions, given: Given)` becomes a command with a flag
for each option of the two sections. `JobChanges` stands for options that change keys of a job.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, get_args, get_type_hints

import typer

from qaic_ray import options
from qaic_ray.cli import parameters
from qaic_ray.cli.flags.flag import BY_NAME, Flag, flags_of, section_of
from qaic_ray.cli.flags.page import HelpEntry, entry_of, rank
from qaic_ray.option_types import OptionValue, Section
from qaic_ray.sampling_params import ANSWER_END, SamplingParams

PANELS = (
    parameters.PROGRAM,
    options.PROMPTS,
    ANSWER_END,
    SamplingParams.GROUP,
    "",
    parameters.JOB,
    options.SERVER,
    options.LIMITS,
    options.CARDS,
    options.RAY,
    options.SCALE,
    parameters.CLUSTER,
    options.FOLDER,
    options.DRAFTS,
    options.CHECKS,
    parameters.PRINTED,
    parameters.GENERAL,
)
"""The panels of the help in the order in which a person needs them."""

_FIRST = {ANSWER_END: "--max-tokens", SamplingParams.GROUP: "--temperature"}
_TYPED = "COMMANDLINE"


@dataclass(frozen=True)
class _Taken:
    """A parameter of the function: how it is made of its flags and the command line's words."""

    flags: list[Flag]
    made: Callable[[Mapping[str, Any]], Any]


class CommandCall:
    """A function's parameters on the command line, and its call with what they hold."""

    def __init__(self, function: Callable[..., None]) -> None:
        names = {**function.__globals__, "options": options, "parameters": parameters}
        hints = get_type_hints(function, names, include_extras=True)
        self._function = function
        self._plain: list[inspect.Parameter] = []
        self._taken: dict[str, _Taken] = {}
        self._given: str | None = None
        for name, parameter in inspect.signature(function).parameters.items():
            hint, *extras = get_args(hints[name]) or (hints[name],)
            if hint is parameters.Given:
                self._given = name
            elif hint is parameters.JobChanges:
                self._taken[name] = _taken_of_job()
            elif isinstance(hint, type) and issubclass(hint, Section):
                self._taken[name] = _taken_of_section(hint, extras[0] if extras else {})
            else:
                self._plain.append(parameter.replace(annotation=hints[name], kind=BY_NAME))
        flags = [flag for taken in self._taken.values() for flag in taken.flags]
        self.flags = sorted(flags, key=_order)

    def as_function(self) -> Callable[..., None]:
        """A function as typer takes it."""

        def call(**values: Any) -> None:
            self._call(values.pop("context"), values)

        context = inspect.Parameter("context", BY_NAME, annotation=typer.Context)
        made = [context, *self._plain]
        made += [flag.argument() for flag in self.flags if flag.opt.argument]
        made += [flag.parameter() for flag in self.flags]
        call.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
        call.__doc__ = self._function.__doc__
        return call

    def _call(self, context: typer.Context, values: Mapping[str, Any]) -> None:
        sources = {name: context.get_parameter_source(name) for name in values}
        words = {n: values[n] for n, source in sources.items() if source and source.name == _TYPED}
        arguments = {parameter.name: values[parameter.name] for parameter in self._plain}
        for name, taken in self._taken.items():
            arguments[name] = taken.made(words)
        if self._given is not None:
            fixed = (flag.said_in(words) for flag in self.flags if not flag.opt.free)
            arguments[self._given] = parameters.Given(
                fixed=tuple(filter(None, fixed)),
                may_be_free=tuple(flag.flag for flag in self.flags if flag.opt.free),
            )
        self._function(**arguments)

    def entries(self, params: Iterable[Any]) -> Iterator[HelpEntry]:
        """What the help says of a command's parameters, as typer made them of this."""
        flags = {flag.name: flag for flag in self.flags}
        places = {f"{flag.name}_argument" for flag in self.flags if flag.opt.argument}
        for param in params:
            if param.name in flags:
                yield from _entries_of_flag(flags[param.name])
            elif param.name not in places:
                yield replace(entry_of(param), group=_group(param))


def _group(param: Any) -> str:
    return parameters.GENERAL if "--help" in param.opts else ""


def _order(flag: Flag) -> tuple[int, bool]:
    """By panel, and in it what is asked for most before the rest."""
    return rank(flag.opt.group, PANELS), _FIRST.get(flag.opt.group) != flag.flag


def _taken_of_section(kind: type[Section], defaults: Mapping[str, Any]) -> _Taken:
    flags = flags_of(kind, defaults)
    return _Taken(flags, lambda words: section_of(kind, flags, defaults, words))


def _taken_of_job() -> _Taken:
    """The flags of the job's keys that a command line may say; each checked by its own section."""
    known = {".".join(flag.path): flag for flag in flags_of(options.Job, {})}
    flags = [known[key].of_job(parameters.JOB) for key in parameters.JOB_KEYS]

    def made(words: Mapping[str, Any]) -> parameters.JobChanges:
        values = {}
        for key, flag in zip(parameters.JOB_KEYS, flags, strict=True):
            if flag.read(words) is not ...:
                alone = flag.of_section()
                section = section_of(_section_with(flag.path), [alone], {}, words)
                values[key] = getattr(section, alone.path[0])
        return parameters.JobChanges(values)

    return _Taken(flags, made)


def _section_with(path: tuple[str, ...]) -> type[Section]:
    """The section of a job that brings a key."""
    kind: Any = options.Job
    for name in path[:-1]:
        kind = OptionValue(kind.model_fields[name]).kind
    owners = (base for base in kind.__mro__ if path[-1] in vars(base).get("__annotations__", ()))
    return cast(type[Section], next(owners))


def _entries_of_flag(flag: Flag) -> Iterator[HelpEntry]:
    """One, or none where nobody is shown it."""
    place = [flag.opt.argument.strip("[]")] if flag.opt.argument else []
    names = flag.shown_names
    if not place and not names:
        return
    names[-1:] = [f"{name} {flag.place}".rstrip() for name in names[-1:]]
    notes = []
    if flag.opt.environment:
        notes.append(f"env: {', '.join(flag.opt.environment)}")
    if flag.default is ...:
        notes.append("required")
    elif flag.shown_default:
        notes.append(f"default: {flag.shown_default}")
    if flag.opt.aliases:
        notes.append(f"also: {', '.join(flag.opt.aliases)}")
    yield HelpEntry((*place, *names), flag.help, tuple(notes), flag.opt.group)
