"""The step's kernels, one by one, against numpy and the definitions of the number formats."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from kernel_tables import Quantized, attention, bits, product, row_operation

from qaic_ray.emulator.kernels import operations as op
from qaic_ray.emulator.kernels.multiply import planes_here
from qaic_ray.emulator.numbers import kv_cache, mxfp6

PLANES = [0, *planes_here()]
TOP = {1: 127, 2: 32639, 3: 8355584}
"""The largest number of so many planes of 8 bits."""

ANY_FLOAT = st.floats(width=32)
TAME = st.floats(-100, 100, width=32)


def same(made: Any, expected: Any) -> None:
    np.testing.assert_array_equal(made, expected)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> Any:
    return rng(seed).standard_normal(shape).astype(np.float32)


def tile_of_all_codes(exponent: int) -> Any:
    """A packed [32, 64] weight in which each row has each code once."""
    codes = ((np.arange(32)[:, None] * 7 + np.arange(64)) % 64).astype(np.uint8)
    packed = np.empty((1, 25, 64), np.uint8)
    packed[0, 0] = exponent
    mxfp6.pack_codes(codes.reshape(8, 4, 64), packed[0, 1:].reshape(8, 3, 64))
    return packed


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("exponent", [0, 1, 2, 100, 127, 140, 220])
@pytest.mark.parametrize("num_rows", [1, 2, 32])
def test_each_code_of_mxfp6_has_its_value(exponent: int, planes: int, num_rows: int) -> None:
    packed = tile_of_all_codes(exponent)
    for first in range(0, 32, num_rows):
        x = np.eye(32, dtype=np.float32)[first : first + num_rows]
        made = product(x, packed, "mxfp6", planes)
        expected = mxfp6.decode(packed, 32)[first : first + num_rows]
        if planes:
            np.testing.assert_allclose(made, expected, rtol=1e-6, atol=2.0**-149)
        else:
            same(made, expected)


@pytest.mark.parametrize("planes", PLANES)
def test_a_scale_of_255_is_no_number_and_one_of_254_none_that_is_wrong(planes: int) -> None:
    x = np.eye(32, dtype=np.float32)
    assert np.isnan(product(x, tile_of_all_codes(255), "mxfp6", planes)).all()
    packed = tile_of_all_codes(254)
    made, expected = product(x, packed, "mxfp6", planes), mxfp6.decode(packed, 32)
    finite = np.isfinite(made)
    np.testing.assert_allclose(made[finite], expected[finite], rtol=1e-6)
    assert not np.isfinite(made[~np.isfinite(expected)]).any()


SIZES = st.tuples(st.integers(1, 20), st.integers(1, 120).map(lambda n: 4 * n), st.integers(1, 200))


@pytest.mark.parametrize("planes", PLANES)
@given(sizes=SIZES, seed=st.integers(0, 99), block=st.integers(0, 8))
def test_products_with_mxfp6_are_those_of_its_values(
    planes: int, sizes: tuple[int, int, int], seed: int, block: int
) -> None:
    num_rows, k, n = sizes
    x, packed = normal(num_rows, k, seed=seed), mxfp6.encode(normal(k, n, seed=seed + 1))
    if planes:
        x = of_planes(Quantized(x, planes))[:, :k]
    expected = x.astype(np.float64) @ mxfp6.decode(packed, k)
    made = product(x, packed, "mxfp6", planes, block=block)
    np.testing.assert_allclose(made, expected, atol=2e-6 * np.sqrt(k) * 8, rtol=1e-5)


@pytest.mark.parametrize("kind", ["float16", "float32"])
@given(sizes=SIZES, seed=st.integers(0, 99), block=st.integers(0, 8))
def test_products_with_floats_are_numpys(
    kind: str, sizes: tuple[int, int, int], seed: int, block: int
) -> None:
    num_rows, k, n = sizes
    x, weight = normal(num_rows, k, seed=seed), normal(k, n, seed=seed + 1).astype(kind)
    made = product(x, weight, kind, block=block)
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(made, expected, atol=2e-6 * np.sqrt(k) * 8, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "planes"),
    [*(("mxfp6", planes) for planes in PLANES), ("float16", 0), ("float32", 0)],
)
@given(sizes=SIZES, seed=st.integers(0, 99), block=st.integers(0, 8))
def test_a_row_has_the_same_bits_whichever_kernel_takes_it(
    kind: str, planes: int, sizes: tuple[int, int, int], seed: int, block: int
) -> None:
    num_rows, k, n = sizes
    x, weight = normal(num_rows, k, seed=seed), normal(k, n, seed=seed + 1)
    stored = mxfp6.encode(weight) if kind == "mxfp6" else weight.astype(kind)
    expected = product(x, stored, kind, planes, packed=0)
    for packed in (2, 5, num_rows):
        same(product(x, stored, kind, planes, block=block, packed=packed), expected)
    for row in range(num_rows):
        for packed in (0, 1):
            alone = product(x[row : row + 1], stored, kind, planes, packed=packed)
            same(alone[0], expected[row])


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_rows", [1, 3, 12])
def test_what_is_no_number_stays_none_in_its_row_alone(
    planes: int, bad: float, num_rows: int
) -> None:
    x, packed = normal(num_rows, 100), mxfp6.encode(normal(100, 70, seed=1))
    good = product(x, packed, "mxfp6", planes)
    x[num_rows // 2, 97] = bad
    made = product(x, packed, "mxfp6", planes)
    hit = np.arange(num_rows) == num_rows // 2
    weights = mxfp6.decode(packed, 100)[97]
    assert not np.isfinite(made[hit][:, weights != 0]).any()
    same(made[~hit], good[~hit])


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_a_weight_makes_its_column_none(planes: int, bad: float) -> None:
    x, weight = normal(5, 100), normal(100, 70, seed=1)
    good = product(x, mxfp6.encode(weight), "mxfp6", planes)
    weight[33, 66] = bad
    made = product(x, mxfp6.encode(weight), "mxfp6", planes)
    assert np.isnan(made[:, 66]).all()
    same(np.delete(made, 66, axis=1), np.delete(good, 66, axis=1))
    if planes == 0:
        made = product(x, weight, "float32")
        assert not np.isfinite(made[:, 66]).any()


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("k", [4, 36, 60, 100])
def test_what_lies_beyond_a_row_has_no_part_in_it(planes: int, k: int) -> None:
    x, packed = normal(3, k), mxfp6.encode(normal(k, 64, seed=1))
    expected = product(x, packed, "mxfp6", planes)
    for beyond in (np.nan, np.inf, 1e30):
        same(product(x, packed, "mxfp6", planes, beyond=beyond), expected)


def of_planes(made: Quantized) -> Any:
    """What planes of bytes stand for, float32 [n, K]."""
    num_planes = made.planes.shape[1]
    powers = 256 ** np.arange(num_planes - 1, -1, -1)
    whole = (made.planes.astype(np.int64) * powers[:, None]).sum(axis=1)
    return (whole * made.scales.astype(np.float64).repeat(32, axis=1)).astype(np.float32)


@pytest.mark.parametrize("planes", planes_here())
@given(x=arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64)), elements=TAME))
def test_planes_are_the_nearest_integers_of_a_block(planes: int, x: Any) -> None:
    made = Quantized(x, planes)
    top = np.float32(TOP[planes])
    blocks = x.reshape(len(x), -1, 32)
    high = np.abs(blocks).max(axis=2)
    same(made.scales, high / top)
    usable = high > np.float32(1e-30)
    factor = np.where(usable, top / np.where(usable, high, 1), np.float32(0)).astype(np.float32)
    integers = np.rint(blocks * factor[..., None]).astype(np.int64)
    powers = 256 ** np.arange(planes - 1, -1, -1)
    whole = (made.planes.astype(np.int64) * powers[:, None]).sum(axis=1)
    same(whole, integers.reshape(len(x), -1))
    parts = made.planes.astype(np.int64).reshape(len(x), planes, -1, 32)
    same(made.sums, -64 * parts.sum(axis=3))
    error = np.abs(of_planes(made) - x).reshape(blocks.shape)
    assert (error <= high[..., None] * (0.5 / TOP[planes] + 2e-7) + 1e-30).all()


@pytest.mark.parametrize("planes", planes_here())
@given(x=arrays(np.float32, (2, 64), elements=ANY_FLOAT))
def test_a_block_has_a_scale_if_all_of_it_is_finite(planes: int, x: Any) -> None:
    with np.errstate(invalid="ignore"):
        made = Quantized(x, planes)
    finite = np.isfinite(x).reshape(2, 2, 32).all(axis=2)
    same(np.isfinite(made.scales), finite)
    same(np.isnan(made.scales), ~finite)


EDGES = [
    0.0, -0.0, 2.0**-149, -(2.0**-140), 2.0**-126, 2.0**-127, 2.0**-25, 2.0**-24, 3 * 2.0**-26,
    6.1e-5, 65504.0, 65519.0, 65520.0, -65520.0, 3.4e38, 1.0, 127.5 / 64, 1.9921875, 1.9999,
    np.inf, -np.inf, np.nan,
]  # fmt: skip
ROUND = {kv_cache.FLOAT16: op.ROUND_HALF, kv_cache.MXINT8: op.ROUND_MXINT8}


@pytest.mark.parametrize("kind", ROUND)
@given(x=arrays(np.float32, (3, 64), elements=st.one_of(ANY_FLOAT, st.sampled_from(EDGES), TAME)))
def test_rounding_is_that_of_the_cache(kind: str, x: Any) -> None:
    same(row_operation(ROUND[kind], x), kv_cache.rounded(kind, x))


@pytest.mark.parametrize("kind", ROUND)
@pytest.mark.parametrize("value", EDGES)
def test_edges_are_rounded_as_in_the_cache(kind: str, value: float) -> None:
    for company in (0.0, 2.0**-149, 1.0, 3e38):
        x = np.full((1, 32), company, np.float32)
        for place in (0, 15, 16, 31):
            x[0, place] = np.float32(value)
            same(row_operation(ROUND[kind], x), kv_cache.rounded(kind, x))
            x[0, place] = company


@given(x=arrays(np.float32, (2, 48), elements=ANY_FLOAT), seed=st.integers(0, 9))
def test_sums_products_and_scales_are_numpys(x: Any, seed: int) -> None:
    other = normal(2, 48, seed=seed)
    with np.errstate(over="ignore", invalid="ignore"):
        same(row_operation(op.ADD, x, other), x + other)
        same(row_operation(op.MULTIPLY, x, other), x * other)
        same(row_operation(op.MULTIPLY, x, other[0]), x * other[0])
        same(row_operation(op.SCALE, x, None, bits(0.3)), x * np.float32(0.3))


@given(x=arrays(np.float32, (2, 48), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_activations_are_those_of_the_formula(x: Any) -> None:
    wide, other = x.astype(np.float64), normal(2, 48)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-wide))
    np.testing.assert_allclose(row_operation(op.SIGMOID, x), sigmoid, rtol=1e-6, atol=1e-37)
    silu = wide * sigmoid
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(row_operation(op.SILU, x), silu, **tolerance)
    made = row_operation(op.SILU_TIMES, x, other)
    np.testing.assert_allclose(made, silu * other, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [op.SIGMOID, op.SILU, op.ROUND_HALF, op.SCALE])
def test_a_nan_stays_one(kind: int) -> None:
    x = normal(1, 32)
    x[0, 5] = np.nan
    made = row_operation(kind, x, None, bits(2.0))
    same(np.isnan(made), np.isnan(x))


@pytest.mark.parametrize(("width", "groups"), [(40, 1), (64, 1), (96, 1), (96, 3), (4, 1)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_norm_is_that_of_the_formula(width: int, groups: int, size: float) -> None:
    x, weight = normal(3, width) * np.float32(size), normal(1, width // groups, seed=1)[0]
    count = width // groups
    made = row_operation(op.NORM, x, weight, bits(1e-5), groups, count=count)
    wide = x.reshape(3, groups, count).astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=2, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(made, expected.reshape(3, width), rtol=2e-6, atol=1e-30)


@given(x=arrays(np.float32, (2, 40), elements=st.sampled_from([-1.0, 0.0, 2.0, 3.0, -np.inf])))
def test_the_first_of_the_largest_is_found(x: Any) -> None:
    made = row_operation(op.ARGMAX, x).view(np.int64)[:, 0]
    same(made, x.argmax(axis=1))


def expected_attention(
    query: Any, keys: Any, values: Any, where: tuple[Any, Any], factor: float, window: int = 0
) -> Any:
    """The formula in float64."""
    out = np.empty(query.shape)
    group = query.shape[1] // keys.shape[1]
    for row, (position, slot) in enumerate(zip(*where, strict=True)):
        first = max(0, position + 1 - window) if window else 0
        for head in range(query.shape[1]):
            places = slot, head // group, slice(first, position + 1)
            k, v = (cache[places].astype(np.float64) for cache in (keys, values))
            scores = k @ query[row, head].astype(np.float64) * factor
            powers = np.exp(scores - scores.max())
            out[row, head] = powers @ v / powers.sum()
    return out


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@given(data=st.data())
def test_attention_is_that_of_the_formula(kind: Any, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from([4, 8, 16, 32, 48, 64, 80, 112, 128]))
    ctx_len = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 31, 32, 33])))
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    where = st.one_of(st.integers(0, ctx_len - 1), st.just(ctx_len - 1), st.just(0))
    positions = np.array(data.draw(st.lists(where, min_size=1, max_size=7)))
    slots = np.array(
        data.draw(st.lists(st.integers(0, 2), min_size=len(positions), max_size=len(positions)))
    )
    window = data.draw(st.one_of(st.just(0), st.integers(1, ctx_len + 5)))
    keys, values = (normal(3, kv_heads, ctx_len, dim, seed=s).astype(kind) for s in (1, 2))
    query, factor = normal(len(positions), kv_heads * group, dim, seed=3) * 2, dim**-0.5
    expected = expected_attention(query, keys, values, (positions, slots), factor, window)
    made = attention(query, keys, values, (positions, slots), factor, window)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=3e-6)
    # What lies beyond a token's own position, or before its window, is not looked at.
    for slot in range(3):
        last = max(positions[slots == slot], default=-1)
        if window:
            first = max(0, min(positions[slots == slot], default=0) + 1 - window)
            keys[slot, :, :first] = values[slot, :, :first] = np.nan
        keys[slot, :, last + 1 :] = np.nan
        values[slot, :, last + 1 :] = np.nan
    same(attention(query, keys, values, (positions, slots), factor, window), made)


@pytest.mark.parametrize("dim", [8, 32])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_attention_over_what_is_no_number_gives_none(
    where: str, bad: float, kind: Any, dim: int
) -> None:
    query = np.abs(normal(2, 2, dim))
    keys, values = (np.abs(normal(1, 1, 20, dim, seed=s)).astype(kind) for s in (1, 2))
    positions, slots = np.array([3, 19]), np.zeros(2, np.int64)
    good = attention(query, keys, values, (positions, slots), 0.25)
    if where == "query":
        query[1, :, 2] = bad
    else:
        # Every key that the second token sees and the first does not.
        (keys if where == "key" else values)[0, 0, 4:, 2] = bad
    made = attention(query, keys, values, (positions, slots), 0.25)
    same(made[0], good[0])
    if where == "query":
        assert not np.isfinite(made[1]).any()
    elif where == "value":
        assert not np.isfinite(made[1, :, 2]).any()
    elif bad > 0 or np.isnan(bad):
        assert not np.isfinite(made[1]).any()
    else:
        # A score of minus infinity is a key that is not looked at.
        without = np.array([3, 3]), slots
        expected = expected_attention(query, keys, values, without, 0.25)
        np.testing.assert_allclose(made, expected, rtol=1e-5)
