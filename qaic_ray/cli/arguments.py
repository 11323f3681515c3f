"""Words of the command line to values. Knows no command."""

from __future__ import annotations

import re

from qaic_ray.documents import shown
from qaic_ray.errors import UsageError

_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)


def given_once(positional: str | None, option: str | None, what: str) -> str | None:
    """What was given as an argument or as an option; both is one too many."""
    if positional is not None and option is not None:
        both = f"{shown(positional)} and as {shown(option)}"
        raise UsageError(f"{what} is given twice, as {both}: give it once.")
    return positional if positional is not None else option


def words(text: str) -> list[str]:
    """A list separated by commas."""
    return [word.strip() for word in text.split(",")]


def numbers(text: str, what: str) -> list[int]:
    """Whole numbers separated by commas; `what` names them in the error."""
    parts = text.split(",")
    if not all(map(_NUMBER.fullmatch, parts)):
        raise UsageError(
            f"{what} takes a whole number, or several separated by commas, not {shown(text)}."
        )
    return [int(part) for part in parts]


def number_groups(text: str, what: str) -> list[list[int]]:
    """Groups separated by commas, their numbers by `+`: `32,64+256`."""
    return [numbers(word.replace("+", ","), what) for word in words(text)]


def device_ids(text: str) -> tuple[int, ...] | None:
    """Device ids, or None for `all`."""
    return None if text == "all" else tuple(numbers(text, "--device-id"))


def chosen(text: str, known: tuple[str, ...], what: str) -> str:
    """One of the known words; `what` names the option in the error."""
    if text not in known:
        raise UsageError(f"{what} takes {', '.join(known[:-1])} or {known[-1]}, not {shown(text)}.")
    return text
