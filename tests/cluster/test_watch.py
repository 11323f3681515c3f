"""A Ray that is gone is noticed, whatever its calls do."""

from __future__ import annotations

import threading
import time

import pytest
from awaited import joined

from qaic_ray import interruption
from qaic_ray.cluster.connection import ClusterWatch, call_for
from qaic_ray.timeouts import Timeouts

QUICK = Timeouts(watch_s=0.01, ask_s=0.01, silent_s=0.2)


def interrupted(watch: ClusterWatch) -> bool:
    """Whether the main thread, which is this, is interrupted."""
    deadline_s = time.monotonic() + 120
    try:
        while time.monotonic() < deadline_s:
            time.sleep(0.01)
    except KeyboardInterrupt:
        return watch.loss is not None and interruption.loss() == watch.loss
    return False


def test_a_death_is_told_once_and_interrupts() -> None:
    told: list[int] = []
    watch = ClusterWatch(
        dead=lambda: "The raylet died", on_loss=lambda: told.append(1), timeouts=QUICK
    )
    assert interrupted(watch)
    assert (watch.loss, told) == ("The raylet died", [1])
    watch.close()
    assert interruption.loss() is None


@pytest.mark.parametrize("hangs", [False, True])
def test_a_cluster_that_fails_or_does_not_answer_is_lost(hangs: bool) -> None:
    gone = threading.Event()
    ask = (lambda: gone.wait(30) and False) if hangs else (lambda: False)
    watch = ClusterWatch(ask=ask, timeouts=QUICK)
    assert interrupted(watch)
    assert watch.loss is not None
    assert watch.loss.startswith("The Ray cluster has not answered for ")
    gone.set()
    watch.close()


def test_a_cluster_that_answers_is_let_be() -> None:
    asked = threading.Semaphore(0)
    watch = ClusterWatch(ask=lambda: asked.release() or True, timeouts=QUICK)
    for _ in range(40):  # longer than it may be silent
        assert asked.acquire(timeout=120)
    watch.close()
    assert watch.loss is None


def test_another_thread_is_not_interrupted_through_the_main_one() -> None:
    found: list[ClusterWatch] = []
    thread = threading.Thread(
        target=lambda: found.append(ClusterWatch(dead=lambda: "gone", timeouts=QUICK))
    )
    thread.start()
    joined(thread)
    deadline_s = time.monotonic() + 120
    while found[0].loss is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    found[0].close()


def test_a_call_that_does_not_return_is_left() -> None:
    ends = threading.Event()
    assert not call_for(0.05, lambda: ends.wait(30))
    ends.set()
    assert call_for(30, lambda: None)
