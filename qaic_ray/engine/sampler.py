"""Logits to tokens: greedy, or as each row's SamplingParams say; and their log-probabilities.

The order is vLLM's: what a row's limits forbid and move (`row_limits.py`), repetition, frequency
and presence penalty, `min_tokens`, temperature, `min_p`, `top_k`, `top_p`, one draw. A row's token
number t depends on its parameters, its seed, t and its own logits and tokens: not on its batch, its
slot or the order of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from qaic_ray.engine.categorical import (
    BLOCK_LEN,
    NUM_GROUPS,
    NUMBERS,
    CategoricalSampler,
    Rules,
)
from qaic_ray.engine.compiled.loader import KERNELS, KernelLoader
from qaic_ray.engine.limits.row_limits import RowLimits
from qaic_ray.engine.past import Pasts
from qaic_ray.engine.steps import Sequence
from qaic_ray.engine.unsettled import Floats, Ints, Logits
from qaic_ray.errors import RowError
from qaic_ray.sampling_params import TokenLogprob

if TYPE_CHECKING:
    from qaic_ray.engine.compiled.chooser import Compiled

_SPAN = 64  # tokens whose uniform numbers are made at once
_LOGPROB_BLOCK_LEN = 32
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
    """One token a row, and its logprobs where the row asked for them.

    Only rows in `odd` may have logits that are no finite numbers; those in `failed` end with that
    error.
    """

    tokens: list[int]
    logprobs: list[TokenLogprob | None]
    odd: Listed[int]
    failed: Mapping[int, RowError] = field(default_factory=dict)


class Selector:
    """Chooses the next token of every row, and remembers it for the row's next one.

    Args:
        num_slots: rows of the compiled batch.
        loader: of the compiled kernels; numpy chooses the same tokens until they are there.
    """

    def __init__(self, num_slots: int, *, loader: KernelLoader = KERNELS) -> None:
        self._rows: dict[int, _Row] = {}
        self._pasts = Pasts(num_slots)
        self._uniforms = np.empty((num_slots, _SPAN, NUMBERS))
        self._categorical = CategoricalSampler()
        self._changed = np.empty((0, 0), np.float32)
        self._limits: dict[int, RowLimits] = {}
        self._limited = np.empty((0, 0), np.float32)
        self._group: _Group | None = None
        self._loader = loader

    def enter(self, slot: int, sequence: Sequence) -> None:
        """A sequence takes a slot, perhaps with tokens that it already has."""
        self._rows[slot] = _Row(sequence)
        self._pasts.enter(slot, sequence)
        if sequence.params.has_limits:
            self._limits[slot] = RowLimits(sequence)
        self._group = None

    def prepare(self, slot: int, draft: Listed[int]) -> None:
        """Find out ahead what the next tokens of a row with limits may be; see `RowLimits`."""
        self._limits[slot].prepare(draft)

    def leave(self, slot: int) -> None:
        """The slot's sequence is gone."""
        del self._rows[slot]
        self._pasts.leave(slot)
        self._limits.pop(slot, None)
        self._group = None

    def choose(self, logits: Logits, slots: list[int]) -> Choice:
        """The next token of the rows in these slots.

        Args:
            logits: float32 [rows, vocab], row i that of `slots[i]`; only read.
            slots: without repetition.

        Returns:
            Tokens in the order of `slots`. Logprobs are of the logits as the model gave them,
            before limits, penalties, `min_tokens` and temperature: vLLM's default.

        Raises:
            RowError: no token may come next in a row; nothing was chosen for any.
        """
        group = self._group
        if group is None or group.slots != slots:
            group = self._group = _Group(slots, self._rows, logits.shape[1])
        limited = (
            [i for i, slot in enumerate(slots) if slot in self._limits] if self._limits else ()
        )
        chosen, odd = (
            self._select_limited(logits, group, limited) if limited else self._select(logits, group)
        )
        tokens: list[int] = chosen.tolist()
        failed: dict[int, RowError] = {}
        for position in limited:
            try:
                self._limits[slots[position]].take(tokens[position])
            except RowError as error:
                failed[position] = error
        logprobs: list[TokenLogprob | None] = [None] * len(slots)
        for position in group.with_logprobs:
            logprobs[position] = token_logprob(
                logits[position], tokens[position], group.rows[position].params.logprobs or 0
            )
        for row in group.rows:
            row.num_output += 1
        if not self._pasts.is_empty:
            for slot, token in zip(slots, tokens, strict=True):
                self._pasts.take(slot, token)
        return Choice(tokens, logprobs, odd, failed)

    def _select_limited(
        self, logits: Logits, group: _Group, limited: list[int]
    ) -> tuple[Ints, Listed[int]]:
        """As `_select`, for rows of which some, in these positions, have limits."""
        if not group.tokens_of_span:
            self._begin_span(group)
        # First, because it may fail, and nothing has been chosen then.
        found = [
            self._only_of_few(logits[i], group.slots[i]) if i in group.greedy else None
            for i in limited
        ]
        rest = [i for i, token in zip(limited, found, strict=True) if token is None]
        others = iter(self._select_of_copy(logits, group, rest) if rest else ())
        own = [next(others) if token is None else token for token in found]
        if len(limited) < len(group.slots):
            tokens, _ = self._select(logits, group)
        else:
            tokens = np.empty(len(limited), np.int64)
            group.numbers += 1
            group.tokens_of_span -= 1
        tokens[limited] = own
        return tokens, group.every

    def _only_of_few(self, logits: Logits, slot: int) -> int | None:
        """The likeliest of the few tokens that a greedy row may have; None where they are many."""
        return None if self._pasts.changes(slot) else self._limits[slot].likeliest_of_few(logits)

    def _select_of_copy(self, logits: Logits, group: _Group, rows: list[int]) -> list[int]:
        """Tokens of rows with limits, in a copy of whose logits these are applied."""
        slots = [group.slots[i] for i in rows]
        allowed = self._limited[: len(rows)]
        if self._limited.shape[1] != logits.shape[1] or len(allowed) < len(rows):
            self._limited = np.empty(logits.shape, np.float32)
            allowed = self._limited[: len(rows)]
        for slot, row, copy in zip(slots, rows, allowed, strict=True):
            copy[:] = logits[row]
            self._limits[slot].change(copy)
        if group.rest is None or group.rest.slots != slots:
            group.rest = _Group(slots, self._rows, logits.shape[1])
        group.rest.numbers[:] = group.numbers[rows]
        tokens: list[int] = self._select_by_numpy(allowed, group.rest).tolist()
        return [
            # All that may come can be -inf in the model's own logits, which is the row's error.
            self._limits[slot].first_allowed(token) if copy[token] == -np.inf else token
            for slot, token, copy in zip(slots, tokens, allowed, strict=True)
        ]

    def _select(self, logits: Logits, group: _Group) -> tuple[Ints, Listed[int]]:
        """The tokens, and the rows of which some logits may be no finite numbers."""
        if not group.tokens_of_span:
            self._begin_span(group)
        compiled = self._compiled(logits, group)
        odd: Listed[int] = group.every
        if compiled is None:
            tokens = self._select_by_numpy(logits, group)
        else:
            tokens, odd = compiled.choose(logits, self._pasts)
            if odd:
                rest = _Group([group.slots[row] for row in odd], self._rows, logits.shape[1])
                rest.numbers[:] = group.numbers[odd]
                tokens[odd] = self._select_by_numpy(logits[odd], rest)
        group.numbers += 1
        group.tokens_of_span -= 1
        return tokens, odd

    def _compiled(self, logits: Logits, group: _Group) -> Compiled | None:
        """The kernels for this group, where they are there and it is one for them."""
        if not group.is_for_kernels:
            return None
        if group.compiled is None:
            module = self._loader.kernels(len(group.slots))
            if module is None:
                return None
            params = [row.params for row in group.rows]
            vocab = logits.shape[1]
            if not module.can_choose(params, vocab) or not self._pasts.fit(group.slots, vocab):
                group.is_for_kernels = False
                return None
            group.compiled = module.Compiled(
                params,
                group.slots,
                vocab,
                uniforms=self._uniforms,
                numbers=group.numbers,
                address=logits.ctypes.data,
            )
        is_plain = logits.dtype == np.float32 and logits.flags.c_contiguous and logits.flags.aligned
        return group.compiled if is_plain else None

    def _select_by_numpy(self, logits: Logits, group: _Group) -> Ints:
        logits = self._adjusted(logits, group)
        if not group.drawn.size:
            return greedy(logits)
        uniforms = self._uniforms[group.drawn_slots, group.numbers[group.drawn]]
        if not group.greedy:
            return self._categorical.draw(np.ascontiguousarray(logits), group.rules, uniforms)
        tokens = np.empty(len(group.slots), np.int64)
        tokens[group.drawn] = self._categorical.draw(logits[group.drawn], group.rules, uniforms)
        for position in group.greedy:
            tokens[position] = logits[position].argmax()
        return tokens

    def _adjusted(self, logits: Logits, group: _Group) -> Logits:
        """The logits, or a copy in which penalties and `min_tokens` are applied."""
        pasts = self._pasts
        if pasts.is_empty:
            return logits
        adjusting = [i for i, slot in enumerate(group.slots) if pasts.changes(slot)]
        if not adjusting:
            return logits
        if self._changed.shape != logits.shape:
            self._changed = np.empty(logits.shape, np.float32)
        np.copyto(self._changed, logits)
        for position in adjusting:
            pasts.change(group.slots[position], self._changed[position])
        return self._changed

    def _begin_span(self, group: _Group) -> None:
        """Have the uniform numbers of every row's next tokens, up to the first end of a span."""
        for position, slot in zip(group.drawn.tolist(), group.drawn_slots, strict=True):
            row = group.rows[position]
            span, group.numbers[position] = divmod(row.num_output, _SPAN)
            if row.span != span:
                self._uniforms[slot], row.span = _uniforms(row.seed, span), span
        group.tokens_of_span = _SPAN - int(group.numbers.max(initial=0))


class _Row:
    """One sequence in its slot."""

    def __init__(self, sequence: Sequence) -> None:
        self.params = sequence.params
        self.seed = sequence.seed
        self.num_output = len(sequence.output_ids)
        self.span = -1


class _Group:
    """The rows of one call, sorted by how they are answered; kept while the slots are the same."""

    def __init__(self, slots: list[int], rows: dict[int, _Row], vocab: int) -> None:
        self.slots = list(slots)
        self.rows = [rows[slot] for slot in slots]
        params = [row.params for row in self.rows]
        self.greedy = [i for i, asked in enumerate(params) if asked.is_greedy]
        self.drawn = np.array([i for i, asked in enumerate(params) if not asked.is_greedy], int)
        self.drawn_slots = [slots[i] for i in self.drawn]
        self.with_logprobs = [i for i, asked in enumerate(params) if asked.logprobs is not None]
        drawn = [asked for asked in params if not asked.is_greedy]
        self.rules = Rules(
            [(asked.temperature, asked.top_k, asked.top_p, asked.min_p) for asked in drawn], vocab
        )
        # Which number of its span each row's next token has, and how many until one ends.
        self.numbers = np.zeros(len(slots), np.int64)
        self.tokens_of_span = 0
        self.every = range(len(slots))
        self.is_for_kernels = vocab >= BLOCK_LEN * NUM_GROUPS
        self.compiled: Compiled | None = None
        self.rest: _Group | None = None  # the rows of it that are chosen for apart


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
    num_blocks = logits.size // _LOGPROB_BLOCK_LEN
    if num_blocks >= num:
        # So many blocks have a token that reaches this, so no other can be among the largest.
        maxima = (
            logits[: num_blocks * _LOGPROB_BLOCK_LEN]
            .reshape(_LOGPROB_BLOCK_LEN, num_blocks)
            .max(axis=0)
        )
        floor = max(floor, np.partition(maxima, num_blocks - num)[num_blocks - num])
    ids = np.flatnonzero(logits >= floor)
    chosen: list[int] = ids[np.argsort(-logits[ids], kind="stable")][:num].tolist()
    return chosen
