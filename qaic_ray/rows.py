"""What goes round: a prompt in, a row out. Plain frozen data that crosses processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class FinishReason(str, Enum):
    """Why a row ended."""

    STOP = "stop"
    """An EOS token of the model's list; it counts as one generated token."""
    LENGTH = "length"
    """`generation_len` tokens were made, or the context is full."""
    ERROR = "error"
    """The row could not be answered; `error` says why."""


@dataclass(frozen=True)
class Prompt:
    """One user prompt and its place in the input; `index` counts from 0 over the whole input."""

    index: int
    text: str
    id: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of `outputs.jsonl`: a prompt and what became of it.

    `token_ids` holds the generated tokens only, an EOS included. `ttft_s` runs from the row
    entering the engine to its first token, `decode_s` from there to its last. `worker` names the
    card; `attempts` counts how often the row was handed to one.
    """

    index: int
    prompt: str
    text: str
    finish_reason: FinishReason
    id: str | None = None
    token_ids: tuple[int, ...] = field(default=())
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    worker: str = ""
    attempts: int = 1
    error: str | None = None

    @property
    def generated_tokens(self) -> int:
        """Tokens kept in the answer; EOS counts once."""
        return len(self.token_ids)

    @property
    def ok(self) -> bool:
        """Whether the row was answered."""
        return self.finish_reason is not FinishReason.ERROR

    @classmethod
    def failed(cls, prompt: Prompt, error: str, *, worker: str = "", attempts: int = 1) -> Row:
        """The row of a prompt that could not be answered."""
        return cls(
            index=prompt.index,
            id=prompt.id,
            prompt=prompt.text,
            text="",
            finish_reason=FinishReason.ERROR,
            worker=worker,
            attempts=attempts,
            error=error,
        )

    def to_json(self) -> dict[str, Any]:
        """The row as the documented JSON object, keys in the documented order."""
        fields = asdict(self)
        document: dict[str, Any] = {
            key: fields[key] for key in ("index", "id", "prompt", "text", "token_ids")
        }
        document["token_ids"] = list(self.token_ids)
        document["finish_reason"] = self.finish_reason.value
        document["prompt_tokens"] = self.prompt_tokens
        document["generated_tokens"] = self.generated_tokens
        document["ttft_s"] = round(self.ttft_s, 6)
        document["decode_s"] = round(self.decode_s, 6)
        document["worker"] = self.worker
        document["attempts"] = self.attempts
        if self.error is not None:
            document["error"] = self.error
        return document
