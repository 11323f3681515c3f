"""A batch as one value, and how it changes. Pure: no clock, file or thread.

    validating -> in_progress -> finalizing -> completed
               -> failed      -> (expiring) -> expired
    validating, in_progress -> cancelling -> cancelled

While the output files of a batch are written, `ending` says what it will be; the interface has a
status of its own for that only where the batch completes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from qaic_ray.files.documents import shown
from qaic_ray.serve.api_errors import bad_request

WINDOW = "24h"
WINDOW_S = 24 * 3600
MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
PROOF_PREFIX = "qaic_ray."
"""Keys of a batch's metadata that are the server's begin so."""


class BatchStatus(str, Enum):
    """The interface's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset(
    {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)
_TIMED = (
    BatchStatus.IN_PROGRESS,
    BatchStatus.FINALIZING,
    BatchStatus.COMPLETED,
    BatchStatus.FAILED,
    BatchStatus.EXPIRED,
    BatchStatus.CANCELLING,
    BatchStatus.CANCELLED,
)


@dataclass(frozen=True)
class LineError:
    """What is wrong with a line of the input, counted from 1, or with all of it."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True)
class RequestCounts:
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True)
class BatchUsage:
    """Tokens of a batch."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def document(self) -> dict[str, Any]:
        """The interface's object."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the output files of a batch have, once they are written; `proof`: see `docs`."""

    counts: RequestCounts
    usage: BatchUsage
    output_file_id: str | None
    error_file_id: str | None
    proof: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """A batch; times are Unix times in seconds.

    Attributes:
        program: what its answers depend on beside its input; only the same goes on with it.
        input_sha256: of the input's bytes.
        output_kept_s: seconds after which its output files expire; None for never.
        ending: what the batch will be, while its output files are written.
        reserved: ids of the output and the error file, from that time on.
        outcome: once it is completed, expired or cancelled.
    """

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    model: str
    program: Mapping[str, Any]
    input_bytes: int
    input_sha256: str
    completion_window: str = WINDOW
    metadata: Mapping[str, str] | None = None
    output_kept_s: int | None = None
    status: BatchStatus = BatchStatus.VALIDATING
    times: Mapping[str, int] = field(default_factory=dict)
    errors: tuple[LineError, ...] = ()
    total: int = 0
    ending: BatchStatus | None = None
    reserved: tuple[str, ...] = ()
    outcome: Outcome | None = None

    @property
    def is_ended(self) -> bool:
        """Whether nothing is done about it any more."""
        return self.status in ENDED

    @property
    def is_running(self) -> bool:
        """Whether its requests are to be answered."""
        return self.status is BatchStatus.IN_PROGRESS and self.ending is None

    # -- how it changes

    def validated(self, total: int, now: int) -> BatchRecord:
        """Its input is well-formed and has so many requests; a batch that is cancelled stays so."""
        if self.status is not BatchStatus.VALIDATING:
            return replace(self, total=total)
        return replace(self._at(BatchStatus.IN_PROGRESS, now), total=total)

    def failed(self, errors: Sequence[LineError], now: int) -> BatchRecord:
        """Its input is not well-formed; a batch that is cancelled stays so."""
        if self.status is not BatchStatus.VALIDATING:
            return self
        return replace(self._at(BatchStatus.FAILED, now), errors=tuple(errors))

    def cancelled(self, now: int) -> BatchRecord:
        """Its client wants no more answers.

        Raises:
            ApiError: 400, it has ended otherwise, or is about to.
        """
        if self.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
            return self
        if self.status is BatchStatus.VALIDATING or self.is_running:
            return self._at(BatchStatus.CANCELLING, now)
        raise bad_request(
            f"The batch {self.id} is {(self.ending or self.status).value}, and can be cancelled no "
            "more.",
            code="batch_not_cancellable",
        )

    def ending_as(self, ending: BatchStatus, reserved: tuple[str, str], now: int) -> BatchRecord:
        """Its output files are written from now on, with these ids; if that began, nothing."""
        if self.is_ended or self.ending is not None:
            return self
        if self.status is BatchStatus.CANCELLING:
            ending = BatchStatus.CANCELLED
        elif not self.is_running:
            raise ValueError(f"{self.id} is {self.status.value} and cannot end as {ending.value}")
        after = self._at(BatchStatus.FINALIZING, now) if ending is BatchStatus.COMPLETED else self
        return replace(after, ending=ending, reserved=reserved)

    def ended(self, outcome: Outcome, now: int) -> BatchRecord:
        """Its output files are there."""
        if self.ending is None or self.is_ended:
            raise ValueError(f"{self.id} is {self.status.value} and is not about to end")
        return replace(self._at(self.ending, now), ending=None, outcome=outcome)

    def _at(self, status: BatchStatus, now: int) -> BatchRecord:
        return replace(self, status=status, times={**self.times, status.value: now})

    # -- how it is told

    def document(
        self,
        counts: RequestCounts | None = None,
        usage: BatchUsage | None = None,
        *,
        notes: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The batch as the interface's object.

        Args:
            counts: how far it is, while it goes.
            usage: so far.
            notes: what the server has to say, beside the proof, in the metadata.
        """
        outcome = self.outcome
        if outcome is not None:
            counts, usage = outcome.counts, outcome.usage
            notes = {**(notes or {}), **outcome.proof}
        counts = counts or RequestCounts(self.total)
        metadata = {**(self.metadata or {}), **(notes or {})}
        document: dict[str, Any] = {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status.value,
            "output_file_id": None if outcome is None else outcome.output_file_id,
            "error_file_id": None if outcome is None else outcome.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{status.value}_at": self.times.get(status.value) for status in _TIMED},
            "request_counts": vars(counts),
            "usage": None if usage is None else usage.document(),
            "metadata": metadata if metadata or self.metadata is not None else None,
        }
        if self.errors:
            document["errors"] = {"object": "list", "data": [vars(error) for error in self.errors]}
        return document


@dataclass(frozen=True)
class NewBatch:
    """What a client asks for."""

    endpoint: str
    input_file_id: str
    metadata: Mapping[str, str] | None = None
    output_kept_s: int | None = None


def checked_metadata(given: object) -> Mapping[str, str] | None:
    """The client's metadata.

    Raises:
        ApiError: 400.
    """
    if given is None:
        return None
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise bad_request("metadata is an object whose values are texts.", "metadata")
    if len(given) > MAX_PAIRS:
        said = f"metadata has {len(given)} keys: up to {MAX_PAIRS} are kept."
        raise bad_request(said, "metadata")
    for key, value in given.items():
        if not 1 <= len(key) <= MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
            raise bad_request(
                f"metadata has {shown(key)}: a key has 1 to {MAX_KEY_CHARS} characters, and its "
                f"value up to {MAX_VALUE_CHARS}.",
                "metadata",
            )
        if key.startswith(PROOF_PREFIX):
            raise bad_request(
                f"metadata has {shown(key)}: keys that begin with {PROOF_PREFIX} are the server's.",
                "metadata",
            )
    return dict(given)
