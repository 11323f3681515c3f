"""What a run over many cards came to, and how it is added up while rows arrive. Knows no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from qaic_ray.metrics import Durations, Measurement, Span, bin_of, tokens_per_s, total
from qaic_ray.rows import Row

if TYPE_CHECKING:
    from qaic_ray.worker.spec import WorkerInfo


@dataclass(frozen=True)
class WorkerResult:
    """One card's part in a run.

    `measurement` has the rows and tokens of the answers that were kept, so that the workers' sum is
    what the outputs hold; its steps are the engine's own, zero for a worker that was lost.
    `info` is None for one that never got ready, `error` says why one was lost.
    """

    name: str
    info: WorkerInfo | None
    measurement: Measurement
    error: str | None = None


class Cause(str, Enum):
    """What a run broke off for, which says how to go on with it."""

    CARDS = "cards"
    """Every card was lost; prompts that were left have no answer."""
    INPUT = "input"
    """The input could not be read to its end; all that was read of it is answered."""
    CHANGED = "changed"
    """What answers depend on was not the same at the end: they may be of either."""


@dataclass(frozen=True)
class BrokenOff:
    """Why a run is not what it was meant to be: its cause, and a sentence."""

    cause: Cause
    error: str


@dataclass(frozen=True)
class FleetResult:
    """What a run came to.

    Attributes:
        workers: in the order they were asked for.
        unassigned: rows that no worker was to blame for: malformed input, no card left.
        span: first shard handed out to last row in, on the driver's clock; None when no card ran.
            In a run that was resumed the spans of the earlier sessions come before it, end to end:
            the time in between, in which nothing ran, is left out.
        length_counts: generated tokens of an answer -> how many answers had that many.
        broken_off: set when not every row of the input has an answer or an error of its own.
        rows_in: rows of the input that were read.
        inputs_sha256: over their digests, in order.
    """

    workers: tuple[WorkerResult, ...]
    unassigned: Measurement
    span: Span | None
    length_counts: Mapping[int, int]
    broken_off: BrokenOff | None = None
    rows_in: int = 0
    inputs_sha256: str = ""

    @property
    def total(self) -> Measurement:
        """All rows of the input."""
        return total([*(worker.measurement for worker in self.workers), self.unassigned])

    @property
    def tokens_per_s(self) -> float:
        """Merged rate: all generated tokens over the time in which any card worked."""
        return tokens_per_s(self.total.generated_tokens, self.span)

    @property
    def ok(self) -> bool:
        """Whether every row of the input was answered."""
        return self.broken_off is None and self.total.failed_rows == 0


@dataclass
class _Counts:
    """The rows of one worker, so far."""

    rows: int = 0
    failed_rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    ttft: Counter[int] = field(default_factory=Counter)


class Tally:
    """Adds rows up by worker, in constant time a row."""

    def __init__(self) -> None:
        self.length_counts: Counter[int] = Counter()
        self._counts: dict[str, _Counts] = {}

    @property
    def workers(self) -> set[str]:
        """Everyone that rows were counted for, "" for none included."""
        return set(self._counts)

    def add(self, row: Row) -> None:
        """Count one final row."""
        counts = self._counts.setdefault(row.worker, _Counts())
        counts.rows += 1
        counts.prompt_tokens += row.prompt_tokens
        counts.generated_tokens += row.generated_tokens
        if row.ok:
            counts.ttft[bin_of(row.ttft_s)] += 1
            self.length_counts.update(row.answer_lens)
        else:
            counts.failed_rows += 1

    def measurement(self, worker: str, engine: Measurement | None = None) -> Measurement:
        """The rows counted for `worker` ("" for none), with the steps that its engine reports."""
        counts = self._counts.get(worker, _Counts())
        return replace(
            engine or Measurement(),
            rows=counts.rows,
            failed_rows=counts.failed_rows,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            ttft=Durations(dict(counts.ttft)),
        )
