"""Shards and samples of an input: which rows are in which, by counting and by sorting."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.formats.inputs.choice import (
    RowChoice,
    bound_of_count,
    bound_of_share,
    bounds_by_size,
    draw_number,
    rows_of_shard,
    sampled,
)

SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=40)
COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=8)


@given(SIZES, st.data())
def test_files_are_parted_in_order_and_none_is_left_out(
    sizes: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    bounds = bounds_by_size(sizes, count)
    assert bounds[0] == 0
    assert bounds[-1] == len(sizes)
    assert all(a < b for a, b in pairwise(bounds))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10**9))
def test_equal_files_make_equal_parts(count: int, each: int, size: int) -> None:
    assert bounds_by_size([size] * (count * each), count) == list(range(0, count * each + 1, each))


def test_a_large_file_is_alone() -> None:
    assert bounds_by_size([1, 1, 100, 1, 1, 1], 3) == [0, 2, 3, 6]


@given(COUNTS, st.integers(1, 12))
def test_shards_of_rows_are_the_rows_in_order(counts: list[int], count: int) -> None:
    whole = [(file, row) for file, num_rows in enumerate(counts) for row in range(num_rows)]
    shards = [
        [
            (file, row)
            for file, first, end in rows_of_shard(counts, (number, count))
            for row in range(first, end)
        ]
        for number in range(1, count + 1)
    ]
    assert [row for shard in shards for row in shard] == whole
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(COUNTS, st.integers(0, 3), st.integers(1, 60))
def test_a_sample_of_a_number_is_that_many_rows_with_the_least_hashes(
    counts: list[int], seed: int, size: int
) -> None:
    spans = [(file, 0, num_rows) for file, num_rows in enumerate(counts)]
    whole = [(file, row) for file, num_rows in enumerate(counts) for row in range(num_rows)]
    bound = bound_of_count(spans, seed, size)
    kept = [(file, row) for file, row in whole if sampled(file, seed, bound)(row)]
    assert len(kept) == min(size, len(whole))
    fewer = bound_of_count(spans, seed, max(1, size // 2))
    assert {row for row in whole if sampled(row[0], seed, fewer)(row[1])} <= set(kept)


def test_arrays_and_numbers_have_the_same_hashes() -> None:
    from qaic_ray.formats.inputs import choice

    rows = [draw_number(file, row) for file in (0, 1, 2**20) for row in (0, 1, 2**39)]
    with np.errstate(over="ignore"):
        many = choice._mixed_all(np.array(rows, np.uint64), np.uint64(choice._salt(3)))
    assert many.tolist() == [choice._mixed(row, choice._salt(3)) for row in rows]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_share_is_about_that_share_of_any_rows(share: float) -> None:
    bound, num_rows = bound_of_share(share), 20_000
    for file in (0, 5):
        keeps = sampled(file, 0, bound)
        kept = sum(map(keeps, range(num_rows)))
        deviation = (num_rows * share * (1 - share)) ** 0.5
        assert abs(kept - num_rows * share) < 5 * deviation
    others = sampled(0, 1, bound)
    both = sum(keeps(row) and others(row) for row in range(num_rows))
    assert abs(both - num_rows * share**2) < 5 * (num_rows * share**2) ** 0.5 + 5


def test_every_row_is_in_a_sample_of_all() -> None:
    assert all(map(sampled(3, 9, bound_of_share(1.0)), range(1000)))


def test_only_a_part_is_said_of_the_choice() -> None:
    assert RowChoice(limit=5).to_json() == {}
    assert RowChoice((3, 64), 0.05, 2, 7).to_json() == {
        "shard": "3/64",
        "sample": 0.05,
        "sample_seed": 2,
        "limit": 7,
    }
