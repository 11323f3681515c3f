"""Threads of a step: many at once, late ones, ones that never come, and a fork."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from awaited import joined
from hypothesis import given, settings
from step_programs import SLOTS, Row, TinyProgram, TinyPrograms, prompt

from qaic_ray.emulator.container import execution
from qaic_ray.emulator.container.execution import Activation, LoadedProgram
from qaic_ray.emulator.step import runner, team

NUM_CALLS = 12


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, sdk: Path) -> TinyProgram:
    programs = TinyPrograms(tmp_path_factory.mktemp("threads"), sdk)
    return programs.make("head_dim 64, biases", "mx6", continuous_batching=False)


def answers(program: TinyProgram, activation: Activation, seed: int) -> list[Any]:
    """Logits of some prompts and of decode steps after them."""
    rows = [Row(slot, 0, prompt(5 + 3 * slot, seed + slot)) for slot in range(SLOTS)]
    made = program.run(activation, rows)
    for step in range(NUM_CALLS):
        after = [
            Row(row.slot, len(row.ids) + step, prompt(1, seed + 10 * step + row.slot))
            for row in rows
        ]
        made += program.run(activation, after)
    return made


def assert_same(made: list[Any], expected: list[Any]) -> None:
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def alone(program: TinyProgram) -> dict[int, list[Any]]:
    """By seed, what one activation with one thread answers."""
    loaded = LoadedProgram(program.qpc, 1)
    return {seed: answers(program, loaded.activate(), seed) for seed in range(6)}


@settings(max_examples=max(4, settings().max_examples // 4))
@given(
    threads=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    shared=st.booleans(),
)
def test_many_steps_at_once_answer_as_one_alone(
    program: TinyProgram, alone: dict[int, list[Any]], threads: list[int], shared: bool
) -> None:
    """Each in a thread of its own; on activations of one program, or of several."""
    numbers = [threads[0]] * len(threads) if shared else threads
    one = LoadedProgram(program.qpc, numbers[0])
    loaded = [one if shared else LoadedProgram(program.qpc, n) for n in numbers]
    begin = threading.Barrier(len(loaded))

    def work(seed: int) -> list[Any]:
        activation = loaded[seed].activate()
        begin.wait(timeout=60)
        return answers(program, activation, seed)

    with ThreadPoolExecutor(len(loaded)) as pool:
        for seed, made in enumerate(pool.map(work, range(len(loaded)), timeout=120)):
            assert_same(made, alone[seed])


class LateTeam(team.Team):
    """Its helpers come when a call has been answered, or never."""

    def __init__(self, choose: Callable[[], bool]) -> None:
        super().__init__()
        self._choose = choose
        self.waiting: list[Callable[[team.Scratch], None]] = []
        self.num_late = 0

    def run(self, work: Callable[[team.Scratch], None], num_threads: int) -> None:
        for _ in range(num_threads - 1):
            if self._choose():
                self.waiting.append(work)
        super().run(work, 1)

    def come(self) -> None:
        """Those that are late."""
        late, self.waiting = self.waiting, []
        self.num_late += len(late)
        for work in late:
            thread = threading.Thread(target=work, args=[team.Scratch()])
            thread.start()
            thread.join(timeout=60)
            assert not thread.is_alive()


@settings(max_examples=max(4, settings().max_examples // 4))
@given(data=st.data())
def test_helpers_that_come_late_or_never_change_nothing(
    program: TinyProgram, alone: dict[int, list[Any]], data: st.DataObject
) -> None:
    late = LateTeam(lambda: data.draw(st.booleans()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "TEAM", late)
        activation = LoadedProgram(program.qpc, 3).activate()
        made = []
        rows = [Row(slot, 0, prompt(5 + 3 * slot, slot)) for slot in range(SLOTS)]
        made += program.run(activation, rows)
        for step in range(NUM_CALLS):
            if data.draw(st.booleans()):
                late.come()
            after = [
                Row(row.slot, len(row.ids) + step, prompt(1, 10 * step + row.slot)) for row in rows
            ]
            made += program.run(activation, after)
        copies = [logits.copy() for logits in made]
        late.come()
    assert_same(made, copies)
    assert_same(made, alone[0])


def in_child(program: TinyProgram, activation: Activation, seed: int, pipe: Any) -> None:
    pipe.send(answers(program, activation, seed))
    pipe.close()


def test_a_forked_child_goes_on_alone(
    program: TinyProgram, alone: dict[int, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_SMALL_CACHE", 0)  # as caches of a real model lie
    loaded = LoadedProgram(program.qpc, 3)
    activation = loaded.activate()
    assert_same(answers(program, activation, 1), alone[1])
    kept = program.states(activation)
    fork = multiprocessing.get_context("fork")
    stop = threading.Event()

    def keep_busy() -> None:
        other = loaded.activate()
        while not stop.is_set():
            answers(program, other, 2)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(5):
            here, there = fork.Pipe()
            child = fork.Process(target=in_child, args=[program, activation, 3, there])
            child.start()
            assert here.poll(60), "the child hangs"
            assert_same(here.recv(), alone[3])
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        joined(busy)
    for name, state in program.states(activation).items():
        np.testing.assert_array_equal(state, kept[name])
    assert_same(answers(program, activation, 4), alone[4])
