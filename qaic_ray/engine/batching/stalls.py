"""Whether rows that can decode go before the prefill of others. It knows the times it is told.

    rows that decode    rows that want prefill    decode goes first
    some of foreground  some of foreground        once a stall would be longer than `max_stall_s`
    some of foreground  of background only        too but for one prefill in `RARE` decode steps
    of background only  any                       once a stall would be longer than `BACKGROUND_S`

A stall is the time since rows could last decode; one prefill is made in any case. Rows of the
background that get no prefill ride in the decode steps (`Batcher`).
"""

from __future__ import annotations

from qaic_ray.engine.batching.batcher import Batcher
from qaic_ray.engine.batching.lockstep import LockstepBatcher
from qaic_ray.engine.steps import Step

MAX_STALL_S = 1.0
"""Seconds that running rows may wait for the prefill of others, by default."""
BACKGROUND_S = 1.0
"""Seconds that rows of the background may wait, where `max_stall_s` is less: they do not mind."""
RARE = 128
"""While rows of the foreground decode, they are made to wait by prefill of the background so rarely
that no more than one decode step in so many comes behind a prefill: the 99th percentile of the
times between their tokens does not tell. Where their own prefill makes as many wait, there is none.
"""
MAX_DEBT = 4
"""So many prefills of the foreground count at most against those of the background to come."""


class Stalls:
    """How long rows that can decode have waited for prefill.

    Args:
        max_stall_s: how long they may; 0 for one prefill at a time.
    """

    def __init__(self, max_stall_s: float) -> None:
        self._max_stall_s = max_stall_s
        self._has_stalled = False
        self._since_s = 0.0
        self._decodes_foreground = False
        self._credit = 1.0  # prefills of the background that may be made

    def must_decode(self, now_s: float, batcher: Batcher | LockstepBatcher) -> bool:
        """Whether the step that begins now has to be one of decode, where any row can decode."""
        limit_s = self._max_stall_s
        self._decodes_foreground = not batcher.num_background or batcher.decodes_foreground
        if not self._decodes_foreground:
            limit_s = max(limit_s, BACKGROUND_S)
        elif batcher.num_background and not batcher.prefills_foreground and self._credit < 1:
            return True
        if not self._has_stalled:
            return False
        return limit_s <= 0 or now_s - self._since_s + batcher.costs.slowest_s > limit_s

    def made(self, step: Step, end_s: float, *, could_decode: bool) -> None:
        """Note a step; `could_decode`: whether any row could when it was planned."""
        self._has_stalled = step.is_prefill and could_decode
        if not self._has_stalled:
            self._since_s = end_s
        if could_decode and self._decodes_foreground:
            change = -1.0 if step.is_prefill else 1 / RARE
            self._credit = max(-MAX_DEBT, min(1.0, self._credit + change))
