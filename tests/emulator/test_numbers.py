"""Number formats against their definitions, written out element by element."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import microexponents
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from qaic_ray.emulator import numbers
from qaic_ray.emulator.numbers import kv_cache, mxfp6
from qaic_ray.emulator.numbers.mxfp6 import CARD, E2M3, E3M2, OCP

FORMATS = [(E2M3, CARD), (E2M3, OCP), (E3M2, OCP)]
FORMAT_IDS = [f"{element.name}-{rule}" for element, rule in FORMATS]

Quantize = Callable[[Any], Any]


def columns(element: Any, rule: str) -> Quantize:
    """Quantize rows of 32 by the packed form, whose blocks are columns."""
    return lambda x: mxfp6.quantize(np.ascontiguousarray(x.T), element, rule).T


ROW_FORMATS: dict[str, tuple[Quantize, int]] = {
    **{name: (columns(*key), 32) for name, key in zip(FORMAT_IDS, FORMATS, strict=True)},
    "MXINT8": (kv_cache.quantize, 32),
    "MX9": (microexponents.MX9.quantize, 16),
    "MX6": (microexponents.MX6.quantize, 16),
    "MX4": (microexponents.MX4.quantize, 16),
}
SIZES = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)


def rows(block: int) -> st.SearchStrategy[Any]:
    return arrays(np.float32, st.tuples(st.integers(1, 3), st.just(block)), elements=SIZES)


def floor_log2(x: float) -> int:
    return math.frexp(x)[1] - 1


def nearest(x: float, magnitudes: list[float]) -> int:
    """Index of the nearest magnitude; of two that are as near, the even one."""
    distances = [abs(abs(x) - m) for m in magnitudes]
    best = min(distances)
    found = [i for i, d in enumerate(distances) if d == best]
    return found[0] if len(found) == 1 else next(i for i in found if i % 2 == 0)


def e2m3_magnitudes() -> list[float]:
    return [m / 8 for m in range(8)] + [
        (1 + m / 8) * 2.0 ** (e - 1) for e in (1, 2, 3) for m in range(8)
    ]


def e3m2_magnitudes() -> list[float]:
    return [m / 16 for m in range(4)] + [
        (1 + m / 4) * 2.0 ** (e - 3) for e in range(1, 8) for m in range(4)
    ]


def written_out(x: np.ndarray, element: Any, rule: str) -> bytes:
    """One block of 32 as 25 bytes, one value after the other."""
    magnitudes = e2m3_magnitudes() if element is E2M3 else e3m2_magnitudes()
    largest = float(np.abs(x).max())
    exponent = -127
    if largest > 0:
        margin = 1 if rule == CARD else math.floor(math.log2(magnitudes[-1]))
        exponent = max(floor_log2(largest) - margin, -127)
    bits = 0
    for i, value in enumerate(x):
        code = nearest(float(value) / 2.0**exponent, magnitudes)
        code |= 32 if math.copysign(1, value) < 0 else 0
        bits |= code << 6 * i
    return bytes([exponent + 127]) + bits.to_bytes(24, "little")


def test_element_tables_are_those_of_the_definition() -> None:
    np.testing.assert_array_equal(E2M3.values()[:32], e2m3_magnitudes())
    np.testing.assert_array_equal(E3M2.values()[:32], e3m2_magnitudes())
    assert (E2M3.values()[31], E3M2.values()[31]) == (7.5, 28)


@pytest.mark.parametrize(("element", "rule"), FORMATS, ids=FORMAT_IDS)
@given(x=rows(32))
def test_packed_bytes_are_those_of_the_definition(element: Any, rule: str, x: Any) -> None:
    packed = mxfp6.encode(np.ascontiguousarray(x.T), element, rule)
    assert packed.shape == (1, 25, len(x))
    for column, row in enumerate(x):
        assert packed[0, :, column].tobytes() == written_out(row, element, rule)


def test_ties_go_to_even_codes() -> None:
    block = np.zeros((32, 1), np.float32)
    block[:4, 0] = [2.0, 1 / 16, 3 / 16, 2.125]
    np.testing.assert_array_equal(mxfp6.quantize(block)[:4, 0], [2.0, 0.0, 0.25, 2.0])


def test_card_rule_is_one_binade_larger_than_ocp() -> None:
    block = np.full((32, 1), 3.0, np.float32)
    assert mxfp6.encode(block, rule=CARD)[0, 0, 0] == mxfp6.encode(block, rule=OCP)[0, 0, 0] + 1


@pytest.mark.parametrize("name", list(ROW_FORMATS))
@given(data=st.data())
def test_quantizing_is_idempotent_monotone_and_blind_to_powers_of_two(
    name: str, data: st.DataObject
) -> None:
    quantize, block = ROW_FORMATS[name]
    x = data.draw(rows(block))
    once = quantize(x)
    # Under the card's rule a maximum that rounds up to a power of two takes the next exponent.
    settled = quantize(once) if name.endswith(CARD) else once
    np.testing.assert_array_equal(quantize(settled), settled)
    shift = data.draw(st.integers(-40, 40))
    np.testing.assert_array_equal(quantize(np.ldexp(x, shift)), np.ldexp(once, shift))
    if not name.startswith("MX") or name == "MXINT8":
        order = np.argsort(x, axis=1, kind="stable")
        assert (np.diff(np.take_along_axis(once, order, axis=1), axis=1) >= 0).all()


@pytest.mark.parametrize("name", list(ROW_FORMATS))
def test_zero_subnormal_infinite_and_nan_blocks_are_defined(name: str) -> None:
    quantize, block = ROW_FORMATS[name]
    special = np.zeros((4, block), np.float32)
    special[1, 0] = 2.0**-140
    special[2, 3] = np.inf
    special[3, 3] = np.nan
    made = quantize(special)
    assert not made[0].any()
    assert np.isfinite(made[1]).all()
    assert np.abs(made[1]).max() <= 2.0**-126
    assert np.isnan(made[2:]).all()


@pytest.mark.parametrize("element", [E2M3, E3M2])
@given(num_rows=st.integers(1, 70), num_columns=st.integers(1, 5))
def test_a_last_tile_is_padded_and_cut(element: Any, num_rows: int, num_columns: int) -> None:
    x = np.random.default_rng(num_rows).standard_normal((num_rows, num_columns))
    x = x.astype(np.float32)
    padded = np.zeros((-(-num_rows // 32) * 32, num_columns), np.float32)
    padded[:num_rows] = x
    np.testing.assert_array_equal(
        mxfp6.quantize(x, element), mxfp6.quantize(padded, element)[:num_rows]
    )


def test_wide_weights_are_cut_into_pieces_without_a_seam() -> None:
    x = np.random.default_rng(0).standard_normal((64, 5000)).astype(np.float32)
    np.testing.assert_array_equal(mxfp6.quantize(x)[:, 4000:], mxfp6.quantize(x[:, 4000:]))


@given(x=rows(32))
def test_mxint8_is_64ths_of_the_blocks_exponent(x: Any) -> None:
    packed = kv_cache.encode(x)
    for row, (data,) in zip(x, packed, strict=True):
        largest = float(np.abs(row).max())
        exponent = floor_log2(largest) if largest else -127
        expected = [max(-127, min(127, round(float(v) / 2.0**exponent * 64))) for v in row]
        assert data[0] == exponent + 127
        assert data[1:].view(np.int8).tolist() == expected


@pytest.mark.parametrize("form", [microexponents.MX9, microexponents.MX6, microexponents.MX4])
@given(x=rows(16))
def test_microexponents_are_those_of_the_paper(form: Any, x: Any) -> None:
    packed = form.encode(x)
    m = form.mantissa_bits
    assert packed.shape[-1] * 8 == 16 * (m + 1) + 16
    decoded = form.decode(packed, 16)
    for row, (data,), got in zip(x, packed, decoded, strict=True):
        largest = float(np.abs(row).max())
        exponent = floor_log2(largest) if largest else -127
        assert data[0] == exponent + 127
        for pair in range(8):
            two = row[2 * pair : 2 * pair + 2]
            own = floor_log2(float(np.abs(two).max())) if two.any() else -127
            shift = min(exponent - own, 1)
            assert data[1] >> pair & 1 == shift
            ulp = 2.0 ** (exponent - shift - (m - 1))
            limit = 2**m - 1
            expected = [max(-limit, min(limit, round(float(v) / ulp))) * ulp for v in two]
            np.testing.assert_array_equal(got[2 * pair : 2 * pair + 2], np.float32(expected))


@pytest.mark.parametrize(
    ("name", "decibel"),
    [
        ("E2M3-ocp", 30.9),
        ("E3M2-ocp", 25.4),
        ("MXINT8", 41.7),
        ("MX9", 46.5),
        ("MX6", 28.3),
        ("MX4", 15.7),
    ],
)
def test_noise_on_normal_numbers_is_that_of_the_literature(name: str, decibel: float) -> None:
    quantize, _ = ROW_FORMATS[name]
    x = np.random.default_rng(0).standard_normal((500, 1024)).astype(np.float32)
    error = (quantize(x).astype(np.float64) - x) ** 2
    measured = -10 * math.log10(error.sum() / (x.astype(np.float64) ** 2).sum())
    assert abs(measured - decibel) < 0.2


def test_encoding_is_fast() -> None:
    x = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        mxfp6.encode(x)
        seconds.append(time.process_time() - start)
    assert x.size / min(seconds) > 15e6


def test_bytes_of_a_block() -> None:
    assert mxfp6.packed_shape(64, 3) == (2, 25, 3)
    assert kv_cache.BLOCK_BYTES == 33
    assert [f.block_bytes for f in (microexponents.MX9, microexponents.MX6)] == [18, 12]
    assert numbers.NAN_EXPONENT == 255
