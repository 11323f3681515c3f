"""A program's file by a reader of its own: what the vendor's open runtime takes, byte by byte.

Its source was read, and built for a trial, which took these files; the offsets, field numbers and
rules here are written from that, and nothing here uses the writer's own reader for them.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compiled import compile_tiny, write_qpc
from onnx import helper
from small_nets import adding_up, compile_net, two_inputs
from tiny_llama import TinyLlama

from qaic_ray.emulator.compiler import VERSION_VARIABLE
from qaic_ray.emulator.container import (
    CONSTANTS,
    CONSTANTS_DESC,
    FILE_NAME,
    NETWORK,
    SEGMENTS,
    ConstantsDesc,
    QpcError,
    QpcWriter,
    aicapi,
    netdesc,
    read_qpc,
)
from qaic_ray.emulator.container.execution import CompiledProgram
from qaic_ray.emulator.install import APPS_VERSIONS
from qaic_ray.emulator.tools import qaic_qpc

GIB = 1 << 30
IO_BYTES = {0: 4, 1: 2, 3: 1, 6: 4, 7: 8, 8: 1}
PARTIAL_HEADER_BYTES = 64
MDP = {"partitions": [{"name": "P", "devices": [{"deviceId": i, "numCores": 5} for i in (0, 1)]}]}


def table_of(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Name -> (static bytes, content) of a container, as `QAicQpc` and `QpcSegment` lie in it."""
    assert struct.unpack_from("<IBBHQQ", data) == (0x00A1CD7C, 0, 1, 1, len(data), 0)
    count, table = struct.unpack_from("<QQ", data, 24)
    rows = {}
    for row in range(count):
        size, offset, name, start = struct.unpack_from("<QQQQ", data, table + 32 * row)
        rows[data[name : data.index(b"\0", name)].decode()] = (offset, data[start : start + size])
    return rows


def elf_sections(data: bytes) -> dict[str, bytes]:
    """Sections of an ELF of 64 bits by name; it has nothing to run, for no machine."""
    ident, kind, machine, version, entry = struct.unpack_from("<16sHHIQ", data)
    assert ident == b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    assert (kind, machine, version, entry) == (0, 0, 1, 0)
    (table,) = struct.unpack_from("<Q", data, 40)
    header_bytes, _, num_segments, row_bytes, count, names_at = struct.unpack_from("<6H", data, 52)
    assert (header_bytes, num_segments, row_bytes) == (64, 0, 64)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i) for i in range(count)]
    assert rows[0] == (0,) * 10
    names = data[rows[names_at][4] :][: rows[names_at][5]]
    assert [row[1] for row in rows[1:]] == [1] * (count - 2) + [3]
    assert all(row[4] % 8 == 0 for row in rows)
    assert table + 64 * count == len(data)
    return {
        names[row[0] : names.index(b"\0", row[0])].decode(): data[row[4] :][: row[5]]
        for row in rows[1:]
    }


class Flat:
    """A table of a flatbuffer, with the checks that the vendor's verifier makes of it."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        (back,) = struct.unpack_from("<i", data, at)
        self.vtable = at - back
        self.vtable_bytes, self.table_bytes = struct.unpack_from("<HH", data, self.vtable)
        assert at % 4 == 0
        assert self.vtable % 2 == 0
        assert at + self.table_bytes <= len(data)

    @classmethod
    def root(cls, data: bytes) -> Flat:
        return cls(data, struct.unpack_from("<I", data)[0])

    def _field(self, slot: int) -> int:
        place = 4 + 2 * slot
        if place >= self.vtable_bytes:
            return 0
        offset: int = struct.unpack_from("<H", self.data, self.vtable + place)[0]
        return offset and self.at + offset

    def number(self, slot: int, form: str) -> int:
        at = self._field(slot)
        assert at % struct.calcsize(form) == 0
        return int(struct.unpack_from("<" + form, self.data, at)[0]) if at else 0

    def _follow(self, slot: int) -> int:
        at = self._field(slot)
        assert at, f"field {slot} is absent; a reader of this version does not look before it reads"
        return at + int(struct.unpack_from("<I", self.data, at)[0])

    def text(self, slot: int) -> str:
        return _text(self.data, self._follow(slot))

    def table(self, slot: int) -> Flat:
        return Flat(self.data, self._follow(slot))

    def _places(self, slot: int) -> Iterator[int]:
        at = self._follow(slot)
        (count,) = struct.unpack_from("<I", self.data, at)
        assert at % 4 == 0
        for place in range(at + 4, at + 4 + 4 * count, 4):
            yield place + struct.unpack_from("<I", self.data, place)[0]

    def tables(self, slot: int) -> list[Flat]:
        return [Flat(self.data, place) for place in self._places(slot)]

    def texts(self, slot: int) -> list[str]:
        return [_text(self.data, place) for place in self._places(slot)]


def _text(data: bytes, at: int) -> str:
    (size,) = struct.unpack_from("<I", data, at)
    assert data[at + 4 + size] == 0
    return data[at + 4 : at + 4 + size].decode()


def fields_of(data: bytes) -> dict[int, list[Any]]:
    """Field number -> values of a protobuf message, undecoded."""
    values: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            value: Any = varint()
        else:
            size = {1: 8, 2: -1, 5: 4}[key & 7]
            size = varint() if size < 0 else size
            value, at = data[at : at + size], at + size
        values.setdefault(key >> 3, []).append(value)
    return values


def packed(values: list[Any]) -> list[int]:
    return [n for data in values for n in fields_of(b"".join(b"\x08" + b for b in _split(data)))[1]]


def _split(data: bytes) -> list[bytes]:
    parts, start = [], 0
    for at, byte in enumerate(data):
        if byte < 128:
            parts.append(data[start : at + 1])
            start = at + 1
    return parts


def product(dims: list[int]) -> int:
    size = 1
    for dim in dims:
        size *= dim
    return size


def of_many_types() -> Any:
    """Inputs and outputs of every type; the graph makes the outputs in another order than listed.

    An output is made by an operator of its own, and named after its type.
    """
    kinds = {"flag": 9, "half": 10, "wide": 7, "single": 1}  # bool, float16, int64, float32
    inputs = {"bytes": 2, "chars": 3, "words": 6}  # uint8, int8, int32
    nodes = [helper.make_node("Cast", [name], [f"{name}/f"], to=1) for name in inputs]
    nodes += [
        helper.make_node("Sum", [f"{name}/f" for name in inputs], ["single"]),
        *(helper.make_node("Cast", ["single"], [n], to=kinds[n]) for n in ("wide", "half", "flag")),
    ]
    sides = [
        [helper.make_tensor_value_info(name, kind, [3, 2]) for name, kind in side.items()]
        for side in (inputs, kinds)
    ]
    graph = helper.make_graph(nodes, "types", *sides)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module", params=["llm", "state", "plain", "many types", "two devices"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of programs with states and specializations, with one state, with none, for two."""
    folder = tmp_path_factory.mktemp("qpc")
    if request.param == "many types":
        return compile_net(folder, of_many_types())
    if request.param == "llm":
        flags = ("-convert-to-fp16", "-mxfp6-matmul")
        return Path(compile_tiny(folder, TinyLlama(num_layers=1, vocab=7, ffn=8), *flags).path)
    if request.param == "state":
        return compile_net(folder, adding_up(), "-retained-state")
    if request.param == "plain":
        return compile_net(folder, two_inputs())
    (folder / "mdp.json").write_text(json.dumps(MDP))
    mdp = f"-mdp-load-partition-config={folder / 'mdp.json'}"
    return compile_net(folder, two_inputs(), mdp)


def file_of(program: Path) -> bytes:
    return (program / FILE_NAME if program.is_dir() else program).read_bytes()


def test_constants_are_described_in_64_bits(program: Path) -> None:
    segments = table_of(file_of(program))
    static, content = segments["constants.bin"]
    desc = segments["constantsdesc.bin"][1]
    assert len(desc) == 24
    assert struct.unpack("<QQBB", desc[:18]) == (len(content), 0, 0, 0)
    assert desc[18:] == bytes(6)
    assert static == len(content)
    assert all(offset == 0 for name, (offset, _) in segments.items() if name != "constants.bin")


def test_checksums_are_one_word_each(program: Path) -> None:
    segments = {name: content for name, (_, content) in table_of(file_of(program)).items()}
    metadata = elf_sections(segments["network.elf"])["metadata_fb"]
    for name, covered in {
        "metadata.crc": metadata,
        "metadata_fb.crc": metadata,
        "network.elf.crc": segments["network.elf"],
        "constants.bin.crc": segments["constants.bin"],
    }.items():
        assert segments[name] == struct.pack("<I", zlib.crc32(covered)), name
    ours = segments.pop("qaic_emulator.crc")
    assert ours == b"".join(struct.pack("<I", zlib.crc32(data)) for data in segments.values())


def test_the_descriptor_has_a_dma_buffer_for_each_binding(program: Path) -> None:
    desc = fields_of(table_of(file_of(program))["networkdesc.bin"][1])
    buffers = [fields_of(data) for data in desc[6]]
    sides = [(io, side) for side, field in ((0, 4), (1, 5)) for io in desc[field]]
    assert len(buffers) == len(sides)
    for number, (io, side) in enumerate(sides):
        binding = fields_of(io)
        shape = fields_of(binding[2 + side][0])
        (transform,) = map(fields_of, binding[4])
        io_bytes = product(packed(shape[4])) * IO_BYTES[shape.get(1, [0])[0]]
        is_partial = not side and binding.get(5, [0]) == [1]
        header = PARTIAL_HEADER_BYTES if is_partial else 0
        dims = [product(packed(shape[4]))] if is_partial else packed(shape[4])
        assert buffers[number].get(1, [0]) == [io_bytes + header]
        assert buffers[number].get(2, [0]) == [side]
        assert transform[1] == [6]
        assert transform.get(2, [0]) == shape.get(1, [0])
        assert transform[3] == [struct.pack("<f", 1)]
        assert packed(transform[5]) == dims
        copy = fields_of(transform[9][0])
        assert (copy.get(1, [0]), copy.get(2, [0]), copy.get(3, [0])) == ([side], [0], [number])
        assert binding[6] == [PARTIAL_HEADER_BYTES]


def test_outputs_stand_in_the_order_in_which_the_graph_makes_them(tmp_path: Path) -> None:
    net = compile_net(tmp_path, of_many_types())
    desc = fields_of(table_of(file_of(net))["networkdesc.bin"][1])
    names = [[fields_of(io)[1][0].decode() for io in desc[field]] for field in (4, 5)]
    assert names == [["bytes", "chars", "words"], ["single", "wide", "half", "flag"]]
    kinds = [fields_of(fields_of(io)[3][0]).get(1, [0])[0] for io in desc[5]]
    assert kinds == [0, 7, 1, 8]  # the vendor's numbers: a bool is an int8 of it


def test_the_metadata_says_what_the_descriptor_says(program: Path) -> None:
    segments = table_of(file_of(program))
    desc = fields_of(segments["networkdesc.bin"][1])
    sections = elf_sections(segments["network.elf"][1])
    assert list(sections) == ["metadata_fb", "qaic_emulator", ".shstrtab"]
    root = Flat.root(sections["metadata_fb"])
    (cores,) = desc[7]
    assert (root.number(0, "H"), root.number(1, "H")) == (1, 0)
    assert root.text(2) == desc[3][0].decode()
    assert {text.partition("->")[0] for text in root.texts(3)} == {"AicMetadataFlat_Metadata"}
    assert (root.number(19, "H"), root.number(20, "H")) == (cores, len(root.tables(4)))
    assert (root.number(21, "B"), root.number(22, "B"), root.number(18, "H")) == (2, 0, 4)
    assert [entry.tables(0) for entry in root.tables(7)] == [[]] * cores
    assert root.table(8).tables(0) == root.tables(9) == []
    constants = len(segments["constants.bin"][1])
    assert (root.number(13, "Q"), root.number(14, "Q")) == (constants, 0)
    mappings = [(m.number(0, "Q"), m.number(1, "I"), m.number(2, "I")) for m in root.tables(10)]
    assert mappings == ([(0, (1 << cores) - 1, constants)] if constants else [])
    end = 0
    buffers = [fields_of(data) for data in desc[6]]
    requests = root.tables(6)
    for number, (request, buffer) in enumerate(zip(requests, buffers, strict=True)):
        side = buffer.get(2, [0])[0]
        assert request.number(5, "H") == number
        assert request.number(4, "I") == buffer[1][0]
        assert (request.number(8, "B"), request.number(9, "H")) == (side, 100 + side)
        assert (request.number(7, "B"), request.number(2, "Q")) == (1, 0)
        assert request.number(3, "Q") >= end
        assert request.number(3, "Q") % 2048 == 0
        end = request.number(3, "Q") + request.number(4, "I")
    assert root.number(11, "Q") >= end


def test_several_devices_are_named_in_a_segment(program: Path) -> None:
    segments = table_of(file_of(program))
    devices = CompiledProgram.open(str(program)).num_devices
    if devices == 1:
        assert "mdp_meta_info" not in segments
        return
    found = json.loads(segments["mdp_meta_info"][1])["partitions"][0]["devices"]
    assert found == MDP["partitions"][0]["devices"]


def test_io_descriptor_is_what_the_open_runtime_makes_of_the_file(program: Path) -> None:
    qpc = CompiledProgram.open(str(program))
    message = aicapi.IoDesc.FromString(qpc.io_descriptor())
    desc = fields_of(table_of(file_of(program))["networkdesc.bin"][1])
    buffers = [fields_of(data) for data in desc[6]]
    assert message.program_name == ""
    assert [io_set.name for io_set in message.io_sets] == ["default", "dma"]
    assert message.io_sets[0] == message.selected_set
    assert [(b.index, b.size, b.dir) for b in message.dma_buf] == [
        (number, buffer[1][0], buffer.get(2, [0])[0]) for number, buffer in enumerate(buffers)
    ]
    ios = desc[4] + desc[5]
    for number, (default, carried) in enumerate(
        zip(message.io_sets[0].bindings, message.io_sets[1].bindings, strict=True)
    ):
        (transform,) = map(fields_of, fields_of(ios[number])[4])
        assert list(carried.dims) == packed(transform[5])
        assert (carried.name, carried.index, carried.size) == (default.name, number, default.size)
        (info,) = carried.dma_buf_info
        assert (info.dma_buf_index, info.dma_size, info.dma_offset) == (number, default.size, 0)
        assert info.io_binding_offset == 0
        assert carried.is_valid
        assert default.is_valid


def test_every_version_writes_the_same_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for version in APPS_VERSIONS:
        monkeypatch.setenv(VERSION_VARIABLE, version)
        segments = table_of(
            file_of(compile_net(tmp_path / version, adding_up(), "-retained-state"))
        )
        sections = elf_sections(segments["network.elf"][1])
        seen.add((segments["networkdesc.bin"], sections["metadata_fb"], tuple(segments)))
    assert len(seen) == 1


def test_no_card_of_ai_100_takes_a_program_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VERSION_VARIABLE, APPS_VERSIONS[-1])
    net = compile_net(tmp_path, adding_up(), "-retained-state", "-aic-hw-version=ai200")
    sections = elf_sections(table_of(file_of(net))["network.elf"][1])
    assert Flat.root(sections["metadata_fb"]).number(21, "B") == 0


@pytest.mark.parametrize("size", [4 * GIB - 4096, 4 * GIB, 5 * GIB + 64])
def test_constants_of_4_gib_are_told_whole(tmp_path: Path, size: int) -> None:
    """In a sparse file: what a core's table of mappings cannot say is dynamic, and loaded too."""
    source = compile_net(tmp_path / "small", adding_up(), "-retained-state")
    segments = read_qpc(str(source))[1]
    segments[CONSTANTS_DESC] = ConstantsDesc.of(size).pack()
    path = tmp_path / FILE_NAME
    with path.open("wb") as file:
        writer = QpcWriter(file)
        file.seek(size, 1)
        writer.end_segment()
        for name in SEGMENTS[1:]:
            writer.write(segments[name])
            writer.end_segment()
        writer.finish(0)
    assert path.stat().st_blocks * 512 < GIB
    with path.open("rb") as file:
        head = file.read(4096)
    count, table = struct.unpack_from("<QQ", head, 24)
    rows = [struct.unpack_from("<QQQQ", head, table + 32 * i) for i in range(count)]
    (found,) = [row for row in rows if head[row[2] :].startswith(b"constants.bin\0")]
    static = min(size, 4 * GIB - 4096)
    assert found[:2] == (size, static)
    assert struct.unpack("<QQ", segments[CONSTANTS_DESC][:16]) == (static, size - static)
    assert CompiledProgram.open(str(path)).constants_bytes == size


def test_a_description_of_other_constants_is_refused(tmp_path: Path) -> None:
    source = compile_net(tmp_path / "net", adding_up(), "-retained-state")
    segments = read_qpc(str(source))[1]
    path = tmp_path / FILE_NAME
    for desc in (struct.pack("<I", 0), ConstantsDesc(1, 0).pack()):
        write_qpc(str(path), {**segments, CONSTANTS_DESC: desc})
        with pytest.raises(QpcError, match="bytes"):
            CompiledProgram.open(str(path))


def test_a_binding_of_4_gib_has_no_dma_buffer(tmp_path: Path) -> None:
    wide = (GIB, 4)
    ios = (netdesc.Io("x", 0, (2,), False), netdesc.Io("big", 8, wide, False))
    network = netdesc.Network("net", ios, (netdesc.Io("y", 0, (2,), False),), 1, 1, ())
    assert [buffer.binding for buffer in network.dma_buffers()] == [0, 2]
    desc = fields_of(netdesc.serialize(network))
    assert len(desc[6]) == 2
    assert [len(fields_of(io).get(4, [])) for io in desc[4] + desc[5]] == [1, 0, 1]
    assert netdesc.parse(netdesc.serialize(network)) == network
    source = compile_net(tmp_path / "net", adding_up(), "-retained-state")
    qpc = CompiledProgram.open(str(source))
    qpc.bindings, qpc.dma_buffers = network.bindings(), network.dma_buffers()
    carried = aicapi.IoDesc.FromString(qpc.io_descriptor()).io_sets[1].bindings
    assert [b.is_valid for b in carried] == [True, False, True]
    assert [len(b.dma_buf_info) for b in carried] == [1, 0, 1]


def test_a_partial_input_of_more_elements_than_a_dim_says_has_none() -> None:
    ios = (netdesc.Io("x", 8, (GIB, 2), True), netdesc.Io("z", 8, (GIB, 2), False))
    network = netdesc.Network("net", ios, (netdesc.Io("y", 8, (GIB, 2), True),), 1, 1, ())
    assert [buffer.binding for buffer in network.dma_buffers()] == [1, 2]
    assert netdesc.parse(netdesc.serialize(network)) == network


def foreign(segments: dict[str, bytes]) -> bytes:
    """A container as the vendor's writer lays it out: everything aligned to 8, nothing to pages."""
    order = sorted(segments)
    place = 40 + 32 * len(order)
    names, starts, body = [], [], b""
    for content in [*(name.encode() + b"\0" for name in order), *(segments[n] for n in order)]:
        (names if len(names) < len(order) else starts).append(place + len(body))
        body += content + bytes(-len(content) % 8)
    rows = b"".join(
        struct.pack("<QQQQ", len(segments[name]), 0, names[i], starts[i])
        for i, name in enumerate(order)
    )
    head = struct.pack("<IBBHQQQQ", 0x00A1CD7C, 0, 1, 1, place + len(body), 0, len(order), 40)
    return head + rows + body


HEXAGON = b"\x7fELF\x01\x01\x01" + bytes(9) + struct.pack("<HHI", 2, 164, 1) + bytes(28)
"""The head of a program for a card's cores: an ELF of 32 bits for a Hexagon."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEXAGON, "only a card runs"),
        (b"QAICEMU4" + bytes(40), "compile the model again"),
        (b"", "compile the model again"),
    ],
    ids=["the vendor's", "ours of before", "empty"],
)
@pytest.mark.parametrize("num_words", [0, 1, 4])
def test_programs_of_others_are_refused_with_what_to_do(
    tmp_path: Path, content: bytes, said: str, num_words: int
) -> None:
    source = compile_net(tmp_path / "net", adding_up(), "-retained-state")
    segments = read_qpc(str(source))[1]
    kept = {name: segments[name] for name in (*SEGMENTS, "constants.bin.crc")}
    kept[NETWORK] = content
    if num_words:
        kept["metadata.crc"] = struct.pack("<I", 7) * num_words
    path = tmp_path / FILE_NAME
    path.write_bytes(foreign(kept))
    with pytest.raises(QpcError, match=said) as caught:
        CompiledProgram.open(str(path))
    assert "damaged" not in str(caught.value)
    assert qaic_qpc.main(["validate", "-i", str(path)]) == 0


def test_a_program_of_ours_without_its_own_checksums_is_refused(tmp_path: Path) -> None:
    source = compile_net(tmp_path / "net", adding_up(), "-retained-state")
    segments = {k: v for k, v in read_qpc(str(source))[1].items() if k != "qaic_emulator.crc"}
    path = tmp_path / FILE_NAME
    path.write_bytes(foreign(segments))
    with pytest.raises(QpcError, match="compile the model again"):
        CompiledProgram.open(str(path))


def test_a_container_of_another_writer_with_our_content_runs(tmp_path: Path) -> None:
    source = compile_net(tmp_path / "net", adding_up(), "-retained-state")
    segments = read_qpc(str(source))[1]
    del segments["qaic_emulator.crc"]
    order = sorted([*segments, "qaic_emulator.crc"])
    words = [zlib.crc32(segments[name]) for name in order if name in segments]
    segments["qaic_emulator.crc"] = struct.pack(f"<{len(words)}I", *words)
    path = tmp_path / FILE_NAME
    path.write_bytes(foreign(segments))
    qpc = CompiledProgram.open(str(path))
    assert {b.name for b in qpc.bindings} == {"x", "total", "total_RetainedState", "doubled"}
    assert bytes(qpc.constants_segment()) == segments[CONSTANTS]
