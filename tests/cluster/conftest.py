"""What the tests on a real Ray share beside it."""

from __future__ import annotations

import fake_worker
import ray

# Workers cannot import from the tests' folder.
ray.cloudpickle.register_pickle_by_value(fake_worker)
