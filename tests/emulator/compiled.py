"""Compiles the tiny Llama with the emulated compiler, in this process."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from hypothesis import settings
from tiny_llama import TinyLlama

from qaic_ray.emulator import compiler
from qaic_ray.emulator.container import CHECKSUMS, NETWORK, QpcWriter, elf
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram

FUZZ_EXAMPLES = int(os.environ.get("QAIC_FUZZ_EXAMPLES") or settings().max_examples)
"""Inputs of each fuzz test; the long run of all together takes 100,000."""

SLOTS = 3
PROMPT_LEN = 4
CTX_LEN = 16
COMP_CTX_LENGTHS = (8, CTX_LEN)


def write_inputs(
    folder: Path, llama: TinyLlama, *, kv: str | None = None, named: bool = False
) -> list[str]:
    """The model and its config files in `folder`; returns the argv that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(llama.onnx(), folder / "tiny.onnx")
    prefill_rows = 1 if llama.continuous else SLOTS
    entries: list[dict[str, Any]] = [
        {"batch_size": str(rows), "seq_len": str(length), "ctx_len": str(CTX_LEN)}
        for rows, length in ((prefill_rows, PROMPT_LEN), (SLOTS, 1))
    ]
    for entry, compute_ctx in zip(entries, COMP_CTX_LENGTHS, strict=True):
        if llama.continuous:
            entry["full_batch_size"] = str(SLOTS)
        if llama.comp_ctx_lengths:
            entry["comp_ctx_lengths"] = str(compute_ctx)
    if named:
        entries = [{"name": f"S{i}", "symbols": entry} for i, entry in enumerate(entries)]
    (folder / "specializations.json").write_text(json.dumps({"specializations": entries}))
    argv = [
        f"-m={folder / 'tiny.onnx'}",
        "-aic-hw",
        "-aic-hw-version=2.0",
        "-compile-only",
        "-retained-state",
        "-aic-num-cores=14",
        f"-network-specialization-config={folder / 'specializations.json'}",
        f"-aic-binary-dir={folder / 'qpc'}",
    ]
    if kv is not None:
        lines = [
            f" - IOName: {name}{suffix}\n   Precision: {kv}\n"
            for name in llama.past_names()
            for suffix in ("", "_RetainedState")
        ]
        (folder / "custom_io.yaml").write_text("\n".join(lines))
        argv.append(f"-custom-IO-list-file={folder / 'custom_io.yaml'}")
    return argv


def compile_tiny(
    folder: Path, llama: TinyLlama, *flags: str, kv: str | None = None
) -> CompiledProgram:
    """Compile and open; the compiler has to succeed."""
    assert compiler.main([*write_inputs(folder, llama, kv=kv), *flags]) == 0
    return CompiledProgram.open(str(folder / "qpc"))


def write_qpc(path: str, segments: Mapping[str, bytes]) -> None:
    """Write a container from whole segments; what it has of checksums is written anew."""
    names = [name for name in segments if name not in CHECKSUMS]
    with open(path, "wb") as file:
        writer = QpcWriter(file, names)
        for name in names:
            writer.write(segments[name])
            writer.end_segment()
        writer.finish(zlib.crc32(elf.find(segments[NETWORK], "metadata_fb") or b""))


def three_ways(qpc: CompiledProgram) -> list[LoadedProgram]:
    """A program as a compiled step, on the lowered graph, and last on the reference graph."""
    programs = [
        LoadedProgram(qpc, 2),
        LoadedProgram(qpc, 1, use_step=False),
        LoadedProgram(qpc, 1, use_lowered=False),
    ]
    assert [p.step is None for p in programs] == [False, True, True]
    assert [p.lowered is None for p in programs] == [True, False, True]
    return programs
