"""What is measured, and how two measurements add. Knows no clock: callers bring the times.

Definitions: `generated_tokens` are tokens kept in answers (EOS once, no padding, no repeated
prompt); `decode_tokens_per_s` of a card is tokens from decode steps over time in decode steps;
merged `tokens_per_s` is all generated tokens over (last end - first start) on one clock, never a
sum or mean of rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """Counts and times of some work; adds associatively, with `Measurement()` as zero.

    Times in seconds. `ttft_s` holds one value a row, so that medians of sums are true medians.
    """

    rows: int = 0
    failed_rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    ttft_s: tuple[float, ...] = ()

    def __add__(self, other: Measurement) -> Measurement:
        return Measurement(
            rows=self.rows + other.rows,
            failed_rows=self.failed_rows + other.failed_rows,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            prefill_steps=self.prefill_steps + other.prefill_steps,
            prefill_s=self.prefill_s + other.prefill_s,
            decode_steps=self.decode_steps + other.decode_steps,
            decode_tokens=self.decode_tokens + other.decode_tokens,
            decode_s=self.decode_s + other.decode_s,
            ttft_s=self.ttft_s + other.ttft_s,
        )

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens from decode steps over time in decode steps; 0 where nothing was decoded."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def ttft_median_s(self) -> float:
        """Median time to first token; 0 where no row was answered."""
        return quantile(self.ttft_s, 0.5)


@dataclass(frozen=True)
class Span:
    """An interval on one clock, in seconds; adding two gives the interval that covers both."""

    start_s: float
    end_s: float

    def __add__(self, other: Span) -> Span:
        return Span(min(self.start_s, other.start_s), max(self.end_s, other.end_s))

    @property
    def seconds(self) -> float:
        """Length of the interval."""
        return self.end_s - self.start_s


def tokens_per_s(generated_tokens: int, span: Span | None) -> float:
    """Merged rate: all generated tokens over the span that covers all the work."""
    if span is None or span.seconds <= 0:
        return 0.0
    return generated_tokens / span.seconds


def total(measurements: Iterable[Measurement]) -> Measurement:
    """The sum, zero for none."""
    return sum(measurements, start=Measurement())


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) by linear interpolation; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
