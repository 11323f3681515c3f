"""The row that its head does not settle, compiled: `unsettled.Unsettled.token`, where it is sure.

What numpy sums in float32 is known here only within bounds, and an exponential to a billionth.
Where a token hangs on more than that, the answer is -1, and numpy decides.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from qaic_ray.engine.compiled import jit
from qaic_ray.engine.unsettled import Floats, Ints, Logits

ROUGH = 1e-4
"""How far a sum of weights may be from numpy's, as a part of it.

A weight is within 3e-6 of the power of two that it stands for, beside what float32 exponents lose,
3e-5; float32 sums of `_AT_ONCE` of them are within 2e-5, and numpy's own within 1e-5.
"""

_AT_ONCE = 256
_LOG2_E = math.log2(math.e)
_SURE = 1e-9  # of a weight
_UNKNOWN, _REFUSED, _ALLOWED = range(3)


class Line(NamedTuple):
    """One row's number line; names as in `unsettled.Unsettled`, `certain` and `reach` with them."""

    ids: Ints
    ends: Ints
    cells: Logits
    uniforms: Floats
    temperature: float
    top_p: float
    best: float
    floor: float
    certain: int
    reach: float
    num_steps: int
    units: float


_F4, _F8, _I8 = jit.FLOAT32, jit.FLOAT64, jit.INT64
_LINE = jit.tuple_of(
    Line,
    *(_I8[1], _I8[1], _F4[1], _F8[1]),
    *(jit.types.float64, jit.types.float64, jit.types.float64, jit.types.float64),
    *(jit.types.int64, jit.types.float64, jit.types.int64, jit.types.float64),
)


@jit.rough
def _weight_above(logits: Any, best: Any, scale: Any, bound: Any) -> Any:
    """The sum of 2 ** ((logit - best) * scale) over all logits that are larger than `bound`."""
    total, best, factor = np.float64(0), np.float32(best), np.float32(scale)
    for start in range(0, logits.size, _AT_ONCE):
        part = np.float32(0)
        some = logits[start : start + _AT_ONCE]
        for i in range(some.size):
            exponent = max((some[i] - best) * factor, np.float32(-126))
            whole = np.floor(exponent)
            rest = exponent - whole
            # Bits of the power of a whole number, and a polynomial between two of them.
            power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
            curve = np.float32(0.24144275) + rest * (
                np.float32(0.052011468) + rest * np.float32(0.013534165)
            )
            curve = np.float32(1.0000026) + rest * (np.float32(0.69300383) + rest * curve)
            weight = power * curve
            part += weight if some[i] > bound else np.float32(0)
        total += part
    return total


@jit.helper
def _is_below(before: Any, slack: Any, share: Any) -> Any:
    """Whether a weight of `before`, or up to `slack` more or less, is less than a rough share."""
    if before + slack < share * (1 - ROUGH):
        return _ALLOWED
    return _REFUSED if before - slack >= share * (1 + ROUGH) else _UNKNOWN


@jit.helper
def _tail_token(logits: Any, line: Any, place: Any) -> Any:
    """The token at a place of the tail; -1 where none lies, -2 where that is not sure."""
    end, block, before = 0.0, 0, 0.0
    sum_before = 0.0
    while block < line.cells.size:
        sum_before += np.float64(line.cells[block])
        before, end = end, sum_before * line.num_steps
        if end > place:
            break
        block += 1
    if block == line.cells.size:
        return -1
    cell, offset = np.float64(line.cells[block]), place - before
    step = min(np.int64(offset / cell), line.num_steps - 1)
    token = block + step * line.cells.size
    if token >= logits.size or logits[token] >= np.float32(line.floor):
        return -1
    weight = math.exp((np.float64(logits[token]) - line.best) / line.temperature)
    missing = offset - step * cell - weight
    if abs(missing) <= _SURE * weight:
        return -2
    return token if missing < 0 else -1


@jit.helper
def _in_tail(logits: Any, line: Any, share: Any, token: Any) -> Any:
    """Whether top_p allows a token of the tail."""
    if line.top_p == 1:
        return _ALLOWED
    state = _is_below(np.float64(line.ends[-1]) / line.units, 0.0, share)
    if state != _ALLOWED:
        return state
    logit, num_equal = logits[token], 0
    for other in range(token):
        num_equal += logits[other] == logit
    before = _weight_above(logits, line.best, _LOG2_E / line.temperature, logit)
    equal = num_equal * math.exp((np.float64(logit) - line.best) / line.temperature)
    return _is_below(before + equal, (before + equal) * ROUGH, share)


@jit.kernel(jit.READ_ONLY_ROW, _LINE)
def find_token(logits: Any, line: Line) -> int:
    """The token of a row of logits [vocab], or -1 where only numpy can tell it."""
    share = np.float64(-1)
    for number in range(line.uniforms.size - 1):
        place = np.int64(line.uniforms[number] * line.reach)
        in_head = np.searchsorted(line.ends, place, "right")
        if in_head < line.ends.size and place < line.certain:
            return int(line.ids[in_head])
        if line.top_p < 1 and share < 0:
            scale = _LOG2_E / line.temperature
            share = line.top_p * _weight_above(logits, line.best, scale, np.float32(-np.inf))
        if in_head < line.ends.size:
            token, before = line.ids[in_head], np.int64(0)
            if in_head > 0:
                before = line.ends[in_head - 1]
            state = _is_below(np.float64(before) / line.units, 0.0, share)
        else:
            length = np.float64(place - line.ends[-1]) / line.units
            token = _tail_token(logits, line, length)
            if token == -1:
                continue
            state = _UNKNOWN
            if token >= 0:
                state = _in_tail(logits, line, share, token)
        if state == _UNKNOWN:
            return -1
        if state == _ALLOWED:
            return int(token)
    return -1
