"""Simulated card time: the formula, both modes, and that its use can be seen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qaic_ray.emulator.card import timing

Write = Callable[[str, str], None]

PAD = "{mode: pad, base_ms: 20, per_token_ms: 2}"
REPLACE = "{mode: replace, seed: 5}"


class Session:
    def __init__(self, rt: ModuleType, path: str = "vocab=64") -> None:
        self.context = rt.Context(rt.QIDList([0]))
        self.program = rt.Program(self.context, 0, rt.Qpc(path))
        self.exec_obj = rt.ExecObj(self.context, self.program)
        self.logits = np.zeros((2, 1, 64), np.float32)

    def run(self, ids: np.ndarray) -> Any:
        self.exec_obj.setData([(1, ids), (2, self.logits)])
        return self.exec_obj.run()


def test_the_formula() -> None:
    text = """
        {mode: pad, base_ms: 1.5, per_token_ms: 0.25, bandwidth_gb_s: 100, efficiency: 0.5,
         load_gb_s: 2}
    """
    model = timing.parse(text, "t")
    # 1.5 ms + 8 * 0.25 ms + 1 GB / 50 GB/s
    assert model.inference_s(8, 10**9) == pytest.approx(0.0235)
    assert model.load_s(10**9) == pytest.approx(0.5)
    without = timing.parse("mode: pad", "t")
    assert without.inference_s(1000, 10**12) == without.load_s(10**12) == 0


def test_off_by_default_and_nothing_says_otherwise(qaicrt: ModuleType) -> None:
    assert Session(qaicrt).context.timing is None
    assert timing.ECHO_VARIABLE not in os.environ


def test_pad_computes_and_lasts_as_long_as_the_model_says(
    qaicrt: ModuleType, write_file: Write
) -> None:
    write_file(timing.VARIABLE, PAD)
    session = Session(qaicrt)
    start = time.monotonic()
    assert session.run(np.ones((2, 8), np.int64)) == qaicrt.QStatus.QS_SUCCESS
    assert time.monotonic() - start >= 0.020 + 16 * 0.002
    assert session.logits[:, 0, 0].tolist() == [8.0, 8.0]
    assert os.environ[timing.ECHO_VARIABLE].startswith("simulated card time (pad): base_ms 20")


def test_replace_needs_no_weights_and_follows_a_seeded_rule(
    qaicrt: ModuleType, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qaic_ray.emulator.container import execution

    def refuse(*_: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(execution, "LoadedProgram", refuse)

    def answers(text: str) -> list[list[int]]:
        write_file(timing.VARIABLE, text)
        session = Session(qaicrt)
        ids = np.arange(16).reshape(2, 8)
        tokens = []
        for _ in range(6):
            assert session.run(ids) == qaicrt.QStatus.QS_SUCCESS
            assert np.count_nonzero(session.logits) == 2
            ids = session.logits.argmax(axis=2)
            tokens.append(ids[:, 0].tolist())
        return tokens

    first = answers(REPLACE)
    assert answers(REPLACE) == first
    assert answers("{mode: replace, seed: 6}") != first
    assert len({token for row in first for token in row}) > 4


def test_replace_refuses_the_shapes_that_the_program_refuses(
    qaicrt: ModuleType, write_file: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    write_file(timing.VARIABLE, REPLACE)
    session = Session(qaicrt)
    assert session.run(np.zeros((2, 3), np.int64)) == qaicrt.QStatus.QS_ERROR
    assert "No matching dimension found" in capfd.readouterr().err


def test_replace_looks_at_the_last_real_token_of_each_row(qaicrt: ModuleType) -> None:
    qpc = qaicrt.Qpc("vocab=64").contents
    model = timing.parse(REPLACE, "t")
    program = timing.SimulatedProgram(qpc, model, ValueError)
    ids = np.array([[4, 5, 9, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 9]])
    positions = np.array([[7, 8, 9, -1, -1, -1, -1, -1], [2, 3, 4, 5, 6, 7, 8, 9]])
    inputs = {"input_ids": ids, "position_ids": positions}
    logits = np.zeros((2, 1, 64), np.float32)
    program._fill_logits(logits, inputs)
    assert logits[0].argmax() == logits[1].argmax()


def test_replace_answers_every_kept_token_of_a_row(qaicrt: ModuleType) -> None:
    """The k-th answer is to the k-th token, in a row with fewer valid tokens too."""
    program = timing.SimulatedProgram(
        qaicrt.Qpc("vocab=64").contents, timing.parse(REPLACE, "t"), ValueError
    )
    ids = np.array([[4, 5, 0, 0], [4, 5, 6, 7]])
    positions = np.array([[2, 3, -1, -1], [2, 3, 4, 5]])
    inputs = {"input_ids": ids, "position_ids": positions}
    logits, tokens = np.zeros((2, 4, 256), np.float32), np.zeros((2, 4, 1), np.int64)
    program._fill_logits(logits, inputs)
    program._fill_tokens(tokens, inputs)
    np.testing.assert_array_equal(logits.argmax(axis=2), tokens[:, :, 0])
    np.testing.assert_array_equal(tokens[0, :2], tokens[1, :2])
    assert len(set(tokens[1, :, 0].tolist())) > 1
    last = np.zeros((2, 1, 1), np.int64)
    program._fill_tokens(last, inputs)
    assert last[:, 0, 0].tolist() == [tokens[0, 1, 0], tokens[1, 3, 0]]


def test_loading_takes_its_time(qaicrt: ModuleType, write_file: Write) -> None:
    write_file(timing.VARIABLE, "{mode: replace, load_gb_s: 20}")
    start = time.monotonic()
    Session(qaicrt, f"vocab=64,constants={10**9}")
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: fast", "`mode` must be pad or replace, not 'fast'"),
        ("base_ms: 1", "`mode` must be pad or replace, not None"),
        ("{mode: pad, base: 1}", "unknown key 'base'; known are base_ms"),
        ("{mode: pad, base_ms: -1}", "`base_ms` must be a number of 0 or more, not -1"),
        ("{mode: pad, base_ms: .nan}", "`base_ms` must be a number of 0 or more"),
        ("{mode: pad, base_ms: yes}", "`base_ms` must be a number of 0 or more, not True"),
        ("{mode: pad, efficiency: 0}", "`efficiency` must be above 0 and at most 1"),
    ],
)
def test_a_bad_file_gets_one_clear_sentence(text: str, message: str) -> None:
    with pytest.raises(timing.TimingFileError) as error:
        timing.parse(text, "timing.yaml")
    assert message in str(error.value)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(timing.VARIABLE, "/nowhere/timing.yaml")
    with pytest.raises(timing.TimingFileError, match=r"/nowhere/timing\.yaml cannot be read"):
        timing.from_environment()
