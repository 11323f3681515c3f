"""Did a prompt kill its worker, or did the worker die beside it? Knows no prompt and no clock.

Workers die of what their prompts do, and of everything else: a node goes down, an operator kills a
process, memory runs out. A prompt is looked at alone: where its worker dies again, the deaths in
which it had no part, over the time that workers were up, say how often chance would have done that.
It is to blame where that is hardly ever; then its deaths are explained, and count against no other
prompt. On a fleet where nothing else dies, twice alone is enough.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

HARDLY = 1e-5
"""A prompt is to blame when chance alone would do it to fewer of the prompts that come so far."""
_DEVIATIONS = 2.0
"""The rate of chance is taken as so many standard deviations above what was counted."""


@dataclass(slots=True, eq=False)
class Death:
    """The death of one worker; `is_explained` when one of its prompts was found to be to blame."""

    is_explained: bool = False


class PoisonDetector:
    """The deaths of a run, and what is known of them."""

    def __init__(self) -> None:
        self._num_unexplained = 0

    def died(self) -> Death:
        """A worker died."""
        self._num_unexplained += 1
        return Death()

    def is_guilty(self, deaths: Collection[Death], alone_s: Collection[float], up_s: float) -> bool:
        """Whether a prompt is to blame for the deaths of the workers it was alone on.

        Args:
            deaths: all those in which it had a part.
            alone_s: how long it had been there, each time that it was alone.
            up_s: how long workers of this run were up, all added.
        """
        others = self._num_unexplained - sum(not death.is_explained for death in deaths)
        rate = (others + _DEVIATIONS * math.sqrt(others)) / up_s if up_s else 0.0
        # Fisher's method: how often as many numbers between 0 and 1 have a product so small.
        product = math.prod(-math.expm1(-rate * seconds) for seconds in alone_s)
        if product == 0:
            return True
        terms = ((-math.log(product)) ** i / math.factorial(i) for i in range(len(alone_s)))
        return product * sum(terms) < HARDLY

    def explain(self, deaths: Collection[Death]) -> None:
        """The prompt that had a part in these is to blame."""
        for death in deaths:
            self._num_unexplained -= not death.is_explained
            death.is_explained = True
