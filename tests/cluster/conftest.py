"""Rays to test on; never two at a time on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar, cast

import fake_worker
import pytest
import ray

from qaic_ray.cluster.cluster import Cluster
from qaic_ray.timeouts import Timeouts

T = TypeVar("T")
NUM_CARDS = 4
IMPATIENT = Timeouts(steps_s=0.3)


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


@pytest.fixture(scope="module")
def one_ray() -> Iterator[OneRay]:
    """Where a module has its Ray from; it ends with the module, and so does what was set for it."""
    one = OneRay()
    yield one
    one.close()


@pytest.fixture
def cluster(one_ray: OneRay) -> Cluster:
    """A Ray of this machine with four cards, that knows them apart."""
    return one_ray.use("four cards", four_cards)


@contextmanager
def four_cards() -> Iterator[Cluster]:
    """Started by the code under test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_custom_unit_instance_resources", "neuron_cores,TPU,NPU,QAIC")
        # Workers cannot import from the tests' folder.
        ray.cloudpickle.register_pickle_by_value(fake_worker)
        with Cluster(NUM_CARDS, timeouts=IMPATIENT) as started:
            yield started
