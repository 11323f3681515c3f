"""The conversation of a chat request: its messages and tools, and what they ask of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.models import ChatBody
from qaic_ray.serve.tools.call_reader import CallReader
from qaic_ray.serve.tools.calling import Calling, TextReader, finish_reason, read_calling


@dataclass(frozen=True)
class Conversation:
    """A conversation to answer.

    Attributes:
        calling: its messages and tools.
    """

    calling: Calling

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """For the chat template."""
        return self.calling.messages

    @property
    def template_kwargs(self) -> Mapping[str, Any]:
        """Variables of the template that tools bring."""
        return self.calling.template_kwargs

    @property
    def answer_fields(self) -> Mapping[str, Any]:
        """What tools ask of the answer, as fields of sampling parameters."""
        return self.calling.sampling_fields

    def message_of(self, text: str, finish: str, seed: str) -> tuple[dict[str, Any], str]:
        """The message of an answer, and why it ended; `seed` makes the ids of its calls."""
        return self.calling.message(text, finish, seed)

    def stream(self, seed: str) -> AnswerStream:
        """What makes deltas of an answer's text while it comes; the same `seed`, the same ids."""
        return AnswerStream(self.calling.reader(seed))


class AnswerStream:
    """The deltas of one choice."""

    def __init__(self, reader: CallReader | TextReader) -> None:
        self._reader = reader

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas of more text."""
        return [delta.document() for delta in self._reader.feed(text)]

    def end(self, finish: str) -> tuple[list[dict[str, Any]], str]:
        """The deltas of what is left, and why the answer ended."""
        rest = [delta.document() for delta in self._reader.end()]
        return rest, finish_reason(finish, self._reader.num_calls)


def read_conversation(body: ChatBody, context: ModelContext) -> Conversation:
    """The conversation of a request.

    Raises:
        ApiError: a message or a tool is wrong, or the model calls no tools.
    """
    fields = {name: getattr(body, name) for name in _FIELDS}
    return Conversation(read_calling(fields, context.tools, allow_unknown=context.allow_unknown))


_FIELDS = (
    *("messages", "tools", "tool_choice", "parallel_tool_calls"),
    *("response_format", "structured_outputs"),
)
