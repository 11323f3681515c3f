"""What a streamed request got, as the events that its client reads. Pure.

A writer is told each delta of each prompt, and returns the bytes to send. Of the one that a request
has, `begin` comes first and `end` last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from qaic_ray.errors import QaicRayError
from qaic_ray.rows import Row
from qaic_ray.runs.token_streams import TokenDelta
from qaic_ray.serve import api_errors
from qaic_ray.serve.api_errors import ApiError
from qaic_ray.serve.protocol import answers
from qaic_ray.serve.protocol.answers import PREFIXES
from qaic_ray.serve.protocol.asked import CHAT, RESPONSES, Asked
from qaic_ray.serve.protocol.context import ModelContext
from qaic_ray.serve.protocol.logprobs import LogprobWriter

DONE = b"data: [DONE]\n\n"


class ChunkWriter(Protocol):
    """Makes the events of one request."""

    def begin(self) -> bytes:
        """What is sent before any token is there."""

    def take(self, number: int, delta: TokenDelta) -> bytes:
        """What prompt `number` got.

        Raises:
            ApiError: it has no answer, or what was told before is void.
        """

    def end(self, rows: Sequence[Row]) -> bytes:
        """What is sent behind the last token."""


def chunk_writer(
    asked: Asked, context: ModelContext, *, request_id: str, created: int
) -> ChunkWriter:
    """The writer of a request; arguments as those of `answers.answer_body`."""
    answer_id = PREFIXES[asked.endpoint] + request_id
    if asked.endpoint == RESPONSES:
        return ResponseWriter(asked, answer_id, created)
    if asked.endpoint == CHAT:
        return ChatWriter(asked, context, answer_id, created)
    return CompletionWriter(asked, context, answer_id, created)


def event(document: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    said = f"event: {name}\n" if name else ""
    return f"{said}data: {_dumps(document)}\n\n".encode()


def error_event(error: QaicRayError) -> bytes:
    """The last event of a stream that goes wrong."""
    known = error if isinstance(error, ApiError) else ApiError(500, str(error))
    return event(known.document())


class _Choices:
    """The choices of one request: their numbers, and what is void."""

    def __init__(self, asked: Asked) -> None:
        self._num_samples = asked.num_samples
        self._told: set[int] = set()
        self._num_tokens: dict[int, int] = {}

    def index(self, number: int, delta: TokenDelta) -> int:
        """Which choice of the answer a delta is of.

        Raises:
            ApiError: see `ChunkWriter.take`.
        """
        index = number * self._num_samples + delta.choice
        if delta.row is not None and not delta.row.ok:
            raise api_errors.of_row(delta.row)
        if delta.restarted and index in self._told:
            raise ApiError(
                500,
                "The card was lost, and the answer of the one that took over is another: ask "
                "again, the text so far is void.",
                code="answer_restarted",
            )
        if delta.text or delta.token_ids:
            self._told.add(index)
        self._num_tokens[index] = self._num_tokens.get(index, 0) + len(delta.token_ids)
        return index

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(self._num_tokens.values())


class _EventWriter:
    """What completions and chat have in common; `_field` is where a choice has its text."""

    _field: ClassVar[str]

    def __init__(
        self, asked: Asked, context: ModelContext, answer_id: str, *, created: int, name: str
    ) -> None:
        self._asked = asked
        self._context = context
        self._choices = _Choices(asked)
        head = {"id": answer_id, "object": name, "created": created, "model": asked.model}
        self._head = f"{_dumps(head)[:-1]},"
        self._prompt_tokens = sum(len(prompt.token_ids or ()) for prompt in asked.prompts)
        self._logprobs: dict[int, LogprobWriter] = {}

    def _chunk(self, choices: str) -> bytes:
        """An event with these choices, JSON texts with commas between them."""
        tail = ""
        if self._asked.continuous_usage:
            used = answers.usage_of(self._prompt_tokens, self._choices.num_tokens)
            tail = f',"usage":{_dumps(used)}'
        elif self._asked.include_usage:
            tail = ',"usage":null'
        return f'data: {self._head}"choices":[{choices}]{tail}}}\n\n'.encode()

    def end(self, rows: Sequence[Row]) -> bytes:
        """Usage, where it was asked for, and the last event."""
        if not self._asked.include_usage:
            return DONE
        used = answers.usage(rows, drops_answer=self._asked.drops_answer)
        last = f'data: {self._head}"choices":[],"usage":{_dumps(used)}}}\n\n'
        return last.encode() + DONE

    def _writer(self, index: int, offset: int = 0) -> LogprobWriter | None:
        asked = self._asked
        if asked.num_logprobs is None:
            return None
        if index not in self._logprobs:
            self._logprobs[index] = LogprobWriter(
                self._context.texts, asked.num_logprobs, as_ids=asked.ids_as_tokens, offset=offset
            )
        return self._logprobs[index]

    def _choice(
        self,
        index: int,
        said: str,
        logprobs: str = "null",
        *,
        finish: str = "null",
        stop: str = "null",
        more: str = "",
    ) -> str:
        """A choice as JSON text; the arguments are JSON texts too."""
        return (
            f'{{"index":{index},"{self._field}":{said},"logprobs":{logprobs},'
            f'"finish_reason":{finish},"stop_reason":{stop}{more}}}'
        )


class CompletionWriter(_EventWriter):
    """Events of /v1/completions."""

    _field = "text"

    def __init__(self, asked: Asked, context: ModelContext, answer_id: str, created: int) -> None:
        super().__init__(asked, context, answer_id, created=created, name="text_completion")

    def begin(self) -> bytes:
        """The prompts, where they are wanted."""
        if not self._asked.echo:
            return b""
        num_samples = self._asked.num_samples
        told = [self._choice(at, _dumps(text)) for at, text in self._prompts(num_samples)]
        return b"".join(map(self._chunk, told))

    def _prompts(self, num_samples: int) -> list[tuple[int, str]]:
        return [
            (number * num_samples + sample, text)
            for number, text in enumerate(self._asked.texts)
            for sample in range(num_samples)
        ]

    def take(self, number: int, delta: TokenDelta) -> bytes:
        """See `ChunkWriter.take`."""
        index = self._choices.index(number, delta)
        text, token_ids = delta.text, delta.token_ids
        entries = delta.logprobs
        if self._asked.drops_answer:
            text, token_ids, entries = "", (), ()
        logprobs, more = "null", ""
        if (writer := self._writer(index)) is not None:
            for entry in entries:
                writer.add(entry)
            logprobs = _dumps(writer.legacy()) if entries else "null"
        finish, stop = "null", "null"
        if delta.row is not None:
            sample = answers.samples_of(delta.row)[delta.choice]
            word = "length" if self._asked.drops_answer else answers.finish_word(sample)
            finish, stop = f'"{word}"', _dumps(sample.stop_reason)
        elif not text and not entries and not (self._asked.shows_ids and token_ids):
            return b""
        if self._asked.shows_ids:
            more = f',"token_ids":{_dumps(list(token_ids))}'
        return self._chunk(
            self._choice(index, _dumps(text), logprobs, finish=finish, stop=stop, more=more)
        )


class ChatWriter(_EventWriter):
    """Events of /v1/chat/completions."""

    _field = "delta"

    def __init__(self, asked: Asked, context: ModelContext, answer_id: str, created: int) -> None:
        super().__init__(asked, context, answer_id, created=created, name="chat.completion.chunk")
        assert asked.conversation is not None
        self._streams = [
            asked.conversation.stream(asked.call_seed(answer_id, index))
            for index in range(asked.num_samples)
        ]

    def begin(self) -> bytes:
        """The role of each choice."""
        delta = '{"role":"assistant","content":""}'
        return b"".join(
            self._chunk(self._choice(index, delta)) for index in range(self._asked.num_samples)
        )

    def take(self, number: int, delta: TokenDelta) -> bytes:
        """See `ChunkWriter.take`."""
        index = self._choices.index(number, delta)
        stream = self._streams[index]
        logprobs = "null"
        if (writer := self._writer(index)) is not None and delta.logprobs:
            content = [writer.chat(entry) for entry in delta.logprobs]
            logprobs = _dumps({"content": content, "refusal": None})
        more = f',"token_ids":{_dumps(list(delta.token_ids))}' if self._asked.shows_ids else ""
        told = stream.feed(delta.text) if delta.text else []
        if delta.row is None:
            return self._told(index, told, logprobs, more)
        sample = answers.samples_of(delta.row)[delta.choice]
        rest, finish = stream.end(answers.finish_word(sample))
        sent = self._told(index, [*told, *rest], logprobs, more)
        last = self._choice(index, "{}", finish=f'"{finish}"', stop=_dumps(sample.stop_reason))
        return sent + self._chunk(last)

    def _told(self, index: int, deltas: list[dict[str, Any]], logprobs: str, more: str) -> bytes:
        if not deltas and (logprobs != "null" or more):
            deltas = [{"content": ""}]
        sent = b""
        for delta in deltas:
            sent += self._chunk(self._choice(index, _dumps(delta), logprobs, more=more))
            logprobs, more = "null", ""  # each token once
        return sent


class ResponseWriter:
    """Events of /v1/responses."""

    def __init__(self, asked: Asked, answer_id: str, created: int) -> None:
        self._asked = asked
        self._answer_id = answer_id
        self._created = created
        self._choices = _Choices(asked)
        self._text = ""
        self._number = 0

    def begin(self) -> bytes:
        """The response, its message and its part, all of them empty."""
        begun = self._response((), "in_progress")
        item = {**answers.output_item(self._answer_id, "", "in_progress"), "content": []}
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._part("response.content_part.added", part=answers.text_part(""))
        )

    def take(self, number: int, delta: TokenDelta) -> bytes:
        """See `ChunkWriter.take`."""
        self._choices.index(number, delta)
        if not delta.text:
            return b""
        self._text += delta.text
        return self._part("response.output_text.delta", delta=delta.text, logprobs=[])

    def end(self, rows: Sequence[Row]) -> bytes:
        """The same as they are now."""
        whole = self._response(rows, None)
        item = whole["output"][0]
        return (
            self._part("response.output_text.done", text=self._text, logprobs=[])
            + self._part("response.content_part.done", part=item["content"][0])
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{whole['status']}", response=whole)
        )

    def _response(self, rows: Sequence[Row], status: str | None) -> dict[str, Any]:
        return answers.response_body(
            self._asked, rows, answer_id=self._answer_id, created=self._created, status=status
        )

    def _part(self, kind: str, **fields: Any) -> bytes:
        item_id = answers.message_id(self._answer_id)
        return self._event(kind, item_id=item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)


# Made once: json.dumps makes an encoder for each call that is not of its defaults.
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
