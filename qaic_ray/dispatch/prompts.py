"""Which prompt is where: every open prompt waits, or runs in a shard on a worker. Decides nothing.

Each operation keeps the counts of the prompts, the shards and the workers true to one another;
`check` says what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from qaic_ray.dispatch.poison import PoisonDetector
from qaic_ray.dispatch.waiting import ALONE_FROM, OpenPrompt, Waiting
from qaic_ray.dispatch.workers import WorkerState
from qaic_ray.rows import ErrorClass, Prompt, Row

ENOUGH_ATTEMPTS = 4
"""A prompt that came to a bad end so often may be given up: the last two times it was alone."""
MAX_ATTEMPTS = 30
"""A prompt that came to a bad end so often is given up, whatever else dies. Where a card lives as
long as a row takes in the mean, chance alone does not bring an innocent one that far."""
MAX_SHARDS = 16
"""Most shards in flight on a worker. Two hold what it works on and what is queued in it; others
hold a long row each that they were left with."""
FIRST_ROW_S = 30.0
"""How long a row is thought to take while none has come."""
_NEW_SHARE = 0.02


@dataclass(slots=True, eq=False)
class Shard:
    """Prompts on a worker.

    Attributes:
        alone: whether nothing else runs on the worker.
        unfinished: index -> prompt that has no row yet.
        held: it failed, and is begun on the same worker again after a pause.
        asked: it was asked to give back what has not begun; `answered` when it did.
        ended: it gave its last row while it was being asked.
    """

    id: int
    worker: WorkerState
    attempt: int
    alone: bool
    started_s: float
    unfinished: dict[int, OpenPrompt]
    held: bool = False
    asked: bool = False
    answered: bool = False
    ended: bool = False

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """What has no row yet, in the order it was given."""
        return tuple(entry.prompt for entry in self.unfinished.values())


class PromptTable:
    """All open prompts and all shards.

    `num_asked` shards were asked to give back and have not answered; `second_per_work` is how long
    a row takes for its estimated work, from being given to a worker, in the mean of late ones.
    """

    def __init__(self) -> None:
        self.open: dict[int, OpenPrompt] = {}
        self.waiting = Waiting()
        self.shards: dict[int, Shard] = {}
        self.num_asked = 0
        self.second_per_work: float | None = None
        self._poison = PoisonDetector()
        self._num_shards = 0
        self._num_bands = 0
        self._num_read = 0
        self._num_done = 0

    def read(self, prompts: Sequence[Prompt], work_of: Callable[[Prompt], float]) -> None:
        """Let the next prompts of the input wait."""
        for prompt in prompts:
            entry = OpenPrompt(prompt, work_of(prompt), self._num_bands)
            self.open[prompt.index] = entry
            self.waiting.add(entry)
        self._num_read += len(prompts)
        self._num_bands += 1

    def begin(
        self, worker: WorkerState, entries: Sequence[OpenPrompt], now_s: float, *, alone: bool
    ) -> Shard:
        """Put prompts that do not wait into a new shard on a worker."""
        unfinished = {entry.prompt.index: entry for entry in entries}
        shard = Shard(self._num_shards, worker, entries[0].attempt, alone, now_s, unfinished)
        self._num_shards += 1
        self.shards[shard.id] = shard
        if not worker.shards:
            worker.begins(now_s)
        worker.shards.append(shard.id)
        worker.alone = alone
        for entry in entries:
            entry.shard_ids += (shard.id,)
            worker.work += entry.work
        worker.num_unfinished += len(entries)
        return shard

    def accept(self, rows: Iterable[Row]) -> list[Row]:
        """Close the prompts of these rows; return those that are the first of an open prompt."""
        kept = []
        for row in rows:
            entry = self.open.get(row.index)
            if entry is not None:
                self._close(entry)
                kept.append(row)
        return kept

    def measure_row(self, shard: Shard, rows: Sequence[Row], now_s: float) -> None:
        """Learn from a row that has just come how long rows take; before it is accepted."""
        entry = shard.unfinished.get(rows[-1].index) if rows else None
        if entry is None:
            return
        second_per_work = (now_s - shard.started_s) / entry.work
        if self.second_per_work is None:
            self.second_per_work = second_per_work
        else:
            self.second_per_work += _NEW_SHARE * (second_per_work - self.second_per_work)

    def row_s(self, entry: OpenPrompt) -> float:
        """How long this prompt should take on a worker, from being given to it."""
        if self.second_per_work is None:
            return FIRST_ROW_S
        return self.second_per_work * entry.work

    def end(self, shard: Shard) -> list[OpenPrompt]:
        """Take a shard off its worker; return its prompts that have no row and run nowhere else."""
        worker = shard.worker
        del self.shards[shard.id]
        worker.shards.remove(shard.id)
        worker.alone = worker.alone and not shard.alone
        self.num_asked -= shard.asked and not shard.answered
        left = [entry for entry in shard.unfinished.values() if entry.shard_ids == (shard.id,)]
        for entry in shard.unfinished.values():
            self._leave(entry, shard)
        if not worker.shards:
            worker.work = 0.0  # and what rounding left
        return left

    def hold(self, shard: Shard, now_s: float) -> bool:
        """End a shard; its prompts, if there are, stay on the worker for one to be begun later."""
        left = self.end(shard)
        if left:
            self.begin(shard.worker, left, now_s, alone=shard.alone).held = True
        return bool(left)

    def resume(self, worker: WorkerState) -> list[Shard]:
        """The shards that were held on a worker and have something to do, held no more."""
        held = [shard for id_ in worker.shards if (shard := self.shards[id_]).held]
        for shard in held:
            shard.held = False
            if not shard.unfinished:
                self.end(shard)
        return [shard for shard in held if shard.unfinished]

    def ask(self, shard: Shard) -> None:
        """It is being asked to give back what has not begun."""
        shard.asked = True
        self.num_asked += 1

    def give_back(self, shard: Shard, indexes: Iterable[int]) -> None:
        """It was asked: prompts that had not begun wait again, as if they had not been in it."""
        shard.answered = True
        self.num_asked -= 1
        for index in indexes:
            entry = shard.unfinished.pop(index, None)
            if entry is not None:
                self._leave(entry, shard)
                if not entry.shard_ids:
                    self.waiting.add(entry)

    def fail(self, shard: Shard, error: str) -> list[Row]:
        """End a shard that came to a bad end by itself; rows of what has had its last go."""
        return self._blame(shard, self.end(shard), error, is_guilty=True)

    def on_worker_lost(
        self, worker: WorkerState, error: str, now_s: float, *, num_begun: int, up_s: float
    ) -> list[Row]:
        """End every shard of a worker that is gone; rows of the prompts that are to blame.

        Of its prompts the first `num_begun` may be; the others wait again as if they had not been
        there, and so do those of shards that were held. For `up_s` see `Suspicion`.
        """
        death = self._poison.died()
        given_up: list[Row] = []
        for shard in [self.shards[shard_id] for shard_id in worker.shards]:
            begun = set() if shard.held else set(islice(shard.unfinished, num_begun))
            num_begun -= len(begun)
            left = self.end(shard)
            suspects = [entry for entry in left if entry.prompt.index in begun]
            for entry in left:
                if entry.prompt.index not in begun:
                    self.waiting.add(entry)
            for entry in suspects:
                entry.deaths += (death,)
                if shard.alone:
                    entry.alone_s += (now_s - shard.started_s,)
            is_guilty = shard.alone and all(
                self._poison.is_guilty(entry.deaths, entry.alone_s, up_s) for entry in suspects
            )
            given_up += self._blame(shard, suspects, f"{worker.name}: {error}", is_guilty=is_guilty)
        return given_up

    def _blame(
        self, shard: Shard, entries: Iterable[OpenPrompt], error: str, *, is_guilty: bool
    ) -> list[Row]:
        """Let prompts of a shard that came to a bad end try again, or give them up: their rows."""
        given_up = []
        for entry in entries:
            enough = ENOUGH_ATTEMPTS if is_guilty else MAX_ATTEMPTS
            if entry.attempt < enough:
                entry.attempt += 1
                if shard.alone:
                    entry.died_on = shard.worker.name
                self.waiting.add(entry)
                continue
            self._close(entry)
            self._poison.explain(entry.deaths)
            text = f"Given up after {entry.attempt} attempts; the last one: {error}"
            row = Row.failed(
                entry.prompt,
                text,
                worker=shard.worker.name,
                attempts=entry.attempt,
                error_class=ErrorClass.DEVICE,
            )
            given_up.append(row)
        return given_up

    def _leave(self, entry: OpenPrompt, shard: Shard) -> None:
        entry.shard_ids = tuple(id_ for id_ in entry.shard_ids if id_ != shard.id)
        shard.worker.num_unfinished -= 1
        shard.worker.work -= entry.work

    def _close(self, entry: OpenPrompt) -> None:
        index = entry.prompt.index
        if entry.waiting:
            self.waiting.remove(entry)
        for shard_id in entry.shard_ids:
            shard = self.shards[shard_id]
            del shard.unfinished[index]
            shard.worker.num_unfinished -= 1
            shard.worker.work -= entry.work
        del self.open[index]
        self._num_done += 1

    def check(self) -> None:
        """Assert what always holds between two events; a failure is a bug."""
        assert self._num_read == len(self.open) + self._num_done
        self.waiting.check(entry for entry in self.open.values() if not entry.shard_ids)
        running = [(i, s.id) for s in self.shards.values() for i in s.unfinished]
        assert sorted(running) == sorted(
            (i, shard_id) for i, entry in self.open.items() for shard_id in entry.shard_ids
        ), "a prompt and its shard do not know each other"
        for entry in self.open.values():
            assert entry.attempt <= MAX_ATTEMPTS
            assert len(entry.shard_ids) <= 2, "a prompt runs a third time"
            workers = {self.shards[shard_id].worker.name for shard_id in entry.shard_ids}
            assert len(workers) == len(entry.shard_ids), "a prompt runs twice on one worker"
        for shard in self.shards.values():
            self._check_shard(shard)
        asked = [s for s in self.shards.values() if s.asked and not s.answered]
        assert len(asked) == self.num_asked

    def _check_shard(self, shard: Shard) -> None:
        worker = shard.worker
        assert shard.id in worker.shards
        assert len(worker.shards) <= MAX_SHARDS
        assert worker.alone == shard.alone
        entries = [e for i in worker.shards for e in self.shards[i].unfinished.values()]
        assert worker.num_unfinished == len(entries)
        assert abs(worker.work - sum(entry.work for entry in entries)) < 1e-3
        assert all(entry.attempt == shard.attempt for entry in shard.unfinished.values())
        assert not shard.alone or len(worker.shards) == 1, "a prompt that is to be alone is not"
        assert shard.alone or shard.attempt < ALONE_FROM
        assert not shard.alone or len(shard.unfinished) <= 1
