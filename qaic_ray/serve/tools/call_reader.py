"""Reads tool calls out of an answer while its text comes.

What may begin a call is held back until it is one or none. A call is one for good once the name of
a known tool and the bracket that opens its arguments were read: from then on the arguments are told
as they come, as the model wrote them, also where the answer ends inside them. Whatever is no call
is content, and nothing is lost: except white space beside a call, and the syntax of calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache

from qaic_ray.serve.tools.deltas import (
    CallDelta,
    ContentDelta,
    Delta,
    ParsedAnswer,
    call_id,
    joined,
    merged,
)
from qaic_ray.serve.tools.forms import MISTRAL, CallForm
from qaic_ray.serve.tools.json_parts import (
    WHITE,
    NoHead,
    ObjectEnd,
    Stop,
    call_in,
    is_end_of_object,
    read_head,
)

_NAME = re.compile(r"[\w.-]+")
_NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*(?=\{)")
_MAX_NAMED_CHARS = 300


class CallReader:
    """Reads one answer.

    Args:
        form: of the model's calls.
        names: of the tools that may be called. A call of another one is content.
        parallel: whether there may be several calls; else only the first is kept.
        seed: what call ids are made of; see `call_id`.
        special: special tokens, where the text has them written out. Those that belong to no call
            are left out, as a decoder does.
    """

    def __init__(
        self,
        form: CallForm,
        names: Collection[str],
        *,
        parallel: bool = True,
        seed: str = "",
        special: Collection[str] = (),
    ) -> None:
        self._form = form
        self._names = names
        self._parallel = parallel
        self._seed = seed
        self._special = frozenset(special)
        self._finder = _finder(form, self._special)
        self._stops = tuple(filter(None, (form.closing, form.opening)))
        self._text = ""  # not told yet
        self._is_last = False
        self._state: Callable[[], bool] = self._in_text
        self._told: list[Delta] = []
        self._space: list[str] = []  # white space that nothing followed yet
        self._has_content = False
        self._is_beside_call = False  # and nothing was said before it
        self._in_list = False
        self._opened = 0  # characters that are content if no call follows them
        self._object_at = 0
        self._depth = 0
        self._scan = ObjectEnd(self._stops)
        self._scanned = 0
        self._num_begun = 0

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._num_begun if self._parallel else min(1, self._num_begun)

    def feed(self, text: str) -> list[Delta]:
        """Take more of the answer's text; return what can be told of it."""
        self._text += text
        while self._state():
            pass
        told, self._told = self._told, []
        return merged(told)

    def end(self) -> list[Delta]:
        """The rest, when no text follows."""
        self._is_last = True
        told = self.feed("")
        if self._space and not self._num_begun:
            told.append(ContentDelta("".join(self._space)))
        return merged(told)

    # Each state does one move and returns whether another one may be possible.

    def _in_text(self) -> bool:
        found = self._finder.first(self._text)
        if found is None or self._waits(self._text[found.start() :]):
            at = len(self._text) if found is None else found.start()
            if not self._is_last:
                at = min(at, len(self._text) - self._finder.num_begun(self._text))
            self._say_up_to(at)
            return False
        self._say_up_to(found.start())
        if found[0] in self._special and found[0] != self._form.opening:
            self._text = self._text[len(found[0]) :]
            return True
        self._opened = len(found[0])
        self._object_at = self._opened
        self._state = self._at_opening
        if found[0] == "{":
            self._object_at = 0
            self._state = self._in_head
        return True

    def _waits(self, text: str) -> bool:
        """Whether text that is a marker may still become a longer one."""
        return not self._is_last and text in self._finder.beginnings

    def _at_opening(self) -> bool:
        at = _behind_white(self._text, self._object_at)
        if at == len(self._text):
            return self._wait_or_break()
        if self._text[at] == "[" and not self._form.is_bare and not self._in_list:
            self._in_list = True
            self._object_at = at + 1
            return True
        self._object_at = at
        if self._text[at] == "{":
            self._state = self._in_head
            return True
        if self._form.name == MISTRAL and not self._in_list:
            return self._in_named_head(at)
        return self._break()

    def _in_named_head(self, at: int) -> bool:
        """Read `name[ARGS]` in front of arguments."""
        window = self._text[at : at + _MAX_NAMED_CHARS]
        named = _NAMED.match(window)
        if named is not None:
            if named[1] not in self._names:
                return self._break()
            return self._begin(named[1], at + named.end(), depth=0)
        name = _NAME.match(window)
        is_other = name is None or (name.end() < len(window) and name[0] not in self._names)
        if is_other or "{" in window or len(window) == _MAX_NAMED_CHARS:
            return self._break()
        return self._wait_or_break()

    def _in_head(self) -> bool:
        head = read_head(self._text, self._object_at, self._names, only_named=self._form.is_bare)
        if head is NoHead.MORE:
            return self._wait_or_break()
        if head is NoHead.OTHER:
            return self._break()
        if head is NoHead.WHOLE:
            self._scan = ObjectEnd(self._stops)
            self._scanned = self._object_at
            self._state = self._in_whole
            return True
        assert not isinstance(head, NoHead)
        return self._begin(head.name, head.at, head.depth)

    def _in_whole(self) -> bool:
        """Hold an object until it ends, and look at it then."""
        self._scanned, stop = self._scan.find(self._text, self._scanned, is_last=self._is_last)
        if stop is Stop.MORE:
            return self._wait_or_break()
        call = None
        if stop is Stop.CLOSED:
            call = call_in(self._text[self._object_at : self._scanned], self._names)
        if call is None:
            return self._break()
        name, arguments = call
        end = self._scanned
        self._begin(name, end, depth=0)
        self._tell_arguments(arguments)
        self._state = self._behind_object
        return True

    def _in_arguments(self) -> bool:
        at, stop = self._scan.find(self._text, 0, is_last=self._is_last)
        self._tell_arguments(self._text[:at])
        self._text = self._text[at:]
        if stop is Stop.MORE:
            return False
        self._state = self._behind_object
        if stop is Stop.CLOSED and self._depth:
            self._scan = ObjectEnd(self._stops, self._depth)
            self._scanned = 0
            self._state = self._in_rest
        return True

    def _in_rest(self) -> bool:
        """Read the end of the object around the arguments."""
        at = _behind_white(self._text, 0)
        if at < len(self._text) and self._text[at] in ",}":
            self._scanned, stop = self._scan.find(self._text, self._scanned, is_last=self._is_last)
            if stop is Stop.MORE and not self._is_last:
                return False
            rest, self._text = self._text[: self._scanned], self._text[self._scanned :]
            is_end = stop is Stop.CLOSED and is_end_of_object(rest, self._depth)
            if not is_end and rest.strip(WHITE + "}"):
                self._say(rest)
        elif at == len(self._text) and not self._is_last:
            return False
        self._state = self._behind_object
        return True

    def _behind_object(self) -> bool:
        """Find out whether another call of the same list or block follows."""
        at = _behind_white(self._text, 0)
        if at:
            self._space.append(self._text[:at])
        rest = self._text = self._text[at:]
        if not rest and not self._is_last:
            return False
        if self._in_list and rest.startswith("]"):
            self._in_list = False
            self._text = rest[1:]
            return True
        closing = self._form.closing
        if closing and rest.startswith(closing):
            self._text = rest[len(closing) :]
            return self._back_to_text()
        if rest and closing.startswith(rest):
            self._text = "" if self._is_last else self._text
            return self._is_last and self._back_to_text()
        next_at = _behind_white(rest, 1) if rest[:1] in {",", ";"} else 0
        if next_at and next_at == len(rest) and not self._is_last:
            return False
        if rest[next_at : next_at + 1] == "{":
            self._object_at = next_at
            self._opened = 1
            self._state = self._in_head
            return True
        return self._back_to_text()

    def _back_to_text(self) -> bool:
        self._in_list = False
        self._state = self._in_text
        return True

    def _wait_or_break(self) -> bool:
        return self._break() if self._is_last else False

    def _break(self) -> bool:
        """Take what looked like a call as text, and look for a call behind its beginning."""
        opened, self._text = self._text[: self._opened], self._text[self._opened :]
        if opened not in self._special:
            self._say(opened)
        return self._back_to_text()

    def _begin(self, name: str, at: int, depth: int) -> bool:
        self._space.clear()
        self._is_beside_call = not self._has_content
        self._num_begun += 1
        if self._parallel or self._num_begun == 1:
            index = self._num_begun - 1
            id_ = call_id(self._seed, index, short=self._form.short_ids)
            self._told.append(CallDelta(index, "", id_, name))
        self._text = self._text[at:]
        self._depth = depth
        self._scan = ObjectEnd(self._stops)
        self._state = self._in_arguments
        return True

    def _tell_arguments(self, text: str) -> None:
        if text and (self._parallel or self._num_begun == 1):
            self._told.append(CallDelta(self._num_begun - 1, text))

    def _say_up_to(self, at: int) -> None:
        said, self._text = self._text[:at], self._text[at:]
        self._say(said)

    def _say(self, text: str) -> None:
        end = len(text.rstrip(WHITE))
        if end:
            said = "".join([*self._space, text[:end]])
            self._told.append(ContentDelta(said.lstrip(WHITE) if self._is_beside_call else said))
            self._space.clear()
            self._is_beside_call = False
            self._has_content = True
        if end < len(text):
            self._space.append(text[end:])


def parse_answer(
    text: str,
    form: CallForm,
    names: Collection[str],
    *,
    parallel: bool = True,
    seed: str = "",
    special: Collection[str] = (),
) -> ParsedAnswer:
    """A whole answer; see `CallReader`."""
    reader = CallReader(form, names, parallel=parallel, seed=seed, special=special)
    return joined([*reader.feed(text), *reader.end()])


def _behind_white(text: str, at: int) -> int:
    while at < len(text) and text[at] in WHITE:
        at += 1
    return at


class _Finder:
    """Finds what may begin a call, and special tokens, in text."""

    def __init__(self, sought: Collection[str]) -> None:
        by_length = sorted(sought, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, by_length)))
        self.beginnings = frozenset(one[:length] for one in sought for length in range(1, len(one)))
        """What may become one of them."""
        self._longest = len(by_length[0]) - 1

    def first(self, text: str) -> re.Match[str] | None:
        """The first of them."""
        return self._pattern.search(text)

    def num_begun(self, text: str) -> int:
        """How many of the last characters may begin one."""
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self.beginnings:
                return length
        return 0


@lru_cache(maxsize=64)
def _finder(form: CallForm, special: frozenset[str]) -> _Finder:
    return _Finder({form.opening, *special, *(["{"] if form.is_bare else [])})
