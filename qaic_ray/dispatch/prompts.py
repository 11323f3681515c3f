"""Every open prompt of a run: it waits, or it runs in a shard on a worker.

A prompt that is done is forgotten. Each operation keeps the counts of prompts, shards and workers
consistent; `tests/invariants.py` says what that means.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from qaic_ray.dispatch.policy import LoneRuns, Policy, text_work
from qaic_ray.dispatch.workers import WorkerState
from qaic_ray.rows import ErrorClass, Prompt, Row


@dataclass(slots=True, eq=False)
class OpenPrompt:
    """A prompt that was read and is not done.

    Attributes:
        work: estimated, in any unit.
        band: the number of the read that brought it.
        attempt: one more than the times it was unfinished when its shard came to a bad end.
        num_deaths_alone: workers that died while it was alone on them.
        died_on: the worker on which it came to a bad end last while it was alone.
        shard_ids: the shards it runs in: none while it waits, two in a second run.
    """

    prompt: Prompt
    work: float
    band: int
    attempt: int = 1
    num_deaths_alone: int = 0
    died_on: str = ""
    shard_ids: tuple[int, ...] = ()

    @property
    def num_slots(self) -> int:
        """Slots that it takes, one for each of its samples."""
        return 1 if self.prompt.sampling is None else self.prompt.sampling.n

    def count_at(self, worker: WorkerState, sign: int) -> None:
        """Count it as one of a worker's, or no more."""
        num_slots = sign * self.num_slots
        worker.work += sign * self.work
        worker.taken += num_slots
        if self.prompt.background:
            worker.lent += num_slots


@dataclass(slots=True, eq=False)
class Shard:
    """Prompts on a worker.

    Attributes:
        attempt: of each of its prompts.
        alone: whether nothing else may run on the worker.
        unfinished: index -> prompt that has no row yet, in the order they were given.
        held: it failed, and is begun on the same worker again after a pause.
    """

    id: int
    worker: WorkerState
    attempt: int
    alone: bool
    started_s: float
    unfinished: dict[int, OpenPrompt]
    held: bool = False


class WaitingList:
    """Waiting prompts in one sorted list, of which the next one is the last.

    An older band goes first, in it a longer prompt, and of the same length the earlier one. Lengths
    count by powers of two, so that prompts of about the same length go in input order and their
    rows can be written early.
    """

    def __init__(self) -> None:
        self._has_bands = True
        self._is_exact = False
        self.entries: list[OpenPrompt] = []

    def add(self, entry: OpenPrompt) -> None:
        """Let one prompt wait."""
        insort(self.entries, entry, key=self._rank)

    def add_band(self, entries: Sequence[OpenPrompt]) -> None:
        """Let the prompts of the newest band wait."""
        self.entries[:0] = sorted(entries, key=self._rank)

    def remove(self, entry: OpenPrompt) -> None:
        """Take out a prompt that waits here."""
        del self.entries[bisect_left(self.entries, self._rank(entry), key=self._rank)]

    def pop(self, *, shortest: bool = False) -> OpenPrompt:
        """Take the next prompt, or the shortest one of the oldest band; there must be one."""
        if not shortest:
            return self.entries.pop()
        first = (self._rank(self.entries[-1])[0], -math.inf, 0)
        return self.entries.pop(bisect_left(self.entries, first, key=self._rank))

    def merge_bands(self, *, exactly: bool) -> None:
        """Make one band of all bands, sorted by length, exactly or not."""
        self._has_bands, self._is_exact = False, exactly
        self.entries.sort(key=self._rank)

    def _rank(self, entry: OpenPrompt) -> tuple[int, float, int]:
        band = entry.band if self._has_bands else 0
        length = entry.work if self._is_exact else math.frexp(entry.work)[1]
        return -band, length, -entry.prompt.index


class WaitingPrompts:
    """All waiting prompts of the foreground, or of the background.

    Attributes:
        fresh: those that were never on a worker that died. Those that were are `retried`, and go in
            small groups; or `suspects` if they were more than once, and go alone.
        num_grouped: how many are fresh or retried, and `work` their estimated work.
    """

    def __init__(self, policy: Policy) -> None:
        self.fresh = WaitingList()
        self.retried = WaitingList()
        self.suspects: dict[int, OpenPrompt] = {}
        self.num_grouped = 0
        self.work = 0.0
        self._policy = policy

    @property
    def next(self) -> OpenPrompt | None:
        """The one that goes next, as long as it need not be alone."""
        for waiting in (self.retried, self.fresh):
            if waiting.entries:
                return waiting.entries[-1]
        return None

    def add_band(self, entries: Sequence[OpenPrompt]) -> None:
        """Let fresh prompts of the newest band wait."""
        self.fresh.add_band(entries)
        self.num_grouped += len(entries)
        self.work += sum(entry.work for entry in entries)

    def add(self, entry: OpenPrompt) -> None:
        """Let a prompt wait again."""
        if entry.attempt >= self._policy.alone_from:
            self.suspects[entry.prompt.index] = entry
            return
        self._list_of(entry).add(entry)
        self.num_grouped += 1
        self.work += entry.work

    def remove(self, entry: OpenPrompt) -> None:
        """Take out a prompt that waits here."""
        if self.suspects.pop(entry.prompt.index, None) is None:
            self._list_of(entry).remove(entry)
            self._waits_no_more(1, entry.work)

    def sort(self, *, exactly: bool) -> None:
        """Let the longest prompts go first, exactly or by powers of two."""
        self.fresh.merge_bands(exactly=exactly)
        self.retried.merge_bands(exactly=exactly)

    def take(
        self, waiting: WaitingList, size: tuple[int, int, float], *, shortest: bool = False
    ) -> list[OpenPrompt]:
        """Take the next prompts of a list that is not empty, for a shard.

        Args:
            waiting: `fresh` or `retried`.
            size: least and most prompts, and the estimated work after which it is enough.
            shortest: take from the short end.
        """
        least, most, enough = size
        taken: list[OpenPrompt] = []
        work = 0.0
        while waiting.entries and len(taken) < most and (len(taken) < least or work < enough):
            entry = waiting.pop(shortest=shortest)
            taken.append(entry)
            work += entry.work
        self._waits_no_more(len(taken), work)
        return taken

    def suspect_for(self, worker: WorkerState, *, has_others: bool) -> OpenPrompt | None:
        """A suspect for this worker: none that died alone on it, where there are others."""
        first = islice(self.suspects.values(), self._policy.look_ahead)
        return next((s for s in first if not (has_others and s.died_on == worker.name)), None)

    def _waits_no_more(self, num_grouped: int, work: float) -> None:
        self.num_grouped -= num_grouped
        # Where none waits, rounding leaves nothing.
        self.work = self.work - work if self.num_grouped else 0.0

    def _list_of(self, entry: OpenPrompt) -> WaitingList:
        return self.fresh if entry.attempt == 1 else self.retried


class PromptTable:
    """All open prompts and all shards.

    Attributes:
        open: index -> prompt.
        exhausted: whether the input has ended.
        is_open: whether prompts come at any time.
        is_dry: whether it is open and has no more now.
        foreground: prompts that wait, and that somebody waits for.
        background: the other ones that wait.
        shards: in flight, by id.
    """

    def __init__(self, policy: Policy, work_of: Callable[[Prompt], float] | None = None) -> None:
        self.open: dict[int, OpenPrompt] = {}
        self.exhausted = False
        self.is_open = self.is_dry = False
        self.foreground = WaitingPrompts(policy)
        self.background = WaitingPrompts(policy)
        self.shards: dict[int, Shard] = {}
        self._policy = policy
        self._lone_runs = LoneRuns(policy)
        self._work_of = work_of or partial(text_work, policy=policy)
        self._second_per_work: float | None = None
        self._num_shards = 0
        self._num_bands = 0
        self._num_read = 0
        self._num_done = 0

    def read(self, prompts: Sequence[Prompt], *, exhausted: bool, is_dry: bool = False) -> None:
        """Let the next prompts of the input wait."""
        work_of, number = self._work_of, self._num_bands
        band = [OpenPrompt(prompt, work_of(prompt), number) for prompt in prompts]
        self._num_bands += 1
        self._num_read += len(band)
        self.open.update((entry.prompt.index, entry) for entry in band)
        self.foreground.add_band([entry for entry in band if not entry.prompt.background])
        if any(prompt.background for prompt in prompts):
            self.background.add_band([entry for entry in band if entry.prompt.background])
        self.exhausted, self.is_dry = exhausted, is_dry and not exhausted
        if exhausted:
            self.sort_waiting(exactly=False)

    # -- waiting prompts

    def sort_waiting(self, *, exactly: bool) -> None:
        """The input has ended: let the longest prompts go first, exactly or by powers of two."""
        self.foreground.sort(exactly=exactly)
        self.background.sort(exactly=exactly)

    def _waiting_with(self, entry: OpenPrompt) -> WaitingPrompts:
        return self.background if entry.prompt.background else self.foreground

    # -- shards

    def begin(
        self, worker: WorkerState, entries: Sequence[OpenPrompt], now_s: float, *, alone: bool
    ) -> Shard:
        """Put prompts that do not wait into a new shard on a worker."""
        unfinished = {entry.prompt.index: entry for entry in entries}
        shard = Shard(self._num_shards, worker, entries[0].attempt, alone, now_s, unfinished)
        self._num_shards += 1
        self.shards[shard.id] = shard
        if not worker.shards:
            worker.on_first_work(now_s)
        worker.shards.append(shard.id)
        worker.alone = alone
        for entry in entries:
            entry.shard_ids += (shard.id,)
            entry.count_at(worker, 1)
            if alone:
                self._waiting_with(entry).suspects.pop(entry.prompt.index, None)
            if worker.held is not None:
                worker.held.begin(entry.prompt)
        worker.num_unfinished += len(entries)
        return shard

    def accept(self, rows: Sequence[Row], now_s: float, shard: Shard | None = None) -> list[Row]:
        """Close the prompts of these rows; return those that are the first of an open prompt.

        Args:
            shard: theirs, if it is in flight: the last one tells how long rows take.
        """
        entry = shard.unfinished.get(rows[-1].index) if shard and rows else None
        if shard and entry:
            newest = (now_s - shard.started_s) / entry.work
            before = newest if self._second_per_work is None else self._second_per_work
            self._second_per_work = before + self._policy.new_row * (newest - before)
        kept = []
        for row in rows:
            if (answered := self.open.get(row.index)) is not None:
                if shard and shard.alone and row.ok:
                    self._lone_runs.note_answered(answered.num_deaths_alone)
                self._close(answered, row)
                kept.append(row)
        return kept

    def row_s(self, entry: OpenPrompt) -> float:
        """How long this prompt should take on a worker, from being given to it."""
        if self._second_per_work is None:
            return self._policy.first_row_s
        return self._second_per_work * entry.work

    def hold(self, shard: Shard, now_s: float) -> bool:
        """End a shard that failed, and keep its prompts, if there are any, on its worker."""
        left = self._end(shard)
        if left:
            self.begin(shard.worker, left, now_s, alone=shard.alone).held = True
        return bool(left)

    def resume(self, worker: WorkerState) -> list[Shard]:
        """Hold the shards of a worker no more; return those that have something to do."""
        held = [shard for id_ in worker.shards if (shard := self.shards[id_]).held]
        for shard in held:
            shard.held = False
            if not shard.unfinished:
                self._end(shard)
        return [shard for shard in held if shard.unfinished]

    def fail(self, shard: Shard, error: str) -> list[Row]:
        """End a shard that came to a bad end by itself; rows of the prompts that are given up."""
        limit = self._policy.alone_from - 1 + self._policy.max_failures_alone
        given_up: list[Row] = []
        for entry in self._end(shard):
            given_up += self._blame(shard, entry, error, is_guilty=entry.attempt >= limit)
        return given_up

    def on_worker_lost(self, worker: WorkerState, error: str, *, num_begun: int) -> list[Row]:
        """End every shard of a worker that is gone; rows of the prompts that are given up.

        Of its prompts the first `num_begun` may be to blame. The others wait again as if they had
        not been there, and so do those of shards that were held.
        """
        given_up: list[Row] = []
        text = f"{worker.name}: {error}"
        for shard in [self.shards[shard_id] for shard_id in worker.shards]:
            begun = set() if shard.held else set(islice(shard.unfinished, num_begun))
            num_begun -= len(begun)
            for entry in self._end(shard):
                if entry.prompt.index not in begun:
                    self._waiting_with(entry).add(entry)
                    continue
                entry.num_deaths_alone += shard.alone
                is_guilty = self._lone_runs.is_poison(entry.num_deaths_alone)
                given_up += self._blame(shard, entry, text, is_guilty=is_guilty)
        return given_up

    def _blame(self, shard: Shard, entry: OpenPrompt, error: str, *, is_guilty: bool) -> list[Row]:
        """Let a prompt that came to a bad end wait for another attempt, or give it up: its row."""
        name = shard.worker.name
        if not is_guilty and entry.attempt < self._policy.max_attempts:
            entry.attempt += 1
            if shard.alone:
                entry.died_on = name
            self._waiting_with(entry).add(entry)
            return []
        del self.open[entry.prompt.index]
        self._num_done += 1
        text = f"Given up after {entry.attempt} attempts; the last one: {error}"
        row = Row.failed(
            entry.prompt, text, worker=name, attempts=entry.attempt, error_class=ErrorClass.DEVICE
        )
        return [row]

    def _end(self, shard: Shard) -> list[OpenPrompt]:
        """Take a shard off its worker; return its prompts that have no row and run nowhere else."""
        worker = shard.worker
        del self.shards[shard.id]
        worker.shards.remove(shard.id)
        worker.alone = worker.alone and not shard.alone
        for entry in shard.unfinished.values():
            entry.shard_ids = tuple(id_ for id_ in entry.shard_ids if id_ != shard.id)
            entry.count_at(worker, -1)
            if worker.held is not None:
                worker.held.end(entry.prompt)
        worker.num_unfinished -= len(shard.unfinished)
        if not worker.shards:
            worker.work = 0.0  # and what rounding left
        return [entry for entry in shard.unfinished.values() if not entry.shard_ids]

    def _close(self, entry: OpenPrompt, row: Row) -> None:
        index = entry.prompt.index
        if not entry.shard_ids:
            self._waiting_with(entry).remove(entry)
        for shard_id in entry.shard_ids:
            shard = self.shards[shard_id]
            worker = shard.worker
            del shard.unfinished[index]
            worker.num_unfinished -= 1
            entry.count_at(worker, -1)
            if worker.held is not None:
                worker.held.end(entry.prompt, row)
        del self.open[index]
        self._num_done += 1
