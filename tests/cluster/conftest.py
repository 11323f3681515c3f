"""What the tests on a real Ray share beside it."""

from __future__ import annotations

import fake_worker
import pytest
import ray

from qaic_ray.cluster import actors
from qaic_ray.dispatch import workers

# Workers cannot import from the tests' folder.
ray.cloudpickle.register_pickle_by_value(fake_worker)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits as long as a run of days may."""
    monkeypatch.setattr(workers, "MIN_BACKOFF_S", 0.1)
    monkeypatch.setattr(workers, "MIN_STALL_S", 3.0)
    monkeypatch.setattr(workers, "STALL_STEPS", 10)
    monkeypatch.setattr(actors, "STEPS_EVERY_S", 0.3)
