"""The descriptor messages: their bytes on the wire, written out by hand from the field numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from qaic_ray.emulator.container import aicapi


def test_bytes_on_the_wire_are_those_of_the_public_field_numbers() -> None:
    desc = aicapi.IoDesc(program_name="net")
    desc.selected_set.bindings.add(
        name="x",
        index=1,
        type=aicapi.INT64_I_TYPE,
        dir=aicapi.BUFFER_IO_TYPE_OUTPUT,
        dims=[1, 300],
        size=2400,
        is_partial_buf_allowed=True,
        is_valid=True,
    )
    desc.allowed_shapes.add().shapes.add(type=aicapi.FLOAT_16_TYPE, dims=[2])
    binding = (
        b"\x0a\x01x"  # 1 name
        b"\x10\x01"  # 2 index
        b"\x18\x07"  # 3 type
        b"\x20\x01"  # 4 dir
        b"\x3a\x03\x01\xac\x02"  # 7 dims, packed
        b"\x40\xe0\x12"  # 8 size
        b"\x50\x01"  # 10 is_partial_buf_allowed
        b"\xa0\x01\x01"  # 20 is_valid
    )
    selected = b"\x12" + bytes([len(binding)]) + binding
    shapes = b"\x0a\x05\x08\x01\x12\x01\x02"
    expected = (
        b"\x12" + bytes([len(selected)]) + selected  # 2 selected_set
        + b"\x1a\x03net"  # 3 program_name
        + b"\x42" + bytes([len(shapes)]) + shapes  # 8 allowed_shapes
    )  # fmt: skip
    assert desc.SerializeToString() == expected


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("FLOAT_TYPE", 0),
        ("FLOAT_16_TYPE", 1),
        ("INT8_Q_TYPE", 2),
        ("UINT8_Q_TYPE", 3),
        ("INT16_Q_TYPE", 4),
        ("INT32_Q_TYPE", 5),
        ("INT32_I_TYPE", 6),
        ("INT64_I_TYPE", 7),
        ("INT8_TYPE", 8),
        ("BFLOAT16_TYPE", 11),
        ("TYPE_INVALID", 255),
    ],
)
def test_data_types_have_the_vendors_numbers(name: str, number: int) -> None:
    assert getattr(aicapi, name) == aicapi.bufferIoDataTypeEnum.Value(name) == number


def test_it_stands_alone_beside_another_copy_of_itself(tmp_path: Path) -> None:
    copy = tmp_path / "QAicApi_pb2.py"
    copy.write_bytes(Path(str(aicapi.__file__)).read_bytes())
    spec = importlib.util.spec_from_file_location("QAicApi_pb2", copy)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    desc = other.IoDesc()
    desc.ParseFromString(aicapi.IoDesc(program_name="both").SerializeToString())
    assert desc.program_name == "both"


@given(
    st.lists(st.tuples(st.text(max_size=20), st.lists(st.integers(0, 2**31 - 1), max_size=4))),
)
def test_what_goes_in_comes_out(bindings: list[tuple[str, list[int]]]) -> None:
    desc = aicapi.IoDesc()
    for name, dims in bindings:
        desc.selected_set.bindings.add(name=name, dims=dims)
    again = aicapi.IoDesc()
    again.ParseFromString(desc.SerializeToString())
    assert [(b.name, list(b.dims)) for b in again.selected_set.bindings] == bindings
