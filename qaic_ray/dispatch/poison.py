"""Which prompts kill their workers: a count of deaths alone, held against what chance would do."""

from __future__ import annotations

from qaic_ray.dispatch.policy import Policy


class LoneRuns:
    """How lone runs of good prompts end, and whether a prompt's deaths can be chance.

    Only prompts that were answered in the end are counted: their deaths were not their doing.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._num_runs = 0
        self._num_deaths = 0

    def note_answered(self, num_deaths: int) -> None:
        """A prompt was answered alone on a worker, after so many deaths alone."""
        self._num_runs += num_deaths + 1
        self._num_deaths += num_deaths

    def is_poison(self, num_deaths: int) -> bool:
        """Whether a prompt with so many deaths alone is to blame for them."""
        chance = (self._num_deaths + self._policy.lone_death_prior) / (self._num_runs + 1)
        return (
            num_deaths >= self._policy.min_deaths_alone
            and chance**num_deaths < self._policy.false_blame
        )
