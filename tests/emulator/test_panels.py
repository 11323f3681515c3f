"""Weights in panels: there and back, and out of a QPC what went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from onnx import TensorProto

from qaic_ray.emulator.container import QpcWriter, constants
from qaic_ray.emulator.container.constants import ConstantsWriter, panels_of, read_constant
from qaic_ray.emulator.numbers import mxfp6, panels

ROWS, COLUMNS = st.integers(1, 140), st.integers(1, 200)


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@given(tiles=st.integers(1, 4), columns=COLUMNS, seed=st.integers(0, 99))
def test_mxfp6_panels_hold_every_bit(tiles: int, columns: int, seed: int) -> None:
    packed = random_bytes((tiles, mxfp6.BLOCK_BYTES, columns), seed)
    made = panels.of_mxfp6(packed)
    assert made.shape == panels.mxfp6_shape(tiles * 32, columns)
    np.testing.assert_array_equal(panels.to_mxfp6(made, columns), packed)


@given(rows=ROWS, columns=COLUMNS, kind=st.sampled_from(["float16", "float32"]))
def test_float_panels_hold_every_value(rows: int, columns: int, kind: str) -> None:
    weight = np.arange(rows * columns).reshape(rows, columns).astype(kind)
    made = panels.of_floats(weight)
    assert made.shape == (panels.num_panels(columns), rows, panels.WIDTH)
    assert made.dtype == weight.dtype
    np.testing.assert_array_equal(panels.to_floats(made, columns), weight)
    assert not made[-1, :, (columns - 1) % panels.WIDTH + 1 :].any()


@given(tiles=st.integers(1, 3), column=st.integers(0, 130), row=st.integers(0, 31))
def test_a_code_lies_where_the_page_says(tiles: int, column: int, row: int) -> None:
    """Four rows make 192 bytes: three rows of 64 that hold four codes, one above the other, of 16
    columns with the four rows of a column side by side."""
    codes = np.zeros((tiles * 8, 4, 131), np.uint8)
    codes[row // 4, row % 4, column] = 0x2B
    packed = np.zeros((tiles, mxfp6.BLOCK_BYTES, 131), np.uint8)
    mxfp6.pack_codes(codes.reshape(tiles, 8, 4, 131), packed[:, 1:].reshape(tiles, 8, 3, 131))
    packed[0, 0, column] = 99
    tile = panels.of_mxfp6(packed)[column // 64, 0]
    assert np.flatnonzero(tile[:64]).tolist() == [column % 64]
    assert tile[column % 64] == 99
    group = tile[64:].reshape(8, 3, 64)
    unpacked = mxfp6.unpack_codes(group)  # [8, 4 times 16 columns, 16 columns x 4 rows]
    expected = np.zeros((8, 4, 64), np.uint8)
    expected[row // 4, column % 64 // 16, column % 16 * 4 + row % 4] = 0x2B
    np.testing.assert_array_equal(unpacked, expected)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes weights into a segment, in pieces of few columns, and gives it and the table."""
    monkeypatch.setattr(constants, "_PIECE", 8192)

    def store(add: Any) -> tuple[Any, Any]:
        with (tmp_path / "qpc.bin").open("wb+") as file:
            writer = QpcWriter(file)
            kept = ConstantsWriter(writer)
            add(kept)
            segment = np.frombuffer(bytes(writer.open_segment()), np.uint8)
        return segment, {c.name: c for c in kept.table}

    return store


SHAPES = [(1, 1), (4, 64), (31, 65), (100, 300), (3, 40, 70), (2, 1, 33, 129)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp6_constants_come_back_as_they_are_computed_with(
    stored: Any, shape: tuple[int, ...], transposed: bool
) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    segment, table = stored(
        lambda kept: (
            kept.add("before", np.zeros(3, np.float32), TensorProto.FLOAT, "float32"),
            kept.add_mxfp6("w", weight, TensorProto.FLOAT, transposed=transposed),
        )
    )
    made = read_constant(segment, table["w"])
    assert table["w"].offset % 64 == 0
    for index in np.ndindex(shape[:-2]):
        matrix = weight[index].T if transposed else weight[index]
        expected = mxfp6.quantize(np.ascontiguousarray(matrix))
        np.testing.assert_array_equal(made[index], expected.T if transposed else expected)


@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 2])
def test_float_constants_come_back_as_they_were_rounded(
    stored: Any, shape: tuple[int, ...], kind: str
) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    segment, table = stored(lambda kept: kept.add_panels("w", weight, TensorProto.FLOAT, kind))
    np.testing.assert_array_equal(read_constant(segment, table["w"]), weight.astype(kind))
    by_panel = panels_of(segment, table["w"]).view(kind)
    expected = panels.of_floats(weight.astype(kind))
    np.testing.assert_array_equal(by_panel.reshape(expected.shape), expected)


def test_a_vector_is_no_panel(stored: Any) -> None:
    vector = np.arange(70, dtype=np.float32)
    segment, table = stored(lambda kept: kept.add("b", vector, TensorProto.FLOAT, "float16"))
    assert not table["b"].in_panels
    np.testing.assert_array_equal(read_constant(segment, table["b"]), vector)


@pytest.mark.parametrize("change", [{"size_bytes": 100}, {"offset": -1}, {"shape": (100, 400)}])
def test_a_table_that_does_not_fit_is_refused(stored: Any, change: dict[str, Any]) -> None:
    weight = np.zeros((100, 300), np.float32)
    segment, table = stored(
        lambda kept: kept.add_mxfp6("w", weight, TensorProto.FLOAT, transposed=False)
    )
    for read in (read_constant, panels_of):
        with pytest.raises(constants.QpcError, match="'w'"):
            read(segment, table["w"]._replace(**change))
