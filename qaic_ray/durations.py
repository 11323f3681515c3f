"""Many durations as few numbers: a million take no more memory than a thousand. Knows no clock."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

GROWTH = 1.002
"""Each bin's upper end over its lower one: what is read back is right to a tenth of a percent."""
SHORTEST_S = 1e-9

_LOG_GROWTH = math.log(GROWTH)


def bin_of(seconds: float) -> int:
    """The number of the bin that a duration falls into; one of nothing counts as a nanosecond."""
    return math.floor(math.log(max(seconds, SHORTEST_S)) / _LOG_GROWTH)


@dataclass(frozen=True)
class Durations:
    """How many durations fell into which bin; adds associatively, with `Durations()` as zero."""

    counts: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Durations:
        """These durations."""
        return cls(dict(Counter(map(bin_of, seconds))))

    def __add__(self, other: Durations) -> Durations:
        return Durations(dict(Counter(self.counts) + Counter(other.counts)))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def items(self) -> Iterator[tuple[float, int]]:
        """Seconds, and how many durations were about so long, from the shortest on."""
        for number in sorted(self.counts):
            yield GROWTH ** (number + 0.5), self.counts[number]

    def quantile(self, q: float) -> float:
        """The duration of rank q (0 to 1), in seconds; 0 where there is none."""
        rank = q * (len(self) - 1)
        seen = 0
        for seconds, count in self.items():
            seen += count
            if rank < seen:
                return seconds
        return 0.0
