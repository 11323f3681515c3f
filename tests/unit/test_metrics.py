"""Measurements add, and rates are what the definitions say."""

from __future__ import annotations

import statistics
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaic_ray.metrics import Measurement, Span, quantile, tokens_per_s, total

COUNTS = st.integers(0, 10**6)
# Multiples of 1/8 add exactly, so that equality is equality.
SECONDS = st.integers(0, 10**6).map(lambda eighths: eighths / 8)
MEASUREMENTS = st.builds(
    Measurement,
    **{
        field.name: SECONDS if field.name.endswith("_s") else COUNTS
        for field in fields(Measurement)
        if field.name != "ttft_s"
    },
    ttft_s=st.lists(SECONDS, max_size=5).map(tuple),
)


@settings(max_examples=40)
@given(MEASUREMENTS, MEASUREMENTS, MEASUREMENTS)
def test_measurements_add_associatively(a: Measurement, b: Measurement, c: Measurement) -> None:
    assert (a + b) + c == a + (b + c) == total([a, b, c])


@settings(max_examples=40)
@given(MEASUREMENTS, MEASUREMENTS)
def test_every_field_is_added(a: Measurement, b: Measurement) -> None:
    for field in fields(Measurement):
        added = getattr(a, field.name) + getattr(b, field.name)
        assert getattr(a + b, field.name) == added


@settings(max_examples=40)
@given(MEASUREMENTS)
def test_zero(a: Measurement) -> None:
    assert a + Measurement() == Measurement() + a == total([a]) == a
    assert total([]) == Measurement()


def test_the_rate_of_a_sum_is_no_sum_and_no_mean_of_rates() -> None:
    slow = Measurement(decode_tokens=10, decode_s=10.0)
    fast = Measurement(decode_tokens=90, decode_s=1.0)
    assert (slow + fast).decode_tokens_per_s == pytest.approx(100 / 11)
    assert Measurement().decode_tokens_per_s == 0.0


@settings(max_examples=40)
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


@settings(max_examples=40)
@given(st.lists(SECONDS, min_size=1))
def test_median_is_the_median(values: list[float]) -> None:
    assert quantile(values, 0.5) == pytest.approx(statistics.median(values))
    assert (quantile(values, 0.0), quantile(values, 1.0)) == (min(values), max(values))


@settings(max_examples=40)
@given(st.lists(SECONDS, min_size=2), st.integers(1, 19))
def test_quantile_is_the_inclusive_one(values: list[float], twentieths: int) -> None:
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    assert quantile(values, twentieths / 20) == pytest.approx(cuts[twentieths - 1])


def test_no_values_have_no_median() -> None:
    assert Measurement().ttft_median_s == 0.0
    assert Measurement(ttft_s=(3.0, 1.0, 2.0)).ttft_median_s == 2.0
