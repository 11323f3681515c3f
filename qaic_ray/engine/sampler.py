"""Logits to tokens: greedy, or as each row's SamplingParams say; and their log-probabilities.

The order is vLLM's: repetition, frequency and presence penalty, `min_tokens`, temperature, `min_p`,
`top_k`, `top_p`, one draw. A row's token number t depends on its parameters, its seed, t and its
own logits and tokens: not on its batch, its slot or the order of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qaic_ray.engine.categorical import NUMBERS, CategoricalSampler, Floats, Ints, Logits, Rules
from qaic_ray.engine.steps import Sequence
from qaic_ray.sampling_params import TokenLogprob

_SPAN = 64  # tokens whose uniform numbers are made at once
_BLOCK_LEN = 32
_LOG2_E = np.float32(math.log2(math.e))
_LOWEST = np.finfo(np.float32).min


def greedy(logits: Logits) -> Ints:
    """The most likely token of each row: the first of the largest logits, as in torch.

    Args:
        logits: float32 [rows, vocab].

    Returns:
        int64 [rows].
    """
    tokens: Ints = logits.argmax(axis=-1)
    return tokens


def overflowed(logits: Logits, tokens: Ints | list[int]) -> list[int]:
    """The rows whose largest logit is not a finite number, seen at the token chosen for it.

    `greedy` and the draw give the first NaN, else the first infinity, where there is one.

    Args:
        logits: float32 [rows, vocab], C-contiguous.
        tokens: what was chosen, one a row.

    Returns:
        Row numbers; usually none, found in a microsecond.
    """
    if len(tokens) == 1:
        return [] if math.isfinite(logits.item(tokens[0])) else [0]
    is_finite = np.isfinite(logits.take(_first_of_rows(*logits.shape) + tokens))
    if b"\0" not in is_finite.tobytes():  # twice as quick as numpy's own way to ask
        return []
    rows: list[int] = np.flatnonzero(~is_finite).tolist()
    return rows


@lru_cache(maxsize=128)
def _first_of_rows(num_rows: int, vocab: int) -> Ints:
    """Where each row begins in the flat logits."""
    return np.arange(0, num_rows * vocab, vocab)


@dataclass(frozen=True)
class Choice:
    """One token a row, and its logprobs where the row asked for them."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]


class Selector:
    """Chooses the next token of every row, and remembers it for the row's next one.

    Args:
        num_slots: rows of the compiled batch.
    """

    def __init__(self, num_slots: int) -> None:
        self._rows: dict[int, _Row] = {}
        self._uniforms = np.empty((num_slots, _SPAN, NUMBERS))
        self._categorical = CategoricalSampler()
        self._changed = np.empty((0, 0), np.float32)
        self._group: _Group | None = None

    def enter(self, slot: int, sequence: Sequence) -> None:
        """A sequence takes a slot, perhaps with tokens that it already has."""
        self._rows[slot] = _Row(sequence)
        self._group = None

    def leave(self, slot: int) -> None:
        """The slot's sequence is gone."""
        del self._rows[slot]
        self._group = None

    def choose(self, logits: Logits, slots: list[int]) -> Choice:
        """The next token of the rows in these slots.

        Args:
            logits: float32 [rows, vocab], row i that of `slots[i]`; only read.
            slots: without repetition.

        Returns:
            Tokens in the order of `slots`. Logprobs are of the logits as the model gave them,
            before penalties, `min_tokens` and temperature: vLLM's default.
        """
        group = self._group
        if group is None or group.slots != slots:
            group = self._group = _Group(slots, self._rows, logits.shape[1])
        tokens: list[int] = self._select(logits, group).tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(slots)
        for position in group.with_logprobs:
            logprobs[position] = token_logprob(
                logits[position], tokens[position], group.rows[position].params.logprobs or 0
            )
        for row, token in zip(group.rows, tokens, strict=True):
            row.take(token)
        return Choice(tokens, logprobs)

    def _select(self, logits: Logits, group: _Group) -> Ints:
        logits = self._adjusted(logits, group)
        if not group.drawn.size:
            return greedy(logits)
        if not group.greedy:
            return self._draw(np.ascontiguousarray(logits), group)
        tokens = np.empty(len(group.slots), np.int64)
        tokens[group.drawn] = self._draw(logits[group.drawn], group)
        for position in group.greedy:
            tokens[position] = logits[position].argmax()
        return tokens

    def _adjusted(self, logits: Logits, group: _Group) -> Logits:
        """The logits, or a copy in which penalties and `min_tokens` are applied."""
        adjusting = [p for p in group.adjusted if group.rows[p].adjusts]
        if not adjusting:
            return logits
        if self._changed.shape != logits.shape:
            self._changed = np.empty(logits.shape, np.float32)
        np.copyto(self._changed, logits)
        for position in adjusting:
            group.rows[position].adjust(self._changed[position])
        return self._changed

    def _draw(self, logits: Logits, group: _Group) -> Ints:
        numbers = []
        for slot, row in zip(group.drawn_slots, group.drawn_rows, strict=True):
            if row.num_output >= row.end_of_span:
                span = row.num_output // _SPAN
                self._uniforms[slot] = _uniforms(row.seed, span)
                row.end_of_span = (span + 1) * _SPAN
            numbers.append(row.num_output % _SPAN)
        uniforms = self._uniforms[group.drawn_slots, numbers]
        return self._categorical.draw(logits, group.rules, uniforms)


class _Row:
    """One sequence in its slot: its parameters, and its past as far as these ask for it."""

    def __init__(self, sequence: Sequence) -> None:
        self.params = sequence.params
        self.seed = sequence.seed
        self.num_output = len(sequence.output_ids)
        self._has_penalties = self.params.has_penalties
        self.end_of_span = 0
        self._stop_ids = np.array(sorted(sequence.stop_ids), np.int64)
        self._place: dict[int, int] = {}
        self._seen = np.empty(0, np.int64)
        self._count = np.empty(0, np.float32)
        if self._has_penalties:
            for token in sequence.prompt_ids:
                self._remember(token, 0)
            for token in sequence.output_ids:
                self._remember(token, 1)

    @property
    def adjusts(self) -> bool:
        """Whether the next token's logits are changed."""
        return self._has_penalties or self.num_output < self.params.min_tokens

    def adjust(self, logits: Logits) -> None:
        """Apply penalties and `min_tokens` to a row of logits, in place."""
        params = self.params
        if self._has_penalties:
            num_seen = len(self._place)
            seen, count = self._seen[:num_seen], self._count[:num_seen]
            values = logits[seen]
            if params.repetition_penalty != 1:
                penalty = np.float32(params.repetition_penalty)
                values = np.where(values > 0, values / penalty, values * penalty)
            if params.frequency_penalty != 0:
                values -= np.float32(params.frequency_penalty) * count
            if params.presence_penalty != 0:
                values -= np.float32(params.presence_penalty) * (count > 0)
            logits[seen] = values
        if self.num_output < params.min_tokens:
            logits[self._stop_ids[self._stop_ids < logits.size]] = -np.inf

    def take(self, token: int) -> None:
        """The row's next token is this one."""
        self.num_output += 1
        if self._has_penalties:
            self._remember(token, 1)

    def _remember(self, token: int, times: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == self._seen.size:
            self._seen = np.concatenate([self._seen, np.zeros(place + 64, np.int64)])
            self._count = np.concatenate([self._count, np.zeros(place + 64, np.float32)])
        self._seen[place] = token
        self._count[place] += times


class _Group:
    """The rows of one call, sorted by how they are answered; kept while the slots are the same."""

    def __init__(self, slots: list[int], rows: dict[int, _Row], vocab: int) -> None:
        self.slots = list(slots)
        self.rows = [rows[slot] for slot in slots]
        params = [row.params for row in self.rows]
        self.greedy = [i for i, asked in enumerate(params) if asked.is_greedy]
        self.drawn = np.array([i for i, asked in enumerate(params) if not asked.is_greedy], int)
        self.drawn_rows = [self.rows[i] for i in self.drawn]
        self.drawn_slots = [slots[i] for i in self.drawn]
        self.adjusted = [i for i, row in enumerate(self.rows) if row.adjusts]
        self.with_logprobs = [i for i, asked in enumerate(params) if asked.logprobs is not None]
        drawn = [asked for asked in params if not asked.is_greedy]
        self.rules = Rules(
            [(asked.temperature, asked.top_k, asked.top_p, asked.min_p) for asked in drawn], vocab
        )


def _uniforms(seed: int, span: int) -> Floats:
    """Numbers in [0, 1) for the tokens of a span, a function of seed and span alone.

    The streams of numpy's bit generators never change; those of its Generator may.
    """
    raw = np.random.Philox(key=seed, counter=span << 64).random_raw(_SPAN * NUMBERS)
    uniforms: Floats = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms.reshape(_SPAN, NUMBERS)


def token_logprob(logits: Logits, token: int, num_top: int) -> TokenLogprob:
    """The log-softmax of a row at the chosen token and at its `num_top` largest logits.

    Tokens of logit -inf are impossible and never among the most likely ones. A row whose largest
    logit is no finite number has NaN for all its logprobs.
    """
    best = logits.max()
    # numpy's exp2 is more than twice as fast as its exp.
    with np.errstate(invalid="ignore"):
        weights = logits - best
        weights *= _LOG2_E
        log_total = float(best) + math.log(np.exp2(weights, out=weights).sum())
    top = tuple((at, float(logits[at]) - log_total) for at in _most_likely(logits, num_top))
    return TokenLogprob(token, float(logits[token]) - log_total, top)


def _most_likely(logits: Logits, num: int) -> list[int]:
    """Ids of the largest logits, from the largest on; equal ones by rising id."""
    if num == 0:
        return []
    floor = _LOWEST
    num_blocks = logits.size // _BLOCK_LEN
    if num_blocks >= num:
        # So many blocks have a token that reaches this, so no other can be among the largest.
        maxima = logits[: num_blocks * _BLOCK_LEN].reshape(_BLOCK_LEN, num_blocks).max(axis=0)
        floor = max(floor, np.partition(maxima, num_blocks - num)[num_blocks - num])
    ids = np.flatnonzero(logits >= floor)
    chosen: list[int] = ids[np.argsort(-logits[ids], kind="stable")][:num].tolist()
    return chosen
