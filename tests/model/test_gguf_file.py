"""The header of a GGUF file: as the gguf package reads it, or one sentence."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.errors import CheckpointError
from qaic_ray.model.gguf_file import model_name, part_paths, read_gguf


def write(path: Path, keys: dict[str, tuple[Any, gguf.GGUFValueType]], tensors: int = 2) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in keys.items():
        if kind is gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    for number in range(tensors):
        writer.add_tensor(f"t{number}", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    kind = gguf.GGUFValueType
    keys = {
        "a.text": ("größer", kind.STRING),
        "a.small": (-3, kind.INT8),
        "a.big": (2**63, kind.UINT64),
        "a.number": (0.5, kind.FLOAT64),
        "a.flag": (True, kind.BOOL),
        "a.texts": (["x", "", "ÿ"], kind.ARRAY),
        "a.numbers": ([1, 2, 300], kind.ARRAY),
        "a.floats": ([0.25, -1.0], kind.ARRAY),
        "a.flags": ([True, False], kind.ARRAY),
    }
    return write(tmp_path / "model.gguf", keys)


def test_keys_and_tensors_are_those_of_the_gguf_package(whole: Path) -> None:
    ours, theirs = read_gguf(whole), gguf.GGUFReader(whole)
    expected = {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
    assert ours.keys == expected
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.offset, found.kind) == (tensor.data_offset, tensor.tensor_type)
        assert found.shape == (2, 3)


@given(data=st.data())
def test_damage_is_one_sentence(whole: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere, or the end cut off: it is read, or it is an error of ours."""
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 8))
        kind = data.draw(st.sampled_from(["byte", "count"]))
        new = bytes([data.draw(st.integers(0, 255))])
        if kind == "count":
            new = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**40, 2**64 - 1])))
        content[at : at + len(new)] = new
    damaged = whole.with_name("damaged.gguf")
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    said = ""
    try:
        read_gguf(damaged)
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with GGUF"),
        (b"GG", "does not begin with GGUF"),
        (b"PK\3\4" + bytes(40), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF of version 1; supported: 2 and 3"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
            "says that it has 1152921504606846976 tensors",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "says that it has 1152921504606846976 keys"),
        (b"GGUF" + struct.pack("<I", 3), "ends inside its header"),
    ],
)
def test_what_is_no_such_file_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_a_file_without_its_end_is_named(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"cut short: \d+ bytes, and its tensor 't1' ends at"):
        read_gguf(whole)


def test_parts_are_known_by_their_names(tmp_path: Path) -> None:
    plain = tmp_path / "m-1-of-2.gguf"
    assert part_paths(plain) == (plain,)
    assert model_name(plain) == "m-1-of-2"
    part = tmp_path / "m-00002-of-00002.gguf"
    assert model_name(part) == "m"
    with pytest.raises(CheckpointError, match=r"m-00001-of-00002\.gguf is missing"):
        part_paths(part)
    with pytest.raises(CheckpointError, match="is no part of 2"):
        part_paths(tmp_path / "m-00003-of-00002.gguf")
