"""JSON objects that come in parts: where one ends, and what the call in it is named.

Every answer depends on the beginning of the text alone, so it is the same however the text is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

WHITE = " \t\r\n"
ARGUMENT_KEYS = ("arguments", "parameters")
MAX_HEAD_CHARS = 2000
"""A call names its tool and begins its arguments within so many characters, or is held whole."""

_IN_STRING = re.compile(r'["\\]')
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_BEGUN_STRING = re.compile(r'"((?:[^"\\]|\\.)*)', re.DOTALL)
_SCALAR = re.compile(r"[-+.\w]+")
_FIRST_KEYS = ("name", "type", "id", "function")


class Stop(Enum):
    """Why a scan stopped."""

    MORE = "the text so far does not end the object"
    CLOSED = "the object's last bracket was read"
    MARKER = "a marker stands where the object should go on"


class ObjectEnd:
    """Finds the end of an object, or a marker that no JSON has there; brackets in strings are text.

    Args:
        markers: texts that end the object outside its strings.
        depth: how many objects are open already.
    """

    def __init__(self, markers: Sequence[str], depth: int = 0) -> None:
        self._markers = markers
        self._depth = depth
        self._is_string = False
        self._is_escaped = False
        firsts = {re.escape(marker[0]) for marker in markers}
        self._outside = re.compile("[" + "".join(['"{}', *sorted(firsts)]) + "]")

    def find(self, text: str, at: int, *, is_last: bool) -> tuple[int, Stop]:
        """Read on from `at`, which the call before gave.

        Args:
            text: what there is.
            at: the first character that was not read yet.
            is_last: whether nothing follows.

        Returns:
            Where it stopped: behind the last bracket, at the marker, or where to read on.
        """
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._is_string else self._outside).search(text, at)
            if found is None:
                return len(text), Stop.MORE
            at = found.start()
            if self._is_string:
                self._is_escaped = found[0] == "\\"
                self._is_string = self._is_escaped
                at += 1
                continue
            for marker in self._markers:
                if text.startswith(marker, at):
                    return at, Stop.MARKER
                if not is_last and marker.startswith(text[at:]):
                    return at, Stop.MORE
            at += 1
            if self._take(found[0]):
                return at, Stop.CLOSED
        return at, Stop.MORE

    def _take(self, character: str) -> bool:
        """Whether a character outside of strings closes the object."""
        if character == '"':
            self._is_string = True
        elif character == "{":
            self._depth += 1
        elif character == "}":
            self._depth -= 1
            return self._depth <= 0
        return False


@dataclass(frozen=True)
class Head:
    """The beginning of a call that can be told while it comes.

    Attributes:
        name: the tool's.
        at: where the arguments begin.
        depth: objects that are open around them.
    """

    name: str
    at: int
    depth: int


class NoHead(Enum):
    """What an object is that has no such beginning."""

    MORE = "too short to tell"
    WHOLE = "to be looked at as a whole"
    OTHER = "no call of a known tool"


def read_head(text: str, at: int, names: Collection[str], *, only_named: bool) -> Head | NoHead:
    """Read the beginning of the object at `at`.

    Args:
        text: what there is.
        at: of the opening bracket.
        names: of the tools that may be called.
        only_named: whether an object that does not begin with a known name is no call.
    """
    window = text[at : at + MAX_HEAD_CHARS]
    result = _HeadReader(window, names, only_named=only_named).read()
    if result is NoHead.MORE and len(window) == MAX_HEAD_CHARS:
        return NoHead.OTHER if only_named else NoHead.WHOLE
    return Head(result.name, at + result.at, result.depth) if isinstance(result, Head) else result


class _Short(Exception):
    """The text ends before it tells."""


class _HeadReader:
    def __init__(self, text: str, names: Collection[str], *, only_named: bool) -> None:
        self._text = text
        self._names = names
        self._only_named = only_named
        self._at = 1
        self._depth = 1
        self._name: str | None = None

    def read(self) -> Head | NoHead:
        try:
            while (result := self._pair()) is None:
                pass
        except _Short:
            return NoHead.MORE
        return result

    def _pair(self) -> Head | NoHead | None:
        """Read one key and its value; None where the next pair may tell."""
        first = self._next()
        if first == "}":
            return NoHead.OTHER if self._name is None else NoHead.WHOLE
        if first != '"' or not self._may_be_key():
            return NoHead.OTHER
        key = self._string()
        if self._next() != ":":
            return NoHead.OTHER
        self._at += 1
        value = self._next()
        if key in ARGUMENT_KEYS:
            return self._arguments(value)
        if key == "function" and value == "{":
            self._at += 1
            self._depth += 1
            return None
        if key in {"name", "function"} and value == '"':
            if not self._may_be(self._names):
                return NoHead.OTHER
            self._name = self._string()
        elif value == '"':
            self._string()
        elif (scalar := _SCALAR.match(self._text, self._at)) is not None:
            self._at = scalar.end()
        else:
            return self._undecided()
        return self._behind_value()

    def _arguments(self, value: str) -> Head | NoHead:
        if self._name is not None and value == "{":
            return Head(self._name, self._at, self._depth)
        return self._undecided()

    def _behind_value(self) -> NoHead | None:
        character = self._next()
        if character == ",":
            self._at += 1
            return None
        return self._undecided() if character == "}" else NoHead.OTHER

    def _undecided(self) -> NoHead:
        is_other = self._name is None and self._only_named
        return NoHead.OTHER if is_other else NoHead.WHOLE

    def _may_be_key(self) -> bool:
        if not self._only_named or self._name is not None:
            return True
        return self._may_be(_FIRST_KEYS)

    def _may_be(self, known: Collection[str]) -> bool:
        """Whether the string here is one of those, or may become one."""
        begun = _BEGUN_STRING.match(self._text, self._at)
        assert begun is not None
        if begun.end() < len(self._text):
            return begun[1] in known
        return any(one.startswith(begun[1]) for one in known)

    def _string(self) -> str:
        found = _STRING.match(self._text, self._at)
        if found is None:
            raise _Short
        self._at = found.end()
        return found[1]

    def _next(self) -> str:
        """The next character that is not white."""
        while self._at < len(self._text):
            if self._text[self._at] not in WHITE:
                return self._text[self._at]
            self._at += 1
        raise _Short


def call_in(document: str, names: Collection[str]) -> tuple[str, str] | None:
    """The tool's name and the arguments, as JSON, of a whole object; None where it is no call."""
    value = _loaded(document)
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name", inner)
    if not isinstance(name, str) or name not in names:
        return None
    arguments: Any = next((value[key] for key in ARGUMENT_KEYS if value.get(key) is not None), {})
    if isinstance(arguments, str):
        return (name, arguments) if isinstance(_loaded(arguments), dict) else None
    return (name, _dumped(arguments)) if isinstance(arguments, dict) else None


def is_end_of_object(text: str, depth: int) -> bool:
    """Whether a text closes `depth` objects behind a value, with further keys perhaps."""
    opened = '{"o":' * depth + "0"
    return isinstance(_loaded(opened + text), dict)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _dumped(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        return json.dumps(value)
    return text
