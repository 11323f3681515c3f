"""Measurements add, and rates are what the definitions say."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.metrics import Durations, Measurement, Span, tokens_per_s

COUNTS = st.integers(0, 10**6)
# Multiples of 1/8 add exactly, so that equality is equality.
SECONDS = st.integers(0, 10**6).map(lambda eighths: eighths / 8)
MEASUREMENTS = st.builds(
    Measurement,
    **{
        field.name: SECONDS if field.name.endswith("_s") else COUNTS
        for field in fields(Measurement)
        if field.name not in ("ttft", "inter_token")
    },
    ttft=st.lists(SECONDS, max_size=5).map(Durations.of),
    inter_token=st.lists(SECONDS, max_size=5).map(Durations.of),
)


@given(MEASUREMENTS, MEASUREMENTS, MEASUREMENTS)
def test_measurements_add_associatively(a: Measurement, b: Measurement, c: Measurement) -> None:
    assert (a + b) + c == a + (b + c) == sum([a, b, c], start=Measurement())


@given(MEASUREMENTS, MEASUREMENTS)
def test_every_field_is_added(a: Measurement, b: Measurement) -> None:
    for field in fields(Measurement):
        added = getattr(a, field.name) + getattr(b, field.name)
        assert getattr(a + b, field.name) == added


@given(MEASUREMENTS)
def test_zero(a: Measurement) -> None:
    assert a + Measurement() == Measurement() + a == sum([a], start=Measurement()) == a


def test_the_rate_of_a_sum_is_no_sum_and_no_mean_of_rates() -> None:
    slow = Measurement(decode_tokens=10, decode_s=10.0)
    fast = Measurement(decode_tokens=90, decode_s=1.0)
    assert (slow + fast).decode_tokens_per_s == pytest.approx(100 / 11)
    assert Measurement().decode_tokens_per_s == 0.0


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_spans_cover_both(a: float, b: float, c: float, d: float) -> None:
    one, other = Span(min(a, b), max(a, b)), Span(min(c, d), max(c, d))
    assert one + other == other + one == Span(min(a, b, c, d), max(a, b, c, d))
    assert (one + other).seconds >= max(one.seconds, other.seconds)


def test_merged_rate() -> None:
    span = Span(10.0, 14.0) + Span(12.0, 20.0)
    assert tokens_per_s(500, span) == 50.0
    assert tokens_per_s(500, None) == 0.0
    assert tokens_per_s(500, Span(3.0, 3.0)) == 0.0


@given(st.lists(st.floats(1e-6, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_is_right_to_a_tenth_of_a_percent(values: list[float], q: float) -> None:
    expected = sorted(values)[math.floor(q * (len(values) - 1))]
    assert Durations.of(values).quantile(q) == pytest.approx(expected, rel=0.00101)


def test_durations_are_counted_in_few_numbers() -> None:
    many = Durations.of(1e-3 * (1 + i % 5000) for i in range(100_000))
    assert len(many) == sum(count for _, count in many.items()) == 100_000
    assert len(many.counts) < 4300  # 1 ms to 5 s: log(5000) / log(1.002)


def test_no_duration_has_no_quantile_and_none_is_too_short() -> None:
    assert Durations().quantile(0.5) == 0.0
    assert round(Durations.of([0.0]).quantile(0.5), 6) == 0.0
    assert Measurement().ttft_median_s == 0.0
    assert Measurement(ttft=Durations.of((3, 1, 2))).ttft_median_s == pytest.approx(2, rel=0.00101)
