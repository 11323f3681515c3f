"""Drafts without a second model: what followed the last tokens when they occurred before. Pure.

Answers repeat their prompts (summaries, code, extraction) and themselves; where they do, the tokens
that came after the latest earlier occurrence are a good guess. A wrong guess costs nothing but its
place in a decode shape that is there anyway.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

from qaic_ray.engine.batcher import Sequence

MAX_NGRAM = 3
"""Longest run of last tokens that is looked up; the longest that is found decides."""


@dataclass
class _Text:
    """The tokens of one row, and behind which of them each n-gram ended last."""

    tokens: list[int]
    next_of: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0

    def index(self) -> None:
        """Take in every n-gram that has a token behind it by now."""
        for end in range(self.num_indexed + 1, len(self.tokens)):
            for length in range(1, min(MAX_NGRAM, end) + 1):
                self.next_of[tuple(self.tokens[end - length : end])] = end
        self.num_indexed = max(len(self.tokens) - 1, 0)

    def guess(self, room: int) -> list[int]:
        """At most `room` tokens that may come next."""
        for length in range(min(MAX_NGRAM, len(self.tokens)), 0, -1):
            start = self.next_of.get(tuple(self.tokens[-length:]))
            if start is not None:
                known = self.tokens[start:]
                # A repetition that reaches the end goes on repeating.
                return [known[i % len(known)] for i in range(room)]
        return []


class PromptLookup:
    """Drafts from the row's own prompt and answer."""

    def __init__(self) -> None:
        self._texts: dict[Sequence, _Text] = {}

    def propose(self, rows: Listed[Sequence], room: Listed[int]) -> list[list[int]]:
        """At most `room[i]` tokens for row i."""
        return [
            self._propose(sequence, most) if most > 0 else []
            for sequence, most in zip(rows, room, strict=True)
        ]

    def release(self, sequence: Sequence) -> None:
        """Forget a row."""
        self._texts.pop(sequence, None)

    def _propose(self, sequence: Sequence, most: int) -> list[int]:
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = _Text(list(sequence.prompt_ids))
        text.tokens += sequence.output_ids[len(text.tokens) - len(sequence.prompt_ids) :]
        text.index()
        return text.guess(most)
