"""Tokens of streamed rows as their reader gets them: nothing twice, nothing lost.

A row may be begun again on another worker, or run on two at once, and its row may be there before
its last tokens are. What is told all the same joins to exactly the row. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qaic_ray.rows import FinishReason, Row, Sample, TokenChunk
from qaic_ray.sampling_params import TokenLogprob


@dataclass(frozen=True)
class TokenDelta:
    """What follows of one choice of a streamed row.

    The texts of a choice, from the last one that has `restarted` on, join to its text, and so do
    tokens and log-probabilities. `restarted`: what was told before is void, as another attempt gave
    another answer. The last delta of each choice has the `row`, which may have no answer; what was
    told is void then too.
    """

    index: int
    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    restarted: bool = False
    row: Row | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the choice ended; None while it goes on."""
        if self.row is None:
            return None
        choices = self.row.choices
        return choices[self.choice].finish_reason if choices else self.row.finish_reason


@dataclass
class _Attempt:
    """One choice as one attempt told it; `number` rises with each that begins."""

    number: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, chunk: TokenChunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs

    def begins(self, other: _Attempt | Sample | Row) -> bool:
        """Whether another one says the same so far, and perhaps more."""
        ids = other.token_ids
        return other.text.startswith(self.text) and list(ids[: len(self.token_ids)]) == (
            self.token_ids
        )


class _Choice:
    """One choice of a streamed row: its attempts by worker, and the one that was told."""

    def __init__(self, index: int, number: int) -> None:
        self._empty = TokenDelta(index, number, "")
        self._told = _Attempt(-1)
        self._attempts: dict[str, _Attempt] = {}
        self._num_begun = 0

    def take(self, worker: str, chunk: TokenChunk) -> TokenDelta | None:
        """What the reader is to be told of a chunk."""
        if chunk.tokens_at == 0:
            self._attempts[worker] = _Attempt(self._num_begun)
            self._num_begun += 1
        attempt, told = self._attempts.get(worker), self._told
        if attempt is None:
            return None  # its beginning was not told
        attempt.add(chunk)
        if attempt is told:
            return replace(
                self._empty, text=chunk.text, token_ids=chunk.token_ids, logprobs=chunk.logprobs
            )
        is_old = attempt.number < told.number and not told.begins(attempt)
        if is_old or attempt.begins(told):
            return None  # given up for another answer, or behind
        self._told = attempt
        return self._after(told, attempt)

    def end(self, row: Row) -> TokenDelta:
        """What is still to be told, now that the row is there."""
        if not row.ok:
            return replace(self._empty, row=row)
        answer: Sample | Row = row.choices[self._empty.choice] if row.choices else row
        return replace(self._after(self._told, answer), row=row)

    def _after(self, told: _Attempt, now: _Attempt | Sample | Row) -> TokenDelta:
        goes_on = told.begins(now)
        num_chars, num_tokens = (len(told.text), len(told.token_ids)) if goes_on else (0, 0)
        return replace(
            self._empty,
            text=now.text[num_chars:],
            token_ids=tuple(now.token_ids[num_tokens:]),
            logprobs=tuple(now.logprobs or ())[num_tokens:],
            restarted=not goes_on,
        )


class RowStream:
    """A streamed row that is not done."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._choices: dict[int, _Choice] = {}

    def take(self, worker: str, chunk: TokenChunk) -> TokenDelta | None:
        """What is to be told of a chunk; None for nothing.

        Args:
            worker: whose; its chunks of one attempt come in order.
            chunk: of this row.
        """
        return self._choice(chunk.choice).take(worker, chunk)

    def end(self, row: Row) -> list[TokenDelta]:
        """The last delta of each choice, now that the row is there."""
        num_choices = max(1, len(row.choices), *(number + 1 for number in self._choices))
        return [self._choice(number).end(row) for number in range(num_choices)]

    def _choice(self, number: int) -> _Choice:
        return self._choices.setdefault(number, _Choice(self._index, number))
