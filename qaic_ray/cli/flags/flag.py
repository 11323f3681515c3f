"""An option of the tree as a flag: how it is written, what the help says of it, and its value."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, get_origin

import typer
from pydantic import ValidationError

from qaic_ray.cli.flags.completion import words_for
from qaic_ray.errors import UsageError
from qaic_ray.files.documents import as_object, must_be, parse_json, shown, with_given
from qaic_ray.option_types import Opt, OptionValue, Section, options_of

BY_NAME = inspect.Parameter.KEYWORD_ONLY

_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)
_WORDS_OF_TYPES = {int: "a whole number", float: "a number"}
_PLACES_OF_TYPES = {int: "N", float: "NUMBER", str: "TEXT"}


def with_dashes(name: str) -> str:
    """A flag's name as it is registered: words may be joined by underscores too, as in the recipe.

    Click's `token_normalize_func`, for the name behind the dashes.
    """
    return name.replace("_", "-")


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
        self.flag = opt.flag or "--" + with_dashes(path[-1])
        self.written = f"--no-{self.flag[2:]}" if opt.off else self.flag
        self.name = self.flag.lstrip("-").replace("-", "_")
        self.names = [self.flag, *opt.aliases, *([opt.short] if opt.short else [])]

    def of_job(self, group: str) -> Flag:
        """The flag of the same key where a job has a value for it, in a panel of its own."""
        entry = replace(self.opt, group=group, shown="the job's", argument="")
        return Flag(self.path, entry, self.value, None)

    def of_section(self) -> Flag:
        """The flag of the same option, its path as the section that it stands in has it."""
        return Flag(self.path[-1:], self.opt, self.value, self.default)

    def parameter(self) -> inspect.Parameter:
        """As typer takes it; its default is never looked at, as the section has its own."""
        names = self.names
        if self.default is True:
            names = [f"{' ' if self.opt.off else name}/--no-{name[2:]}" for name in names]
        # One that may stand without its flag is missed when its section is made.
        is_said = self.default is True or (self.default is ... and not self.opt.argument)
        info = typer.Option(
            self.default if is_said else None,
            *names,
            help=self.help,
            hidden=self.opt.hidden,
            autocompletion=words_for(self._choices, self.opt.completes),
        )
        annotation = list[str] | None if self.opt.repeated else self._kind | None
        return inspect.Parameter(self.name, BY_NAME, default=info, annotation=annotation)

    @property
    def _choices(self) -> tuple[Any, ...]:
        """The values that there are, or those of a list's items, where they are few."""
        item = self.value.item
        if isinstance(item, type) and issubclass(item, Enum):
            return tuple(member.value for member in item)
        return self.value.words

    @property
    def _kind(self) -> type:
        return bool if self.value.kind is bool else str

    def argument(self) -> inspect.Parameter:
        """The place where it may stand without its flag."""
        info = typer.Argument(
            None,
            metavar=self.opt.argument,
            autocompletion=words_for(self._choices, self.opt.completes),
        )
        name = f"{self.name}_argument"
        return inspect.Parameter(name, BY_NAME, default=info, annotation=str | None)

    # -- for people

    @property
    def shown_names(self) -> list[str]:
        """What help and completion name, the short one first; other names are only taken."""
        if self.opt.hidden:
            return []
        short = [self.opt.short] if self.opt.short else []
        opposite = [f"--no-{self.flag[2:]}"] if self.default is True else []
        return [*short, *([] if self.opt.off else [self.flag]), *opposite]

    @property
    def place(self) -> str:
        """What the help writes for the value; nothing for a switch."""
        if self._kind is bool:
            return ""
        if self.opt.metavar:
            return self.opt.metavar
        if self.value.is_path:
            return "PATH"
        if self.value.item is not None and not self.opt.repeated:
            return "LIST"
        place = _PLACES_OF_TYPES[self.value.scalar]
        return "WORD" if self.value.words and place == "TEXT" else place

    @property
    def help(self) -> str:
        """What it does, which values there are, and one of them."""
        choices, of = self._choices, "One of" if self.value.item is None else "Of"
        words = f" {of} {', '.join(map(str, choices))}." if len(choices) > 1 else ""
        like = f" Like {self.opt.example}." if self.opt.example else ""
        return f"{self.opt.off or self.opt.help}{words}{like}"

    @property
    def shown_default(self) -> str:
        """What it is where nothing is said, in plain words; empty where that is nothing."""
        if self.opt.shown or isinstance(self.default, bool):
            return self.opt.shown or ("on" if self.default and not self.opt.off else "")
        if isinstance(self.default, tuple):
            return ",".join(map(_plain, self.default))
        return "" if self.default in (..., None, {}) else _plain(self.default)

    @property
    def missing(self) -> str:
        """The sentence, without its end, of one that has to be there and is not."""
        names = [self.opt.argument.strip("[]"), self.flag] if self.opt.argument else [self.flag]
        about = self.opt.help.rstrip(".")
        return f"{' or '.join(names)} is needed: {about[:1].lower()}{about[1:]}"

    # -- its value

    def named_as(self, typed: Iterable[str]) -> None:
        """From now on errors name it as it stands among these words."""
        spelled = {f"--{with_dashes(word[2:])}": word for word in typed if word[:2] == "--"}
        self.flag = next((spelled[name] for name in self.names if name in spelled), self.flag)

    def said_in(self, words: Mapping[str, Any]) -> str:
        """How the command line's words name it; nothing where they do not."""
        if self.name in words:
            return self.written
        return self.opt.argument.strip("[]") if f"{self.name}_argument" in words else ""

    def takes(self, word: str | None) -> bool:
        """Whether a word that follows the flag is its value; None: nothing follows."""
        if word is None or word.startswith("-"):
            return False
        return not self.value.words or word in self.value.words

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
            return self._number(text) if self.value.scalar in _WORDS_OF_TYPES else text
        parts = text.split(",")
        if self.value.item is not int:
            return [part.strip() for part in parts]
        if not all(map(_WHOLE.fullmatch, parts)):
            raise UsageError(
                f"{self.flag} takes a whole number, or several separated by commas, not "
                f"{shown(text)}."
            )
        return list(map(int, parts))

    def _number(self, text: str) -> int | float:
        kind = self.value.scalar
        try:
            return int(text) if kind is int else float(text)
        except ValueError:
            what = _WORDS_OF_TYPES[kind]
            raise UsageError(f"{self.flag} takes {what}, not {shown(text)}.") from None


def _plain(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def flags_of(kind: type, defaults: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[Flag]:
    """The flags of a section, with those of sections in it.

    Args:
        kind: the section.
        defaults: the command's own; `...` stands for an option that it does not have.
        path: of the section in the one that is made.
    """
    entries, flags = options_of(kind), []
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        value = OptionValue(field)
        if defaults.get(name) is ...:
            continue
        if hasattr(value.kind, "__pydantic_fields__"):
            flags += flags_of(value.kind, {}, (*path, name))
        elif name in entries and entries[name].flag is not None:
            entry = entries[name]
            default = ... if field.is_required() else field.default
            if name in defaults:  # what the command has in place of it, no variable changes
                default, entry = defaults[name], replace(entry, environment=())
            flags.append(Flag((*path, name), entry, value, default))
    return flags


def section_of(
    kind: type[Section], flags: list[Flag], defaults: Mapping[str, Any], words: Mapping[str, Any]
) -> Section:
    """The section that a command line's words make; `defaults` are the command's own.

    Raises:
        UsageError: naming the flag and the value.
    """
    document: dict[str, Any] = {n: value for n, value in defaults.items() if value is not ...}
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
    if first["type"] == "missing":
        return next(f"{f.missing}." for f in flags if f.path == first["loc"][:1])
    value, limits = shown(first["input"]), first.get("ctx", {})
    if first["type"] in ("literal_error", "enum"):
        return f"{flag} takes {limits['expected'].replace(chr(39), '')}, not {value}."
    if (must := must_be(first)) is not None:
        return f"{flag} {must}, not {value}."
    return f"{flag}: {with_given(said, first['input'])}."
