"""Amounts over time in buckets of equal width, which doubles as a run grows. Pure.

Time is taken as it comes, in any order. Only buckets in which something happens are held, so a
run that pauses for a week and goes on costs no more than one that does not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

FIRST_EXPONENT = -5
"""Buckets begin with 2^-5 s: a run of seconds has a shape too."""
MAX_BUCKETS = 512

_RATE_UNIT = 2.0**-20
"""Rates are whole numbers of it, so that their sums are exact, and nothing is left of them where
nothing is."""


class Series:
    """Amounts in buckets of 2^`exponent` seconds, each known by its number: start over width.

    An interval is a constant rate between two times. Of a long one only both ends are held, so
    that adding it costs the same as adding a short one.
    """

    def __init__(self, exponent: int = FIRST_EXPONENT) -> None:
        self.exponent = exponent
        self._amounts: defaultdict[int, float] = defaultdict(float)
        # How the rate changes at the start of a bucket, of buckets that are in intervals whole.
        self._steps: defaultdict[int, float] = defaultdict(float)

    def __len__(self) -> int:
        """Buckets that are held: more than nothing, and no more than there are."""
        return len(self._amounts)

    @property
    def width_s(self) -> float:
        """Seconds of a bucket."""
        return 2.0**self.exponent

    def add_at(self, at_s: float, amount: float) -> None:
        """Add an amount at one time."""
        self._amounts[math.floor(at_s / self.width_s)] += amount

    def add_between(self, start_s: float, end_s: float, rate: float) -> None:
        """Add `rate` for each second from `start_s` to `end_s`, which is not before it."""
        rate = round(rate / _RATE_UNIT) * _RATE_UNIT
        width_s = 2.0**self.exponent
        first, last = math.floor(start_s / width_s), math.floor(end_s / width_s)
        if first == last:
            self._amounts[first] += rate * (end_s - start_s)
            return
        self._amounts[first] += rate * ((first + 1) * width_s - start_s)
        self._amounts[last] += rate * (end_s - last * width_s)
        if last - first > 1:
            self._steps[first + 1] += rate
            self._steps[last] -= rate

    def widen(self, exponent: int) -> None:
        """Put everything into buckets of 2^`exponent` seconds, which are not narrower."""
        shift = exponent - self.exponent
        if shift <= 0:
            return
        width_s = self.width_s
        amounts: defaultdict[int, float] = defaultdict(float)
        for number, amount in self._amounts.items():
            amounts[number >> shift] += amount
        steps: defaultdict[int, float] = defaultdict(float)
        for (first, end), rate in self._stretches():
            first_wide, end_wide = -(-first >> shift), end >> shift
            if first_wide >= end_wide:  # no wide bucket is in it whole
                for number in range(first >> shift, ((end - 1) >> shift) + 1):
                    inside = min(end, (number + 1) << shift) - max(first, number << shift)
                    amounts[number] += rate * width_s * inside
                continue
            steps[first_wide] += rate
            steps[end_wide] -= rate
            if before := (first_wide << shift) - first:
                amounts[first >> shift] += rate * width_s * before
            if behind := end - (end_wide << shift):
                amounts[end_wide] += rate * width_s * behind
        self._amounts, self._steps = amounts, steps
        self.exponent = exponent

    def _stretches(self) -> Iterator[tuple[tuple[int, int], float]]:
        """Buckets beside each other with one rate: the first, the one behind the last; the rate."""
        rate = 0.0
        for number, behind in pairwise([*sorted(self._steps), 0]):
            rate += self._steps[number]
            if rate and behind > number:
                yield (number, behind), rate

    def buckets(self) -> dict[int, float]:
        """Number -> amount of each bucket in which something happens."""
        found = dict(self._amounts)
        for (first, end), rate in self._stretches():
            for number in range(first, end):
                found[number] = found.get(number, 0.0) + rate * self.width_s
        return {number: amount for number, amount in found.items() if amount}

    def num_active(self) -> int:
        """How many buckets something happens in, or a few more."""
        return len(self._amounts) + sum(end - first for (first, end), _ in self._stretches())


def widen_all(series: Iterable[Series], max_buckets: int = MAX_BUCKETS) -> int:
    """Give all one width, the least at which something happens in few buckets; its exponent."""
    every = list(series)
    exponent = max((one.exponent for one in every), default=FIRST_EXPONENT)
    while True:
        for one in every:
            one.widen(exponent)
        # Each alone first: a union of millions need not be made.
        most = max((one.num_active() for one in every), default=0)
        if most <= max_buckets:
            most = len(_union(every))
        if most <= max_buckets:
            return exponent
        # So many doublings are needed at least, where all of it is without a gap.
        exponent += max(1, math.floor(math.log2(most / max_buckets)))


def _union(every: Iterable[Series]) -> set[int]:
    return {number for one in every for number in one.buckets()}
