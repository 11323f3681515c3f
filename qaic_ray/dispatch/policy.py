"""Every number by which the dispatcher decides, and when by them a prompt is to blame.

`docs/explanation/dispatch.md` says how they work together.
"""

from __future__ import annotations

from dataclasses import dataclass

from qaic_ray.rows import Prompt
from qaic_ray.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers of one run's dispatcher. Names that end in `_s` are seconds."""

    # Reading the input

    read_ahead: int = 8192
    """Prompts that one read asks for, where the slots do not ask for more."""
    read_rounds: int = 4
    """A read asks for at least so many prompts for each slot of the fleet."""
    ahead_rounds: int = 16
    """At least so many prompts for each slot wait until the input has ended: the longest of them go
    first then, and are done before the end even if a worker dies with them."""

    # Sizes of shards

    shard_s: float = 1.0
    """A full shard is so much of a worker's time, and about as much is queued behind it."""
    max_shard_prompts: int = 1024
    """Most prompts in a shard."""
    max_shards: int = 16
    """Most shards in flight on a worker. Two hold what it works on and what is queued in it; the
    others hold a long row each that they were left with."""
    guide: int = 3
    """Near the end a shard is a worker's share of what is left, divided by this."""
    max_speed: float = 4.0
    """No worker's share is more than so many times the mean share."""
    slow_share: float = 0.67
    """A worker is slow when its slots do less than this part of the fleet's mean."""
    answer_tokens: int = 32
    """Estimated tokens of an answer whose prompt does not say how long it may be."""
    token_chars: int = 4
    """Estimated characters of a token of a prompt that is given by its tokens."""
    token_work: float = 32.0
    """Estimated work of one token of an answer, in characters of prompt."""

    # Open inputs, and the background

    kept_slots: int = 0
    """So many slots of a worker are kept for the foreground, but one slot: whatever runs there, a
    prompt of the background begins only while more than these are free."""
    block_tokens: int = 16
    """Beginnings of prompts that slots hold count by blocks of so many tokens, and a prompt looks
    for one from the first block on; 0: any worker will do."""

    # Bad ends of prompts

    retry_shrink: int = 4
    """Prompts that were on a dying worker go in groups of so many times fewer than it has slots."""
    alone_from: int = 3
    """From this attempt on a prompt runs alone on its worker."""
    max_failures_alone: int = 2
    """A prompt whose shard failed by itself so many times while it was alone is given up."""
    min_deaths_alone: int = 3
    """A prompt is given up when at least so many workers died while it was alone on them."""
    lone_death_prior: float = 0.1
    """Chance that a worker dies under a lone prompt by itself, before any lone run was seen."""
    false_blame: float = 2e-5
    """A prompt is given up when chance makes as many deaths alone less often than this."""
    max_attempts: int = 30
    """A prompt that came to a bad end so many times is given up, whatever it was."""
    look_ahead: int = 8
    """So many prompts or workers are tried before one is said to fit nowhere now."""

    # Failures of workers

    max_openings: int = 3
    """A worker that cannot be opened so many times in a row is given up."""
    max_failures: int = 6
    """Where no worker has given a row yet, one is given up after so many failures."""
    patience: int = 10
    """Elsewhere a worker is given up when it failed so many times as often, with no row in between,
    as a row takes lives. Chance makes one of 20,000 such series as long."""
    max_transients: int = 2
    """A failed shard is tried again so many times in a row on the same worker."""
    min_backoff_s: float = 0.5
    """Rest after the first failure; it doubles with each further one."""
    max_backoff_s: float = 30.0
    """Longest rest."""

    # Silence of workers

    max_open_s: float = 900.0
    """Limit for opening: a QPC of a large model, from a shared disk, on a node that was asleep."""
    stall_steps: int = 100
    """A worker that makes no step in the time of so many of its own steps is stalled."""
    min_stall_s: float = 15.0
    """But never before this."""
    first_stall_s: float = 300.0
    """The same while no step was seen: the first may wait for a long prefill, or an emulator."""
    late_s: float = 1.0
    """A driver that comes so much later than it was to be woken did not listen in between: nobody
    was silent."""

    # Measured speeds

    first_speed_s: float = 1.0
    """What a worker does in less time than this tells nothing of its speed."""
    speed_s: float = 60.0
    """What was measured so long ago counts a third of what is measured now."""
    new_step: float = 0.2
    """Weight of the newest step in the mean time of a worker's steps."""
    first_row_s: float = 30.0
    """Estimated time of a row while none has come."""
    new_row: float = 0.02
    """Weight of the newest row in the mean time of a row."""

    # Second runs

    second_run_factor: float = 2.0
    """A prompt may run a second time when it has taken so many times what it should."""
    second_run_again_s: float = 1.0
    """A prompt that may not is looked at again after so long, and never earlier than this."""


DEFAULT_POLICY = Policy()
GREEDY = SamplingParams()


def text_work(
    prompt: Prompt, defaults: SamplingParams = GREEDY, *, policy: Policy = DEFAULT_POLICY
) -> float:
    """Estimated work of a prompt in characters; `defaults` are what it does not say itself."""
    length = len(prompt.text)
    if prompt.token_ids is not None:
        length = policy.token_chars * len(prompt.token_ids)
    elif prompt.messages is not None:
        length = sum(len(message.get("content", "")) for message in prompt.messages)
    sampling = prompt.sampling or defaults
    num_tokens = policy.answer_tokens if sampling.max_tokens is None else sampling.max_tokens
    return length + policy.token_work * num_tokens * sampling.n


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
