"""Folders of runs that took no time: rows, journal and events as cards would have left them."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qaic_ray.dispatch.dispatcher import ReplaceWorker, RunShard, WorkerLost
from qaic_ray.metrics import Durations, Measurement
from qaic_ray.rows import ErrorClass, FinishReason, Prompt, Row
from qaic_ray.runs.history import RunHistory
from qaic_ray.runs.journal import Journal
from qaic_ray.runs.result import FleetResult, WorkerResult
from qaic_ray.worker.worker import WorkerInfo

BEGAN_AT = 1_764_396_395.0
STEP_S = 0.02
OPEN_S = 8.0
ABOUT = {
    "qaic_ray": "0.9.0",
    "ray": "2.60.0",
    "python": "3.11.2",
    "sdk": "emulated SDK 1.20.2",
    "host": "node-7",
    "cpus": 64,
    "pid": 4242,
    "command": "qaic-ray launch jobs/llama.yaml --set run.generation_len=256",
    "model": "meta-llama/Llama-3.2-1B-Instruct",
    "qpc": "Llama-3.2-1B-Instruct-kv-128pl-4096cl-14c-16BS-mx6",
    "qpc_sha256": "5f" * 32,
    "model_sha256": "a7" * 32,
    "precision": "mx6",
    "num_cores": 14,
    "compile_s": 1312.5,
    "specializations": [
        {"batch_size": "1", "seq_len": "128", "ctx_len": "4096"},
        {"batch_size": "16", "seq_len": "1", "ctx_len": "4096"},
    ],
}


@dataclass
class FolderMaker:
    """Makes the folder of a run, session by session, from a seed.

    Args:
        folder: is made.
        cards, slots: of each session.
        losses: how many times a card is lost in a session.
        mean_tokens: of an answer.
        timed: whether rows have times of day, as those of earlier versions have not.
    """

    folder: Path
    cards: int = 4
    slots: int = 8
    losses: int = 2
    mean_tokens: int = 150
    timed: bool = True
    seed: int = 0
    next_index: int = 0
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "request.yaml").write_text(
            f"name: {self.folder.name}\nmodel: {ABOUT['model']}\nqpc: /qpc/{ABOUT['qpc']}\n"
        )
        self.names = [f"card {number}" for number in range(self.cards)]
        self._random = random.Random(self.seed)
        self._now = BEGAN_AT

    def session(self, num_rows: int, *, pause_s: float = 0.0, ends: bool = True) -> list[Row]:
        """Add a session that answers some rows; the rows. `ends`: it is not killed."""
        begin = self._now + pause_s
        lost_at = self._losses(begin, num_rows)
        rows = sorted(self._rows(begin + OPEN_S, num_rows, lost_at), key=lambda row: row.ended_at)
        span_s = rows[-1].ended_at - begin - OPEN_S if rows else 0.0
        with Journal(self.folder, {"run": "made"}) as journal:
            for number, row in enumerate(rows):
                at_s = (row.ended_at or 0.0) - begin - OPEN_S
                journal.append(row if self.timed else untimed(row), row.index + 1, at_s)
                if number % 1000 == 999:
                    journal.commit()
            journal.commit()
        self._events(begin, span_s, lost_at, ends=ends)
        self._now = begin + OPEN_S + span_s
        self.rows += rows
        return rows

    def _losses(self, begin: float, num_rows: int) -> list[tuple[float, str]]:
        about_s = num_rows * self.mean_tokens * STEP_S / (self.cards * self.slots)
        times = (begin + OPEN_S + about_s * self._random.uniform(0.1, 0.8) for _ in range(99))
        return sorted(
            (at, name) for at, name in zip(times, self.names * self.losses, strict=False)
        )[: self.losses]

    def _rows(self, begin: float, num_rows: int, lost_at: list[tuple[float, str]]) -> Iterator[Row]:
        """Each slot of each card takes the next row when it is free; a lost card rests."""
        free = [(begin, name, slot) for name in self.names for slot in range(self.slots)]
        heapq.heapify(free)
        made = 0
        while made < num_rows:
            at, name, slot = heapq.heappop(free)
            row = self._row(self.next_index, name, at)
            ended_at = row.ended_at or 0.0
            lost = next((t for t, who in lost_at if who == name and at <= t < ended_at), None)
            if lost is not None:
                heapq.heappush(free, (lost + OPEN_S, name, slot))
                continue
            self.next_index += 1
            made += 1
            heapq.heappush(free, (ended_at, name, slot))
            yield row

    def _row(self, index: int, name: str, at: float) -> Row:
        rng = self._random
        prompt = Prompt(index, f"What is {index} times {index % 89}? Explain it in short.")
        queue_s = rng.uniform(0.0, 1.5)
        if rng.random() < 0.004:
            limit = 4096
            return Row(
                index=index,
                prompt=prompt.text,
                text="",
                finish_reason=FinishReason.ERROR,
                worker=name,
                error=f"The prompt has {limit + index % 7} tokens, more than the context of "
                f"{limit} the QPC was compiled for: shorten it, or compile with a larger ctx_len.",
                error_class=ErrorClass.REFUSED,
                ended_at=at,
                started_at=at,
            )
        num_tokens = max(1, min(512, round(rng.lognormvariate(0, 0.6) * self.mean_tokens)))
        prompt_tokens = max(4, round(rng.lognormvariate(4.5, 0.7)))
        ttft_s = 0.05 + prompt_tokens * 0.0006 + rng.expovariate(8)
        decode_s = (num_tokens - 1) * STEP_S * rng.uniform(0.95, 1.3)
        return Row(
            index=index,
            id=f"q-{index}",
            prompt=prompt.text,
            text="It is so, for reasons. " * (num_tokens // 6 + 1),
            finish_reason=FinishReason.LENGTH if num_tokens == 512 else FinishReason.STOP,
            token_ids=tuple(rng.choices(range(32_000), k=num_tokens)),
            prompt_tokens=prompt_tokens,
            ttft_s=ttft_s,
            decode_s=decode_s,
            queue_s=queue_s,
            started_at=at - queue_s,
            ended_at=at + ttft_s + decode_s,
            worker=name,
            attempts=1 if rng.random() < 0.98 else 2,
        )

    def _events(
        self, begin: float, span_s: float, lost_at: list[tuple[float, str]], *, ends: bool
    ) -> None:
        clock = Clock(begin)
        with RunHistory(self.folder, lambda text: None, clock=clock) as history:
            build = {"name": ABOUT["qpc"], "seconds": 1312.5, "reused": False}
            history.write("session_started", **ABOUT, compiles=[build])
            for number, name in enumerate(self.names):
                clock.now = begin + OPEN_S - 0.1 * number
                history.worker_ready(made_info(name, self.slots))
            later: list[tuple[float, int, Any]] = []
            for at, name in lost_at:
                back = WorkerInfo(name, (0,), ABOUT["sdk"], self.slots, 128, 4096, 5.5)  # type: ignore[arg-type]
                retried = RunShard(name, 1, (Prompt(0, "p"),) * self.slots, 2)
                some = [WorkerLost(name, "ActorDiedError: its process died"), retried]
                some.append(ReplaceWorker(name, 1))
                later += [(at + 0.2 * number, len(later), what) for number, what in enumerate(some)]
                later.append((at + OPEN_S, len(later), back))
            later += [
                (begin + OPEN_S + at, -1, {f"B{n:04}": 40.0 + n for n in range(self.cards)})
                for at in range(0, round(span_s), 15)
            ]
            for clock.now, _, what in sorted(later, key=lambda item: item[:2]):
                if isinstance(what, WorkerInfo):
                    history.worker_ready(what)
                elif isinstance(what, dict):
                    history.write("power", watts=what)
                else:
                    history.happened(what)
            clock.now = begin + OPEN_S + span_s
            if ends:
                history.ended(self._result())
            else:
                history._has_ended = True  # as if it had been killed: it writes no last line

    def _result(self) -> FleetResult:
        gaps = Durations()
        for number in range(50):
            gaps.count(STEP_S * (1 + number / 100), 40)
        work = Measurement(
            decode_steps=1000, decode_slots=8000, decode_rows=7000, decode_tokens=7000,
            decode_s=20.0, inter_token=gaps,
        )  # fmt: skip
        workers = tuple(
            WorkerResult(name, made_info(name, self.slots), work, ready_at_end=True)
            for name in self.names
        )
        return FleetResult(workers, Measurement(), None, dict(Counter[int]()))


@dataclass
class Clock:
    """A clock that is set."""

    now: float

    def __call__(self) -> float:
        return self.now


def made_info(name: str, slots: int) -> WorkerInfo:
    number = int(name.split()[-1])
    return WorkerInfo(name, (number,), "emulated SDK 1.20.2", slots, 128, 4096, 5.5)


def untimed(row: Row) -> Row:
    """As an earlier version wrote it."""
    from dataclasses import replace

    return replace(row, queue_s=None, started_at=None, ended_at=None)
