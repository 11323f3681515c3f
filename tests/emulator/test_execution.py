"""A compiled tiny Llama against the same model in numpy, and what a program does at its edges."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import CTX_LEN, PROMPT_LEN, SLOTS, compile_tiny
from onnx import numpy_helper
from tiny_llama import NumpyLlama, TinyLlama

from qaic_ray.emulator import compiler
from qaic_ray.emulator.container import aicapi, execution
from qaic_ray.emulator.container.constants import Weights, packs_into_its_own_memory
from qaic_ray.emulator.container.execution import (
    CompiledProgram,
    LoadedProgram,
    NoMatchingDimension,
    ShapeError,
)
from qaic_ray.emulator.numbers import kv_cache, mxfp6

PRECISIONS = {
    "fp32": (),
    "fp16": ("-convert-to-fp16",),
    "mx6": ("-convert-to-fp16", "-mxfp6-matmul"),
}


@pytest.fixture(scope="module")
def qpcs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], CompiledProgram]:
    """Every precision of a continuous and a static tiny Llama."""
    folder = tmp_path_factory.mktemp("qpcs")
    return {
        (continuous, name): compile_tiny(
            folder / f"{name}-{continuous}",
            TinyLlama(continuous=continuous),
            *flags,
            kv=None if name == "fp32" else "float16",
        )
        for continuous in (True, False)
        for name, flags in PRECISIONS.items()
    }


def rounded_weights(llama: TinyLlama, precision: str) -> dict[str, np.ndarray]:
    """The weights that the documentation of the flags promises."""
    if precision == "fp32":
        return llama.weights
    rounded = {k: v.astype(np.float16).astype(np.float32) for k, v in llama.weights.items()}
    if precision == "mx6":
        for name in llama.weights:
            if name.startswith("w") or name == "lm_head":
                rounded[name] = mxfp6.quantize(llama.weights[name])
    return rounded


def step(llama: TinyLlama, rows: dict[int, tuple[list[int], int]], length: int) -> dict[str, Any]:
    """Inputs of one inference: slot -> (tokens, first position); padding everywhere else."""
    num_rows = 1 if llama.continuous and length > 1 else SLOTS
    slots = list(rows) if num_rows == 1 else list(range(SLOTS))
    ids = np.zeros((num_rows, length), np.int64)
    positions = np.full((num_rows, length), -1, np.int64)
    for row, slot in enumerate(slots):
        tokens, start = rows.get(slot, ([], 0))
        ids[row, : len(tokens)] = tokens
        positions[row, : len(tokens)] = np.arange(start, start + len(tokens))
    inputs = {"input_ids": ids, "position_ids": positions}
    if llama.continuous:
        inputs["batch_index"] = np.array(slots, np.int64)[:, None]
    return inputs


def logits_of(activation: Any, llama: TinyLlama, inputs: dict[str, Any]) -> np.ndarray:
    dims = (len(inputs["input_ids"]), 1, llama.vocab)
    return np.asarray(activation.run(inputs, {"logits": dims})["logits"][:, 0])


@pytest.mark.parametrize("use_lowered", [True, False])
@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_logits_are_those_of_numpy(
    qpcs: dict[Any, CompiledProgram], precision: str, continuous: bool, use_lowered: bool
) -> None:
    llama = TinyLlama(continuous=continuous)
    loaded = LoadedProgram(qpcs[continuous, precision], 1, use_lowered=use_lowered)
    assert (loaded.step is not None) == use_lowered
    activation = loaded.activate()

    def half(x: Any) -> Any:
        return x.astype(np.float16)

    truth = NumpyLlama(
        llama, rounded_weights(llama, precision), None if precision == "fp32" else half
    )
    tolerance = 1e-5 if precision == "fp32" else 3e-3
    prompt = [3, 1, 4, 1, 5, 9]
    for start in (0, PROMPT_LEN):
        tokens = prompt[start : start + PROMPT_LEN]
        made = logits_of(activation, llama, step(llama, {1: (tokens, start)}, PROMPT_LEN))
        for i, token in enumerate(tokens):
            expected = truth.forward(1, token, start + i)
        row = 0 if continuous else 1
        np.testing.assert_allclose(made[row], expected, atol=tolerance)
    for position in (6, 7, 8):
        rows = {1: ([2], position), 2: ([7], position - 6)}
        made = logits_of(activation, llama, step(llama, rows, 1))
        np.testing.assert_allclose(made[1], truth.forward(1, 2, position), atol=tolerance)
        np.testing.assert_allclose(made[2], truth.forward(2, 7, position - 6), atol=tolerance)


def test_inputs_keep_their_order_and_outputs_do_not(qpcs: dict[Any, CompiledProgram]) -> None:
    qpc = qpcs[True, "fp16"]
    names = [b.name for b in qpc.bindings]
    graph_order = ["input_ids", "position_ids", *TinyLlama().past_names(), "batch_index"]
    assert names[:7] == graph_order
    outputs = ["logits", *(f"{name}_RetainedState" for name in TinyLlama().past_names())]
    assert sorted(names[7:]) == sorted(outputs)
    assert names[7:] != outputs
    assert [b.index for b in qpc.bindings] == list(range(12))
    by_name = {b.name: b for b in qpc.bindings}
    assert by_name["past_key.0"].type == aicapi.FLOAT_16_TYPE
    assert by_name["past_key.0"].dims == (SLOTS, 2, CTX_LEN, 8)
    assert by_name["past_key.0"].size == SLOTS * 2 * CTX_LEN * 8 * 2
    assert by_name["input_ids"].dims == (1, PROMPT_LEN)
    assert by_name["input_ids"].is_partial_buf_allowed
    assert by_name["past_value.1_RetainedState"].is_partial_buf_allowed
    assert by_name["logits"].type == aicapi.FLOAT_TYPE


def test_io_descriptor_tells_the_same_as_the_bindings(qpcs: dict[Any, CompiledProgram]) -> None:
    qpc = qpcs[True, "fp16"]
    desc = aicapi.IoDesc()
    desc.ParseFromString(qpc.io_descriptor())
    bindings = desc.selected_set.bindings
    assert [(b.name, b.index, tuple(b.dims), b.size) for b in bindings] == [
        (b.name, b.index, b.dims, b.size) for b in qpc.bindings
    ]
    assert [b.dir for b in bindings] == [int(not b.is_input) for b in qpc.bindings]
    at = [b.name for b in qpc.bindings].index("input_ids")
    shapes = [tuple(entry.shapes[at].dims) for entry in desc.allowed_shapes]
    assert shapes == [(1, PROMPT_LEN), (SLOTS, 1)]


def test_shapes_of_no_specialization_are_refused(qpcs: dict[Any, CompiledProgram]) -> None:
    llama = TinyLlama()
    activation = LoadedProgram(qpcs[True, "fp32"], 1).activate()
    inputs = step(llama, {0: ([1], 0)}, 1)
    with pytest.raises(NoMatchingDimension, match="No matching dimension found"):
        activation.run({**inputs, "input_ids": np.zeros((SLOTS, 2), np.int64)}, {})
    with pytest.raises(NoMatchingDimension):
        activation.run(inputs, {"logits": (1, 1, llama.vocab)})
    with pytest.raises(ShapeError, match="batch_index"):
        activation.run({k: v for k, v in inputs.items() if k != "batch_index"}, {})
    with pytest.raises(ShapeError, match="nothing"):
        activation.run({**inputs, "nothing": np.zeros(1)}, {})


def test_a_token_outside_of_the_vocabulary_is_an_error_not_a_crash(
    qpcs: dict[Any, CompiledProgram],
) -> None:
    llama = TinyLlama()
    activation = LoadedProgram(qpcs[True, "fp32"], 1).activate()
    with pytest.raises(execution.ExecutionError):
        activation.run(step(llama, {0: ([llama.vocab], 0)}, 1), {})


@pytest.mark.parametrize("use_lowered", [True, False])
def test_retained_state_can_be_read_and_replaced(
    qpcs: dict[Any, CompiledProgram], use_lowered: bool
) -> None:
    llama = TinyLlama()
    loaded = LoadedProgram(qpcs[True, "fp16"], 1, use_lowered=use_lowered)
    first, second = loaded.activate(), loaded.activate()
    pasts = {f"{n}_RetainedState": (SLOTS, 2, CTX_LEN, 8) for n in llama.past_names()}
    prefill = step(llama, {1: ([5, 6, 7], 0)}, PROMPT_LEN)
    made = first.run(prefill, {"logits": (1, 1, llama.vocab), **pasts})
    assert made["past_key.0_RetainedState"].dtype == np.float16
    assert np.count_nonzero(made["past_key.0_RetainedState"][1, 0, :, 0]) == 3
    assert not made["past_key.0_RetainedState"][[0, 2]].any()
    given = {name: made[f"{name}_RetainedState"] for name in llama.past_names()}
    decode = step(llama, {1: ([8], 3)}, 1)
    expected = logits_of(first, llama, decode)
    np.testing.assert_array_equal(logits_of(second, llama, {**decode, **given}), expected)
    first.reset()
    assert not np.allclose(logits_of(first, llama, decode)[1], expected[1], atol=1e-3)


@pytest.mark.parametrize("use_lowered", [True, False])
def test_a_state_given_by_the_caller_is_rounded_too(tmp_path: Path, use_lowered: bool) -> None:
    qpc = compile_tiny(tmp_path, TinyLlama(), "-convert-to-fp16")
    activation = LoadedProgram(qpc, 1, use_lowered=use_lowered).activate()
    past = np.random.default_rng(0).standard_normal((SLOTS, 2, CTX_LEN, 8)).astype(np.float32)
    activation.run({**step(TinyLlama(), {0: ([1], 0)}, 1), "past_key.1": past}, {})
    np.testing.assert_array_equal(
        activation.state("past_key.1")[1:], past[1:].astype(np.float16).astype(np.float32)
    )


def test_padding_rows_leave_their_slots_alone(qpcs: dict[Any, CompiledProgram]) -> None:
    llama = TinyLlama()
    activation = LoadedProgram(qpcs[True, "fp32"], 1).activate()
    dims = {f"{n}_RetainedState": (SLOTS, 2, CTX_LEN, 8) for n in llama.past_names()}
    activation.run(step(llama, {1: ([5, 6], 0)}, PROMPT_LEN), {})
    before = activation.run(step(llama, {}, 1), dims)
    after = activation.run(step(llama, {0: ([1], 0), 2: ([2], 5)}, 1), dims)
    for name in dims:
        np.testing.assert_array_equal(before[name][1], after[name][1])
        assert np.any(after[name][2, :, 5])


def test_mxint8_cache_holds_mxint8_values(tmp_path: Path) -> None:
    llama = TinyLlama(hidden=64, num_heads=2, num_kv_heads=1)
    qpc = compile_tiny(tmp_path, llama, "-convert-to-fp16", kv="mxint8")
    results = []
    for use_lowered in (True, False):
        loaded = LoadedProgram(qpc, 1, use_lowered=use_lowered)
        assert (loaded.step is not None) == use_lowered
        activation = loaded.activate()
        made = logits_of(activation, llama, step(llama, {0: ([5, 6, 7], 0)}, PROMPT_LEN))
        cache = activation.state("past_key.1")[0, 0, :3]
        largest = np.abs(cache).max(axis=1, keepdims=True)
        steps = cache / 2.0 ** (np.floor(np.log2(largest)) - 6)
        np.testing.assert_array_equal(steps, np.rint(steps))
        assert np.abs(steps).max() <= 127
        results.append(made)
        name = "past_key.1_RetainedState"
        dims = (SLOTS, 1, CTX_LEN, 33)
        packed = activation.run(step(llama, {}, 1), {name: dims})[name]
        np.testing.assert_array_equal(
            kv_cache.decode(packed[0, 0, :3, None].view(np.uint8), 32), cache
        )
        other = loaded.activate()
        other.run({**step(llama, {}, 1), "past_key.1": packed}, {})
        np.testing.assert_array_equal(other.state("past_key.1"), activation.state("past_key.1"))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    binding = next(b for b in qpc.bindings if b.name == "past_key.1")
    assert (binding.type, binding.size) == (aicapi.INT8_TYPE, SLOTS * CTX_LEN * 33)


RUNNING_SUM = """
<ir_version: 8, opset_import: ["": 13]>
sum (int64[batch_size, seq_len] input_ids, bool[batch_size, ctx_len] attention_mask,
     int64[1] cache_index, float[batch_size, 1, ctx_len, 4] past_key_0)
 => (float[batch_size, 4] logits, bool[batch_size, ctx_len] attention_mask_RetainedState,
     float[batch_size, 1, ctx_len, 4] past_key_0_RetainedState)
{
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  i1 = Constant <value = int64[1] {1}> ()
  hidden = Gather (embed, input_ids)
  dims = Shape (input_ids)
  length = Gather (dims, one)
  span = Range (zero, length, one)
  where = Add (span, cache_index)
  indices = Unsqueeze (where, i1)
  steps_first = Transpose <perm = [1, 0, 2]> (hidden)
  i2 = Constant <value = int64[1] {2}> ()
  updates = Unsqueeze (steps_first, i2)
  context_first = Transpose <perm = [2, 0, 1, 3]> (past_key_0)
  written = ScatterND (context_first, indices, updates)
  past_key_0_RetainedState = Transpose <perm = [1, 2, 0, 3]> (written)
  attention_mask_RetainedState = Identity (attention_mask)
  keys = Squeeze (past_key_0_RetainedState, i1)
  weights_2d = Cast <to = 1> (attention_mask)
  weights = Unsqueeze (weights_2d, i1)
  total = MatMul (weights, keys)
  logits = Squeeze (total, i1)
}
"""


def test_a_graph_with_cache_index_and_a_retained_mask(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(RUNNING_SUM)
    embed = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(embed, "embed"))
    onnx.save(model, tmp_path / "sum.onnx")
    entries = [{"batch_size": "2", "seq_len": s, "ctx_len": "8"} for s in ("4", "1")]
    (tmp_path / "s.json").write_text(json.dumps({"specializations": entries}))
    argv = [
        f"-m={tmp_path / 'sum.onnx'}",
        f"-aic-binary-dir={tmp_path / 'qpc'}",
        f"-network-specialization-config={tmp_path / 's.json'}",
        "-aic-hw",
        "-retained-state",
    ]
    assert compiler.main(argv) == 0
    qpc = CompiledProgram.open(str(tmp_path / "qpc"))
    by_name = {b.name: b for b in qpc.bindings}
    assert by_name["attention_mask"].type == aicapi.INT8_TYPE
    assert by_name["attention_mask"].is_partial_buf_allowed
    activation = LoadedProgram(qpc, 1).activate()
    ids = np.array([[0, 0, 3, 4], [1, 2, 3, 4]])
    mask = np.zeros((2, 8), np.int8)
    mask[0, 2:5], mask[1, :5] = 1, 1
    inputs = {"input_ids": ids, "cache_index": np.array([0]), "attention_mask": mask}
    made = activation.run(inputs, {"logits": (2, 4)})["logits"]
    np.testing.assert_allclose(made, [embed[[3, 4]].sum(0), embed[[1, 2, 3, 4]].sum(0)], atol=1e-6)
    step = {"input_ids": np.array([[5], [6]]), "cache_index": np.array([4])}
    made = activation.run(step, {"logits": (2, 4)})["logits"]
    expected = [embed[[3, 4, 5]].sum(0), embed[[1, 2, 3, 4, 6]].sum(0)]
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_activations_run_from_several_threads(qpcs: dict[Any, CompiledProgram]) -> None:
    llama = TinyLlama()
    loaded = LoadedProgram(qpcs[True, "fp32"], 1)
    shared = loaded.activate()

    def work(slot: int) -> list[np.ndarray]:
        """A prompt in a slot of the shared activation, as several queues would run it."""
        chunks = [step(llama, {slot: ([slot + 1, 5, 7], start)}, PROMPT_LEN) for start in (0, 3, 6)]
        return [logits_of(shared, llama, chunk) for chunk in chunks]

    with ThreadPoolExecutor(SLOTS) as pool:
        together = list(pool.map(work, range(SLOTS)))
    shared.reset()
    np.testing.assert_array_equal(together, [work(slot) for slot in range(SLOTS)])


@pytest.mark.parametrize(("named", "threads"), [("3", 3), ("none", None), ("", None)])
def test_threads_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, named: str, threads: int | None
) -> None:
    """Ray gives each of its processes one OpenMP thread; the cards share cores themselves."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("QAIC_EMULATOR_THREADS", named)
    expected = threads or len(os.sched_getaffinity(0))
    assert execution.num_threads_of_environment() == expected


def test_a_lowered_graph_that_does_not_hold_is_left(
    qpcs: dict[Any, CompiledProgram],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llama = TinyLlama()
    good = LoadedProgram(qpcs[True, "mx6"], 1, use_step=False)
    monkeypatch.setattr(execution.Probe, "holds", lambda _: False)
    other = LoadedProgram(qpcs[True, "mx6"], 1, use_step=False)
    assert (good.lowered is not None, other.lowered is not None) == (True, False)
    assert "without faster operators" in caplog.text
    inputs = step(llama, {2: ([9, 8, 7], 0)}, PROMPT_LEN)
    made = [logits_of(p.activate(), llama, inputs) for p in (good, other)]
    np.testing.assert_allclose(*made, atol=1e-4)


def test_released_weights_can_be_restored(qpcs: dict[Any, CompiledProgram]) -> None:
    qpc = qpcs[True, "mx6"]
    model = onnx.ModelProto.FromString(qpc.graphs["reference"])
    constants = {c.name: c for c in qpc.program.constants}
    weights = Weights(model, constants, qpc.constants_segment())
    expected = mxfp6.quantize(TinyLlama().weights["wq_0"])
    np.testing.assert_array_equal(weights.arrays["wq_0"], expected)
    weights.release()
    weights.restore()
    np.testing.assert_array_equal(weights.arrays["wq_0"], expected)
    assert packs_into_its_own_memory()
