"""Sums of weights that are known within bounds: quick, in any order, the same on no two machines.

Where a token hangs on them, both bounds must give the same one, or numpy decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qaic_ray.engine.compiled import jit

ROUGH = 0.004
"""How far such a sum may be from numpy's, as a part of it.

A weight is within 0.0027 of the power of two that it stands for, float32 sums of `_AT_ONCE` of them
within 0.0003, and numpy's own within 0.0001.
"""

_AT_ONCE = 4096


@jit.rough
def weight_above(logits: Any, best: Any, scale: Any, bound: Any) -> Any:
    """The sum of 2 ** ((logit - best) * scale) over all logits that are larger than `bound`."""
    total, best, factor = np.float64(0), np.float32(best), np.float32(scale)
    for start in range(0, logits.size, _AT_ONCE):
        part = np.float32(0)
        for i in range(start, min(start + _AT_ONCE, logits.size)):
            exponent = max((logits[i] - best) * factor, np.float32(-126))
            whole = np.floor(exponent)
            rest = exponent - whole
            # Bits of the power of a whole number, and a parabola between two of them.
            power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
            weight = power * (1 + rest * (np.float32(0.6602) + np.float32(0.3398) * rest))
            part += weight if logits[i] > bound else np.float32(0)
        total += part
    return total
