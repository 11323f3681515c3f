"""Draws one token from each row of logits, without the exponential of a whole vocabulary.

A row's tokens lie on a number line. First its *head*, the likeliest tokens (equal ones by rising
id), each as long as its weight exp((logit - best) / T). Then its *tail* in blocks, token `c` in
block `c % num_blocks`. There each token has a cell as long as its block's heaviest weight, of which
its own weight fills the left part, so the tail's length needs the block maxima only. A uniform
number is a place on the line, and draws the token there. An unfilled place or a token outside top_p
is rejected and the next number tried: probabilities are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qaic_ray.engine.unsettled import LOG2_E, UNITS, Floats, Ints, Logits, Unsettled

NUMBERS = 8
"""Uniform numbers of a row for one token."""

BLOCK_LEN = 16  # tokens of a block: fewer tell more of the tail, more shorten the list of blocks
NUM_GROUPS = 512  # the head is found by the largest logits of so many groups of blocks
HEAD = 48  # tokens of the head at least, where neither top_k nor min_p says how many
_IN_CACHE = 4096  # columns reduced at once: they stay in the first-level cache
LOWEST = np.finfo(np.float32).min
SLACK = 1e-5  # of the tail's length, which is a sum of float32


class Rules:
    """What restricts the draw of each row.

    top_k and min_p keep tokens equal to the last one kept, and leave a row no tail. top_p keeps the
    most likely tokens up to the one that reaches p of what top_k and min_p left; of equal ones
    those with lower ids.

    Args:
        asked: temperature, top_k, top_p and min_p of each row, as SamplingParams has them.
        vocab: tokens of a row.
    """

    def __init__(self, asked: list[tuple[float, int, float, float]], vocab: int) -> None:
        columns = np.array(asked, np.float64).reshape(-1, 4).T
        self.temperature: Floats = columns[0]
        top_k = np.where((columns[1] > 0) & (columns[1] < vocab), columns[1], 0).astype(np.int64)
        # numpy's exp2 is more than twice as fast as its exp.
        self.scale: Logits = (LOG2_E / columns[0]).astype(np.float32)
        self.top_p: Floats = columns[2]
        with np.errstate(divide="ignore"):
            self.log_min_p: Floats = np.log(columns[3])
        has_min_p = self.log_min_p > -np.inf
        self.has_top_k = bool(top_k.any())
        self.has_top_p = bool((self.top_p < 1).any())
        self.has_min_p = bool(has_min_p.any())
        self.limited = (top_k > 0) | has_min_p
        self.is_limited = bool(self.limited.all())
        self.only_min_p = has_min_p & (top_k == 0)
        self.num_head = np.where(top_k > 0, top_k, HEAD)
        self.num_kept = np.where(top_k > 0, top_k, vocab)
        self.max_head = int(top_k.max(initial=0))
        self.rows, self.bounds = np.arange(top_k.size), np.arange(top_k.size + 1)
        self._asked, self._vocab = asked, vocab

    def take(self, rows: Ints) -> Rules:
        """The rules of some of the rows."""
        return Rules([self._asked[row] for row in rows], self._vocab)


class _Line(NamedTuple):
    """The number lines of all rows, one behind the other; lengths in units."""

    best: Logits  # [rows]: the largest logit
    floor: Logits  # [rows]: what the head's logits reach
    at: Ints  # where each token of the heads stands in the flat logits
    ends: Ints  # where its stretch ends
    first: Ints  # [rows]: number of the head's first token
    stop: Ints  # [rows]: number of the token behind the head's last one
    before: Ints  # [rows]: where the row's line starts
    head: Ints  # [rows]: how long the head is
    tail: Floats  # [rows]: how long the tail is at most
    cells: Logits  # [rows, num_blocks]: weight of the heaviest token of each block of the tail
    num_steps: int  # tokens of a block


class CategoricalSampler:
    """Draws tokens; keeps its buffers from one call to the next."""

    def __init__(self) -> None:
        self._maxima = np.empty((0, 0), np.float32)
        self._steps = np.zeros((1, 1), np.int64)
        self._vocab = self._num_groups = 0
        self._at = np.empty(0, np.int64)
        self._values = np.empty(0, np.float32)

    def draw(self, logits: Logits, rules: Rules, uniforms: Floats) -> Ints:
        """One token for each row.

        Args:
            logits: float32 [rows, vocab], C-contiguous; only read.
            rules: of the same rows.
            uniforms: [rows, NUMBERS] in [0, 1).

        Returns:
            int64 [rows]. A row whose largest logit is no finite number gets its argmax.
        """
        num_rows, vocab = logits.shape
        # Row, logit and place of a token are sorted as one number of 63 bits.
        at_once = 1 << max(31 - (vocab - 1).bit_length(), 0) // 2
        if num_rows > at_once:
            parts = [slice(first, first + at_once) for first in range(0, num_rows, at_once)]
            return np.concatenate([self._part(logits, rules, uniforms, p) for p in parts])
        if self._maxima.shape[0] != num_rows or vocab != self._vocab:
            self._arrange(num_rows, vocab)
        maxima = _folded(logits, self._maxima)
        groups = _folded(maxima, np.empty((num_rows, self._num_groups), np.float32))
        groups.sort(axis=1)
        best = groups[:, -1]
        if not np.isfinite(best).all():
            return self._draw_finite(logits, rules, uniforms)
        with np.errstate(over="ignore", under="ignore"):
            line = self._line(logits, rules, best, self._floor(logits, rules, groups))
            return _tokens(logits, rules, line, uniforms)

    def _part(self, logits: Logits, rules: Rules, uniforms: Floats, rows: slice | Ints) -> Ints:
        return self.draw(logits[rows], rules.take(rules.rows[rows]), uniforms[rows])

    def _draw_finite(self, logits: Logits, rules: Rules, uniforms: Floats) -> Ints:
        tokens: Ints = logits.argmax(axis=1)
        rows = np.flatnonzero(np.isfinite(logits.max(axis=1)))
        if rows.size:
            tokens[rows] = self._part(logits, rules, uniforms, rows)
        return tokens

    def _arrange(self, num_rows: int, vocab: int) -> None:
        self._vocab = vocab
        num_blocks = vocab // BLOCK_LEN if vocab >= BLOCK_LEN * NUM_GROUPS else vocab
        self._num_groups = min(NUM_GROUPS, num_blocks)
        self._maxima = np.empty((num_rows, num_blocks), np.float32)
        self._steps = np.arange(0, vocab, num_blocks)[:, None]

    def _floor(self, logits: Logits, rules: Rules, groups: Logits) -> Logits:
        """A logit that at least `num_head` tokens of the row reach, and all that min_p allows."""
        width = groups.shape[1]
        floor: Logits = groups[rules.rows, np.maximum(width - rules.num_head, 0)]
        if rules.max_head > width // 2:
            # Groups tell of as many tokens as there are groups, and badly of nearly as many.
            for row in np.flatnonzero(rules.num_head > max(width // 2, HEAD)):
                num = int(rules.num_head[row])
                some = self._maxima[row] if num <= self._maxima.shape[1] else logits[row]
                floor[row] = np.partition(some, some.size - num)[some.size - num]
        best = groups[:, -1]
        if rules.has_min_p:
            allowed = (best + rules.temperature * rules.log_min_p).astype(np.float32)
            floor = np.where(rules.only_min_p, allowed, np.maximum(floor, allowed))
        if not rules.is_limited:
            # A head may end anywhere where a tail follows it: before many equal logits is best.
            np.nextafter(floor, np.float32(np.inf), out=floor, where=~rules.limited)
            np.minimum(floor, best, out=floor)
        np.maximum(floor, LOWEST, out=floor)
        return floor

    def _head_keys(self, logits: Logits, floor: Logits, rules: Rules) -> Ints:
        """The tokens that reach the floor as sorted numbers; `_maxima` then are of the others.

        A number's lowest bits say where in the flat logits its token stands; the higher ones sort
        it by row, in it by falling logit.
        """
        vocab, maxima = self._vocab, self._maxima
        num_blocks, num_steps = maxima.shape[1], len(self._steps)
        found = np.flatnonzero(maxima >= floor[:, None])
        row = found // num_blocks
        size = num_steps * found.size
        if size > self._at.size:
            self._at, self._values = np.empty(2 * size, np.int64), np.empty(2 * size, np.float32)
        at, values = self._at[:size], self._values[:size]
        table = values.reshape(num_steps, -1)
        np.add(self._steps, found + row * (vocab - num_blocks), out=at.reshape(table.shape))
        logits.reshape(-1).take(at, mode="clip", out=values)
        if vocab % num_blocks:
            table[-1, at[-found.size :] >= (row + 1) * vocab] = -np.inf
        inside = np.flatnonzero(table >= floor[row])
        at = at.take(inside)
        # The bits of a float as a number that rises with it; -0 is 0.
        bits = values.take(inside).view(np.int32).astype(np.int64)
        keys = at // vocab
        keys <<= 32
        keys -= np.where(bits < 0, -(2**31) - bits, bits)
        keys <<= (logits.size - 1).bit_length()
        keys += at
        keys.sort()
        if not rules.is_limited:
            values[inside] = -np.inf
            maxima.reshape(-1)[found] = table.max(axis=0)
        return keys

    def _line(self, logits: Logits, rules: Rules, best: Logits, floor: Logits) -> _Line:
        keys = self._head_keys(logits, floor, rules)
        places = (1 << (logits.size - 1).bit_length()) - 1
        at = keys & places
        row = at // self._vocab
        weights = logits.reshape(-1).take(at).astype(np.float64)
        weights -= best.astype(np.float64)[row]
        weights /= rules.temperature[row]
        np.exp(weights, out=weights)
        weights *= UNITS
        units = weights.astype(np.int64)
        ends = units.cumsum()
        bounds = row.searchsorted(rules.bounds)
        first, stop = bounds[:-1], bounds[1:]
        if rules.has_top_k:
            kept = np.minimum(first + rules.num_kept, stop)
            stop = keys.searchsorted(keys[kept - 1] | places, "right")
        before = ends[first] - units[first]
        head = ends[stop - 1] - before
        cells, num_steps = self._maxima, len(self._steps)
        tail = np.zeros(len(best))
        if not rules.is_limited:
            cells -= best[:, None]
            cells *= rules.scale[:, None]
            tail = np.exp2(cells, out=cells).sum(axis=1) * (num_steps * (1 + SLACK) * UNITS)
            tail[rules.limited] = 0
        return _Line(best, floor, at, ends, first, stop, before, head, tail, cells, num_steps)


def _folded(values: Logits, folded: Logits) -> Logits:
    """The largest of all columns whose numbers are equal modulo the width of `folded`, in it."""
    num_rows, width = folded.shape
    whole = values.shape[1] // width * width
    layers = values[:, :whole].reshape(num_rows, -1, width)
    for first in range(0, width, _IN_CACHE):
        part = slice(first, first + _IN_CACHE)
        np.maximum.reduce(layers[:, :, part], axis=1, out=folded[:, part])
    rest = values[:, whole:]
    if rest.size:
        np.maximum(folded[:, : rest.shape[1]], rest, out=folded[:, : rest.shape[1]])
    return folded


def _tokens(logits: Logits, rules: Rules, line: _Line, uniforms: Floats) -> Ints:
    """The tokens that lie at the places of the uniform numbers."""
    certain, reach = _narrowed(rules, line) if rules.has_top_p else _whole(rules, line)
    places = (uniforms[:, 0] * reach).astype(np.int64)
    numbers = line.ends.searchsorted(line.before + places, "right")
    tokens: Ints = line.at[np.minimum(numbers, line.stop - 1)]
    tokens -= rules.rows * logits.shape[1]
    if not rules.is_limited:
        for row in np.flatnonzero(places >= certain).tolist():
            tokens[row] = _unsettled(logits, rules, line, row).token(
                uniforms[row].tolist(), int(certain[row]), float(reach[row])
            )
    return tokens


def _unsettled(logits: Logits, rules: Rules, line: _Line, row: int) -> Unsettled:
    first, stop = line.first[row], line.stop[row]
    return Unsettled(
        logits=logits[row],
        temperature=float(rules.temperature[row]),
        top_p=float(rules.top_p[row]),
        best=line.best[row],
        floor=line.floor[row],
        ids=line.at[first:stop] - row * logits.shape[1],
        ends=line.ends[first:stop] - line.before[row],
        cells=line.cells[row],
        num_steps=line.num_steps,
    )


def _whole(rules: Rules, line: _Line) -> tuple[Ints, Ints | Floats]:
    """Without top_p: places below the first hold allowed tokens, from the second on none do."""
    return line.head, line.head if rules.is_limited else line.head + line.tail


def _narrowed(rules: Rules, line: _Line) -> tuple[Ints, Ints | Floats]:
    """As `_whole`, with top_p: from the least and the most that a tail can weigh."""
    least = rules.top_p * (line.head + line.tail * ((1 - 2 * SLACK) / line.num_steps))
    certain = _border(line, least)
    if rules.is_limited:
        return certain, certain
    whole = line.head + line.tail
    most = rules.top_p * whole
    # A border in the tail leaves out tokens anywhere in it.
    return certain, np.where(most <= line.head, _border(line, most), whole)


def _border(line: _Line, share: Floats) -> Ints:
    """Where the head's token ends that reaches this share; the last one where none does."""
    wanted = np.minimum(np.ceil(share).astype(np.int64), line.head)
    border: Ints = line.ends[line.ends.searchsorted(line.before + wanted)] - line.before
    return border
