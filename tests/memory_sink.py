"""A sink of metrics in memory, which is as strict about tags as Ray is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from qaic_ray.telemetry.names import METRICS, Metric, MetricKind


class MemorySink:
    """Sums of counters, what gauges show, and every value of histograms, by name and tags."""

    def __init__(self) -> None:
        self.values: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self.observed: defaultdict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)
        self.calls = 0

    def add(self, metric: Metric, amount: float, tags: Mapping[str, str]) -> None:
        assert metric.kind is MetricKind.COUNTER
        assert amount >= 0
        self.values[self._key(metric, tags)] += amount

    def set(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        assert metric.kind is MetricKind.GAUGE
        self.values[self._key(metric, tags)] = value

    def observe(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        assert metric.kind is MetricKind.HISTOGRAM
        self.observed[self._key(metric, tags)].append(value)

    def value(self, metric: Metric, **tags: str) -> float:
        """Of the one series that has these tags among its own."""
        (found,) = (self.values[key] for key in self._series(metric, tags, self.values))
        return found

    def all(self, metric: Metric, **tags: str) -> list[float]:
        """Every value of the histogram's series that have these tags."""
        keys = self._series(metric, tags, self.observed)
        return [value for key in keys for value in self.observed[key]]

    def tags(self, metric: Metric) -> set[tuple[str, ...]]:
        """The tags of each series, in the metric's order."""
        return {tags for name, tags in (*self.values, *self.observed) if name == metric.name}

    def _key(self, metric: Metric, tags: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
        assert metric in METRICS
        assert set(tags) == set(metric.tags)
        assert all(isinstance(value, str) for value in tags.values())
        self.calls += 1
        return metric.name, tuple(tags[name] for name in metric.tags)

    def _series(
        self,
        metric: Metric,
        tags: Mapping[str, str],
        kept: Mapping[tuple[str, tuple[str, ...]], object],
    ) -> list[tuple[str, tuple[str, ...]]]:
        wanted = {metric.tags.index(name): value for name, value in tags.items()}
        return [
            (name, values)
            for name, values in kept
            if name == metric.name and all(values[at] == v for at, v in wanted.items())
        ]
