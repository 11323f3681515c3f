"""The prompts that wait for a worker, in the order they go. Knows no worker and no time.

There are three queues. *Fresh* prompts were never on a worker that died. *Retried* ones were, and
go in small groups. *Suspects* were more than once, and each goes alone. In the first two an older
band goes first and in it a longer prompt, by powers of two, so that prompts of about the same
length go in input order and answers can be shown early; slow workers are given the shortest. When
the input has ended there are no bands any more, and at the very end lengths count exactly.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from qaic_ray.dispatch.poison import Death
from qaic_ray.rows import Prompt

ALONE_FROM = 3
"""From this attempt on a prompt runs alone on its worker."""
Size = tuple[int, int, float]
"""Least and most prompts, and the estimated work after which it is enough."""
_LOOK_AHEAD = 8
_MOST_STALE = 1024


@dataclass(slots=True, eq=False)
class OpenPrompt:
    """A prompt that was read and is not done.

    It waits, or runs in one shard, or in two where a straggler's prompt runs a second time.
    `attempt` is one more than the times it was unfinished when its shard came to a bad end;
    `died_on` names the worker on which that happened last while it was alone. It had begun on the
    workers that died the `deaths`, and was alone for `alone_s` each on those where it was that.
    """

    prompt: Prompt
    work: float
    band: int
    attempt: int = 1
    shard_ids: tuple[int, ...] = ()
    died_on: str = ""
    waiting: bool = False
    deaths: tuple[Death, ...] = ()
    alone_s: tuple[float, ...] = ()


# Least first: band, length, index, and a number, because one prompt may be there twice.
_Ranked = tuple[int, float, int, int, OpenPrompt]


class Queue:
    """Waiting prompts of one attempt, of each band from the longest on or from the shortest on.

    Two heaps of the same prompts: one that waits no more is passed over where it is met, and all of
    those are thrown out when they are the most.
    """

    def __init__(self, attempt: int) -> None:
        self._attempt = attempt
        self._longest: list[_Ranked] = []
        self._shortest: list[_Ranked] = []
        self._exact = False
        self._len = 0
        self._num_ranked = 0

    def __len__(self) -> int:
        return self._len

    def add(self, entry: OpenPrompt) -> None:
        """Let it wait."""
        self._len += 1
        heapq.heappush(self._longest, self._rank(entry, -1))
        heapq.heappush(self._shortest, self._rank(entry, 1))
        for heap in (self._longest, self._shortest):
            if len(heap) > 2 * self._len + _MOST_STALE:
                heap[:] = [ranked for ranked in heap if self._has(ranked[-1])]
                heapq.heapify(heap)

    def left(self) -> None:
        """One of them waits no more."""
        self._len -= 1

    def pop(self, *, shortest: bool = False) -> OpenPrompt:
        """Take the one whose turn it is; there must be one. It waits no more."""
        heap = self._shortest if shortest else self._longest
        entry = heapq.heappop(heap)[-1]
        while not self._has(entry):
            entry = heapq.heappop(heap)[-1]
        entry.waiting = False
        self._len -= 1
        return entry

    def merge_bands(self) -> None:
        """The input has ended: all that waits is one band."""
        for entry in self.entries():
            entry.band = 0
        self._rank_again()

    def order_exactly(self) -> None:
        """From now on exactly by length."""
        self._exact = True
        self._rank_again()

    def entries(self) -> list[OpenPrompt]:
        """All that wait; takes the time of all."""
        live = (ranked[-1] for ranked in self._longest if self._has(ranked[-1]))
        return list({entry.prompt.index: entry for entry in live}.values())

    def _has(self, entry: OpenPrompt) -> bool:
        return entry.waiting and entry.attempt == self._attempt

    def _rank_again(self) -> None:
        entries = self.entries()
        self._longest = [self._rank(entry, -1) for entry in entries]
        self._shortest = [self._rank(entry, 1) for entry in entries]
        heapq.heapify(self._longest)
        heapq.heapify(self._shortest)

    def _rank(self, entry: OpenPrompt, sign: int) -> _Ranked:
        length = entry.work if self._exact else math.frexp(entry.work)[1]
        self._num_ranked += 1
        return entry.band, sign * length, entry.prompt.index, self._num_ranked, entry


class Waiting:
    """All waiting prompts; `num_grouped` go in groups, and `work` is their estimated work."""

    def __init__(self) -> None:
        self.fresh = Queue(attempt=1)
        self.retried = Queue(attempt=2)
        self.suspects: dict[int, OpenPrompt] = {}
        self.num_grouped = 0
        self.work = 0.0

    def __len__(self) -> int:
        return self.num_grouped + len(self.suspects)

    def add(self, entry: OpenPrompt) -> None:
        """Let it wait, by its attempt."""
        entry.waiting = True
        if entry.attempt >= ALONE_FROM:
            self.suspects[entry.prompt.index] = entry
        else:
            self._queue(entry).add(entry)
            self.num_grouped += 1
            self.work += entry.work

    def remove(self, entry: OpenPrompt) -> None:
        """It waits no more, whoever's turn it is."""
        entry.waiting = False
        if self.suspects.pop(entry.prompt.index, None) is None:
            self._queue(entry).left()
            self.num_grouped -= 1
            self.work -= entry.work

    def take(self, queue: Queue, size: Size, *, shortest: bool = False) -> list[OpenPrompt]:
        """The next ones of a queue that is not empty."""
        least, most, work = size
        taken: list[OpenPrompt] = []
        total = 0.0
        while queue and len(taken) < most and (len(taken) < least or total < work):
            entry = queue.pop(shortest=shortest)
            taken.append(entry)
            total += entry.work
        self.num_grouped -= len(taken)
        self.work = self.work - total if self.num_grouped else 0.0
        return taken

    def suspect_for(self, worker: str | None) -> OpenPrompt | None:
        """A suspect for this worker, or for any; none that died alone on it already."""
        first = islice(self.suspects.values(), _LOOK_AHEAD)
        return next((entry for entry in first if entry.died_on != worker), None)

    def merge_bands(self) -> None:
        """The input has ended: all that waits is one band."""
        self.fresh.merge_bands()
        self.retried.merge_bands()

    def order_exactly(self) -> None:
        """From now on exactly by length."""
        self.fresh.order_exactly()
        self.retried.order_exactly()

    def check(self, waiting: Iterable[OpenPrompt]) -> None:
        """Assert that exactly these wait; a failure is a bug of this module or its user."""
        entries = list(waiting)
        fresh, retried = (
            {entry.prompt.index for entry in queue.entries()}
            for queue in (self.fresh, self.retried)
        )
        assert fresh == {e.prompt.index for e in entries if e.attempt == 1}
        assert retried == {e.prompt.index for e in entries if 1 < e.attempt < ALONE_FROM}
        assert set(self.suspects) == {e.prompt.index for e in entries if e.attempt >= ALONE_FROM}
        assert (len(fresh), len(retried)) == (len(self.fresh), len(self.retried))
        assert self.num_grouped == len(fresh) + len(retried)
        assert all(entry.waiting and not entry.shard_ids for entry in entries)
        work = sum(entry.work for entry in entries if entry.attempt < ALONE_FROM)
        assert math.isclose(self.work, work, rel_tol=1e-9, abs_tol=1e-3)

    def _queue(self, entry: OpenPrompt) -> Queue:
        return self.fresh if entry.attempt == 1 else self.retried
