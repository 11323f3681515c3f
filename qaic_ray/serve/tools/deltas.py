"""Pieces of an answer as the chat interface streams them, and what they are together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ContentDelta:
    """Some more of the message's text."""

    text: str

    def document(self) -> dict[str, Any]:
        """As `choices[].delta`."""
        return {"content": self.text}


@dataclass(frozen=True)
class CallDelta:
    """Some more of a call's arguments; with the call's first piece its id and the tool's name.

    `index` counts the message's calls from 0.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None

    def document(self) -> dict[str, Any]:
        """As `choices[].delta`."""
        function = {"arguments": self.arguments}
        if self.id is None:
            return {"tool_calls": [{"index": self.index, "function": function}]}
        call = {"index": self.index, "id": self.id, "type": "function"}
        return {"tool_calls": [call | {"function": {"name": self.name} | function}]}


Delta = ContentDelta | CallDelta


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote.

    `arguments` are what it wrote, which is no whole JSON where the answer ended before, or where
    the model erred.
    """

    id: str
    name: str
    arguments: str

    def document(self) -> dict[str, Any]:
        """As `message.tool_calls[]`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer as its text and its calls; `content` is None where calls are all there is."""

    content: str | None
    calls: tuple[ToolCall, ...] = ()

    def message(self) -> dict[str, Any]:
        """As `choices[].message`."""
        document: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            document["tool_calls"] = [call.document() for call in self.calls]
        return document


def joined(deltas: Iterable[Delta]) -> ParsedAnswer:
    """What pieces are together."""
    content: list[str] = []
    calls: dict[int, list[CallDelta]] = {}
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content.append(delta.text)
        else:
            calls.setdefault(delta.index, []).append(delta)
    text = "".join(content)
    return ParsedAnswer(text if text or not calls else None, tuple(map(_call, calls.values())))


def _call(deltas: list[CallDelta]) -> ToolCall:
    first = deltas[0]
    assert first.id is not None
    assert first.name is not None
    return ToolCall(first.id, first.name, "".join(delta.arguments for delta in deltas))


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same pieces, those that touch as one."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
            result[-1] = ContentDelta(last.text + delta.text)
        elif isinstance(delta, CallDelta) and isinstance(last, CallDelta) and delta.id is None:
            result[-1] = CallDelta(last.index, last.arguments + delta.arguments, last.id, last.name)
        else:
            result.append(delta)
    return result


def call_id(seed: str, index: int, *, short: bool = False) -> str:
    """The id of a call: the same for the same seed and place, so that an answer can be told again.

    Args:
        seed: names the message, for example by the request's id and the choice's number.
        index: of the call in the message.
        short: nine letters and digits, as mistral's templates want.
    """
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=12).hexdigest()
    return digest[:SHORT_ID_CHARS] if short else f"call_{digest}"


SHORT_ID_CHARS = 9
