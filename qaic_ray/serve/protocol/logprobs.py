"""Log-probabilities in the two forms of the interface: completions' lists, chat's objects."""

from __future__ import annotations

import math
from typing import Any

from qaic_ray.sampling_params import TokenLogprob
from qaic_ray.serve.protocol.token_texts import TokenTexts

LOWEST = -9999.0
"""Stands in the interface for what JSON has no number for."""


class LogprobWriter:
    """Writes the tokens of one choice, in order.

    Args:
        texts: of the model's tokens.
        num_top: how many alternatives are listed.
        as_ids: write `token_id:N` in place of a token's text.
        offset: characters of the choice's text before its first token here.
    """

    def __init__(
        self, texts: TokenTexts, num_top: int, *, as_ids: bool = False, offset: int = 0
    ) -> None:
        self._texts = texts
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = offset
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def unscored(self, token_id: int) -> None:
        """The first token of a prompt, which follows nothing."""
        self._put(token_id, None, None)

    def add(self, entry: TokenLogprob) -> None:
        """One more token."""
        top = {
            self._name(token_id): number(value) for token_id, value in entry.top[: self._num_top]
        }
        top.setdefault(self._name(entry.token_id), number(entry.logprob))
        self._put(entry.token_id, number(entry.logprob), top)

    def legacy(self) -> dict[str, Any]:
        """What was added since the last call, as completions have it."""
        written = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
        self._clear()
        return written

    def chat(self, entry: TokenLogprob) -> dict[str, Any]:
        """A token as chat has it."""
        top = entry.top[: self._num_top]
        return {
            **self._object(entry.token_id, entry.logprob),
            "top_logprobs": [self._object(*other) for other in top],
        }

    def _object(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": number(logprob),
            "bytes": list(self._texts.raw(token_id)),
        }

    def _put(self, token_id: int, logprob: float | None, top: dict[str, float] | None) -> None:
        self._tokens.append(self._name(token_id))
        self._logprobs.append(logprob)
        self._tops.append(top)
        self._offsets.append(self._offset)
        self._offset += len(self._texts.text(token_id))

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.text(token_id)


def number(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return LOWEST if math.isnan(logprob) else max(logprob, LOWEST)
