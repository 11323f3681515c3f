"""The inner loops of token selection, compiled by numba when this file is imported.

They do what `categorical.py` and `sampler.py` do with numpy, row by row, while a row's logits are
in the processor's cache. numpy stays the reference: every number here comes of the same float32,
float64 or integer operations, so the tokens are the same bit for bit. Exponentials, which differ
between libraries, are numpy's own: `find_heads` leaves the exponents, `settle` takes the powers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qaic_ray.engine.compiled import jit
from qaic_ray.engine.unsettled import Floats, Ints, Logits

_LOG2_E = math.log2(math.e)
_LOWEST = np.finfo(np.float32).min
_IN_CACHE = 4096  # columns reduced at once: they stay in the first-level cache
_LEAST_BITS = np.int32(-(2**31))
_LANES = 8  # layers reduced at once

ROUGH = 0.004
"""How far the length of a tail may be from numpy's, as a part of it.

A cell is within 0.0027 of the power of two that it stands for, float32 sums of the 16,384 that
`MOST_TOKENS` have within 0.001, and numpy's own within 0.0001.
"""

MOST_TOKENS = 2**18
"""Of a vocabulary."""

MOST_OF_HEAD = 512
"""Tokens that a row's head may have here; they are sorted by counting, in the square of this."""

# Columns of `RowRules.numbers` and of `RowRules.ints`.
TEMPERATURE, TOP_P, LOG_MIN_P = range(3)
GREEDY, LIMITED, ONLY_MIN_P, NUM_HEAD, NUM_KEPT, CELLS = range(6)
# Columns of `Past.num`, of `Past.penalties`, of `Heads.bounds` and of `Heads.levels`.
NUM_SEEN, NUM_STOPS = range(2)
REPETITION, FREQUENCY, PRESENCE = range(3)
FIRST, STOP, STATE = range(3)
BEST, FLOOR = range(2)
# How a row stands: its token is known; not yet; only the reference can tell.
SETTLED, OPEN, ODD = range(3)


class RowRules(NamedTuple):
    """What the rows of one call ask for."""

    numbers: Floats  # [rows, 3]
    ints: Ints  # [rows, 6]; of CELLS: the row of `Heads.maxima`, the last one without a tail
    slots: Ints  # [rows]: where a row's past is in `Past`


class Past(NamedTuple):
    """What the row in each slot changes about its logits; made and kept by `past.py`."""

    seen: Ints  # [slots, most]: tokens of prompt and answer, each once
    counts: Logits  # [slots, most]: how often the answer has each
    stops: Ints  # [slots, most]: tokens that may not come yet
    num: Ints  # [slots, 2]: how many of each
    penalties: Logits  # [slots, 3]
    copy: Logits  # [vocab]: the row that is looked at, where it changes any


class Heads(NamedTuple):
    """The likeliest tokens of the rows, one row behind the other, and the cells of the tails."""

    maxima: Logits  # [rows with a tail + 1, blocks]: of the tail's blocks, raw
    groups: Logits  # [groups]
    bits: npt.NDArray[np.int32]  # [groups]
    values: Logits  # [MOST_OF_HEAD]
    keys: Ints  # [MOST_OF_HEAD]
    ids: Ints  # [rows * MOST_OF_HEAD]
    exponents: Floats  # the same: (logit - best) / temperature; then what e to this is
    ends: Ints  # the same: where each token's stretch ends
    bounds: Ints  # [rows, 3]: first token, the one behind the last, and the state
    levels: Logits  # [rows, 2]
    tails: Logits  # [rows, 2]: how long the tail is at least and at most, in weights of blocks


class Draw(NamedTuple):
    """What `settle` needs beside the heads, and what it finds."""

    uniforms: Floats  # [slots, numbers of a span, of a token]: in [0, 1)
    numbers: Ints  # [rows]: which one of the span
    scale: Floats  # [3]: a weight of 1, that of a tail, and what of a tail it weighs at least
    tokens: Ints  # [rows]
    certain: Ints  # [rows]: places below this hold allowed tokens
    reach: Floats  # [rows]: from here on none do


_F4, _F8, _I4, _I8 = jit.FLOAT32, jit.FLOAT64, jit.INT32, jit.INT64
_RULES = jit.tuple_of(RowRules, _F8[2], _I8[2], _I8[1])
_PAST = jit.tuple_of(Past, _I8[2], _F4[2], _I8[2], _I8[2], _F4[2], _F4[1])
_HEAD = (_F4[2], _F4[1], _I4[1], _F4[1], _I8[1], _I8[1], _F8[1], _I8[1], _I8[2], _F4[2], _F4[2])
_HEADS = jit.tuple_of(Heads, *_HEAD)
_DRAW = jit.tuple_of(Draw, _F8[3], _I8[1], _F8[1], _I8[1], _I8[1], _F8[1])


@jit.helper
def _larger(a: Any, b: Any) -> Any:
    return a if a > b else b


@jit.helper
def _fold(row: Any, maxima: Any) -> Any:
    """The largest logit of each block, in `maxima`; whether the row has a NaN."""
    width, num_nan = maxima.size, 0
    whole = row.size // width // _LANES * _LANES
    maxima[:] = -np.inf
    for start in range(0, width, _IN_CACHE):
        out = maxima[start : start + _IN_CACHE]
        for layer in range(0, whole, _LANES):
            num_nan += _fold_layers(row[start + layer * width :], width, out)
    for first in range(whole * width, row.size, width):
        rest = row[first : first + width]
        for column in range(rest.size):
            num_nan += rest[column] != rest[column]
            maxima[column] = _larger(rest[column], maxima[column])
    return num_nan > 0


@jit.helper
def _fold_layers(row: Any, width: Any, out: Any) -> Any:
    """Raise `out` to the largest of eight layers, each `width` behind the last; NaNs found."""
    a, b, c, d = row, row[width:], row[2 * width :], row[3 * width :]
    e, f, g, h = row[4 * width :], row[5 * width :], row[6 * width :], row[7 * width :]
    num_nan = 0
    for i in range(out.size):
        left = _larger(_larger(a[i], b[i]), _larger(c[i], d[i]))
        right = _larger(_larger(e[i], f[i]), _larger(g[i], h[i]))
        out[i] = _larger(_larger(left, right), out[i])
        first = (a[i] != a[i]) | (b[i] != b[i]) | (c[i] != c[i]) | (d[i] != d[i])
        second = (e[i] != e[i]) | (f[i] != f[i]) | (g[i] != g[i]) | (h[i] != h[i])
        num_nan += first | second
    return num_nan


@jit.helper
def _fold_blocks(maxima: Any, groups: Any) -> None:
    """The largest of all blocks whose numbers are equal modulo the number of groups."""
    width = groups.size
    groups[:] = -np.inf
    for start in range(0, maxima.size, width):
        layer = maxima[start : start + width]
        for column in range(layer.size):
            groups[column] = _larger(layer[column], groups[column])


@jit.helper
def _flip(bits: Any) -> Any:
    """A float's bits as an integer that rises with it, and back; -0 comes before 0."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit.helper
def _rising(values: Any, bits: Any) -> Any:
    """Put the bits of all values, which rise with them, into `bits`; the largest of these."""
    source, largest = values.view(np.int32), _LEAST_BITS
    for i in range(bits.size):
        bits[i] = _flip(source[i])
        largest = max(largest, bits[i])
    return largest


@jit.helper
def _number_from_top(bits: Any, number: Any) -> Any:
    """The value of this rank, from 1 on, by halving the range; the least where there are fewer."""
    least, most = bits[0], bits[0]
    for i in range(bits.size):
        least, most = min(least, bits[i]), max(most, bits[i])
    low, high = np.int64(least), np.int64(most)
    while low < high:
        middle = high - (high - low) // 2
        bound, num_above = np.int32(middle), np.int32(0)
        for i in range(bits.size):
            num_above += np.int32(bits[i] >= bound)
        if num_above >= number:
            low = middle
        else:
            high = middle - 1
        if num_above == number:
            break
    least = most
    for i in range(bits.size):
        least = min(least, bits[i] if bits[i] >= low else most)
    return least


@jit.helper
def _changed(row: Any, past: Any, slot: Any) -> Any:
    """A copy of the logits in which penalties and `min_tokens` are applied, as `Pasts.change`."""
    copy, seen, counts, stops = past.copy, past.seen[slot], past.counts[slot], past.stops[slot]
    repetition = past.penalties[slot, REPETITION]
    frequency, presence = past.penalties[slot, FREQUENCY], past.penalties[slot, PRESENCE]
    for token in range(row.size):
        copy[token] = row[token]
    for i in range(past.num[slot, NUM_SEEN]):
        value = row[seen[i]]
        if repetition != 1:
            value = value / repetition if value > 0 else value * repetition
        if frequency != 0:
            value -= frequency * counts[i]
        if presence != 0:
            value -= presence * np.float32(counts[i] > 0)
        copy[seen[i]] = value
    for i in range(past.num[slot, NUM_STOPS]):
        if stops[i] < row.size:
            copy[stops[i]] = -np.inf
    return copy


@jit.helper
def _floor(asked: Any, row: Any, best: Any, heads: Any) -> Any:
    """What the head reaches: as `CategoricalSampler._floor`, and all of it for a greedy row."""
    ints, numbers, bits = asked.ints[row], asked.numbers[row], heads.bits
    if ints[GREEDY]:
        return best
    allowed = np.float32(best + numbers[TEMPERATURE] * numbers[LOG_MIN_P])
    if ints[ONLY_MIN_P]:
        return max(allowed, np.float32(_LOWEST))
    bits[0] = _flip(_number_from_top(bits, ints[NUM_HEAD]))
    floor = _larger(bits.view(np.float32)[0], allowed)
    if not ints[LIMITED]:
        floor = min(np.nextafter(floor, np.float32(np.inf)), best)
    return max(floor, np.float32(_LOWEST))


@jit.helper
def _gather(row: Any, maxima: Any, heads: Any, floor: Any) -> Any:
    """The row's tokens that reach the floor, as sortable keys; more than fit where that is so.

    `maxima` are of the other tokens from now on.
    """
    width, num_groups, num_found = maxima.size, heads.groups.size, 0
    values, keys = heads.values, heads.keys
    for group in range(num_groups):
        if not heads.groups[group] >= floor:
            continue
        for block in range(group, width, num_groups):
            if not maxima[block] >= floor:
                continue
            rest = np.float32(-np.inf)
            for token in range(block, row.size, width):
                value = row[token]
                if not value >= floor:
                    rest = _larger(value, rest)
                    continue
                if num_found == MOST_OF_HEAD:
                    return num_found + 1
                values[num_found] = value
                keys[num_found] = token
                num_found += 1
            maxima[block] = rest
    # From the largest logit on; equal ones, and -0 is equal to 0, by rising token.
    bits = values.view(np.int32)
    for i in range(num_found):
        rising = _flip(bits[i])
        rising += np.int32(rising < 0)
        keys[i] += -np.int64(rising) << 32
    return num_found


@jit.helper
def _lay(heads: Any, first: Any, num_found: Any, asked: Any, row: Any) -> Any:
    """Sort the head that was gathered, and lay it down from token number `first` on; its end."""
    keys, best, last = heads.keys, np.float64(heads.levels[row, BEST]), np.int64(0)
    temperature = asked.numbers[row, TEMPERATURE]
    num_kept = min(asked.ints[row, NUM_KEPT], num_found)
    for i in range(num_found):
        key, rank = keys[i], 0
        for j in range(num_found):
            rank += keys[j] < key
        if rank == num_kept - 1:
            last = key
        heads.ids[first + rank] = key & 0x7FFFFFFF
        heads.exponents[first + rank] = (np.float64(heads.values[i]) - best) / temperature
    # What equals the last token kept is kept.
    stop = first
    for i in range(num_found):
        stop += keys[i] >> 32 <= last >> 32
    return stop


@jit.rough
def _length(maxima: Any, best: Any, scale: Any) -> Any:
    """The sum of 2 ** ((maximum - best) * scale), within `ROUGH` of it."""
    total, factor = np.float32(0), np.float32(scale)
    for block in range(maxima.size):
        exponent = max((maxima[block] - best) * factor, np.float32(-126))
        whole = np.floor(exponent)
        rest = exponent - whole
        # Bits of the power of a whole number, and a parabola between two of them.
        power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
        curve = np.float32(0.6602) + np.float32(0.3398) * rest
        total += power * (np.float32(1) + rest * curve)
    return total


@jit.kernel(jit.READ_ONLY, _RULES, _PAST, _HEADS)
def find_heads(logits: Any, asked: RowRules, past: Past, heads: Heads) -> int:
    """Fill `heads` for rows of logits [rows, vocab]; how many tokens they have together."""
    num_tokens, levels = np.int64(0), heads.levels.view(np.int32)
    for row in range(logits.shape[0]):
        these, slot = logits[row], asked.slots[row]
        maxima = heads.maxima[asked.ints[row, CELLS]]
        heads.bounds[row, FIRST], heads.bounds[row, STATE] = num_tokens, ODD
        if past.num[slot, NUM_SEEN] + past.num[slot, NUM_STOPS] > 0:
            these = _changed(these, past, slot)
        if _fold(these, maxima):
            continue
        _fold_blocks(maxima, heads.groups)
        levels[row, BEST] = _flip(_rising(heads.groups, heads.bits))
        best = heads.levels[row, BEST]
        num_found = MOST_OF_HEAD + 1
        if np.isfinite(best):
            floor = heads.levels[row, FLOOR] = _floor(asked, row, best, heads)
            num_found = _gather(these, maxima, heads, floor)
        if num_found > MOST_OF_HEAD:
            continue
        num_tokens = _lay(heads, num_tokens, num_found, asked, row)
        heads.bounds[row, STOP], heads.bounds[row, STATE] = num_tokens, OPEN
        length = np.float32(0)
        if not asked.ints[row, LIMITED]:
            scale = _LOG2_E / asked.numbers[row, TEMPERATURE]
            length = _length(maxima, best, scale)
        heads.tails[row, 0], heads.tails[row, 1] = length * (1 - ROUGH), length * (1 + ROUGH)
    return int(num_tokens)


@jit.helper
def _border(ends: Any, share: Any) -> Any:
    """Where the token ends that reaches this share; the last one where none does."""
    wanted = min(np.int64(math.ceil(share)), ends[-1])
    return ends[np.searchsorted(ends, wanted)]


@jit.helper
def _reading(ends: Any, tail: Any, least_tail: Any, top_p: Any, at: Any) -> Any:
    """Where the certain places end, where all do, and the place; see `categorical._narrowed`."""
    head = ends[-1]
    most = top_p * (np.float64(head) + np.float64(tail))
    certain = _border(ends, top_p * (np.float64(head) + np.float64(least_tail)))
    reach = np.float64(head) + np.float64(tail)
    if most <= head:
        reach = np.float64(_border(ends, most))
    return certain, reach, np.int64(at * reach)


@jit.kernel(_RULES, _HEADS, _DRAW)
def settle(asked: RowRules, heads: Heads, draw: Draw) -> int:
    """Find the tokens of rows that are open, as `categorical._tokens`; how many stay open.

    Everything rises with the tail's length, of which the least and the most are known: where both
    give the same token, so does the length.

    Args:
        asked: of the rows.
        heads: as `find_heads` left them, with the exponents' exponentials in their place; their
            states are written.
        draw: its last three are written.
    """
    num_open, tail_scale = 0, np.float32(draw.scale[1])
    least_share = np.float32(draw.scale[2])
    for row in range(draw.numbers.size):
        if heads.bounds[row, STATE] != OPEN:
            num_open += heads.bounds[row, STATE] == ODD
            continue
        first, stop = heads.bounds[row, FIRST], heads.bounds[row, STOP]
        end = np.int64(0)
        for i in range(first, stop):
            end += np.int64(heads.exponents[i] * draw.scale[0])
            heads.ends[i] = end
        ends, top_p, at = heads.ends[first:stop], asked.numbers[row, TOP_P], 0.0
        if not asked.ints[row, GREEDY]:
            at = draw.uniforms[asked.slots[row], draw.numbers[row], 0]
        low, high = heads.tails[row, 0] * tail_scale, heads.tails[row, 1] * tail_scale
        certain, reach, place = _reading(ends, low, low * least_share, top_p, at)
        number, last = np.searchsorted(ends, place, "right"), place
        if low != high:
            last = _reading(ends, high, high * least_share, top_p, at)[2]
        draw.certain[row], draw.reach[row] = certain, reach
        if last < certain and last < ends[number]:
            draw.tokens[row] = heads.ids[first + number]
            heads.bounds[row, STATE] = SETTLED
        else:
            num_open += 1
    return num_open
