"""Which replica answers a prompt: the one whose slots hold its longest beginning. Pure."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from qaic_ray.dispatch.beginnings import HeldBeginnings, beginning_of
from qaic_ray.dispatch.policy import DEFAULT_POLICY, Policy
from qaic_ray.rows import Prompt, Row


@dataclass(frozen=True)
class Candidate:
    """A replica that takes prompts.

    Attributes:
        name: tells it apart.
        slots: prompts that it answers side by side.
        load: prompts that it has, of everybody, as far as is known.
    """

    name: str
    slots: int
    load: int = 0


class ReplicaChoice:
    """What one replica of the interface has given to each replica of cards, and what they hold.

    Any thread may call it.

    Args:
        policy: see `beginning_of`.
    """

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._held: dict[str, HeldBeginnings] = {}
        self._meant: dict[int, str] = {}
        self._running: dict[int, str] = {}

    def order(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[str]:
        """The replicas, the best one first, which the prompt is meant for from now on.

        One with a free slot goes before one that is full. Of those with a free slot it is the one
        that holds the most of the prompt's beginning, then the one with the least load a slot.
        """
        beginning = beginning_of(prompt, self._policy)
        with self._lock:
            self._meant.pop(prompt.index, None)
            self._know(candidates)

            def badness(candidate: Candidate) -> tuple[bool, int, float, str]:
                name = candidate.name
                load = max(candidate.load, self._own_load(name))
                is_full = load >= candidate.slots
                held = 0 if is_full else self._held[name].num_held(beginning)
                return is_full, -held, load / candidate.slots, name

            names = [candidate.name for candidate in sorted(candidates, key=badness)]
            if names:
                self._meant[prompt.index] = names[0]
            return names

    def begin(self, name: str, prompt: Prompt) -> None:
        """A replica has taken a prompt."""
        with self._lock:
            self._meant.pop(prompt.index, None)
            held = self._held.get(name)
            if held is not None and prompt.index not in self._running:
                held.begin(prompt)
                self._running[prompt.index] = name

    def end(self, prompt: Prompt, row: Row | None = None) -> None:
        """A prompt is done, or is given up; with its row, what the slot holds now."""
        with self._lock:
            meant = self._meant.pop(prompt.index, None)
            name = self._running.pop(prompt.index, None)
            if name is None and meant is not None and row is not None:
                # Ray Serve does not say who takes a request where no replica may refuse one.
                name = meant
                if name in self._held:
                    self._held[name].begin(prompt)
            if name is not None and (held := self._held.get(name)) is not None:
                held.end(prompt, row)

    def load(self, name: str) -> int:
        """Prompts that were given to a replica, or are meant for it, and are not done."""
        with self._lock:
            return self._own_load(name)

    @property
    def names(self) -> frozenset[str]:
        """The replicas that something is known of."""
        return frozenset(self._held)

    def _own_load(self, name: str) -> int:
        return sum(one == name for one in (*self._running.values(), *self._meant.values()))

    def _know(self, candidates: Sequence[Candidate]) -> None:
        """Begin to know those that are new, and forget those that are gone."""
        there = {candidate.name for candidate in candidates}
        for name in self._held.keys() - there:
            del self._held[name]
            for index in [index for index, one in self._running.items() if one == name]:
                del self._running[index]
        for candidate in candidates:
            if candidate.name not in self._held:
                self._held[candidate.name] = HeldBeginnings(candidate.slots, self._policy)
