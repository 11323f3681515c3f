"""The result of a run over many cards, and the counts that it is made from while rows arrive."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING

from qaic_ray.metrics import Durations, Measurement, Span, bin_of, tokens_per_s, total
from qaic_ray.rows import Row

if TYPE_CHECKING:
    from qaic_ray.dispatch.policy import Policy
    from qaic_ray.timeouts import Timeouts
    from qaic_ray.worker.spec import WorkerInfo


@dataclass(frozen=True)
class WorkerResult:
    """One card's part in a run.

    `measurement` has the rows and tokens of the answers that were kept, so that the workers' sum is
    what the outputs hold; its steps are the engine's own, zero for a worker that was lost.
    `info` is None for one that never got ready. `error` is the last error of the worker; `losses`
    counts how often its process was lost or its cards did not open.
    """

    name: str
    info: WorkerInfo | None
    measurement: Measurement
    error: str | None = None
    losses: int = 0
    ready_at_end: bool = False


class Cause(str, Enum):
    """Why a run ended early, which decides how it can be resumed."""

    CARDS = "cards"
    """Every card was lost; prompts that were left have no answer."""
    INPUT = "input"
    """The input could not be read to its end; all that was read of it is answered."""
    CHANGED = "changed"
    """What answers depend on was not the same at the end: they may be of either."""


@dataclass(frozen=True)
class BrokenOff:
    """Why a run is not complete: its cause, and a sentence."""

    cause: Cause
    error: str


@dataclass(frozen=True)
class FleetResult:
    """The result of a run.

    Attributes:
        workers: in the order they were asked for.
        unassigned: rows without a worker: malformed input, or no card was left.
        span: first shard handed out to last row in, on the driver's clock; None when no card ran.
            In a run that was resumed the spans of the earlier sessions come before it, end to end:
            the time in between, in which nothing ran, is left out.
        length_counts: generated tokens of an answer -> how many answers had that many.
        broken_off: set when not every row of the input has an answer or an error of its own.
        rows_in: rows of the input that were read.
        inputs_sha256: over their digests, in order.
        settings: values of the run's `Timeouts` and policy that are not the default.
    """

    workers: tuple[WorkerResult, ...]
    unassigned: Measurement
    span: Span | None
    length_counts: Mapping[int, int]
    broken_off: BrokenOff | None = None
    rows_in: int = 0
    inputs_sha256: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)

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


def changed_values(settings: Policy | Timeouts) -> dict[str, object]:
    """The fields of a run's policy or time-outs that are not the default."""
    values = (
        (field.name, getattr(settings, field.name), field.default) for field in fields(settings)
    )
    return {name: value for name, value, default in values if value != default}


@dataclass
class _Counts:
    """The rows of one worker, so far."""

    rows: int = 0
    failed_rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    ttft: Counter[int] = field(default_factory=Counter)


class Tally:
    """Adds rows up by worker, in constant time a row.

    Attributes:
        rows: of all workers, and `failed_rows` and `generated_tokens` of them.
        length_counts: generated tokens of an answer -> how many answers had that many.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.failed_rows = 0
        self.generated_tokens = 0
        self.length_counts: Counter[int] = Counter()
        self._counts: defaultdict[str, _Counts] = defaultdict(_Counts)

    def add(self, row: Row) -> None:
        """Count one final row."""
        counts = self._counts[row.worker]
        answer_lens = row.answer_lens
        num_tokens = sum(answer_lens)
        self.rows += 1
        self.generated_tokens += num_tokens
        counts.rows += 1
        counts.prompt_tokens += row.prompt_tokens
        counts.generated_tokens += num_tokens
        if row.ok:
            counts.ttft[bin_of(row.ttft_s)] += 1
            self.length_counts.update(answer_lens)
        else:
            self.failed_rows += 1
            counts.failed_rows += 1

    def earlier_workers(self, names: Sequence[str]) -> list[str]:
        """Workers that rows were counted for and that are not among these."""
        return sorted(self._counts.keys() - {"", *names})

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
