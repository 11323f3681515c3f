"""Exported graphs through the emulated SDK: compiled by its command, run by its program."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_here import compile_here
from random_models import export_untouched, write_checkpoint

from qaic_ray import contract
from qaic_ray.compile.compiler import check_qpc, run_compiler
from qaic_ray.contract import IoContract
from qaic_ray.emulator.container.execution import CompiledProgram, LoadedProgram
from qaic_ray.export.check.replay import NUM_KEPT, PositionIdsReplay, Replay, replay_of
from qaic_ray.export.check.verify import Trace, trace_prompts
from qaic_ray.export.export import ExportResult
from qaic_ray.model.checkpoint import Checkpoint, ModelManifest
from qaic_ray.options import EmulatorOptions, ExportOptions
from qaic_ray.sdk import Sdk, find_sdk

CACHE_INDEX = IoContract.CACHE_INDEX
CTX_LEN, CHUNK_LEN, NUM_STEPS = 32, 4, 5
PROMPT_LENGTHS = (3, 14, 9)
CONTEXTS = (8, 16)

OLD = ("1.14.2", "1.17", "1.20")
NEW = ("1.21.6", "1.22")
# The recipe's graphs have plain operators only, which every compiler takes; from Apps 1.16 on
# there are the card's own operators, and from 1.21 on opset 17.
FITTING = {
    "cache-index": (
        ExportOptions(io=CACHE_INDEX, opset=13, continuous_batching=False),
        (*OLD, *NEW),
    ),
    "cache-index, opset 17": (
        ExportOptions(io=CACHE_INDEX, continuous_batching=False, opset=17),
        NEW,
    ),
    "static, opset 13": (
        ExportOptions(opset=13, continuous_batching=False),
        ("1.17", "1.20", *NEW),
    ),
    "continuous, opset 13": (
        ExportOptions(continuous_batching=True, opset=13),
        ("1.17", "1.20", *NEW),
    ),
    "static": (ExportOptions(continuous_batching=False), NEW),
    "continuous": (ExportOptions(continuous_batching=True), NEW),
}
CHANGED = {
    "next_tokens": ExportOptions(continuous_batching=True, next_tokens=True),
    "next_tokens, cache-index": ExportOptions(
        io=CACHE_INDEX, opset=13, next_tokens=True, continuous_batching=False
    ),
    "all": ExportOptions(logits="all", continuous_batching=False),
    "all, cache-index": ExportOptions(
        io=CACHE_INDEX, opset=13, logits="all", continuous_batching=False
    ),
    "num_logits_to_keep": ExportOptions(
        continuous_batching=True, logits=contract.NUM_LOGITS_TO_KEEP
    ),
    "num_logits_to_keep, next_tokens": ExportOptions(
        logits=contract.NUM_LOGITS_TO_KEEP, next_tokens=True, continuous_batching=False
    ),
    "comp_ctx_lengths": ExportOptions(continuous_batching=True, comp_ctx_lengths=True),
    "comp_ctx_lengths, num_logits_to_keep": ExportOptions(
        comp_ctx_lengths=True, logits=contract.NUM_LOGITS_TO_KEEP, continuous_batching=False
    ),
    "replicated heads": ExportOptions(continuous_batching=True, replicate_kv_heads=2),
    "replicated heads, cache-index": ExportOptions(
        io=CACHE_INDEX, opset=13, replicate_kv_heads=2, continuous_batching=False
    ),
    "float16 files": ExportOptions(opset=13, dtype="float16", continuous_batching=False),
    "mxint8 cache": ExportOptions(continuous_batching=True, kv_dtype="mxint8"),
}


def specializations(options: ExportOptions, sdk: Sdk) -> str:
    num_rows, shapes = len(PROMPT_LENGTHS), [(CHUNK_LEN, CTX_LEN), (1, CTX_LEN)]
    if options.comp_ctx_lengths:
        shapes += [(1, contexts) for contexts in CONTEXTS]
    if options.logits == contract.NUM_LOGITS_TO_KEEP:
        shapes.append((NUM_KEPT, CTX_LEN))
    entries = []
    for seq_len, contexts in shapes:
        prefill = options.continuous_batching and seq_len == CHUNK_LEN
        symbols = {
            "batch_size": "1" if prefill else str(num_rows),
            "seq_len": str(seq_len),
            "ctx_len": str(CTX_LEN),
        }
        if options.continuous_batching:
            symbols["full_batch_size"] = str(num_rows + 1)
            symbols["batch_size"] = "1" if prefill else str(num_rows)
        if options.logits == contract.NUM_LOGITS_TO_KEEP:
            symbols[contract.NUM_LOGITS_TO_KEEP] = str(min(NUM_KEPT, seq_len))
        if options.comp_ctx_lengths:
            symbols[contract.COMP_CTX_LENGTHS] = str(contexts)
        entries.append(symbols)
    named = [{"name": f"S{i}", "symbols": symbols} for i, symbols in enumerate(entries)]
    return json.dumps({"specializations": named if sdk.named_specializations else entries})


def compiled(
    folder: Path,
    result: ExportResult,
    options: ExportOptions,
    apps_version: str,
    *flags: str,
    compile_: Callable[[list[str], Path], None] = run_compiler,
) -> LoadedProgram:
    """The program that the SDK's compiler makes; without flags everything stays float32."""
    sdk = find_sdk("emulated", EmulatorOptions(cards=1, sku="standard", apps_version=apps_version))
    (folder / "specializations.json").write_text(specializations(options, sdk))
    argv = [
        str(sdk.compiler),
        f"-m={result.onnx_path}",
        "-aic-hw",
        f"-aic-hw-version={sdk.hw_version}",
        f"-network-specialization-config={folder / 'specializations.json'}",
        "-retained-state",
        "-aic-num-cores=14",
        *(["-compile-only"] if sdk.compile_only else []),
        *flags,
        f"-aic-binary-dir={folder / 'qpc'}",
    ]
    compile_(argv, folder / "log")
    check_qpc(folder / "qpc", folder / "log")
    return LoadedProgram(CompiledProgram.open(str(folder / "qpc")), 1)


class OnCard:
    """In the place of an onnxruntime session: the state stays in the program."""

    def __init__(self, program: LoadedProgram, manifest: ModelManifest) -> None:
        self._activation = program.activate()
        self._manifest = manifest

    def run(self, outputs: list[str], feed: Mapping[str, Any]) -> list[Any]:
        manifest = self._manifest
        num_rows, seq_len = feed[contract.INPUT_IDS].shape
        width = 1 if manifest.next_tokens else manifest.vocab_size
        num_tokens = {"last": 1, "all": seq_len}.get(manifest.logits, min(NUM_KEPT, seq_len))
        dims: tuple[int, ...] = (num_rows, num_tokens, width)
        if manifest.contract is CACHE_INDEX and manifest.logits == "last":
            dims = (num_rows, width)
        # As the recipe's runModel.py: in decode the mask is the one that stayed on the card.
        kept = {contract.ATTENTION_MASK} if seq_len == 1 else set()
        inputs = {n: v for n, v in feed.items() if not contract.is_past(n) and n not in kept}
        if contract.COMP_CTX_LENGTHS in inputs:
            needed = len(inputs[contract.COMP_CTX_LENGTHS])
            known = [n for n in CONTEXTS if n >= needed and seq_len == 1]
            inputs[contract.COMP_CTX_LENGTHS] = np.zeros(min(known, default=CTX_LEN), np.int64)
        answer = self._activation.run(inputs, {outputs[0]: dims})[outputs[0]]
        return [answer, *(feed.get(name.removesuffix("_RetainedState")) for name in outputs[1:])]


def replay_on(program: LoadedProgram, manifest: ModelManifest) -> Replay:
    layers, card = range(manifest.num_layers), OnCard(program, manifest)
    return replay_of(manifest.contract)(card, manifest, layers, ctx_len=CTX_LEN, watched={})


def check_answers(
    program: LoadedProgram, traces: Sequence[Trace], result: ExportResult, tolerance: float
) -> None:
    """Prompts of mixed lengths in one batch, chunk by chunk, and then a few tokens more."""
    replay, slots = replay_on(program, result.manifest), list(range(len(traces)))
    replay.reset(len(slots) + result.manifest.continuous)
    tokens = [trace.tokens[: trace.prompt_len] for trace in traces]
    if result.manifest.continuous:
        slots.reverse()
        found = []
        for row, slot in enumerate(slots):
            answers = replay.prefill([tokens[row]], [slot], CHUNK_LEN)
            found += [(row, answer) for answer in answers]
    else:
        found = [(a.row, a) for a in replay.prefill(tokens, slots, CHUNK_LEN)]
    if result.manifest.logits == contract.NUM_LOGITS_TO_KEEP:
        assert isinstance(replay, PositionIdsReplay)
        ends = [trace.prompt_len + NUM_KEPT for trace in traces]
        ends[-1] -= 1
        more = [
            trace.tokens[trace.prompt_len : end] for trace, end in zip(traces, ends, strict=True)
        ]
        found += [(answer.row, answer) for answer in replay.extend(more, slots)]
        traces = [replace(t, prompt_len=end) for t, end in zip(traces, ends, strict=True)]
    for step in range(NUM_STEPS - NUM_KEPT):
        fresh = [int(trace.tokens[trace.prompt_len + step]) for trace in traces]
        found += [(answer.row, answer) for answer in replay.decode(fresh, slots)]
    assert len(found) >= len(traces) * (1 + NUM_STEPS - NUM_KEPT)
    for row, answer in found:
        expected = traces[row].logits[answer.position]
        if result.manifest.next_tokens:
            assert expected[int(answer.values[0])] >= expected.max() - tolerance
        else:
            np.testing.assert_allclose(answer.values, expected, atol=tolerance)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", head_dim=32)


@pytest.fixture(scope="module")
def traces(checkpoint: Checkpoint) -> list[Trace]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, length).tolist() for length in PROMPT_LENGTHS]
    return trace_prompts(checkpoint, prompts, num_steps=NUM_STEPS)


@pytest.fixture(scope="module")
def exports(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[ExportOptions, ExportResult]]:
    """Every export, by name."""
    folder = tmp_path_factory.mktemp("exports")
    wanted = {name: options for name, (options, _) in FITTING.items()} | CHANGED
    return {
        name: (
            options,
            export_untouched(checkpoint, options, output=folder / f"{number}-kv", verify="off"),
        )
        for number, (name, options) in enumerate(wanted.items())
    }


Exports = dict[str, tuple[ExportOptions, ExportResult]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAIC_RAY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("name", FITTING)
def test_compiles_and_runs_wherever_it_fits(
    exports: Exports, traces: list[Trace], tmp_path: Path, name: str
) -> None:
    options, result = exports[name]
    versions = FITTING[name][1]

    # One export goes through the command of every version; the others through what it calls.
    compile_ = run_compiler if versions == (*OLD, *NEW) else compile_here
    for apps_version in versions:
        folder = tmp_path / apps_version
        folder.mkdir()
        program = compiled(folder, result, options, apps_version, compile_=compile_)
        check_answers(program, traces, result, 1e-4)


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_compiles_and_runs(
    exports: Exports, traces: list[Trace], tmp_path: Path, name: str
) -> None:
    options, result = exports[name]
    exact = name not in ("float16 files", "mxint8 cache")
    flags = [f"-custom-IO-list-file={result.folder / 'custom_io.yaml'}", "-convert-to-fp16"]
    flags = [] if exact else flags
    program = compiled(tmp_path, result, options, "1.20", *flags, compile_=compile_here)
    assert program.step is not None
    check_answers(program, traces, result, 1e-4 if exact else 0.5)
