"""Which tokens a row may have next, and how far their logits are moved, whatever the model says.

A row's grammar, `allowed_token_ids` and `bad_words` forbid tokens, `logit_bias` moves logits.
What the grammar allows is found out while the card works; at the end of the step it is one pass
over the row's logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qaic_ray.engine.steps import Sequence
from qaic_ray.engine.unsettled import Ints, Logits
from qaic_ray.errors import RowError

Mask = npt.NDArray[np.uint8]
"""[vocab]: 1 for a token that may come."""

_FEW = 64  # where one token in so many is allowed, they are written one by one
_FORBIDDEN = np.uint32(0xFF800000)  # the bits of a float32 -inf; without the highest one, of +inf
_SIGN = np.uint32(31)


@dataclass(frozen=True)
class _Allowed:
    """The tokens that may come: their ids where they are few, else a ceiling for each logit."""

    ids: Ints | None = None
    ceiling: Logits | None = None

    def apply(self, logits: Logits) -> None:
        """Make the logits of all other tokens -inf, in place."""
        if self.ids is not None:
            kept = logits[self.ids]
            logits.fill(-np.inf)
            logits[self.ids] = kept
        else:
            assert self.ceiling is not None
            np.fmin(logits, self.ceiling, out=logits)  # which gives NaN no way past a ceiling

    @property
    def first(self) -> int:
        """One of them."""
        if self.ids is not None:
            return int(self.ids[0])
        assert self.ceiling is not None
        return int(self.ceiling.argmax())


class RowLimits:
    """Of one row while it runs.

    Args:
        sequence: the row, perhaps with tokens that it already has; its guide is where they end.
    """

    def __init__(self, sequence: Sequence) -> None:
        params = sequence.params
        self._guide = sequence.guide
        self._stop_ids = np.array(sorted(sequence.stop_ids), np.int64)
        self._output = list(sequence.output_ids)
        self._min_tokens = params.min_tokens
        only = params.allowed_token_ids
        self._only = None if only is None else np.array(only, np.int64)
        self._mask_of_only: Mask | None = None
        self._all_of_only: _Allowed | None = None
        self._bad_ids = sequence.bad_ids
        self._bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], np.float32)
        # What may come next, and behind each drafted token.
        self._ready: list[_Allowed | None] = []
        self._drafted: list[int] = []

    def prepare(self, draft: Listed[int]) -> None:
        """Find out what a grammar allows next, and behind each token of a draft; for `change`.

        Raises:
            RowError: nothing may come, or the grammar cannot be followed here.
        """
        guide, num_output = self._guide, len(self._output)
        if guide is None:
            return
        vocab = guide.num_tokens
        self._ready, self._drafted = [self._allowed(vocab)], []
        try:
            for token in draft:
                # Nothing comes behind a token that may not come, or that ends the row.
                if token in self._stop_ids or not guide.try_take(token):
                    break
                self._output.append(token)
                self._drafted.append(token)
                if guide.is_done:
                    break
                self._ready.append(self._allowed(vocab))
        finally:
            guide.go_back(len(self._output) - num_output)
            del self._output[num_output:]

    def change(self, logits: Logits) -> None:
        """Forbid and move, in place.

        Raises:
            RowError: as `prepare`.
        """
        allowed = self._next(logits.size)
        if allowed is not None:
            allowed.apply(logits)
        elif self._bad_ids:
            logits[self._banned()] = -np.inf
        if self._biases.size:
            logits[self._bias_ids] += self._biases

    def likeliest_of_few(self, logits: Logits) -> int | None:
        """The token with the largest logit, where few are allowed; None where `change` tells it.

        Raises:
            RowError: as `prepare`.
        """
        allowed = self._next(logits.size)
        if allowed is None or allowed.ids is None or self._biases.size:
            return None
        ids = allowed.ids
        return int(ids[logits[ids].argmax()] if ids.size > 1 else ids[0])

    def first_allowed(self, token: int) -> int:
        """One of the tokens that may come, in place of one that may not; else the same."""
        allowed = self._ready[0] if self._ready else None
        return token if allowed is None else allowed.first

    def take(self, token: int) -> None:
        """The row's next token is this one.

        Raises:
            RowError: the grammar cannot be followed any more.
        """
        is_drafted = self._drafted[:1] == [token]
        self._ready = self._ready[1:] if is_drafted else []
        self._drafted = self._drafted[1:] if is_drafted else []
        self._output.append(token)
        if self._guide is not None and token not in self._stop_ids:
            self._guide.take(token)

    def _next(self, vocab: int) -> _Allowed | None:
        if not self._ready:
            self._ready = [self._allowed(vocab)]
        return self._ready[0]

    def _allowed(self, vocab: int) -> _Allowed | None:
        """What may come in this state; None for a row in which everything may but bad words."""
        guide, stop_ids = self._guide, self._stop_ids
        ends = len(self._output) >= self._min_tokens
        if guide is None:
            return None if self._only is None else self._of_only(vocab, ends=ends)
        if self._only is None and not self._bad_ids:
            # The text is the same whatever tokens write it; these are how the tokenizer does.
            forced = guide.forced()
            if forced and forced[0] < vocab and forced[0] not in stop_ids:
                return _of_ids(np.array(forced[:1], np.int64))
        bits = np.frombuffer(guide.allowed(), np.uint8)
        mask = np.zeros(vocab, np.uint8)
        given = np.unpackbits(bits, bitorder="little")[:vocab]
        mask[: given.size] = given
        mask[[token for token in guide.end_ids if token < vocab]] = 0
        mask[stop_ids[stop_ids < vocab]] = ends and guide.may_end
        if self._only is not None:
            mask &= self._only_mask(vocab)
        mask[self._banned()] = 0
        return _of_mask(mask)

    def _of_only(self, vocab: int, *, ends: bool) -> _Allowed:
        """Those of `allowed_token_ids` that are neither of bad words nor stop tokens too early."""
        banned = self._banned()
        if ends and not banned:
            if self._all_of_only is None:
                self._all_of_only = _of_mask(self._only_mask(vocab))
            return self._all_of_only
        mask = self._only_mask(vocab).copy()
        mask[banned] = 0
        if not ends:
            mask[self._stop_ids[self._stop_ids < vocab]] = 0
        return _of_mask(mask)

    def _only_mask(self, vocab: int) -> Mask:
        if self._mask_of_only is None:
            self._mask_of_only = np.zeros(vocab, np.uint8)
            self._mask_of_only[self._only] = 1
        return self._mask_of_only

    def _banned(self) -> list[int]:
        """The last tokens of bad words whose other tokens the answer ends with."""
        output = self._output
        return [
            word[-1]
            for word in self._bad_ids
            if len(word) == 1 or tuple(output[1 - len(word) :]) == word[:-1]
        ]


def _of_ids(ids: Ints) -> _Allowed:
    if not ids.size:
        raise _nothing()
    return _Allowed(ids=ids)


def _of_mask(mask: Mask) -> _Allowed:
    num = np.count_nonzero(mask)
    if num * _FEW <= mask.size:
        return _of_ids(np.flatnonzero(mask))
    bits = mask.astype(np.uint32)
    bits <<= _SIGN
    bits ^= _FORBIDDEN
    return _Allowed(ceiling=bits.view(np.float32))


def _nothing() -> RowError:
    return RowError(
        "No token may come next in this answer: what structured_outputs allows is forbidden by "
        "allowed_token_ids, bad_words or min_tokens, or the tokenizer has no token for it; ask for "
        "less."
    )
