"""Containers that somebody damaged, by accident or with care: opened, or refused in a sentence."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiled import compile_tiny, write_qpc
from fuzzing import counts, put_through
from small_nets import adding_up, compile_net
from tiny_llama import TinyLlama

from qaic_ray.emulator.container import (
    CHECKSUMS,
    FILE_NAME,
    NETWORK,
    SEGMENTS,
    QpcError,
    elf,
    read_qpc,
)
from qaic_ray.emulator.container.constants import read_constant
from qaic_ray.emulator.container.execution import CompiledProgram
from qaic_ray.emulator.tools import qaic_qpc

SECTIONS = ("metadata_fb", "qaic_emulator")
SHARE = 5
"""One in so many of the other readers' inputs, for each part: a container takes milliseconds."""
EXTREMES = (0, 1, 63, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of programs: with states and specializations, and with one state."""
    folder = tmp_path_factory.mktemp("qpcs")
    llama = TinyLlama(num_layers=1, vocab=7, ffn=8)
    compiled = compile_tiny(folder / "llm", llama, "-convert-to-fp16", "-mxfp6-matmul")
    state = compile_net(folder / "state", adding_up(), "-retained-state")
    return [Path(compiled.path), state / FILE_NAME]


def mutate(draw: random.Random, good: bytes) -> bytes:
    """Some bytes changed, words set to extremes, a part cut out, doubled, or moved."""
    bad = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(bad) + 1)
        kind = draw.randrange(6)
        if kind < 2:
            bad[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            width = draw.choice([2, 4, 8])
            word = draw.choice(EXTREMES) % (1 << (8 * width))
            at -= at % width
            bad[at : at + width] = word.to_bytes(width, "little")
        elif kind == 3:
            del bad[at : at + draw.randint(1, 64)]
        elif kind == 4:
            bad[at:at] = bad[at : at + draw.randint(1, 64)]
        else:
            other = draw.randrange(len(bad) + 1)
            bad[at : at + 8], bad[other : other + 8] = bad[other : other + 8], bad[at : at + 8]
    return bytes(bad)


def damaged_file(draw: random.Random, good: Path, path: Path, part: str) -> None:
    """Write a program of which this part is damaged."""
    whole = good.read_bytes()
    if part == "head":
        path.write_bytes(mutate(draw, whole[:700]) + whole[700:])
        return
    if part == "file":
        path.write_bytes(mutate(draw, whole))
        return
    segments = {k: v for k, v in read_qpc(str(good))[1].items() if k not in CHECKSUMS}
    if part in segments:
        segments[part] = mutate(draw, segments[part])
    else:
        sections = {name: elf.find(segments[NETWORK], name) or b"" for name in SECTIONS}
        # What is written in JSON, and the sizes before it, come first.
        content = sections[part]
        sections[part] = mutate(draw, content[:1500]) + content[1500:]
        segments[NETWORK] = elf.build(sections)
    write_qpc(str(path), segments)


def read_it_all(path: Path, target: Path) -> None:
    """Everything that reads a container."""
    assert qaic_qpc.main(["validate", "-i", str(path)]) in (0, 1)
    assert qaic_qpc.main(["extract", "--qpc", str(path), "--output-dir", str(target)]) in (0, 1)
    qpc = CompiledProgram.open(str(path))
    qpc.io_descriptor()
    qpc.digest()
    for constant in qpc.program.constants:
        read_constant(qpc.constants_segment(), constant)


PARTS = ("file", "head", *(name for name in SEGMENTS if name not in CHECKSUMS), *SECTIONS)


@pytest.mark.parametrize("number", counts())
@pytest.mark.parametrize("part", PARTS)
def test_damaged_containers_are_opened_or_refused(
    programs: list[Path], tmp_path: Path, part: str, number: int
) -> None:
    """Each part by itself, with right checksums where it is not the file or its head."""
    draw = random.Random(part)
    path = tmp_path / FILE_NAME

    def damaged() -> Iterator[Path]:
        for count in range(number // SHARE):
            damaged_file(draw, programs[count % 2], path, part)
            yield path

    found = put_through(
        f"QPC, {part}", damaged(), lambda _: read_it_all(path, tmp_path / "segments"), QpcError
    )
    assert sum(found) == number // SHARE
    # The flatbuffers are for the open runtime: nothing here reads them.
    assert (found.refused == 0) == (part == "metadata_fb")


def test_an_elf_of_any_bytes_is_searched_or_refused() -> None:
    draw = random.Random(2)
    good = elf.build({"a": b"one", "bc": b"two" * 9})
    assert (elf.find(good, "a"), elf.find(good, "bc")) == (b"one", b"two" * 9)
    assert elf.find(good, "b") is None
    assert elf.find(good, "c") is None
    for number in range(3000):
        bad = mutate(draw, good) if number % 2 else good[: draw.randrange(len(good))]
        found = elf.find(bad, "bc")
        assert found is None or found in bad
    assert elf.find(struct.pack("<I", 7), "a") is None
