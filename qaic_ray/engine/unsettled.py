"""A row of a draw whose token the head does not tell: its tail, and what top_p leaves of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# Lengths are whole numbers of units: their sums are exact, whatever stands before them. The
# longest lines, of 4 million equal tokens, end before 2**63.
UNITS = 2.0**36
LOG2_E = math.log2(math.e)

_CHUNK_LEN = 256  # weights of the exact draw that are summed at once


@dataclass
class Unsettled:
    """One row whose first uniform number did not settle its token.

    Attributes:
        logits: float32 [vocab], and `best` the largest of them.
        temperature: of the row, and its `top_p`.
        floor: what the logits of the head reach.
        ids: the head's tokens, from the likeliest on; `ends` says where the stretch of each ends.
        cells: weight of the heaviest token of each block of the tail, of `num_steps` tokens.
    """

    logits: Logits
    temperature: float
    top_p: float
    best: np.float32
    floor: np.float32
    ids: Ints
    ends: Ints
    cells: Logits
    num_steps: int

    def token(self, uniforms: list[float], certain: int, reach: float) -> int:
        """The token at the first place that holds an allowed one.

        The last number is a place among the weights of the allowed tokens alone.
        """
        for uniform in uniforms[:-1]:
            place = int(uniform * reach)
            number = int(self.ends.searchsorted(place, "right"))
            if number < self.ends.size:
                token = int(self.ids[number])
                if place < certain or self._is_allowed_in_head(number):
                    return token
            else:
                token = self._tail_token((place - int(self.ends[-1])) / UNITS)
                if token >= 0 and self._is_allowed_in_tail(token):
                    return token
        return self._exact_token(uniforms[-1])

    @cached_property
    def _weights(self) -> Logits:
        """Of all tokens, for what the line cannot tell."""
        weights: Logits = self.logits - self.best
        weights *= np.float32(LOG2_E / self.temperature)
        np.exp2(weights, out=weights)
        return weights

    @cached_property
    def _share(self) -> float:
        """What the allowed tokens weigh at least."""
        return self.top_p * float(self._weights.sum())

    @cached_property
    def _cell_ends(self) -> Floats:
        ends: Floats = self.cells.cumsum(dtype=np.float64)
        ends *= self.num_steps
        return ends

    def _is_allowed_in_head(self, number: int) -> bool:
        before = float(self.ends[number - 1]) / UNITS if number else 0.0
        return before < self._share

    def _is_allowed_in_tail(self, token: int) -> bool:
        if self.top_p == 1:
            return True
        if float(self.ends[-1]) / UNITS >= self._share:
            return False
        logits, logit = self.logits, self.logits[token]
        before = float(self._weights[logits > logit].sum())
        num_equal = int(np.count_nonzero(logits[:token] == logit))
        return before + num_equal * float(self._weights[token]) < self._share

    def _tail_token(self, place: float) -> int:
        """The token at a place of the tail, or -1 where none lies."""
        block = int(self._cell_ends.searchsorted(place, "right"))
        if block == self.cells.size:
            return -1
        cell = float(self.cells[block])
        offset = place - (float(self._cell_ends[block - 1]) if block else 0.0)
        step = min(int(offset / cell), self.num_steps - 1)
        token = block + step * self.cells.size
        if token >= self.logits.size or self.logits[token] >= self.floor:
            return -1
        weight = math.exp((float(self.logits[token]) - float(self.best)) / self.temperature)
        return token if offset - step * cell < weight else -1

    def _exact_token(self, uniform: float) -> int:
        """The token at a place among those that are allowed."""
        if self.top_p < 1:
            return self._of_nucleus(uniform)
        firsts = np.arange(0, self._weights.size, _CHUNK_LEN)
        chunk_ends = np.add.reduceat(self._weights, firsts).cumsum(dtype=np.float64)
        place = uniform * float(chunk_ends[-1])
        chunk = _number(chunk_ends, place)
        first = chunk * _CHUNK_LEN
        ends = self._weights[first : first + _CHUNK_LEN].cumsum(dtype=np.float64)
        return first + _number(ends, place - (float(chunk_ends[chunk - 1]) if chunk else 0.0))

    def _of_nucleus(self, uniform: float) -> int:
        # All tokens lighter than this weigh less than what top_p leaves out.
        left_out = float(self._weights.sum()) - self._share
        ids = np.flatnonzero(self._weights >= left_out / self._weights.size)
        ids = ids[np.argsort(-self.logits[ids], kind="stable")]
        ends = self._weights[ids].cumsum(dtype=np.float64)
        border = float(ends[min(int(ends.searchsorted(self._share)), ends.size - 1)])
        return int(ids[_number(ends, uniform * border)])


def _number(ends: Floats, place: float) -> int:
    """Number of the stretch that holds a place; rounding never leads behind the last one."""
    return int(min(ends.searchsorted(place, "right"), ends.searchsorted(ends[-1])))
