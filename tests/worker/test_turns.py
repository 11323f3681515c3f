"""Turns at a card: together, or alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaic_ray.worker.turns import Turns


@given(st.lists(st.booleans(), min_size=1, max_size=16))
def test_whoever_is_alone_is_with_nobody_and_all_have_their_turn(wanted: list[bool]) -> None:
    turns, lock = Turns(), threading.Lock()
    here: list[bool] = []
    ended = 0

    def take(alone: bool) -> None:
        nonlocal ended
        with turns.turn(alone=alone):
            with lock:
                here.append(alone)
                assert len(here) == 1 if any(here) else True
            with lock:
                here.remove(alone)
                ended += 1

    with ThreadPoolExecutor(len(wanted)) as pool:
        for future in [pool.submit(take, alone) for alone in wanted]:
            future.result(timeout=30)
    assert ended == len(wanted)


def test_two_may_be_there_together_and_nobody_enters_before_one_that_waits_to_be_alone() -> None:
    turns, order = Turns(), []
    both, leave = threading.Barrier(3), threading.Event()

    def shared(name: str) -> None:
        with turns.turn(alone=False):
            both.wait(30)
            leave.wait(30)
            order.append(name)

    def later(name: str, *, alone: bool) -> None:
        with turns.turn(alone=alone):
            order.append(name)

    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(shared, "shared") for _ in range(2)]
        both.wait(30)  # the two are there at once
        alone = pool.submit(later, "alone", alone=True)
        while not turns._num_alone:
            threading.Event().wait(0.001)
        after = pool.submit(later, "after", alone=False)
        leave.set()
        for future in (*first, alone, after):
            future.result(timeout=30)
    assert order == ["shared", "shared", "alone", "after"]


def test_an_error_ends_a_turn() -> None:
    turns = Turns()
    for alone in (True, False):
        with pytest.raises(RuntimeError), turns.turn(alone=alone):
            raise RuntimeError
    with turns.turn(alone=True):
        pass
