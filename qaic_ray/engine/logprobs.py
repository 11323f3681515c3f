"""Log-probabilities of one row of logits: the chosen token's and the most likely ones'."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qaic_ray.sampling_params import TokenLogprob

_BLOCK_LEN = 32
_LOG2_E = np.float32(math.log2(math.e))
_LOWEST = np.finfo(np.float32).min


def token_logprob(logits: npt.NDArray[np.float32], token: int, num_top: int) -> TokenLogprob:
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
    top = tuple((at, float(logits[at]) - log_total) for at in _largest(logits, num_top))
    return TokenLogprob(token, float(logits[token]) - log_total, top)


def _largest(logits: npt.NDArray[np.float32], num: int) -> list[int]:
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
