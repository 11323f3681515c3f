"""The documents that the emulated SDK reads, made odd: its own error for each, or they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutations import documents, texts

from qaic_ray.emulator import folder, install
from qaic_ray.emulator.card import faults, timing
from qaic_ray.emulator.compiler import configs
from qaic_ray.emulator.documents import read_text
from qaic_ray.emulator.qaicrt import buffers
from qaic_ray.emulator.tools import qaic_device_partition

NUMBER = 60
STATUS = {
    "emulated": True, "apps_version": "1.20", "platform_version": "1.20", "cards": 4,
    "sku": "pro", "digest": "ab",
}  # fmt: skip
PARTS = {"partitions": [{"name": "P", "devices": [{"deviceId": 0, "numCores": 14}]}]}
SHAPES = {"specializations": [{"batch_size": "1", "seq_len": "1", "ctx_len": "32"}]}
FAULTS = {
    "seed": 7,
    "faults": [
        {"kind": "error", "device": 1, "after": 10},
        {"kind": "data_path_timeout", "device": [0, 1], "at": [2, 9], "wait_ms": 50},
        {"kind": "corrupt", "device": "all", "probability": 0.01},
        {"kind": "slow", "factor": 4},
    ],
}
TIMING = {"mode": "pad", "bandwidth_gb_s": 137, "efficiency": 0.6, "seed": 3}
SLICES = {"BufferSpecs": [{"Name": "past.*", "ElemSize": 2, "DimSpecs": [{"start": "x"}]}]}
DEMAND = dict.fromkeys(("ddrSize", "numNsp", "numMcid", "numSem", "numVc", "l2Region"), 1)

READERS: dict[str, tuple[Any, type[Exception], Callable[[Path], object]]] = {
    "marker": (STATUS, folder.FolderError, lambda path: folder.read(path.parent)),
    "installed": (STATUS, install.InstallError, lambda path: install._existing(path.parent)),
    "shapes": (
        SHAPES,
        configs.ConfigError,
        lambda path: configs.read_specializations(str(path), named=False),
    ),
    "named": (
        {"specializations": [{"name": "Decode", "symbols": SHAPES["specializations"][0]}]},
        configs.ConfigError,
        lambda path: configs.read_specializations(str(path), named=True),
    ),
    "partition": (PARTS, configs.ConfigError, lambda path: configs.read_partition(str(path))),
    "faults": (
        FAULTS,
        faults.FaultFileError,
        lambda path: faults.parse(_text(path, faults.FaultFileError), "f"),
    ),
    "timing": (
        TIMING,
        timing.TimingFileError,
        lambda path: timing.parse(_text(path, timing.TimingFileError), "f"),
    ),
    "slices": (
        SLICES,
        buffers.SpecError,
        lambda path: buffers.SlicingSpec.parse(path.read_bytes().decode(errors="replace")),
    ),
    "reservation": (
        DEMAND,
        qaic_device_partition.PartitionError,
        lambda path: qaic_device_partition._from_config(str(path)),
    ),
}


def _text(path: Path, raises: type[Exception]) -> str:
    return read_text(str(path), raises, "VARIABLE")


@pytest.mark.parametrize("name", READERS)
def test_an_odd_document_is_read_or_refused_in_a_line(tmp_path: Path, name: str) -> None:
    good, error, read = READERS[name]
    path = tmp_path / folder.MARKER
    path.write_text(json.dumps(good))
    read(path)
    odd = [json.dumps(value).encode() for value in documents(good, 1, NUMBER)]
    odd += texts(json.dumps(good, indent=1), 2, NUMBER)
    refused = 0
    for data in odd:
        path.write_bytes(data)
        try:
            read(path)
        except error as caught:
            refused += 1
            assert len(str(caught)) < 1000  # noqa: PT017 - either outcome is right
    assert refused > NUMBER / 2


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "long", "zero"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "x")
    if kind == "folder":
        os.mkdir(path)
    elif kind == "pipe":
        os.mkfifo(path)
    path = {"device": "/dev/zero", "long": "x" * 5000, "zero": "a\0b"}.get(kind, path)
    with pytest.raises(configs.ConfigError, match="Failed to open file"):
        configs.read_partition(path)


def test_the_files_shown_in_the_docs_are_read() -> None:
    page = Path(__file__).parents[2] / "docs" / "emulated-sdk" / "faults.md"
    blocks = page.read_text(encoding="utf-8").split("```yaml\n")[1:]
    fault_file, timing_file = (block.partition("```")[0] for block in blocks)
    seed, found = faults.parse(fault_file, "docs")
    assert (seed, len({fault.kind for fault in found})) == (7, 10)
    assert timing.parse(timing_file, "docs").mode == timing.PAD
