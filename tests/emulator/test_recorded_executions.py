"""Executions dumped by any program: private, in order, and replayed to the last bit."""

from __future__ import annotations

import json
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled import PROMPT_LEN, SLOTS, write_inputs
from onnx import numpy_helper
from small_nets import adding_up, compile_net, inputs_of, two_inputs
from test_execution import step
from tiny_llama import TinyLlama

from qaic_ray.bundles.compare import compare_bundles, read_bundle
from qaic_ray.emulator import compiler, qaicrt, runner
from qaic_ray.emulator.card import Machine
from qaic_ray.emulator.qaicrt.recording import VARIABLE, RecordingError, from_environment

NUM = 100


class Caller:
    """A program of the vendor's API that runs one program, as QEfficient's session does."""

    def __init__(self, qpc: Path) -> None:
        self.context = qaicrt.Context()
        self.queue = qaicrt.Queue(self.context, 0)
        properties = qaicrt.QAicProgramProperties()
        opened = qaicrt.Qpc(str(qpc))
        self.program = qaicrt.Program(self.context, None, opened, properties)
        assert self.program.load() == qaicrt.QStatus.QS_SUCCESS
        assert self.program.activate() == qaicrt.QStatus.QS_SUCCESS
        self.exec_obj = qaicrt.ExecObj(self.context, self.program)
        self.bindings = {b.name: b for b in opened.bindings}

    def run(self, given: dict[str, Any], wanted: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        made = {n: np.zeros(d, self.bindings[n].dtype) for n, d in wanted.items()}
        nothing = np.zeros(0, np.float32)
        entries = [
            (b.index, {**given, **made}.get(name, nothing)) for name, b in self.bindings.items()
        ]
        assert self.exec_obj.setData(entries) == qaicrt.QStatus.QS_SUCCESS
        assert self.queue.enqueue(self.exec_obj) == qaicrt.QStatus.QS_SUCCESS
        assert self.exec_obj.waitForCompletion() == qaicrt.QStatus.QS_SUCCESS
        return made

    def close(self) -> None:
        del self.exec_obj
        self.program.deactivate()
        self.program.unload()


def llama_steps(llama: TinyLlama, rng: random.Random) -> Any:
    """Random prefills and decodes of random slots."""
    lengths = [0] * SLOTS
    while True:
        slot = rng.randrange(SLOTS)
        length = rng.choice((1, PROMPT_LEN))
        if lengths[slot] + length > 16:
            lengths[slot] = 0
        tokens = [rng.randrange(llama.vocab) for _ in range(length)]
        rows = {slot: (tokens, lengths[slot])}
        lengths[slot] += length
        given = step(llama, rows, length)
        yield given, {"logits": (len(given["input_ids"]), 1, llama.vocab)}


def two_steps(rng: random.Random) -> Any:
    while True:
        yield inputs_of(rng.randrange(1 << 30)), {"scores": (2, 3), "best": (2,)}


def sums(rng: random.Random) -> Any:
    while True:
        yield (
            {"x": np.array([[rng.gauss(0, 1) for _ in range(3)]], np.float32)},
            {"doubled": (1, 3)},
        )


def compiled(folder: Path, llama: TinyLlama, *flags: str) -> Path:
    assert compiler.main([*write_inputs(folder, llama), *flags]) == 0
    return folder / "qpc"


PROGRAMS = {
    "two inputs": lambda f: (compile_net(f, two_inputs()), two_steps),
    "a state": lambda f: (compile_net(f, adding_up(), "-retained-state"), sums),
    "continuous": lambda f: (
        compiled(f, TinyLlama(), "-convert-to-fp16"),
        lambda rng: llama_steps(TinyLlama(), rng),
    ),
    "static": lambda f: (
        compiled(f, TinyLlama(continuous=False)),
        lambda rng: llama_steps(TinyLlama(continuous=False), rng),
    ),
    "mx6": lambda f: (
        compiled(f, TinyLlama(hidden=64), "-convert-to-fp16", "-mxfp6-matmul"),
        lambda rng: llama_steps(TinyLlama(hidden=64), rng),
    ),
}


def record(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Record `NUM` executions of a program, and run some more; its QPC and the bundle."""
    qpc, steps = PROGRAMS[name](folder / "made")
    monkeypatch.setenv(VARIABLE, f"{NUM}:{folder / 'bundles'}")
    caller = Caller(qpc)
    for (given, wanted), _ in zip(steps(random.Random(name)), range(NUM + 5), strict=False):
        caller.run(given, wanted)
    caller.close()
    monkeypatch.delenv(VARIABLE)
    (bundle,) = (folder / "bundles").iterdir()
    return qpc, bundle


def replay(qpc: Path, bundle: Path, folder: Path) -> Path:
    folder.mkdir()
    argv = ["-t", str(qpc), "--aic-batch-json-input", str(bundle / "aic_batch_io.json")]
    argv += ["--write-output-num-samples", str(NUM), "--write-output-dir", str(folder)]
    assert runner.main(argv) == 0
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hundred_executions_replay_to_the_last_bit(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    qpc, bundle = record(tmp_path, name, monkeypatch)
    first = read_bundle(bundle)
    assert len(first.executions) == NUM
    found = compare_bundles(first, read_bundle(replay(qpc, bundle, tmp_path / "again")))
    assert (found.executions, found.largest, found.difference) == (NUM, 0.0, None)
    modes = {p.relative_to(bundle.parent): p.stat().st_mode for p in bundle.rglob("*")}
    assert {stat.S_IMODE(mode) for mode in modes.values() if stat.S_ISREG(mode)} == {0o600}
    assert {stat.S_IMODE(mode) for mode in modes.values() if stat.S_ISDIR(mode)} == {0o700}
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["two inputs", "static"])
def test_a_weight_of_one_ulp_more_is_found_and_named(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, bundle = record(tmp_path, name, monkeypatch)
    output, weight = {"two inputs": ("scores", "W"), "static": ("logits", "lm_head")}[name]
    path = next((tmp_path / "made").glob("*.onnx"))
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    values = np.array(numpy_helper.to_array(tensor))
    column = 1
    row = int(np.abs(values[:, column]).argmax())
    values[row, column] = np.nextafter(values[row, column], np.float32(np.inf))
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    if name == "two inputs":
        changed = compile_net(tmp_path / "changed", model)
    else:
        argv = write_inputs(tmp_path / "changed", TinyLlama(continuous=False))
        onnx.save(model, tmp_path / "changed" / "tiny.onnx")
        assert compiler.main(argv) == 0
        changed = tmp_path / "changed" / "qpc"
    again = replay(changed, bundle, tmp_path / "again")
    found = compare_bundles(read_bundle(bundle), read_bundle(again)).difference
    assert found is not None
    assert (found.direction, found.tensor) == ("output", output)
    assert found.element is not None
    assert found.element[-1] == column
    within = compare_bundles(read_bundle(bundle), read_bundle(again), tolerance=1e-5)
    assert within.difference is None
    assert 0 < within.largest < 1e-5


def test_each_activation_has_a_bundle_and_the_form_is_the_vendors(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qpc, _ = PROGRAMS["a state"](tmp_path / "made")
    monkeypatch.setenv(VARIABLE, f"2:{tmp_path / 'bundles'}")
    for _ in range(2):
        caller = Caller(qpc)
        caller.run({"x": np.ones((1, 3), np.float32)}, {"doubled": (1, 3)})
        caller.close()
    first, second = sorted((tmp_path / "bundles").iterdir())
    assert second.name == f"{first.name}-2"
    document = json.loads((first / "aic_batch_io.json").read_text())
    assert document == {
        "IO-files": [
            [
                {
                    "path": f"data/000000-{side}-{name}.raw",
                    "io-direction": side,
                    "elem-size": 4,
                    "map-to": name,
                    "dims": [1, 3],
                }
                for side, name in (("in", "x"), ("out", "doubled"))
            ]
        ]
    }
    assert compare_bundles(read_bundle(first), read_bundle(second)).difference is None


@pytest.mark.parametrize("said", ["x", "10", "10:", "0:/tmp/x", "-1:/tmp/x", ":/tmp/x", "1e3:/t"])
def test_a_variable_that_says_neither_is_refused(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv(VARIABLE, said)
    with pytest.raises(RecordingError, match="give a number of executions and a folder"):
        from_environment()


def test_a_disk_that_takes_nothing_ends_the_recording_and_not_the_program(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qpc, _ = PROGRAMS["a state"](tmp_path / "made")
    monkeypatch.setenv(VARIABLE, f"5:{tmp_path / 'bundles'}")
    caller = Caller(qpc)
    (bundle,) = (tmp_path / "bundles").iterdir()
    given = {"x": np.ones((1, 3), np.float32)}
    caller.run(given, {"doubled": (1, 3)})
    (bundle / "data" / "000001-in-x.raw").mkdir()
    for total in (2, 3):
        assert caller.run(given, {"doubled": (1, 3)})["doubled"][0, 0] == 2 * total
    caller.close()
    assert len(read_bundle(bundle).executions) == 1
