"""A Ray that tests share, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar, cast

import pytest

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.timeouts import Timeouts

T = TypeVar("T")
NUM_CARDS = 4
IMPATIENT = Timeouts(steps_s=0.3)
"""No test waits as long as a run of days may."""


class OneRay:
    """The Ray of the moment; another one is started only when it is gone."""

    def __init__(self) -> None:
        self._kind = ""
        self._ends = ExitStack()
        self._value: object = None

    def use(self, kind: str, start: Callable[[], AbstractContextManager[T]]) -> T:
        """The Ray of this kind: the one that runs, or a new one in its place."""
        if kind != self._kind:
            self.close()
            self._value = self._ends.enter_context(start())
            self._kind = kind
        return cast("T", self._value)

    def close(self) -> None:
        """End it."""
        self._kind = ""
        self._ends.close()


@contextmanager
def four_cards() -> Iterator[Cluster]:
    """A Ray of this machine, started by the code under test, with cards that it knows apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.setenv("RAY_custom_unit_instance_resources", "neuron_cores,TPU,NPU,QAIC")
        with Cluster(NUM_CARDS, timeouts=IMPATIENT) as started:
            yield started
