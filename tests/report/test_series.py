"""Amounts over time: against plain integration, and kept small."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.report.series import FIRST_EXPONENT, Series, widen_all

TIMES = st.floats(1.7e9, 1.7e9 + 400)
INTERVALS = st.lists(st.tuples(TIMES, st.floats(0, 300), st.sampled_from([0.25, 1.0, 3.0, 17.5])))


def integral(series: Series, number: int, intervals: list[tuple[float, float, float]]) -> float:
    """What a bucket must hold, straight from the intervals."""
    low, high = number * series.width_s, (number + 1) * series.width_s
    return math.fsum(
        rate * max(0.0, min(high, start + length) - max(low, start))
        for start, length, rate in intervals
    )


@given(INTERVALS, st.integers(0, 12), st.integers(0, 3))
def test_every_bucket_has_the_integral_of_its_time(
    intervals: list[tuple[float, float, float]], wider: int, more: int
) -> None:
    series = Series(-1)
    for start, length, rate in intervals[::2]:
        series.add_between(start, start + length, rate)
    series.widen(-1 + wider)
    for start, length, rate in intervals[1::2]:
        series.add_between(start, start + length, rate)
    series.widen(-1 + wider + more)
    buckets = series.buckets()
    total = math.fsum(rate * length for _, length, rate in intervals)
    assert math.fsum(buckets.values()) == pytest.approx(total, rel=1e-6, abs=1e-4)
    for number, amount in buckets.items():
        assert amount == pytest.approx(integral(series, number, intervals), rel=1e-6, abs=1e-4)


@given(st.lists(st.tuples(TIMES, st.floats(0.001, 100))), st.integers(0, 20))
def test_amounts_at_a_time_are_kept_whatever_the_width(
    amounts: list[tuple[float, float]], wider: int
) -> None:
    series = Series()
    for at, amount in amounts:
        series.add_at(at, amount)
    series.widen(FIRST_EXPONENT + wider)
    assert math.fsum(series.buckets().values()) == pytest.approx(math.fsum(a for _, a in amounts))


def test_a_pause_of_a_year_costs_nothing_and_does_not_widen() -> None:
    series = Series()
    for begin in (1.7e9, 1.7e9 + 365 * 86_400):
        for i in range(40):
            series.add_between(begin + i * 0.1, begin + i * 0.1 + 0.35, 1 / 3)
    assert widen_all([series], 512) == FIRST_EXPONENT
    assert len(series.buckets()) < 300


def test_a_long_run_fits_into_few_buckets_and_loses_nothing() -> None:
    series = Series()
    for i in range(5000):
        series.add_between(1.7e9 + i, 1.7e9 + i + 700.0, 2.0)
    widen_all([series], 100)
    buckets = series.buckets()
    assert 50 <= len(buckets) <= 100
    assert math.fsum(buckets.values()) == pytest.approx(5000 * 700 * 2)
    assert series.num_active() <= 110


def test_series_of_one_chart_have_one_width() -> None:
    short, long = Series(), Series()
    short.add_between(1.7e9, 1.7e9 + 1, 1.0)
    long.add_between(1.7e9, 1.7e9 + 10_000, 1.0)
    exponent = widen_all([short, long], 64)
    assert short.exponent == long.exponent == exponent
    assert 32 <= len(long.buckets()) <= 64
