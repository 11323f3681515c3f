"""Counts and times of work, and how two measurements add; callers bring the times.

Definitions: `generated_tokens` are tokens kept in answers (EOS once, no padding, no repeated
prompt); `decode_tokens_per_s` of a card is tokens from decode steps over time in decode steps;
merged `tokens_per_s` is all generated tokens over (last end - first start) on one clock, never a
sum or mean of rates.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from qaic_ray.rows import Row

GROWTH = 1.002
"""Ratio of a bin's ends: durations are kept to a tenth of a percent."""
SHORTEST_S = 1e-9

_LOG_GROWTH = math.log(GROWTH)


def bin_of(seconds: float) -> int:
    """The number of a duration's bin; zero counts as a nanosecond."""
    return math.floor(math.log(max(seconds, SHORTEST_S)) / _LOG_GROWTH)


@dataclass(frozen=True)
class Durations:
    """Counts of durations by bin, so that a million take no more memory than a thousand.

    Adds associatively, with `Durations()` as zero.
    """

    counts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Durations:
        """Of a number of durations."""
        return cls(dict(Counter(map(bin_of, seconds))))

    def count(self, seconds: float, times: int = 1) -> None:
        """Add one duration to these, in place, as often as it came."""
        number = bin_of(seconds)
        self.counts[number] = self.counts.get(number, 0) + times

    def __add__(self, other: Durations) -> Durations:
        return Durations(dict(Counter(self.counts) + Counter(other.counts)))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def items(self) -> Iterator[tuple[float, int]]:
        """Seconds and the number of durations of that length, the shortest first."""
        for number in sorted(self.counts):
            yield GROWTH ** (number + 0.5), self.counts[number]

    def quantile(self, q: float) -> float:
        """The duration of rank q (0 to 1), in seconds; 0 where there is none."""
        rank = q * (len(self) - 1)
        seen = 0
        for seconds, count in self.items():
            seen += count
            if rank < seen:
                return seconds
        return 0.0


@dataclass
class Measurement:
    """Counts and times of some work; adds associatively, with `Measurement()` as zero.

    Only the engine that does the work changes its own; others get copies. Times are seconds.
    `ttft` has one duration a row, so that medians of sums are true medians. `reused_tokens` are
    prompt tokens that a slot held already. `decode_slots` is the number of rows that decode steps
    had room for. `accepted_tokens` are those of `drafted_tokens` that were right. `inter_token` has
    the time from each step that gave a running row tokens to the next one that did; with drafts one
    step gives several. `cut_rows` have an answer that ended at its most tokens or a full context.
    `loop_tokens` and `loop_s` are of answered rows, as the published recipe's runModel.py counts
    one: its decode steps but one, and the seconds of all of them.
    """

    rows: int = 0
    failed_rows: int = 0
    cut_rows: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_steps: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_slots: int = 0
    decode_rows: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    loop_tokens: int = 0
    loop_s: float = 0.0
    ttft: Durations = field(default_factory=Durations)
    inter_token: Durations = field(default_factory=Durations)

    def __add__(self, other: Measurement) -> Measurement:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Measurement(**sums)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens from decode steps over time in decode steps; 0 where nothing was decoded."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def occupancy(self) -> float:
        """Share of the decode steps' slots that held a row; 0 where nothing was decoded."""
        return self.decode_rows / self.decode_slots if self.decode_slots else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were right; 0 where nothing was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def tokens_per_row_step(self) -> float:
        """Tokens that a row gets from a decode step: 1 without drafts; 0 without decode steps."""
        return self.decode_tokens / self.decode_rows if self.decode_rows else 0.0

    @property
    def ttft_median_s(self) -> float:
        """Median time to first token; 0 where no row was answered."""
        return self.ttft.quantile(0.5)


@dataclass(frozen=True)
class EngineState:
    """How an engine stands at a moment.

    The token counts are since it was made, and `generated_tokens` has those of running rows too.
    `kv_usage` is the share of all slots' cache positions that running rows use. `engine` counts
    the engines that the worker had before.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    engine: int = 0


NO_ENGINE = EngineState()


class EngineTotals:
    """Tokens of several workers' engines: counts that only rise, whatever is opened anew.

    Attributes:
        prompt_tokens: of rows that have ended; slots held `reused_tokens` of them already.
        generated_tokens: those of running rows too.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.reused_tokens = self.generated_tokens = 0
        self._seen: dict[str, EngineState] = {}

    def looked(self, worker: str, state: EngineState) -> None:
        """Learn how a worker's engine stands; counts that fell wait until they rise again."""
        before = self._seen.get(worker, NO_ENGINE)
        if before.engine != state.engine:
            before = NO_ENGINE
        most = replace(
            state,
            prompt_tokens=max(state.prompt_tokens, before.prompt_tokens),
            reused_tokens=max(state.reused_tokens, before.reused_tokens),
            generated_tokens=max(state.generated_tokens, before.generated_tokens),
        )
        self.prompt_tokens += most.prompt_tokens - before.prompt_tokens
        self.reused_tokens += most.reused_tokens - before.reused_tokens
        self.generated_tokens += most.generated_tokens - before.generated_tokens
        self._seen[worker] = most


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
        self._meters: defaultdict[str, Measurement] = defaultdict(Measurement)

    def add(self, row: Row) -> None:
        """Count one final row."""
        counts = self._meters[row.worker]
        answer_lens = row.answer_lens
        num_tokens = sum(answer_lens)
        self.rows += 1
        self.generated_tokens += num_tokens
        counts.rows += 1
        counts.prompt_tokens += row.prompt_tokens
        counts.generated_tokens += num_tokens
        if row.ok:
            counts.cut_rows += row.is_cut
            counts.ttft.count(row.ttft_s)
            self.length_counts.update(answer_lens)
            if num_tokens > 1 and not row.choices:
                counts.loop_tokens += num_tokens - 2
                counts.loop_s += row.decode_s
        else:
            self.failed_rows += 1
            counts.failed_rows += 1

    def earlier_workers(self, names: Sequence[str]) -> list[str]:
        """Workers that rows were counted for and that are not among these."""
        return sorted(self._meters.keys() - {"", *names})

    def measurement(self, worker: str, engine: Measurement | None = None) -> Measurement:
        """The rows counted for `worker` ("" for none), with the steps that its engine reports."""
        counts = self._meters.get(worker, Measurement())
        return replace(
            engine or Measurement(),
            rows=counts.rows,
            failed_rows=counts.failed_rows,
            cut_rows=counts.cut_rows,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            loop_tokens=counts.loop_tokens,
            loop_s=counts.loop_s,
            ttft=counts.ttft + Durations(),
        )
