"""What the engine's thread hands over arrives whole and in order, and an error only behind it."""

from __future__ import annotations

import threading

import pytest

from qaic_ray.errors import DeviceError
from qaic_ray.worker.feeds import RowQueue


def test_what_is_there_comes_together_and_no_more_than_is_asked_for() -> None:
    row_queue = RowQueue(0.05)
    for item in range(5):
        row_queue.put(item)
    assert row_queue.take(3) == [0, 1, 2]
    assert row_queue.take(9) == [3, 4]


def test_an_error_ends_it_when_all_before_it_has_been_taken() -> None:
    row_queue = RowQueue(0.05)
    row_queue.put(1)
    row_queue.put(DeviceError("The card is off."))
    assert row_queue.take(9) == [1]
    for _ in range(2):
        with pytest.raises(DeviceError, match="The card is off"):
            row_queue.take(9)


def test_it_waits_for_the_first() -> None:
    row_queue = RowQueue(0.05)
    taken: list[list[int]] = []
    thread = threading.Thread(target=lambda: taken.append(row_queue.take(1)))
    thread.start()
    row_queue.put(7)
    thread.join(10)
    assert taken == [[7]]
