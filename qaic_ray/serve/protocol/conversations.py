"""The conversation of a chat request: its messages and tools, and what they ask of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qaic_ray.errors import RowError
from qaic_ray.formats.row_reader import Draft
from qaic_ray.serve.api_errors import bad_request
from qaic_ray.serve.protocol.models import ChatBody


@dataclass(frozen=True)
class Conversation:
    """A conversation to answer.

    Attributes:
        messages: for the chat template.
        template_kwargs: variables of the template that tools bring.
        answer_fields: what tools ask of the answer's form.
    """

    messages: tuple[Mapping[str, Any], ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    answer_fields: Mapping[str, Any] = field(default_factory=dict)

    def message_of(self, text: str, finish: str) -> tuple[dict[str, Any], str]:
        """The message of an answer, and why it ended."""
        return {"role": "assistant", "content": text, "refusal": None}, finish

    def stream(self) -> AnswerStream:
        """What makes deltas of an answer's text while it comes."""
        return AnswerStream()


class AnswerStream:
    """The deltas of one choice."""

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas of more text."""
        return [{"content": text}]

    def end(self, finish: str) -> tuple[list[dict[str, Any]], str]:
        """The deltas of what is left, and why the answer ended."""
        return [], finish


def read_conversation(body: ChatBody, tool_form: str | None) -> Conversation:
    """The conversation of a request.

    Raises:
        ApiError: a message is wrong.
    """
    draft = Draft(0, "")
    try:
        draft.read_prompt({"messages": body.messages})
    except RowError as error:
        raise bad_request(str(error), "messages") from error
    return Conversation(tuple(draft.messages or ()))
