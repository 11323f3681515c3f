"""What the engine's thread hands over arrives whole and in order, and an error only behind it."""

from __future__ import annotations

import threading

import pytest

from qaic_ray.errors import DeviceError
from qaic_ray.fleet.handover import Handover


def test_what_is_there_comes_together_and_no_more_than_is_asked_for() -> None:
    handover: Handover[int] = Handover()
    for item in range(5):
        handover.put(item)
    assert handover.take(3) == [0, 1, 2]
    assert handover.take(9) == [3, 4]


def test_an_error_ends_it_when_all_before_it_has_been_taken() -> None:
    handover: Handover[int] = Handover()
    handover.put(1)
    handover.put(DeviceError("The card is off."))
    assert handover.take(9) == [1]
    for _ in range(2):
        with pytest.raises(DeviceError, match="The card is off"):
            handover.take(9)


def test_it_waits_for_the_first() -> None:
    handover: Handover[int] = Handover()
    taken: list[list[int]] = []
    thread = threading.Thread(target=lambda: taken.append(handover.take(1)))
    thread.start()
    handover.put(7)
    thread.join(10)
    assert taken == [[7]]
