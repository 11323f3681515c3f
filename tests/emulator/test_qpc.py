"""The QPC container against the vendor's layout, and damaged ones."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import hypothesis.strategies as st
import pytest
from compiled import FUZZ_EXAMPLES, compile_tiny, write_qpc
from hypothesis import given, settings
from tiny_llama import TinyLlama

from qaic_ray.emulator.container import (
    CONSTANTS,
    CONSTANTS_DESC,
    FILE_NAME,
    NETWORK,
    NETWORK_DESC,
    SEGMENTS,
    Container,
    QpcError,
    QpcWriter,
    netdesc,
    network,
    read_qpc,
)
from qaic_ray.emulator.container.constants import read_constant
from qaic_ray.emulator.container.execution import CompiledProgram

CONTENTS = {
    CONSTANTS: bytes(range(256)) * 20,
    NETWORK: b"program",
    NETWORK_DESC: b"descriptor",
    CONSTANTS_DESC: b"",
}


@pytest.fixture(scope="module")
def program_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real program, small."""
    folder = tmp_path_factory.mktemp("qpc")
    llama = TinyLlama(num_layers=1, vocab=7, ffn=8)
    return Path(compile_tiny(folder, llama, "-convert-to-fp16", "-mxfp6-matmul").path)


def test_header_and_segments_are_as_the_vendors_runtime_reads_them(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    write_qpc(str(path), CONTENTS)
    data = path.read_bytes()
    magic, major, minor, compression, size, base = struct.unpack_from("<IBBHQQ", data)
    assert (magic, major, minor, compression, base) == (0x00A1CD7C, 0, 1, 1, 0)
    assert size == len(data)
    num_images, images = struct.unpack_from("<QQ", data, 24)
    assert num_images == 9
    found = {}
    for i in range(num_images):
        segment_bytes, offset, name, start = struct.unpack_from("<QQQQ", data, images + 32 * i)
        text = data[name : data.index(b"\0", name)].decode()
        found[text] = data[start : start + segment_bytes]
        assert offset == (segment_bytes if text == CONSTANTS else 0)
    assert list(found)[4:] == [
        *("metadata.crc", "metadata_fb.crc", "network.elf.crc", "constants.bin.crc"),
        "qaic_emulator.crc",
    ]
    assert {k: v for k, v in found.items() if k in CONTENTS} == CONTENTS
    assert read_qpc(str(tmp_path))[1] == found


@given(contents=st.fixed_dictionaries({n: st.binary(max_size=50) for n in SEGMENTS}))
def test_what_is_written_is_read(tmp_path: Path, contents: dict[str, bytes]) -> None:
    path = tmp_path / FILE_NAME
    write_qpc(str(path), contents)
    container = Container(str(path))
    container.check(SEGMENTS)
    assert {n: bytes(container.segment(n)) for n in contents} == contents


def test_a_changed_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    write_qpc(str(path), CONTENTS)
    data = bytearray(path.read_bytes())
    at = data.index(b"descriptor")
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(QpcError, match="CRC"):
        Container(str(path)).check([NETWORK_DESC])


def test_an_unfinished_file_is_no_qpc(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with path.open("wb") as file:
        writer = QpcWriter(file)
        writer.write(b"weights")
        writer.end_segment()
    with pytest.raises(QpcError, match="magic"):
        Container(str(path))


@pytest.mark.parametrize("content", [b"", b"not a qpc" * 9, b"\x7c\xcd\xa1\x00"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(QpcError):
        CompiledProgram.open(str(tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QpcError, match=FILE_NAME):
        CompiledProgram.open(str(tmp_path))


def open_and_read(path: Path) -> None:
    """Everything that reads a container; has to end, or end with a QpcError."""
    qpc = CompiledProgram.open(str(path))
    qpc.io_descriptor()
    for constant in qpc.program.constants:
        read_constant(qpc.constants_segment(), constant)


def spoil(data: st.DataObject, good: bytes, region: tuple[int, int]) -> bytes:
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(*region))
        bad[at] = data.draw(st.integers(0, 255))
    return bytes(bad)


@settings(max_examples=FUZZ_EXAMPLES)
@given(data=st.data())
def test_fuzzed_files_are_opened_or_refused(
    program_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    bad = spoil(data, program_file.read_bytes(), (0, 300))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 100, len(bad) // 2]))
    path = tmp_path / FILE_NAME
    path.write_bytes(bad[: len(bad) - cut])
    with contextlib.suppress(QpcError):
        open_and_read(path)


@settings(max_examples=FUZZ_EXAMPLES)
@given(data=st.data())
def test_fuzzed_segments_with_right_checksums_are_opened_or_refused(
    program_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    _, segments = read_qpc(str(program_file))
    name = data.draw(st.sampled_from([NETWORK, NETWORK_DESC]))
    facts_end = min(len(segments[name]), 2500) - 1
    segments[name] = spoil(data, segments[name], (0, facts_end))
    path = tmp_path / FILE_NAME
    write_qpc(str(path), segments)
    with contextlib.suppress(QpcError):
        open_and_read(path)


@given(data=st.binary(max_size=200))
def test_fuzzed_descriptors_are_refused(data: bytes) -> None:
    with contextlib.suppress(QpcError):
        netdesc.parse(data)
    with pytest.raises(QpcError):
        network.parse(b"QAICEMU2" + data)
