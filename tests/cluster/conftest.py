"""One Ray for the whole session, started by the code under test."""

from __future__ import annotations

from collections.abc import Iterator

import fake_worker
import pytest
import ray

from qaic_ray.fleet.cluster import Cluster

NUM_CARDS = 4


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray of this machine with four cards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # Workers cannot import from the tests' folder.
        ray.cloudpickle.register_pickle_by_value(fake_worker)
        with Cluster(NUM_CARDS) as started:
            yield started
