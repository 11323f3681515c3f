"""What the rows in their slots have had so far, and how penalties and `min_tokens` use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from qaic_ray.engine.steps import Sequence
from qaic_ray.engine.unsettled import Ints, Logits

NUM_SEEN, NUM_STOPS = range(2)
REPETITION, FREQUENCY, PRESENCE = range(3)

_ROOM = 64  # tokens more, at the least, that there is room for where room is made


class Pasts:
    """The tokens that rows have seen, of rows whose parameters ask for it. One a slot.

    Attributes:
        seen: int64 [slots, most], the tokens of prompt and answer, each once.
        counts: float32 [slots, most], how often the answer has each.
        stops: int64 [slots, most], tokens that may not come before `min_tokens`, rising.
        num: int64 [slots, 2], how many are seen, and how many may not come yet.
        penalties: float32 [slots, 3].
    """

    def __init__(self, num_slots: int) -> None:
        self.seen = np.zeros((num_slots, 0), np.int64)
        self.counts = np.zeros((num_slots, 0), np.float32)
        self.stops = np.zeros((num_slots, 0), np.int64)
        self.num = np.zeros((num_slots, 2), np.int64)
        self.penalties = np.zeros((num_slots, 3), np.float32)
        # Of each slot whose row has penalties: where in `seen` a token stands.
        self._places: dict[int, dict[int, int]] = {}
        # Of each slot whose row still has too few tokens: how many are missing.
        self._missing: dict[int, int] = {}

    def enter(self, slot: int, sequence: Sequence) -> None:
        """A row takes a slot, perhaps with tokens that it already has."""
        self.leave(slot)
        params = sequence.params
        missing = params.min_tokens - len(sequence.output_ids)
        if missing > 0 and sequence.stop_ids:
            stop_ids = sorted(sequence.stop_ids)
            self.stops = _with_room(self.stops, len(stop_ids))
            self.stops[slot, : len(stop_ids)] = stop_ids
            self.num[slot, NUM_STOPS] = len(stop_ids)
            self._missing[slot] = missing
        if params.has_penalties:
            self.penalties[slot, REPETITION] = params.repetition_penalty
            self.penalties[slot, FREQUENCY] = params.frequency_penalty
            self.penalties[slot, PRESENCE] = params.presence_penalty
            tokens = list(dict.fromkeys(sequence.prompt_ids))
            self._places[slot] = {token: place for place, token in enumerate(tokens)}
            self._make_room(len(tokens))
            self.seen[slot, : len(tokens)] = tokens
            self.counts[slot, : len(tokens)] = 0
            self.num[slot, NUM_SEEN] = len(tokens)
            for token in sequence.output_ids:
                self._count(slot, token)

    def leave(self, slot: int) -> None:
        """The slot's row is gone."""
        self.num[slot] = 0
        self._places.pop(slot, None)
        self._missing.pop(slot, None)

    @property
    def is_empty(self) -> bool:
        """Whether no row changes its logits."""
        return not (self._places or self._missing)

    def changes(self, slot: int) -> bool:
        """Whether the next token's logits are changed."""
        return slot in self._places or slot in self._missing

    def fit(self, slots: Iterable[int], vocab: int) -> bool:
        """Whether all tokens that these rows change are of the vocabulary."""
        for slot in slots:
            places = self._places.get(slot)
            if places and not (min(places) >= 0 and max(places) < vocab):
                return False
            if (self.stops[slot, : self.num[slot, NUM_STOPS]] < 0).any():
                return False
        return True

    def take(self, slot: int, token: int) -> None:
        """The next token of a row that `changes` is this one."""
        if slot in self._places:
            self._count(slot, token)
        missing = self._missing.get(slot)
        if missing is not None:
            self._missing[slot] = missing - 1
            if missing == 1:
                del self._missing[slot]
                self.num[slot, NUM_STOPS] = 0

    def change(self, slot: int, logits: Logits) -> None:
        """Apply penalties and `min_tokens` to a row of logits, in place."""
        num_seen, num_stops = self.num[slot].tolist()
        if num_seen:
            seen, counts = self.seen[slot, :num_seen], self.counts[slot, :num_seen]
            logits[seen] = self._penalized(slot, logits[seen], counts)
        if num_stops:
            stops: Ints = self.stops[slot, :num_stops]
            logits[stops[stops < logits.size]] = -np.inf

    def _penalized(self, slot: int, values: Logits, counts: Logits) -> Logits:
        repetition, frequency, presence = self.penalties[slot]
        if repetition != 1:
            values = np.where(values > 0, values / repetition, values * repetition)
        if frequency != 0:
            values -= frequency * counts
        if presence != 0:
            values -= presence * (counts > 0)
        return values

    def _count(self, slot: int, token: int) -> None:
        """The answer has a token, perhaps once more."""
        places = self._places[slot]
        place = places.get(token)
        if place is not None:
            self.counts[slot, place] += 1
            return
        place = places[token] = len(places)
        if place == self.seen.shape[1]:
            self._make_room(place + 1)
        self.seen[slot, place], self.counts[slot, place] = token, 1
        self.num[slot, NUM_SEEN] = place + 1

    def _make_room(self, num_tokens: int) -> None:
        self.seen = _with_room(self.seen, num_tokens)
        self.counts = _with_room(self.counts, num_tokens)


Rows = TypeVar("Rows", Ints, Logits)


def _with_room(rows: Rows, num: int) -> Rows:
    """The same rows, with room for at least `num` values in each."""
    missing = num - rows.shape[1]
    return rows if missing <= 0 else np.pad(rows, ((0, 0), (0, missing + num // 2 + _ROOM)))
