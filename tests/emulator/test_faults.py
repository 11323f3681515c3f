"""Faults on demand: each kind as a program of the runtime meets it, and the file that asks."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from awaited import said
from hypothesis import given

from qaic_ray.emulator.card import Machine, faults

Write = Callable[[str, str], None]


class Session:
    """A program on a card that answers with `run`."""

    def __init__(self, rt: ModuleType, qid: int, properties: Any = None) -> None:
        self.rt = rt
        self.context = rt.Context(rt.QIDList([qid]))
        self.queue = rt.Queue(self.context, qid)
        self.program = rt.Program(self.context, qid, rt.Qpc(""), properties)
        self.exec_obj = rt.ExecObj(self.context, self.program)
        self.logits = np.zeros((2, 1, 8), np.float32)

    def run(self) -> Any:
        self.exec_obj.setData([(1, np.ones((2, 1), np.int64)), (2, self.logits)])
        status = self.queue.enqueue(self.exec_obj)
        return self.exec_obj.waitForCompletion() if status == 0 else status


@pytest.fixture
def ask(write_file: Write) -> Callable[[str], None]:
    return lambda entry: write_file(faults.VARIABLE, f"seed: 7\nfaults:\n- {{{entry}}}\n")


Ask = Callable[[str], None]


def test_absent(qaicrt: ModuleType, ask: Ask) -> None:
    ask("kind: absent, device: [1, 3]")
    assert qaicrt.Util().getDeviceIds()[1] == [0, 2]
    with pytest.raises(RuntimeError, match="Failed to create Context"):
        qaicrt.Context(qaicrt.QIDList([1]))


def test_error_after_n_inferences(
    qaicrt: ModuleType, ask: Ask, machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    ask("kind: error, device: 0, after: 2")
    status = qaicrt.QStatus
    session = Session(qaicrt, 0)
    assert [session.run() for _ in range(4)] == [
        status.QS_SUCCESS,
        status.QS_SUCCESS,
        status.QS_DEV_ERROR,
        status.QS_DEV_ERROR,
    ]
    assert qaicrt.Util().getDeviceInfo(0)[1].devStatus == qaicrt.QDevStatus.QDS_ERROR
    assert "Dev 0 went to error state" in capfd.readouterr().err
    assert Session(qaicrt, 1).run() == status.QS_SUCCESS
    machine.set_status(0, 1)


def test_data_path_timeout(qaicrt: ModuleType, ask: Ask, capfd: pytest.CaptureFixture[str]) -> None:
    ask("kind: data_path_timeout, at: [1, 3]")
    properties = qaicrt.QAicProgramProperties()
    properties.SubmitRetryTimeoutMs = 20
    properties.SubmitNumRetries = 1
    session = Session(qaicrt, 0, properties)
    session.context.setLogLevel(qaicrt.QLogLevel.QL_WARN)
    start = time.monotonic()
    assert session.run() == qaicrt.QStatus.QS_ERROR
    assert time.monotonic() - start >= 0.04
    text = capfd.readouterr().err
    assert "Kernel wait timeout, retries:0 of 1" in text
    assert "failed to receive response from NW: Connection timed out" in text
    assert [session.run() == 0 for _ in range(3)] == [True, False, True]


def test_data_path_timeout_waits_as_told(qaicrt: ModuleType, ask: Ask) -> None:
    ask("kind: data_path_timeout, wait_ms: 5")
    start = time.monotonic()
    assert Session(qaicrt, 0).run() == qaicrt.QStatus.QS_ERROR
    assert 0.005 <= time.monotonic() - start < 20


def test_load_out_of_memory(
    qaicrt: ModuleType, ask: Ask, capfd: pytest.CaptureFixture[str]
) -> None:
    ask("kind: load_out_of_memory, device: 2, at: 1")
    context = qaicrt.Context()
    first, second = (qaicrt.Program(context, 2, qaicrt.Qpc("")) for _ in range(2))
    assert first.load() == qaicrt.QStatus.QS_ERROR
    assert "Memory resource exhausted" in capfd.readouterr().err
    assert second.load() == qaicrt.QStatus.QS_SUCCESS
    assert first.load() == qaicrt.QStatus.QS_SUCCESS


def test_nsp_allocation_failure(qaicrt: ModuleType, ask: Ask, machine: Machine) -> None:
    ask("kind: nsp_allocation_failure, device: 2, at: [1, 2]")
    context = qaicrt.Context()
    program = qaicrt.Program(context, 2, qaicrt.Qpc(""))
    assert program.activate() == qaicrt.QStatus.QS_ERROR
    with pytest.raises(RuntimeError, match="QAIC_ERROR_NSP_ALLOC_FAILED"):
        qaicrt.ExecObj(context, program)
    assert machine.card(2).free.num_nsps == 14
    assert program.deactivate() == qaicrt.QStatus.QS_SUCCESS
    assert program.activate() == qaicrt.QStatus.QS_SUCCESS


@pytest.mark.parametrize("call", ["load", "activate", "enqueue"])
def test_again_once(qaicrt: ModuleType, ask: Ask, call: str) -> None:
    ask(f"kind: again, call: {call}")
    status = qaicrt.QStatus
    program = qaicrt.Program(qaicrt.Context(), 0, qaicrt.Qpc(""))
    answers = [program.load(), program.load(), program.activate(), program.activate()]
    expected = [status.QS_SUCCESS] * 4
    if call in {"load", "activate"}:
        expected[{"load": 0, "activate": 2}[call]] = status.QS_AGAIN
        assert answers == expected
        return
    session = Session(qaicrt, 1)
    assert [session.run(), session.run()] == [status.QS_AGAIN, status.QS_SUCCESS]


def test_corrupt_is_the_same_noise_every_time(qaicrt: ModuleType, ask: Ask, tmp_path: Path) -> None:
    seen = []
    for state in ("one", "two"):
        os.environ["QAIC_EMULATOR_STATE"] = str(tmp_path / state)
        ask("kind: corrupt, at: 2")
        session = Session(qaicrt, 0)
        assert session.run() == qaicrt.QStatus.QS_SUCCESS
        assert np.unique(session.logits).tolist() == [1.0]
        assert session.run() == qaicrt.QStatus.QS_SUCCESS
        seen.append(session.logits.copy())
        assert session.run() == qaicrt.QStatus.QS_SUCCESS
        assert np.unique(session.logits).tolist() == [3.0]
    assert np.array_equal(seen[0], seen[1])
    assert len(np.unique(seen[0])) > 8


def test_slow(qaicrt: ModuleType, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    ask("kind: slow, device: 1, factor: 3")
    slow, usual = Session(qaicrt, 1), Session(qaicrt, 0)
    for session in (slow, usual):
        activation = session.exec_obj.instance.activation
        quick = activation.run

        def delayed(*arguments: Any, _quick: Any = quick) -> Any:
            time.sleep(0.02)
            return _quick(*arguments)

        monkeypatch.setattr(activation, "run", delayed)

    def seconds(session: Session) -> float:
        start = time.monotonic()
        assert session.run() == qaicrt.QStatus.QS_SUCCESS
        return time.monotonic() - start

    assert seconds(slow) >= 0.06
    assert any(seconds(usual) < 0.06 for _ in range(20))  # a busy machine is late at times


PROGRAM = """
import sys
import fake_program, qaic_ray.emulator.container
qaic_ray.emulator.container.execution = fake_program
import numpy as np
from qaic_ray.emulator import qaicrt
context = qaicrt.Context()
queue = qaicrt.Queue(context, 0)
program = qaicrt.Program(context, 0, qaicrt.Qpc(""))
execObj = qaicrt.ExecObj(context, program)
for number in range(5):
    execObj.setData([(1, np.ones((2, 1), np.int64))])
    print(number, flush=True)
    assert queue.enqueue(execObj) == 0
    assert execObj.waitForCompletion() == 0
print("done", flush=True)
"""


def start() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_kill_at_an_inference_and_not_again(machine: Machine, ask: Ask) -> None:
    ask("kind: kill, device: 0, at: 3")
    process = start()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert out.split() == ["0", "1", "2"]
    # The card counts on: whoever is started in its place lives.
    process = start()
    assert process.communicate(timeout=60)[0].endswith("done\n")


def test_hang_until_killed(machine: Machine, ask: Ask) -> None:
    ask("kind: hang, device: 0, at: 2")
    process = start()
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    assert machine.card(0).free.num_nsps == 0
    process.kill()
    said(process)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("faults: [{kind: slwo}]", "fault 1: unknown kind 'slwo'; did you mean 'slow'"),
        ("faults: [{kind: slow, factr: 2}]", "a slow fault has no 'factr'; did you mean 'factor'"),
        ("faults: [{kind: absent, at: 1}]", "a absent fault has no 'at'"),
        ("faults: [{device: 1}]", "must be a mapping with a `kind`"),
        ("faults: [{kind: hang, at: -1}]", "`at` must be a number of 0 or more, not -1"),
        ("faults: [{kind: hang, device: first}]", "`device` must be a number"),
        ("faults: [{kind: corrupt, probability: 2}]", "`probability` must be between 0 and 1"),
        ("faults: [{kind: slow, factor: no}]", "`factor` must be a positive number"),
        ("faults: [{kind: again, call: query}]", "`call` must be load, activate or enqueue"),
        ("faults: [{kind: kill}]", "a kill fault needs `at`, `after` or `probability`"),
        ("faults: {kind: kill}", "`faults` must be a list"),
        ("seed: one", "`seed` must be an integer"),
        ("falts: []", "unknown key 'falts'; did you mean 'faults'"),
        ("- a", "must be a mapping"),
        ("{", "is not YAML"),
    ],
)
def test_a_bad_file_gets_one_clear_sentence(text: str, message: str) -> None:
    with pytest.raises(faults.FaultFileError) as error:
        faults.parse(text, "faults.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "/nowhere/faults.yaml")
    with pytest.raises(faults.FaultFileError, match=r"/nowhere/faults\.yaml cannot be read"):
        Machine.here()


def test_without_pyyaml_json_is_read_and_yaml_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without_yaml(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    assert faults.parse('{"seed": 3, "faults": [{"kind": "slow"}]}', "f")[0] == 3
    with pytest.raises(faults.FaultFileError, match="install PyYAML to read YAML, or write JSON"):
        faults.parse("seed: 3", "f")


def test_probability_is_drawn_from_the_seed(tmp_path: Path) -> None:
    _, entries = faults.parse("faults: [{kind: corrupt, probability: 0.3}]", "f")

    def numbers(seed: int, name: str) -> list[int]:
        plan = faults.Faults(entries, seed, tmp_path / name)
        fired = (plan.firing(faults.INFERENCE, [0]) for _ in range(400))
        return [each[0].number for each in fired if each]

    first = numbers(1, "first")
    assert first == numbers(1, "again")
    assert first != numbers(2, "other")
    assert 80 <= len(first) <= 160


words = st.one_of(st.text(max_size=6), st.integers(-3, 3), st.floats(), st.none(), st.booleans())


@given(
    st.dictionaries(
        st.sampled_from(["kind", "device", "at", "after", "probability", "call", "factor", "x"]),
        st.one_of(words, st.lists(words, max_size=3), st.sampled_from(["slow", "kill", "load"])),
    )
)
def test_any_entry_is_taken_or_refused_in_words(entry: dict[str, Any]) -> None:
    try:
        faults.parse(json.dumps({"faults": [entry]}), "f")
    except faults.FaultFileError as error:
        assert str(error).startswith("f")  # noqa: PT017 - either outcome is right
