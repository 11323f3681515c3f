"""A command's parameters, made of the sections of options that its function takes.

A function `def run(run: RunOptions, sdk: SdkOptions, given: Given)` becomes a command with a flag
for each option of the two sections. The sections that no job has, as they say what is done or shown
now, are here.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError

from qaic_ray import options
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import as_object, parse_json, shown, with_given
from qaic_ray.option_types import (
    NumCores,
    Opt,
    OptionValue,
    PathText,
    PositiveInt,
    PrecisionName,
    Section,
    Share,
    opt,
    options_of,
)

RESUME_LAST = "last"
"""What `--resume` means where nothing follows it: the run that began last and is not finished."""

PROGRAM = "What is run"

_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)


class ProgramOptions(Section):
    """What is run."""

    GROUP: ClassVar[str] = PROGRAM

    model_name: PathText | None = opt(
        None, options.MODEL_HELP, metavar="<name>", argument="[MODEL]"
    )
    text: str | None = opt(
        None, "One prompt, in which a | is text.", argument="[PROMPT]", hidden=True
    )
    qpc: PathText | None = opt(
        None,
        "Folder of a compiled variant; without it one is made, in the user's cache, and found "
        "there the next time.",
    )


class PrepareOptions(options.VariantChoice):
    """The program that is made where no QPC is given."""

    GROUP: ClassVar[str] = "The program that is made where no --qpc is given"

    precision: PrecisionName | None = opt(None, "How weights are kept on the card.", shown="mx6")
    num_cores: NumCores | None = opt(None, "NSPs of the program.", shown="all of a card")
    batch_size: PositiveInt | None = opt(
        None, "Prompts that a card answers side by side.", shown="1 for one prompt, else 8"
    )


class ShapesOptions(Section):
    """What stands in place of a grid's shapes."""

    specializations: PathText | None = opt(
        None,
        "A specializations.json, in place of the options for shapes below; the one of this "
        "folder is used where none of them is given.",
    )


class ResumeOptions(Section):
    """Whether a run goes on that stopped."""

    GROUP: ClassVar[str] = options.FOLDER

    resume: PathText | None = opt(
        None,
        "Go on where a run stopped: its folder, or nothing for the last unfinished one.",
        metavar="[RUN]",
        bare=RESUME_LAST,
        free=True,
    )
    retry_errors: bool = opt(False, "With --resume: its rows of errors once more.", free=True)


class JsonOptions(Section):
    """What is printed at the end."""

    as_json: bool = opt(
        False, "End stdout with one JSON object on one line.", flag="--json", free=True
    )


class ViewOptions(JsonOptions):
    """What is shown while something goes on."""

    verbose: bool = opt(False, "Show a line a card too.", short="-v", free=True)
    log_format: Literal["text", "json"] = opt(
        "text", "How lines on stderr are written where it is no terminal.", free=True
    )


class ShowOptions(ViewOptions):
    """What is printed."""

    stream: Literal["auto", "rows", "ordered", "tokens"] = opt(
        "auto",
        "Print answers as they end, in input order, or one's text as it is generated. auto: a "
        "single prompt's tokens or rows on a terminal, else ordered.",
        bare="ordered",
        free=True,
    )
    no_stream: bool = opt(False, "Print no answers.", free=True)
    stop_if_errors: Share | None = opt(
        None,
        "End the run early where that share of at least 20 rows failed.",
        example="20%",
        metavar="<share>",
        free=True,
    )


class SubmitOptions(Section):
    """How a job is handed to a cluster that runs it by itself."""

    GROUP: ClassVar[str] = "On a cluster"

    detach: bool = opt(False, "Let the cluster run it: see status, logs and stop.")
    folder: str | None = opt(
        None,
        "Where the job's relative paths start, on the machine that runs it.",
        shown="this folder",
    )
    python: str | None = opt(
        None,
        "With --detach: the Python on the cluster's head that has qaic-ray.",
        shown="this one's path",
    )
    send_prompts: bool = opt(
        True, "With --detach: send the prompts file, or read it at its path there."
    )


class JobsOptions(Section):
    """Which cluster's jobs."""

    address: str | None = opt(
        None,
        "The cluster's dashboard, http://host:8265, or its head, host:6379.",
        shown="this machine's cluster",
    )


@dataclass(frozen=True)
class Given:
    """The flags that stand on the command line, but for those of `Opt.free`; and all of these."""

    fixed: tuple[str, ...] = ()
    may_be_free: tuple[str, ...] = ()

    def refuse_changes(self, resume: str) -> None:
        """Only what changes no answer may be said anew of a run that goes on."""
        is_last = resume == RESUME_LAST
        fixed = [flag for flag in self.fixed if not (is_last and flag == "--output")]
        if fixed:
            whose = "its folder" if is_last else resume
            free = [flag for flag in self.may_be_free if flag != "--resume"]
            raise UsageError(
                f"{fixed[0]} cannot be changed in the middle of a run: leave it out, {whose} knows "
                f"it; only {', '.join(free)} may stand beside --resume."
            )


class CommandCall:
    """A function's parameters on the command line, and its call with what they hold."""

    def __init__(self, function: Callable[..., None]) -> None:
        names = {**function.__globals__, "options": options, "parameters": sys.modules[__name__]}
        hints = get_type_hints(function, names, include_extras=True)
        self._function = function
        self._plain: list[inspect.Parameter] = []
        self._sections: dict[str, tuple[type[Section], list[Flag], Mapping[str, Any]]] = {}
        self._given: str | None = None
        for name, parameter in inspect.signature(function).parameters.items():
            hint, *extras = get_args(hints[name]) or (hints[name],)
            if hint is Given:
                self._given = name
            elif isinstance(hint, type) and issubclass(hint, Section):
                defaults = extras[0] if extras else {}
                self._sections[name] = (hint, flags_of(hint, defaults), defaults)
            else:
                self._plain.append(parameter.replace(annotation=hints[name], kind=_BY_NAME))
        self.flags = [flag for _, flags, _ in self._sections.values() for flag in flags]

    def as_function(self) -> Callable[..., None]:
        """A function as typer takes it."""

        def call(**values: Any) -> None:
            self._call(values.pop("context"), values)

        context = inspect.Parameter("context", _BY_NAME, annotation=typer.Context)
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
        for name, section in self._sections.items():
            arguments[name] = section_of(*section, words)
        if self._given is not None:
            used = [flag for flag in self.flags if flag.name in words]
            arguments[self._given] = Given(
                fixed=tuple(flag.written for flag in used if not flag.opt.free),
                may_be_free=tuple(flag.flag for flag in self.flags if flag.opt.free),
            )
        self._function(**arguments)


_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_TYPED = "COMMANDLINE"


class Flag:
    """An option on the command line.

    Args:
        path: leads from the section to the field.
        opt: the option's entry.
        value: what the field may hold.
        default: the command's; `...` where the option must be given.
    """

    def __init__(self, path: tuple[str, ...], opt: Opt, value: OptionValue, default: Any) -> None:
        self.path, self.opt, self.value, self.default = path, opt, value, default
        self.flag = opt.flag or "--" + path[-1].replace("_", "-")
        self.written = f"--no-{self.flag[2:]}" if opt.off else self.flag
        self.name = self.flag.lstrip("-").replace("-", "_")
        # With dashes, and with underscores as in the old scripts.
        self.spellings = list(dict.fromkeys([self.flag, f"--{self.name}"]))
        if opt.short:
            self.spellings.append(opt.short)

    def parameter(self) -> inspect.Parameter:
        """As typer takes it."""
        spellings = self.spellings
        if self.default is True:
            pairs = zip(spellings, "-_", strict=False)
            opposites = [(word, f"--no{sign}{word[2:]}") for word, sign in pairs]
            spellings = [f"{' ' if self.opt.off else on}/{off}" for on, off in opposites]
        is_plain = self.default is ... or isinstance(self.default, bool | int | float | str)
        info = typer.Option(
            self.default if is_plain else None,
            *spellings,
            help=self._help(),
            rich_help_panel=self.opt.group or None,
            hidden=self.opt.hidden,
            metavar=self.opt.metavar or ("<path>" if self.value.is_path else None),
            show_default=not self.opt.argument and self._shown(),
        )
        annotation = list[str] | None if self.opt.repeated else self.value.scalar | None
        return inspect.Parameter(self.name, _BY_NAME, default=info, annotation=annotation)

    def takes(self, word: str | None) -> bool:
        """Whether a word that follows the flag is its value; None: nothing follows."""
        if word is None or word.startswith("-"):
            return False
        return not self.value.words or word in self.value.words

    def argument(self) -> inspect.Parameter:
        """The place where it may stand without its flag."""
        info = typer.Argument(None, metavar=self.opt.argument, show_default=self._shown())
        name = f"{self.name}_argument"
        return inspect.Parameter(name, _BY_NAME, default=info, annotation=str | None)

    def _shown(self) -> str | bool:
        if isinstance(self.default, tuple) and self.default:
            return ",".join(map(str, self.default))
        is_said = self.default is not False and self.default not in (..., None, "", ())
        return self.opt.shown or is_said

    def _help(self) -> str:
        choices = self.value.words
        words = f" One of {', '.join(map(str, choices))}." if len(choices) > 1 else ""
        like = f" Like {self.opt.example}." if self.opt.example else ""
        also = f" Also: ${self.opt.environment}." if self.opt.environment else ""
        return f"{self.opt.help}{words}{like}{also}"

    def read(self, words: Mapping[str, Any]) -> Any:
        """What a document would have in place of the command line's words; `...` for nothing."""
        found = [words[name] for name in (f"{self.name}_argument", self.name) if name in words]
        if len(found) > 1:
            both = f"{shown(found[0])} and as {shown(found[1])}"
            raise UsageError(f"{self.flag[2:]} is given twice, as {both}: give it once.")
        if not found:
            return ...
        (text,) = found
        if self.opt.repeated or not isinstance(text, str) or text in self.value.words:
            return text
        if get_origin(self.value.kind) is dict:
            return as_object(parse_json(text, self.flag), self.flag)
        if self.value.item is None:
            return text
        parts = text.split(",")
        if self.value.item is not int:
            return [part.strip() for part in parts]
        if not all(map(_NUMBER.fullmatch, parts)):
            raise UsageError(
                f"{self.flag} takes a whole number, or several separated by commas, not "
                f"{shown(text)}."
            )
        return list(map(int, parts))


def flags_of(kind: type, defaults: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[Flag]:
    """The flags of a section, with those of sections in it."""
    entries, flags = options_of(kind), []
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        value = OptionValue(field)
        if hasattr(value.kind, "__pydantic_fields__"):
            flags += flags_of(value.kind, {}, (*path, name))
        elif name in entries and entries[name].flag is not None:
            default = defaults.get(name, ... if field.is_required() else field.default)
            default = default.value if isinstance(default, Enum) else default
            flags.append(Flag((*path, name), entries[name], value, default))
    return flags


def section_of(
    kind: type[Section], flags: list[Flag], defaults: Mapping[str, Any], words: Mapping[str, Any]
) -> Section:
    """The section that a command line's words make; `defaults` are the command's own.

    Raises:
        UsageError: naming the flag and the value.
    """
    document: dict[str, Any] = dict(defaults)
    for flag in flags:
        value = flag.read(words)
        if value is not ...:
            place = document
            for parent in flag.path[:-1]:
                place = place.setdefault(parent, {})
            place[flag.path[-1]] = value
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise UsageError(_refusal(error, flags)) from error


def _refusal(error: ValidationError, flags: list[Flag]) -> str:
    """The first thing that is wrong, in the words of the command line."""
    first = error.errors(include_url=False)[0]
    said = first["msg"].removeprefix("Value error, ").rstrip(".")
    flag = next((flag.flag for flag in flags if flag.path == first["loc"][:1]), None)
    if flag is None:
        return f"{said}."
    value, limits = shown(first["input"]), first.get("ctx", {})
    if first["type"] in ("literal_error", "enum"):
        return f"{flag} takes {limits['expected'].replace(chr(39), '')}, not {value}."
    if first["type"] == "greater_than_equal":
        return f"{flag} must be at least {limits['ge']}, not {value}."
    return f"{flag}: {with_given(said, first['input'])}."
