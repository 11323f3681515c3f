"""What the report says of a run's rows, added up row by row in bounded memory. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qaic_ray.metrics import Durations
from qaic_ray.report.series import Series, widen_all
from qaic_ray.rows import Row

MAX_LANES = 64
"""Cards with a time axis of their own; what others do is one lane together."""
OTHERS = "other cards"
MAX_SLOWEST = 10
MAX_SENTENCES = 3
"""Errors of one class that are quoted; each is the first of its kind."""
MAX_SENTENCE_CHARS = 300
_MAX_KNOWN_SENTENCES = 200
_TIDY_ROWS = 256
_TIDY_BUCKETS = 4096

Document = dict[str, Any]


@dataclass
class Lane:
    """One card's time axis: generated tokens, and seconds of rows in its slots."""

    tokens: Series = field(default_factory=Series)
    slot_s: Series = field(default_factory=Series)


@dataclass
class ErrorClassCount:
    """Rows of one class of errors; sentence -> index of its first row, and how many had it."""

    rows: int = 0
    sentences: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Count a row that has this error."""
        self.rows += 1
        sentence = (row.error or "")[:MAX_SENTENCE_CHARS]
        if sentence in self.sentences:
            known = self.sentences[sentence]
            known[0] = min(known[0], row.index)
            known[1] += 1
        elif len(self.sentences) < _MAX_KNOWN_SENTENCES:
            self.sentences[sentence] = [row.index, 1]


class RowStatistics:
    """Counts rows as they become final, in any order.

    Attributes:
        rows, untimed_rows: all, and those with an answer that have no times of day.
        first_at, last_at: Unix times of the first row's start and the last row's end, if any.
        lanes: of each card, by its worker's name.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.untimed_rows = 0
        self.first_at: float | None = None
        self.last_at: float | None = None
        self.lanes: dict[str, Lane] = {}
        self._durations = {name: Durations() for name in ROW_DURATIONS}
        self._prompt_lens: Counter[int] = Counter()
        self._answer_lens: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._attempts: Counter[int] = Counter()
        self._errors: dict[str, ErrorClassCount] = {}
        self._slowest: list[tuple[float, int, Document]] = []

    def add(self, row: Row) -> None:
        """Count one row."""
        self.rows += 1
        self._reasons[row.finish_reason.value] += 1
        self._attempts[row.attempts] += 1
        if not row.ok:
            name = row.error_class.value if row.error_class else "error"
            self._errors.setdefault(name, ErrorClassCount()).add(row)
            return
        lens = row.answer_lens
        self._prompt_lens[row.prompt_tokens] += 1
        for num_tokens in lens:
            self._answer_lens[num_tokens] += 1
        durations = self._durations
        durations["ttft_engine"].count(row.ttft_s)
        longest = max(lens)
        if longest > 1:
            durations["time_per_output_token"].count(row.decode_s / (longest - 1))
        if row.started_at is None or row.ended_at is None:
            self.untimed_rows += 1
        else:
            self._add_times(row, row.started_at, row.ended_at, sum(lens))

    def _add_times(self, row: Row, start: float, end: float, num_tokens: int) -> None:
        whole_s = end - start
        durations = self._durations
        durations["end_to_end"].count(whole_s)
        durations["ttft_queue"].count(whole_s - row.decode_s)
        if row.queue_s is not None:
            durations["queue"].count(row.queue_s)
        self.first_at = start if self.first_at is None else min(self.first_at, start)
        self.last_at = end if self.last_at is None else max(self.last_at, end)
        lane = self.lanes.get(row.worker) or self._new_lane(row.worker)
        num_answers = len(row.choices) or 1
        first_token = end - row.decode_s
        lane.tokens.add_at(first_token, num_answers)
        if num_tokens > num_answers and row.decode_s > 0:
            lane.tokens.add_between(first_token, end, (num_tokens - num_answers) / row.decode_s)
        lane.slot_s.add_between(min(start + (row.queue_s or 0.0), end), end, num_answers)
        if len(self._slowest) < MAX_SLOWEST or whole_s > self._slowest[0][0]:
            self._note_slow(row, whole_s)
        if self.rows % _TIDY_ROWS == 0:
            self._tidy()

    def _new_lane(self, worker: str) -> Lane:
        name = worker if len(self.lanes) < MAX_LANES else OTHERS
        lane = self.lanes.setdefault(name, Lane())
        exponent = next(iter(self.lanes.values())).tokens.exponent
        lane.tokens.widen(exponent)
        lane.slot_s.widen(exponent)
        return lane

    def _note_slow(self, row: Row, whole_s: float) -> None:
        known: Document = {
            "index": row.index,
            "id": row.id,
            "worker": row.worker,
            "end_to_end_s": round(whole_s, 6),
            "queue_s": None if row.queue_s is None else round(row.queue_s, 6),
            "ttft_s": round(row.ttft_s, 6),
            "decode_s": round(row.decode_s, 6),
            "prompt_tokens": row.prompt_tokens,
            "generated_tokens": row.generated_tokens,
            "attempts": row.attempts,
            "ended_at": round(row.ended_at or 0.0, 3),
        }
        change = heapq.heappush if len(self._slowest) < MAX_SLOWEST else heapq.heappushpop
        change(self._slowest, (whole_s, -row.index, known))

    def _tidy(self) -> None:
        if max(len(s) for lane in self.lanes.values() for s in vars(lane).values()) > _TIDY_BUCKETS:
            self._widen()

    def _widen(self) -> int:
        return widen_all(s for lane in self.lanes.values() for s in vars(lane).values())

    # -- what was counted

    def durations(self) -> Mapping[str, Durations]:
        """By name, as `latency` of the document has them."""
        return self._durations

    @property
    def prompt_lens(self) -> Mapping[int, int]:
        """Tokens of a prompt -> rows."""
        return self._prompt_lens

    def document(self) -> Document:
        """The part of the report that rows give, but durations and histograms."""
        slowest = sorted(self._slowest, reverse=True)
        return {
            "first_row_at": None if self.first_at is None else round(self.first_at, 3),
            "last_row_at": None if self.last_at is None else round(self.last_at, 3),
            "finish_reasons": dict(sorted(self._reasons.items())),
            "attempts": {str(number): rows for number, rows in sorted(self._attempts.items())},
            "errors": [self._error(name) for name in sorted(self._errors)],
            "slowest_rows": [known for _, _, known in slowest],
            "timeline": self._timeline(),
        }

    def _error(self, name: str) -> Document:
        found = self._errors[name]
        first = sorted(found.sentences.items(), key=lambda item: item[1][0])[:MAX_SENTENCES]
        return {
            "class": name,
            "rows": found.rows,
            "sentences": [
                {"text": text, "first_row": index, "rows": rows} for text, (index, rows) in first
            ],
        }

    def _timeline(self) -> Document:
        exponent = self._widen()
        width_s = 2.0**exponent
        lanes = {
            name: (lane.tokens.buckets(), lane.slot_s.buckets())
            for name, lane in sorted(self.lanes.items())
        }
        numbers = sorted({number for pair in lanes.values() for some in pair for number in some})
        return {
            "bucket_s": width_s,
            "times": [number * width_s for number in numbers],
            "workers": [
                {
                    "name": name,
                    "tokens": [round(tokens.get(number, 0.0), 3) for number in numbers],
                    "slots_used": [round(slot_s.get(n, 0.0) / width_s, 3) for n in numbers],
                }
                for name, (tokens, slot_s) in lanes.items()
            ],
        }


ROW_DURATIONS = ("ttft_engine", "ttft_queue", "queue", "time_per_output_token", "end_to_end")
"""Durations that every row has one of; `inter_token` is the engines'."""
