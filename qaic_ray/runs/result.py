"""What came of a run: each card's part, the whole, and why it ended early where it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from qaic_ray.metrics import Measurement, Span, tokens_per_s

if TYPE_CHECKING:
    from qaic_ray.worker.worker import WorkerInfo


@dataclass(frozen=True)
class WorkerResult:
    """One card's part in a run.

    `measurement` has the rows and tokens of the answers that were kept; its steps are the engine's
    own, zero for a worker that was lost. `info` is None for one that never got ready. `error` is
    its last; `losses` counts how often its process was lost or its cards did not open.
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
            Those of earlier sessions come before it, end to end.
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
        return sum((worker.measurement for worker in self.workers), start=self.unassigned)

    @property
    def tokens_per_s(self) -> float:
        """Merged rate: all generated tokens over the time in which any card worked."""
        return tokens_per_s(self.total.generated_tokens, self.span)

    @property
    def ok(self) -> bool:
        """Whether every row of the input was answered."""
        return self.broken_off is None and self.total.failed_rows == 0
