"""One token drawn from each row of logits, without the exponential of a whole vocabulary.

Knows of temperature, top_k, top_p, min_p and uniform numbers; nothing of slots, sequences or
penalties.

A row's tokens lie on a number line. First its *head*, some tens of the most likely tokens, from
the most likely on (equal ones by rising id), each as long as its weight exp((logit - best) / T).
Then its *tail*, all others, in blocks: token `c` is in block `c % num_blocks`, and every token of
a block has a cell as long as the block's heaviest token, which it fills from the left with its own
weight. So the tail's length needs the block maxima only. A uniform number is a place on the line:
the token that lies there is drawn; if it falls on an unfilled part of a cell, or on a token that
top_p does not allow, the next uniform number is tried. Tokens are therefore drawn with exactly
their probabilities. With top_k or min_p the head is all there is.

top_k and min_p keep tokens equal to the last one kept. top_p keeps the most likely tokens up to
the one that reaches p of what top_k and min_p left; of equal ones those with lower ids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
More = Callable[[int, int], Floats]

ATTEMPTS = 8
"""Uniform numbers a row brings for one token; further ones are asked for."""

_BLOCK_LEN = 16  # tokens of a block: fewer tighten the line, more shorten the list of blocks
_GROUP_LEN = 16  # blocks of a group; the head is found by the maxima of groups
_HEAD = 48  # tokens of the head at least, where neither top_k nor min_p says how many
_LOWEST = np.finfo(np.float32).min
_INFINITY = np.float32(np.inf)
_TRIES = 4  # drawn tokens held against top_p before the row is sorted
_SLACK = 1e-5  # of the tail's length, which is a sum of float32


class Rules:
    """What restricts the draw of each row.

    Args:
        asked: temperature, top_k, top_p and min_p of each row, as SamplingParams has them.
        vocab: tokens of a row.
    """

    def __init__(self, asked: list[tuple[float, int, float, float]], vocab: int) -> None:
        columns = np.array(asked, np.float64).reshape(-1, 4).T
        self.temperature: Floats = columns[0]
        self.top_k: Ints = np.where((columns[1] > 0) & (columns[1] < vocab), columns[1], 0).astype(
            np.int64
        )
        self.top_p: Floats = columns[2]
        with np.errstate(divide="ignore"):
            self.log_min_p: Floats = np.log(columns[3])
        has_min_p = self.log_min_p > -np.inf
        self.has_top_k = bool(self.top_k.any())
        self.has_top_p = bool((self.top_p < 1).any())
        self.has_min_p = bool(has_min_p.any())
        self.limited = (self.top_k > 0) | has_min_p
        self.is_limited = bool(self.limited.all())
        self.only_min_p = has_min_p & (self.top_k == 0)
        self.num_head = np.where(self.top_k > 0, self.top_k, _HEAD)
        self.scale = (1 / (self.temperature * np.log(2))).astype(np.float32)[:, None]
        self._asked, self._vocab = asked, vocab

    def take(self, rows: Ints) -> Rules:
        """The rules of some of the rows."""
        return Rules([self._asked[row] for row in rows], self._vocab)


@dataclass(frozen=True)
class _Line:
    """The number lines of all rows; arrays [rows, ...]."""

    best: Logits  # the largest logit
    floor: Logits  # what the head's logits reach
    ids: Ints  # [rows, width]: tokens of the head
    ends: Floats  # [rows, width]: where their stretches end
    starts: Floats
    head_len: Floats
    cells: Logits  # [rows, num_blocks]: cell length of each block of the tail
    tail_len: Floats


class Drawer:
    """Draws tokens; keeps its buffers from one call to the next."""

    def __init__(self) -> None:
        self._maxima = np.empty((0, 0), np.float32)
        self._block_len = 1
        self._steps = np.zeros((1, 1), np.int64)
        self._vocab = 0
        self._at = np.empty(0, np.int64)
        self._values = np.empty(0, np.float32)

    def draw(
        self,
        logits: Logits,
        rules: Rules,
        uniforms: Floats,
        more: More,
    ) -> Ints:
        """One token for each row.

        Args:
            logits: float32 [rows, vocab], C-contiguous; only read.
            rules: of the same rows.
            uniforms: [rows, ATTEMPTS] in [0, 1).
            more: the next ATTEMPTS uniform numbers of a row, by its number and 1, 2, ...

        Returns:
            int64 [rows]. A row whose largest logit is no finite number gets its argmax.
        """
        with np.errstate(over="ignore", under="ignore"):
            maxima = self._block_maxima(logits)
            best = maxima.max(axis=1)
            if not np.isfinite(best).all():
                return self._draw_finite(logits, rules, uniforms, more)
            line = self._line(logits, rules, maxima, best)
            return _Reading(logits, rules, line, len(self._steps)).tokens(uniforms, more)

    def _draw_finite(
        self,
        logits: Logits,
        rules: Rules,
        uniforms: Floats,
        more: More,
    ) -> Ints:
        tokens: Ints = logits.argmax(axis=1)
        rows = np.flatnonzero(np.isfinite(logits.max(axis=1)))
        if rows.size:
            tokens[rows] = self.draw(
                logits[rows],
                rules.take(rows),
                uniforms[rows],
                lambda row, turn: more(int(rows[row]), turn),
            )
        return tokens

    def _block_maxima(self, logits: Logits) -> Logits:
        num_rows, vocab = logits.shape
        if vocab != self._vocab:
            self._arrange(vocab)
        block_len = self._block_len
        num_blocks = vocab // block_len
        if self._maxima.shape != (num_rows, num_blocks):
            self._maxima = np.empty((num_rows, num_blocks), np.float32)
        whole = block_len * num_blocks
        maxima = self._maxima
        logits[:, :whole].reshape(num_rows, block_len, num_blocks).max(axis=1, out=maxima)
        if whole < vocab:
            first = maxima[:, : vocab - whole]
            np.maximum(first, logits[:, whole:], out=first)
        return maxima

    def _arrange(self, vocab: int) -> None:
        self._vocab = vocab
        self._block_len = _BLOCK_LEN if vocab >= _BLOCK_LEN * _GROUP_LEN * _HEAD else 1
        num_blocks = vocab // self._block_len
        num_cells = -(-vocab // num_blocks)
        self._steps = np.arange(num_cells)[:, None] * num_blocks

    def _floor(self, logits: Logits, rules: Rules, maxima: Logits, best: Logits) -> Logits:
        """A logit that at least `num_head` tokens of the row reach, and all that min_p allows."""
        num_rows, num_blocks = maxima.shape
        group_len = _GROUP_LEN if self._block_len > 1 else 1
        width = num_blocks // group_len
        groups = maxima[:, : group_len * width].reshape(num_rows, group_len, width).max(axis=1)
        groups.sort(axis=1)
        floor: Logits = groups[np.arange(num_rows), np.maximum(width - rules.num_head, 0)]
        if rules.has_top_k:
            # Groups tell of as many tokens as there are groups.
            for row in np.flatnonzero(rules.top_k > width):
                at = self._vocab - int(rules.top_k[row])
                floor[row] = np.partition(logits[row], at)[at]
        if rules.has_min_p:
            allowed = (best + rules.temperature * rules.log_min_p).astype(np.float32)
            floor = np.where(rules.only_min_p, allowed, np.maximum(floor, allowed))
        # A head may end anywhere where a tail follows it: before many equal logits is best.
        np.nextafter(floor, _INFINITY, out=floor, where=~rules.limited)
        np.maximum(floor, _LOWEST, out=floor)
        return floor

    def _line(self, logits: Logits, rules: Rules, maxima: Logits, best: Logits) -> _Line:
        num_rows = len(logits)
        floor = self._floor(logits, rules, maxima, best)
        rows, ids, heads = self._heads(logits, maxima, floor)
        counts = np.bincount(rows, minlength=num_rows)
        width = max(int(counts.max()), 1)
        first = np.arange(0, num_rows * width, width) - counts.cumsum() + counts
        place = np.arange(rows.size) + first[rows]
        all_ids = np.zeros((num_rows, width), np.int64)
        all_ids.reshape(-1)[place] = ids
        all_heads = np.full((num_rows, width), -np.inf)
        all_heads.reshape(-1)[place] = heads
        if rules.has_top_k:
            kept = np.where(rules.top_k > 0, np.minimum(rules.top_k, width), width) - 1
            last = all_heads[np.arange(num_rows), kept]
            all_heads[all_heads < last[:, None]] = -np.inf
        all_heads -= best[:, None]
        all_heads /= rules.temperature[:, None]
        weights = np.exp(all_heads, out=all_heads)
        ends = weights.cumsum(axis=1)
        cells, tail_len = maxima, np.zeros(num_rows)
        if not rules.is_limited:
            cells -= best[:, None]
            cells *= rules.scale
            np.exp2(cells, out=cells)
            tail_len = cells.sum(axis=1) * np.float64(len(self._steps))
            tail_len[rules.limited] = 0
        return _Line(best, floor, all_ids, ends, ends - weights, ends[:, -1], cells, tail_len)

    def _heads(self, logits: Logits, maxima: Logits, floor: Logits) -> tuple[Ints, Ints, Logits]:
        """Row, id and logit of all tokens of heads, in order; `maxima` then are of the others."""
        vocab, num_blocks = self._vocab, maxima.shape[1]
        found = np.flatnonzero(maxima >= floor[:, None])
        row = found // num_blocks
        shape = len(self._steps), found.size
        size = len(self._steps) * found.size
        if size > self._at.size:
            self._at, self._values = np.empty(2 * size, np.int64), np.empty(2 * size, np.float32)
        at, values = self._at[:size].reshape(shape), self._values[:size].reshape(shape)
        np.add(self._steps, found + row * (vocab - num_blocks), out=at)
        logits.reshape(-1).take(at, mode="clip", out=values)
        if vocab % num_blocks:
            values[at >= (row + 1) * vocab] = -np.inf
        inside = np.flatnonzero(values >= floor[row])
        rows = row[inside % found.size]
        ids = at.reshape(-1)[inside] - rows * vocab
        heads = values.reshape(-1)[inside]
        values.reshape(-1)[inside] = -np.inf
        maxima.reshape(-1)[found] = values.max(axis=0)
        return _ordered(rows, ids, heads, vocab)


class _Reading:
    """Finds the tokens that lie at places of the number lines of one call."""

    def __init__(self, logits: Logits, rules: Rules, line: _Line, num_cells: int) -> None:
        self._logits, self._rules, self._line, self._num_cells = logits, rules, line, num_cells
        # Places before `certain` hold allowed tokens; no place from `reach` on does.
        self._certain, self._reach = line.head_len, line.head_len + line.tail_len
        if rules.has_top_p:
            self._narrow()

    def tokens(self, uniforms: Floats, more: More) -> Ints:
        """See `Drawer.draw`."""
        line = self._line
        places = uniforms[:, 0] * self._reach
        at = (line.ends <= places[:, None]).sum(axis=1)
        np.minimum(at, line.ids.shape[1] - 1, out=at)
        tokens: Ints = line.ids[np.arange(at.size), at]
        for row in np.flatnonzero(places >= self._certain).tolist():
            tokens[row] = self._settle(row, _endless(row, uniforms[row], more))
        return tokens

    def _narrow(self) -> None:
        """Find what top_p surely and possibly allows, from the least and most a tail weighs."""
        line, top_p = self._line, self._rules.top_p
        least = top_p * (line.head_len + line.tail_len * ((1 - _SLACK) / self._num_cells))
        most = top_p * (line.head_len + line.tail_len * (1 + _SLACK))
        rows = np.arange(top_p.size)
        sure = (line.starts < least[:, None]).sum(axis=1)
        maybe = (line.starts < most[:, None]).sum(axis=1)
        self._certain = line.ends[rows, sure - 1]
        self._reach = np.where(most <= line.head_len, line.ends[rows, maybe - 1], self._reach)

    def _settle(self, row: int, uniforms: Iterator[float]) -> int:
        """The token of a row whose first place is not certain."""
        line, top_p = self._line, float(self._rules.top_p[row])
        reach, certain = float(self._reach[row]), float(self._certain[row])
        head_len = float(line.head_len[row])
        blocks = line.cells[row].astype(np.float64).cumsum()
        blocks *= self._num_cells
        mass, refused = None, 0
        while True:
            place = next(uniforms) * reach
            at = -1
            if place < head_len:
                at = int(line.ends[row].searchsorted(place, "right"))
                token = int(line.ids[row, at])
            else:
                token = self._tail_token(row, blocks, place - head_len)
            if token < 0:
                continue
            if top_p == 1 or place < certain:
                return token
            if mass is None:
                mass = _Mass(self._logits[row], line.best[row], self._rules.scale[row])
            before = mass.before(token) if at < 0 else line.starts[row, at]
            if before < top_p * mass.total:
                return token
            refused += 1
            if refused == _TRIES:
                return mass.draw(top_p, next(uniforms))

    def _tail_token(self, row: int, blocks: Floats, place: float) -> int:
        """The token at a place of the tail, or -1 where none lies."""
        line = self._line
        block = int(blocks.searchsorted(place, "right"))
        if block == blocks.size:
            return -1
        cell = float(line.cells[row, block])
        offset = place - (float(blocks[block - 1]) if block else 0.0)
        step = min(int(offset / cell), self._num_cells - 1)
        token = block + step * blocks.size
        if token >= self._logits.shape[1]:
            return -1
        logit = self._logits[row, token]
        if logit >= line.floor[row]:
            return -1
        weight = math.exp((float(logit) - float(line.best[row])) / self._rules.temperature[row])
        return token if offset - step * cell < weight else -1


class _Mass:
    """The weights of all tokens of a row: what top_p asks where the number line cannot tell."""

    def __init__(self, logits: Logits, best: np.float32, scale: Logits) -> None:
        self._logits = logits
        self._weights = logits - best
        self._weights *= scale
        np.exp2(self._weights, out=self._weights)
        self.total = float(self._weights.sum())

    def before(self, token: int) -> float:
        """What the tokens weigh that come before this one in the order of top_p."""
        logits, logit = self._logits, self._logits[token]
        num_equal = np.count_nonzero(logits[:token] == logit)
        heavier = float((self._weights * (logits > logit)).sum())
        return float(heavier + num_equal * float(self._weights[token]))

    def draw(self, top_p: float, uniform: float) -> int:
        """A token of those that top_p allows."""
        share = top_p * self.total
        # All tokens lighter than this weigh less than what top_p leaves out.
        ids = np.flatnonzero(self._weights >= (self.total - share) / self._weights.size)
        ids = ids[np.argsort(-self._logits[ids], kind="stable")]
        ends = self._weights[ids].cumsum(dtype=np.float64)
        border = ends[min(int(ends.searchsorted(share)), ids.size - 1)]
        return int(ids[ends.searchsorted(uniform * border, "right")])


def _endless(row: int, uniforms: Floats, more: More) -> Iterator[float]:
    yield from uniforms.tolist()
    for turn in itertools.count(1):
        yield from more(row, turn).tolist()


def _ordered(rows: Ints, ids: Ints, logits: Logits, vocab: int) -> tuple[Ints, Ints, Logits]:
    """The same by row, in it by falling logit, among equal ones by rising id."""
    # The bits of floats in the order of their values, as integers; adding 0 makes -0 into 0.
    bits = (logits + np.float32(0)).view(np.int32)
    rank = 0x7FFFFFFF - (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    id_bits = vocab.bit_length()
    keys = (((rows << 32) | rank) << id_bits) | ids
    keys.sort()
    ids = keys & ((1 << id_bits) - 1)
    keys >>= id_bits
    rank = (0x7FFFFFFF - (keys & 0xFFFFFFFF)).astype(np.int32)
    values = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).view(np.float32)
    return keys >> 32, ids, values
