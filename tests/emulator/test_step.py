"""The compiled step equals the reference graph, which onnxruntime runs: every architecture, every
contract that has a step, every precision, whatever the sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from step_programs import (
    MODELS,
    PRECISIONS,
    SLOTS,
    Row,
    TinyProgram,
    TinyPrograms,
    largest_error,
    prompt,
)

from qaic_ray.contract import NUM_LOGITS_TO_KEEP
from qaic_ray.emulator.container.execution import ExecutionError, LoadedProgram

TOLERANCE = 1e-4
"""Of logits, relative to the largest: what the exact numerics promise."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, sdk: Path) -> TinyPrograms:
    return TinyPrograms(tmp_path_factory.mktemp("step"), sdk)


class Both:
    """A program on the step and on the reference graph."""

    def __init__(self, program: TinyProgram) -> None:
        self.program = program
        self.loaded = LoadedProgram(program.qpc, 2)
        self.reference = LoadedProgram(program.qpc, 1, use_lowered=False)
        assert self.loaded.step is not None
        assert self.reference.step is None
        assert self.reference.lowered is None

    def errors(self, calls: list[list[Row]]) -> list[float]:
        """Of the logits of each call, the largest error."""
        step, reference = self.loaded.activate(), self.reference.activate()
        made = [
            largest_error(self.program.run(step, call), self.program.run(reference, call))
            for call in calls
        ]
        self.states = [self.program.states(a) for a in (step, reference)]
        return made


@st.composite
def schedules(draw: st.DrawFn, program: TinyProgram) -> list[list[Row]]:
    """Calls of any rows: prefill of 1 to 40 tokens from any position on, decode of any slots."""
    calls = []
    for _ in range(draw(st.integers(1, 4))):
        alone = program.shapes.continuous and draw(st.booleans())
        is_decode = not alone and (program.shapes.continuous or draw(st.booleans()))
        slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True))
        call = []
        for slot in slots[:1] if alone else slots:
            most = program.shapes.decode.seq_len if is_decode else program.longest
            length = draw(st.integers(1, most))
            start = draw(st.integers(0, program.ctx_len - length))
            call.append(Row(slot, start, prompt(length, draw(st.integers(0, 99)))))
        calls.append(call)
    return calls


# Every architecture in float32 and with MXFP6 weights. Caches stay float32 here: then what is
# left between the two is the order of sums, and the promise can be held to the letter.
EXACT_CASES = [
    *((model, "fp32", {}) for model in MODELS),
    *((model, "mx6, float32 caches", {}) for model in MODELS),
    ("head_dim 16", "fp32", {"continuous_batching": False}),
    ("head_dim 16", "mx6, float32 caches", {"continuous_batching": False}),
    ("head_dim 64, biases", "mx6, float32 caches", {"continuous_batching": False, "ctx_len": 37}),
    ("head_dim 32", "mx6, float32 caches", {"logits": NUM_LOGITS_TO_KEEP}),
    ("head_dim 32", "fp32", {"logits": NUM_LOGITS_TO_KEEP, "continuous_batching": False}),
    ("Qwen3", "mx6, float32 caches", {"logits": "last"}),
    ("Granite", "mx6, float32 caches", {"logits": "last", "ctx_len": 20}),
    ("head_dim 16", "fp32", {"ctx_len": 12}),
    ("head_dim 64, biases", "fp32", {"ctx_len": 15}),
    ("head_dim 48", "fp32", {"ctx_len": 16}),
    ("head_dim 48", "mx6, float32 caches", {"ctx_len": 17}),
    ("plain loops", "fp32", {"ctx_len": 33}),
    ("Mistral", "fp32", {"opset": 13}),
]


def case_id(case: Any) -> str:
    model, precision, options = case
    return ", ".join([model, precision, *(f"{k}={v}" for k, v in options.items())])


@pytest.fixture(scope="module", params=EXACT_CASES, ids=case_id)
def exact(request: pytest.FixtureRequest, programs: TinyPrograms) -> Both:
    model, precision, options = request.param
    return Both(programs.make(model, precision, **options))


@settings(max_examples=max(3, settings().max_examples // 6))
@given(data=st.data())
def test_logits_and_caches_are_those_of_the_reference_graph(
    exact: Both, data: st.DataObject
) -> None:
    calls = data.draw(schedules(exact.program))
    assert max(exact.errors(calls)) <= TOLERANCE
    made, expected = exact.states
    for name in expected:
        assert largest_error([made[name]], [expected[name]]) <= TOLERANCE, name


# Where caches are rounded, a number whose last bit differs may be rounded to its neighbour, a step
# of 2 ** -10 (float16) or 2 ** -6 (MXINT8) away; what is computed of it then differs by more than
# the order of sums. So the logits' bound is wider here, and nearly all numbers are the same.
ROUNDED_CASES = [
    ("plain loops", "fp16", {}),
    ("plain loops", "mx6", {}),
    ("head_dim 32", "fp16", {"continuous_batching": False}),
    ("head_dim 64, biases", "mx6", {}),
    ("Qwen3", "mx6", {"ctx_len": 37}),
    ("Granite", "fp16", {}),
    ("head_dim 32", "mx6, mxint8 caches", {}),
    ("head_dim 64, biases", "mx6, mxint8 caches", {"continuous_batching": False}),
]
LARGEST_ERRORS = {"float16": 2e-3, "mxint8": 3e-2}


@pytest.fixture(scope="module", params=ROUNDED_CASES, ids=case_id)
def rounded(request: pytest.FixtureRequest, programs: TinyPrograms) -> tuple[Both, float]:
    model, precision, options = request.param
    error = LARGEST_ERRORS[PRECISIONS[precision][1] or ""]
    return Both(programs.make(model, precision, **options)), error


@settings(max_examples=max(3, settings().max_examples // 6))
@given(data=st.data())
def test_rounded_caches_differ_where_a_last_bit_does(
    rounded: tuple[Both, float], data: st.DataObject
) -> None:
    both, error = rounded
    assert max(both.errors(data.draw(schedules(both.program)))) <= error
    made, expected = both.states
    for name in expected:
        assert largest_error([made[name]], [expected[name]]) <= error, name
    num_other = sum(int(np.count_nonzero(made[n] != expected[n])) for n in expected)
    num_written = sum(int(np.count_nonzero(expected[n])) for n in expected)
    assert num_other <= max(8, num_written * 0.05)


class OneByOne:
    """A program's rows, each alone and its prompt whole, on one thread: what others must equal."""

    def __init__(self, program: TinyProgram, numerics: str) -> None:
        self.program = program
        self.loaded = {n: LoadedProgram(program.qpc, n, numerics=numerics) for n in (1, 2, 3)}
        assert all(loaded.step is not None for loaded in self.loaded.values())

    def logits(self, calls: list[list[Row]], num_threads: int) -> tuple[dict[Any, Any], Any]:
        """Logits by slot and position, and the caches."""
        activation = self.loaded[num_threads].activate()
        found = {}
        for call in calls:
            for row, made in zip(call, self.program.run(activation, call), strict=True):
                end = row.start + len(row.ids)
                found.update({(row.slot, end - i - 1): made[-i - 1] for i in range(len(made))})
        return found, self.program.states(activation)


BITS_CASES = [
    ("head_dim 64, biases", "mx6", {"continuous_batching": False}),
    ("head_dim 64, biases", "mx6", {"logits": NUM_LOGITS_TO_KEEP}),
    ("plain loops", "mx6", {"continuous_batching": False}),
    ("Granite", "fp16", {"continuous_batching": False, "ctx_len": 37}),
    ("head_dim 32", "mx6, mxint8 caches", {"logits": NUM_LOGITS_TO_KEEP}),
]


@pytest.fixture(
    scope="module",
    params=[(case, numerics) for case in BITS_CASES for numerics in ("exact", "fast")],
    ids=lambda param: f"{case_id(param[0])}, {param[1]}",
)
def alone(request: pytest.FixtureRequest, programs: TinyPrograms) -> OneByOne:
    (model, precision, options), numerics = request.param
    return OneByOne(programs.make(model, precision, **options), numerics)


@st.composite
def cut(draw: st.DrawFn, program: TinyProgram, prompts: dict[int, Any]) -> list[list[Row]]:
    """The prompts in chunks of any length, beside each other in any way."""
    done = dict.fromkeys(prompts, 0)
    calls = []
    decode = program.shapes.decode.seq_len if program.shapes.continuous else program.longest
    while left := [slot for slot in prompts if done[slot] < len(prompts[slot])]:
        slots = draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        most = program.longest if len(slots) == 1 else decode
        call = []
        for slot in slots:
            start = done[slot]
            length = draw(st.integers(1, min(most, len(prompts[slot]) - start)))
            call.append(Row(slot, start, prompts[slot][start : start + length]))
            done[slot] = start + length
        calls.append(call)
    return calls


@settings(max_examples=max(3, settings().max_examples // 6))
@given(data=st.data())
def test_a_tokens_numbers_have_the_same_bits_whatever_runs_beside_it(
    alone: OneByOne, data: st.DataObject
) -> None:
    program = alone.program
    lengths = st.lists(st.integers(1, program.longest), min_size=SLOTS, max_size=SLOTS)
    prompts = {slot: prompt(length, 7 * slot) for slot, length in enumerate(data.draw(lengths))}
    whole = [[Row(slot, 0, ids)] for slot, ids in prompts.items()]
    expected, expected_states = alone.logits(whole, 1)
    calls = data.draw(cut(program, prompts))
    for num_threads in (1, data.draw(st.sampled_from([2, 3]))):
        made, states = alone.logits(calls, num_threads)
        common = made.keys() & expected.keys()
        assert {(slot, len(ids) - 1) for slot, ids in prompts.items()} <= common
        for key in common:
            np.testing.assert_array_equal(made[key], expected[key], err_msg=str(key))
        for name in expected_states:
            np.testing.assert_array_equal(states[name], expected_states[name], err_msg=name)


def add_output(model: Any, name: str, num_tokens: Any) -> None:
    dims = ["batch_size", num_tokens, 64]
    info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
    model.graph.output.append(info)


def add_chosen(model: Any) -> None:
    """What the last token's logits are made of."""
    *_, product = (n for n in model.graph.node if n.op_type == "MatMul")
    add_output(model, product.input[0], 1)


def add_all(model: Any) -> None:
    """The last norm of every token."""
    *_, norm = (n for n in model.graph.node if n.op_type == "CustomRMSNorm")
    add_output(model, norm.output[0], "seq_len")


@pytest.mark.parametrize(
    ("logits", "edit", "has_step"),
    [("all", add_all, True), ("last", add_all, False), ("last", add_chosen, False)],
)
def test_a_result_that_another_is_made_of_is_right_too(
    programs: TinyPrograms, logits: str, edit: Any, has_step: bool
) -> None:
    program = programs.make("head_dim 16", "fp32", logits=logits, edit=edit)
    states = program.qpc.states.values()
    other = next(
        b.name for b in program.qpc.bindings if not (b.is_input or b.name in [*states, "logits"])
    )
    loaded = [LoadedProgram(program.qpc, 1), LoadedProgram(program.qpc, 1, use_lowered=False)]
    assert (loaded[0].step is not None) == has_step
    for ids in ((5,), (5, 6, 7)):
        rows = [Row(slot, 0, ids) for slot in range(SLOTS if len(ids) == 1 else 1)]
        calls = [(p.activate(), rows) for p in loaded]
        made, expected = (program.run(*call) for call in calls)
        assert largest_error(made, expected) <= TOLERANCE
        made, expected = (program.run(*call, output=other) for call in calls)
        assert largest_error(made, expected) <= TOLERANCE


def test_positions_beyond_the_rotary_tables_are_refused(programs: TinyPrograms) -> None:
    program = programs.make("head_dim 16", "fp32", ctx_len=128)
    activation = LoadedProgram(program.qpc, 1).activate()
    program.run(activation, [Row(0, 60, (5, 6, 7, 8))])
    with pytest.raises(ExecutionError):
        program.run(activation, [Row(0, 61, (5, 6, 7, 8))])


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("model", ["plain loops", "width 40", "head_dim 32"])
def test_a_cache_that_holds_no_numbers_is_forgotten_with_it(
    programs: TinyPrograms, model: str, numerics: str
) -> None:
    program = programs.make(model, "mx6", continuous_batching=False)
    loaded = LoadedProgram(program.qpc, 2, numerics=numerics)
    activation = loaded.activate()
    call = [Row(slot, 4, prompt(20, slot)) for slot in range(SLOTS)]
    good = program.run(activation, call)
    name = next(iter(program.qpc.states))
    activation._states[name][1, :, 2] = np.nan
    made = program.run(activation, call)
    assert np.isnan(made[1]).all()
    activation._states[name][1, :, 2] = 0
    again = program.run(activation, call)
    for slot in range(SLOTS):
        np.testing.assert_array_equal(again[slot], good[slot])
    np.testing.assert_array_equal(made[0], good[0])
    np.testing.assert_array_equal(made[2], good[2])
