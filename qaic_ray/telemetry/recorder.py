"""Turns what happens on a card and in the driver into values of metrics, for a sink to keep.

Ray's sink is in `cluster/monitoring/ray_metrics.py`; tests have one in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from qaic_ray.metrics import EngineState
from qaic_ray.telemetry import names
from qaic_ray.telemetry.card_lines import card_info, card_readings
from qaic_ray.telemetry.names import Metric

_log = logging.getLogger(__name__)


class MetricSink(Protocol):
    """Keeps values; with each come all the metric's tags."""

    def add(self, metric: Metric, amount: float, tags: Mapping[str, str]) -> None:
        """Count `amount` more; 0 makes the series, so that its first event has a rate."""

    def set(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """What a gauge shows from now on."""

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """One more value of a histogram."""


class NoSink:
    """Keeps nothing."""

    def add(self, metric: Metric, amount: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""

    def set(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""


class GuardedSink:
    """A sink whose first failure is said once, and is its last: no run ends of its metrics.

    Args:
        make: makes the sink that may fail; called at once.
        on_fault: is told the sentence; it is in the log too.
    """

    def __init__(
        self,
        make: Callable[[], MetricSink],
        on_fault: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._on_fault = on_fault
        self._sink: MetricSink = NoSink()
        self._try(lambda: setattr(self, "_sink", make()))

    def add(self, metric: Metric, amount: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        self._try(lambda: self._sink.add(metric, amount, tags))

    def set(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        self._try(lambda: self._sink.set(metric, value, tags))

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """See `MetricSink`."""
        self._try(lambda: self._sink.observe(metric, value, tags))

    def _try(self, record: Callable[[], None]) -> None:
        try:
            record()
        except Exception as error:  # noqa: BLE001 - whatever a library raises over a viewer's number
            self._sink = NoSink()
            fault = f"Metrics are off from here on: {type(error).__name__}: {error}"
            _log.warning(fault)
            self._on_fault(fault)


@dataclass(frozen=True)
class EndedRequest:
    """A sequence that was answered; seconds are from its arrival at the worker."""

    finished_reason: str
    prompt_tokens: int
    generated_tokens: int
    scheduled_s: float
    first_token_s: float
    end_s: float


class RequestRecorder:
    """What one engine does, under vLLM's names.

    Args:
        sink: where values go.
        model_name: as the user named the model.
        engine: the worker's name.
    """

    def __init__(self, sink: MetricSink, model_name: str = "", engine: str = "") -> None:
        self._sink = sink
        self._tags = {"model_name": model_name, "engine": engine, "ReplicaId": ""}
        self._of_reason = {
            reason: {**self._tags, "finished_reason": reason} for reason in names.FINISHED_REASONS
        }
        self._seen = EngineState()
        for metric in names.ENGINE_COUNTERS:
            sink.add(metric, 0, self._tags)
        for tags in self._of_reason.values():
            sink.add(names.SUCCESS, 0, tags)
        self._show(self._seen)

    def ended(self, request: EndedRequest) -> None:
        """A sequence was answered."""
        observe, tags = self._sink.observe, self._tags
        decode_s = request.end_s - request.first_token_s
        observe(names.PROMPT_LENS, request.prompt_tokens, tags)
        observe(names.ANSWER_LENS, request.generated_tokens, tags)
        observe(names.TTFT, request.first_token_s, tags)
        observe(names.E2E, request.end_s, tags)
        observe(names.QUEUE_TIME, request.scheduled_s, tags)
        observe(names.PREFILL_TIME, request.first_token_s - request.scheduled_s, tags)
        observe(names.DECODE_TIME, decode_s, tags)
        if request.generated_tokens > 1:
            observe(names.TIME_PER_TOKEN, decode_s / (request.generated_tokens - 1), tags)
        self._sink.add(names.SUCCESS, 1, self._of_reason[request.finished_reason])

    def unanswered(self, reason: str, number: int = 1) -> None:
        """Requests ended with no answer: "error" for good, "abort" where the card was lost, or
        nobody wants one any more."""
        if number:
            self._sink.add(names.SUCCESS, number, self._of_reason[reason])

    def looked(self, state: EngineState) -> None:
        """How the engine stands; counts that fell, as of tokens taken back, wait until they rise.

        An engine made anew counts from zero: it is another `engine` of the state.
        """
        before = (
            self._seen if state.engine == self._seen.engine else EngineState(engine=state.engine)
        )
        most = {
            count: max(getattr(state, count), getattr(before, count))
            for count in ("prompt_tokens", "reused_tokens", "generated_tokens")
        }
        for metric, count in (
            (names.PROMPT_TOKENS, "prompt_tokens"),
            (names.PREFIX_QUERIES, "prompt_tokens"),
            (names.PREFIX_HITS, "reused_tokens"),
            (names.GENERATION_TOKENS, "generated_tokens"),
        ):
            more = most[count] - getattr(before, count)
            if more:
                self._sink.add(metric, more, self._tags)
        self._seen = EngineState(engine=state.engine, **most)
        self._show(state)

    def _show(self, state: EngineState) -> None:
        self._sink.set(names.RUNNING, state.running, self._tags)
        self._sink.set(names.WAITING, state.waiting, self._tags)
        self._sink.set(names.SWAPPED, 0, self._tags)
        self._sink.set(names.KV_USAGE, state.kv_usage, self._tags)


class CardRecorder:
    """What `qaic-util` says of cards; of a card that is not ready that is its status alone."""

    def __init__(self, sink: MetricSink) -> None:
        self._sink = sink

    def looked(self, cards: Mapping[str, Mapping[str, str]]) -> None:
        """How the cards of a machine are: the lines of each, by its id."""
        for qid, lines in cards.items():
            tags = {"qid": qid}
            self._sink.set(names.CARD_INFO, 1, tags | card_info(lines))
            for metric, value in card_readings(lines).items():
                self._sink.set(metric, value, tags)


class RunRecorder:
    """What the driver of a run does.

    Args:
        sink: where values go.
        run: the run's name.
    """

    def __init__(self, sink: MetricSink, run: str = "") -> None:
        self._sink = sink
        self._tags = {"run": run}
        self._of_result = {result: self._tags | {"result": result} for result in names.ROW_RESULTS}
        for metric in (names.RETRIES, names.LOSSES):
            sink.add(metric, 0, self._tags)
        for tags in self._of_result.values():
            sink.add(names.ROWS, 0, tags)
        self._waiting = 0
        self._ready: set[str] = set()
        self.look_again()

    def began(self, num_prompts: int, attempt: int) -> None:
        """A shard was given to a worker; `attempt` counts from 1."""
        if attempt > 1:
            self._sink.add(names.RETRIES, num_prompts, self._tags)

    def rows_ended(self, number: int, failed: int) -> None:
        """So many rows are final, and some of them failed."""
        for result, count in (("ok", number - failed), ("failed", failed)):
            if count:
                self._sink.add(names.ROWS, count, self._of_result[result])

    def waiting(self, num_prompts: int) -> None:
        """So many prompts wait now."""
        self._waiting = num_prompts
        self.look_again()

    def worker_ready(self, worker: str) -> None:
        """A worker has opened."""
        self._ready.add(worker)
        self.look_again()

    def worker_lost(self, worker: str) -> None:
        """A worker was lost, or retired, or did not open."""
        self._ready.discard(worker)
        self._sink.add(names.LOSSES, 1, self._tags)
        self.look_again()

    def look_again(self) -> None:
        """The gauges as they are now."""
        self._sink.set(names.PROMPTS_WAITING, self._waiting, self._tags)
        self._sink.set(names.WORKERS_READY, len(self._ready), self._tags)
