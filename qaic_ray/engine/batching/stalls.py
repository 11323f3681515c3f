"""Whether rows that can decode go before the prefill of others. It knows the times it is told.

    rows that decode    rows that want prefill    decode goes first
    some of foreground  some of foreground        once a stall would be longer than `max_stall_s`
    some of foreground  of background only        too while background rests, `REST` of its prefills
    of background only  any                       once a stall would be longer than `BACKGROUND_S`

A stall is the time since rows could last decode; one prefill is made in any case.
"""

from __future__ import annotations

from qaic_ray.engine.batching.batcher import Batcher
from qaic_ray.engine.batching.lockstep import LockstepBatcher
from qaic_ray.engine.steps import Step

MAX_STALL_S = 1.0
"""Seconds that running rows may wait for the prefill of others, by default."""
BACKGROUND_S = 1.0
"""Seconds that rows of the background may wait, where `max_stall_s` is less: they do not mind."""
REST = 4.0
"""While rows of the foreground decode, a prefill of the background is followed by so many times its
own time without another: it takes a fifth of the card's time at most."""


class Stalls:
    """How long rows that can decode have waited for prefill.

    Args:
        max_stall_s: how long they may; 0 for one prefill at a time.
    """

    def __init__(self, max_stall_s: float) -> None:
        self._max_stall_s = max_stall_s
        self._has_stalled = False
        self._since_s = 0.0
        self._is_background_turn = False
        self._background_at_s = 0.0

    def must_decode(self, now_s: float, batcher: Batcher | LockstepBatcher) -> bool:
        """Whether the step that begins now has to be one of decode, where any row can decode."""
        self._is_background_turn = False
        limit_s = self._max_stall_s
        if batcher.num_background:
            if not batcher.decodes_foreground:
                limit_s = max(limit_s, BACKGROUND_S)
            elif not batcher.prefills_foreground:
                self._is_background_turn = True
                if now_s < self._background_at_s:
                    return True
        if not self._has_stalled:
            return False
        return limit_s <= 0 or now_s - self._since_s + batcher.costs.slowest_s > limit_s

    def made(self, step: Step, start_s: float, end_s: float, *, could_decode: bool) -> None:
        """Note a step; `could_decode`: whether any row could when it was planned."""
        self._has_stalled = step.is_prefill and could_decode
        if not self._has_stalled:
            self._since_s = end_s
        elif self._is_background_turn:
            self._background_at_s = end_s + REST * (end_s - start_s)
