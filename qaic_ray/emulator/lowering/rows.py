"""Which rows and slots of one inference run together; pure, over arrays of positions.

A call covers slots `first` to `first + num_slots - 1`, with `length` tokens in the longest row.
Rows of many tokens run one by one (the attention kernel takes one row after the first chunk).
Rows of few tokens, often one, are put together even where idle slots lie between them: a call
reads every weight once, whatever its number of rows. What an idle slot's cache holds where such a
call writes is saved and restored by the caller.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Tuple

import numpy as np

MAX_IDLE_RUN = 8
"""Idle slots in a row that are computed along; more, and a second call is cheaper."""


class Call(NamedTuple):
    """`rows[i]` is the row of the inference that slot `first + i` runs, -1 for an idle slot."""

    first: int
    rows: Tuple[int, ...]
    length: int

    @property
    def num_slots(self) -> int:
        """How many slots the call covers."""
        return len(self.rows)


def plan(
    positions: Any, slots: Any, num_slots: int, ctx_len: int, *, joint_length: int = 1
) -> Optional[List[Call]]:
    """Split an inference into calls.

    Args:
        positions: [rows, tokens]; negative is padding.
        slots: [rows], the slot of each row.
        num_slots: slots that the cache has.
        ctx_len: positions that a slot has.
        joint_length: tokens of a row, at most, that may be put together with another.

    Returns:
        Calls that together write and read what the whole inference would; None where a row is
        not consecutive positions within the context and then padding, or two rows share a slot.
    """
    valid = positions >= 0
    lengths = valid.sum(axis=1)
    steps = np.arange(positions.shape[1])
    expected = np.where(steps < lengths[:, None], positions[:, :1] + steps, -1)
    if not np.array_equal(np.where(valid, positions, -1), expected):
        return None
    active = [int(row) for row in np.flatnonzero(lengths)]
    if any(positions[row, 0] + lengths[row] > ctx_len for row in active):
        return None
    taken = [int(slots[row]) for row in active]
    if len(set(taken)) < len(taken) or any(not 0 <= slot < num_slots for slot in taken):
        return None
    calls: List[Call] = []
    for slot, row in sorted(zip(taken, active)):
        call = Call(slot, (row,), int(lengths[row]))
        joined = _joined(calls[-1], call, joint_length) if calls else None
        if joined is None:
            calls.append(call)
        else:
            calls[-1] = joined
    return calls


def _joined(one: Call, other: Call, joint_length: int) -> Optional[Call]:
    """Both in one call, where they fit into one."""
    length = max(one.length, other.length)
    num_idle = other.first - one.first - one.num_slots
    if length > joint_length or num_idle > MAX_IDLE_RUN:
        return None
    return Call(one.first, one.rows + (-1,) * num_idle + other.rows, length)
