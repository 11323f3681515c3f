"""Streaming weights: every byte in its place, whatever the block; damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import CheckpointError
from qaic_ray.export import weights
from qaic_ray.export.builder import WeightSpec
from qaic_ray.export.conversion import Converter, clip_to_float16
from qaic_ray.export.weights import BlockSizes, plan_weights, weights_sha256, write_weights
from qaic_ray.weight_files.tensors import read_entries

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
DTYPES["BF16"] = np.dtype(ml_dtypes.bfloat16)


def save(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """A safetensors file, written from the format's description."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def spec(name: str, shape: tuple[int, ...], *, transpose: bool = False) -> WeightSpec:
    return WeightSpec(name, shape[::-1] if transpose else shape, name, transpose)


@given(data=st.data())
def test_every_value_arrives(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any shapes, types, sharding and block size give what numpy gives."""
    folder = tmp_path_factory.mktemp("weights")
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    target = np.dtype(data.draw(st.sampled_from(["float32", "float16"])))
    shards: list[dict[str, np.ndarray[Any, Any]]] = [
        {} for _ in range(data.draw(st.integers(1, 3)))
    ]
    specs, expected = [], {}
    for number in range(data.draw(st.integers(1, 5))):
        rank = data.draw(st.integers(1, 2))
        shape = tuple(data.draw(st.integers(1, 40)) for _ in range(rank))
        dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
        tensor = rng.standard_normal(shape).astype(dtype)
        name = f"t{number}"
        shards[data.draw(st.integers(0, len(shards) - 1))][name] = tensor
        transpose = rank == 2 and data.draw(st.booleans())
        specs.append(spec(name, shape, transpose=transpose))
        wide = tensor.astype(np.float32).astype(target)
        expected[name] = wide.T if transpose else wide
    specs.append(WeightSpec("table", (5, 4), None))
    expected["table"] = np.arange(20, dtype=np.float32).reshape(5, 4).astype(target)
    table = expected["table"].astype(np.float32)
    files = [save(folder / f"{i}.safetensors", shard) for i, shard in enumerate(shards) if shard]
    plan = plan_weights(specs, read_entries(files), target.name)
    sizes = BlockSizes(
        data.draw(st.sampled_from([1, 64, 1 << 16])), data.draw(st.sampled_from([1, 100, 1 << 16]))
    )
    tables = {"table": lambda: iter([table[:3], table[3:]])}
    written = write_weights(plan, folder / "data", tables, sizes)
    raw = (folder / "data").read_bytes()
    assert len(raw) == plan.num_bytes
    for place in plan.placements:
        assert place.offset % weights.ALIGNMENT_BYTES == 0
        got = np.frombuffer(raw[place.offset : place.offset + place.num_bytes], target)
        np.testing.assert_array_equal(got.reshape(place.spec.shape), expected[place.spec.name])
    assert written.num_clipped == 0
    assert weights_sha256(plan) == written.sha256


def test_tied_tensor_is_read_once_and_lies_twice(tmp_path: Path) -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(3, 2)
    files = [save(tmp_path / "a.safetensors", {"e": tensor})]
    specs = [spec("e", (3, 2)), WeightSpec("head", (2, 3), "e", transpose=True)]
    plan = plan_weights(specs, read_entries(files), "float32")
    write_weights(plan, tmp_path / "data", {})
    both = {
        p.spec.name: np.fromfile(tmp_path / "data", np.float32, 6, offset=p.offset)
        for p in plan.placements
    }
    np.testing.assert_array_equal(both["e"], tensor.ravel())
    np.testing.assert_array_equal(both["head"], tensor.T.ravel())


@given(
    num_heads=st.integers(1, 5),
    head_dim=st.integers(1, 6),
    width=st.integers(1, 7),
    copies=st.integers(1, 4),
    block=st.sampled_from([1, 16, 1 << 10]),
)
def test_heads_are_copied_side_by_side(
    num_heads: int,
    head_dim: int,
    width: int,
    copies: int,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("copies")
    rows = num_heads * head_dim
    weight = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    bias = np.arange(rows, dtype=np.float32)
    entries = read_entries([save(folder / "a.safetensors", {"w": weight, "b": bias})])
    how: dict[str, Any] = {"copies": copies, "copied_rows": head_dim}
    specs = [
        WeightSpec("w", (width, rows * copies), "w", transpose=True, **how),
        WeightSpec("b", (rows * copies,), "b", **how),
    ]
    plan = plan_weights(specs, entries, "float32")
    write_weights(plan, folder / "data", {}, BlockSizes(block, block))
    found = {
        p.spec.name: np.fromfile(folder / "data", np.float32, p.num_bytes // 4, offset=p.offset)
        for p in plan.placements
    }
    heads = [h for h in range(num_heads) for _ in range(copies)]
    expected = weight.reshape(num_heads, head_dim, width)[heads].reshape(-1, width)
    np.testing.assert_array_equal(found["w"].reshape(width, -1), expected.T)
    np.testing.assert_array_equal(found["b"], bias.reshape(num_heads, head_dim)[heads].ravel())


def digest(folder: Path, *shards: Mapping[str, np.ndarray[Any, Any]]) -> str:
    folder.mkdir()
    files = [save(folder / f"{i}.safetensors", shard) for i, shard in enumerate(shards)]
    entries = read_entries(files)
    specs = [spec(name, entry.shape) for name, entry in entries.items()]
    return weights_sha256(plan_weights(specs, entries, "float32"))


def test_digest_is_of_contents_not_of_files(tmp_path: Path) -> None:
    a, b = np.ones((2, 3), np.float32), np.zeros(4, np.float32)
    one = digest(tmp_path / "1", {"a": a, "b": b})
    assert digest(tmp_path / "2", {"b": b}, {"a": a}) == one
    changed = a.copy()
    changed[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    others = [
        digest(tmp_path / "3", {"a": changed, "b": b}),
        digest(tmp_path / "4", {"a": a.reshape(3, 2), "b": b}),
        digest(tmp_path / "5", {"a": a.view(np.float16), "b": b}),
        digest(tmp_path / "6", {"c": a, "b": b}),
    ]
    assert len({one, *others}) == 5


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_clip_keeps_what_a_card_can_hold(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    before = values.copy()
    num_clipped = clip_to_float16(values)
    inside = np.abs(before) <= 65504
    np.testing.assert_array_equal(values[inside], before[inside])
    assert num_clipped == np.count_nonzero(~inside & ~np.isneginf(before))
    np.testing.assert_array_equal(np.isneginf(values), np.isneginf(before))
    outside = ~inside & ~np.isneginf(before)
    np.testing.assert_array_equal(values[outside], np.sign(before[outside]) * 65504)


@pytest.mark.parametrize("target", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_every_half_precision_number_is_converted(kind: str, target: str) -> None:
    """All 65,536 of them: as numpy converts them, clipped, and not a number refused."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    exact = patterns.view(DTYPES[kind]).astype(np.float32)
    numbers = ~np.isnan(exact)
    ordinary = numbers & (np.abs(exact) <= 65504)
    dtype = np.dtype(target)
    converter = Converter(dtype, 1 << 16)
    got, num_clipped = converter.convert(patterns[ordinary].view(np.uint8), kind)
    np.testing.assert_array_equal(got, exact[ordinary].astype(dtype))
    assert got.dtype == dtype
    assert num_clipped == 0
    got, num_clipped = converter.convert(patterns[numbers].view(np.uint8), kind)
    expected = np.clip(exact[numbers], -65504, 65504)
    expected[np.isneginf(exact[numbers])] = -np.inf
    np.testing.assert_array_equal(got, expected.astype(dtype))
    assert num_clipped == np.count_nonzero(expected != exact[numbers])
    with pytest.raises(ValueError, match="not a number"):
        converter.convert(patterns.view(np.uint8), kind)


def test_clipped_weights_are_counted(tmp_path: Path) -> None:
    tensor = np.array([1e5, -1e5, 3.0, -np.inf], np.float32)
    entries = read_entries([save(tmp_path / "a.safetensors", {"w": tensor})])
    plan = plan_weights([spec("w", (4,))], entries, "float16")
    assert write_weights(plan, tmp_path / "data", {}).num_clipped == 2
    got = np.fromfile(tmp_path / "data", np.float16, 4)
    np.testing.assert_array_equal(got, np.array([65504, -65504, 3, -np.inf], np.float16))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_nan_is_named(tmp_path: Path, dtype: str) -> None:
    tensor = np.array([1.0, np.nan], DTYPES[dtype])
    entries = read_entries([save(tmp_path / "a.safetensors", {"w": tensor})])
    plan = plan_weights([spec("w", (2,))], entries, "float32")
    with pytest.raises(CheckpointError, match=r"w of a\.safetensors.*NaN"):
        write_weights(plan, tmp_path / "data", {})


def plan_of(tmp_path: Path, *specs: WeightSpec) -> None:
    tensors = {"w": np.ones((2, 3), np.float32), "rotary_emb.inv_freq": np.ones(2, np.float32)}
    plan_weights(specs, read_entries([save(tmp_path / "a.safetensors", tensors)]), "float32")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([spec("w", (2, 3)), spec("v", (1,))], "no tensor v"),
        ([spec("w", (3, 2))], r"shape \[2, 3\]; config.json says \[3, 2\]"),
        ([spec("w", (3, 2), transpose=True)], r"shape \[2, 3\]"),
        ([], "tensor w that its config.json does not account for"),
    ],
)
def test_checkpoint_must_fit_the_configuration(
    tmp_path: Path, specs: list[WeightSpec], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_of(tmp_path, *specs)


def test_old_rotary_tables_are_no_surprise(tmp_path: Path) -> None:
    plan_of(tmp_path, spec("w", (2, 3)))


def test_other_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    with pytest.raises(CheckpointError, match="type F8_E4M3"):
        plan_weights([spec("w", (2,))], read_entries([path]), "float32")


@given(cut=st.integers(0, 10_000))
def test_a_cut_file_is_found_before_anything_is_written(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    whole = save(path, {"w": np.ones((20, 30), np.float32)}).read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_entries([path])


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_a_malformed_header_is_named(tmp_path: Path, fields: Any) -> None:
    path = tmp_path / "a.safetensors"
    text = json.dumps({"w": fields}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(CheckpointError, match=r"header of .*a\.safetensors"):
        read_entries([path])


def test_a_tensor_may_be_in_one_file_only(tmp_path: Path) -> None:
    tensors = {"w": np.ones(1, np.float32)}
    files = [save(tmp_path / f"{n}.safetensors", tensors) for n in "ab"]
    with pytest.raises(CheckpointError, match=r"w is in a\.safetensors and again in b"):
        read_entries(files)
