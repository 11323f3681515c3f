"""Fixtures around the tiny random models of `random_models`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_models import write_checkpoint

from qaic_ray.model.checkpoint import Checkpoint


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """`write_checkpoint` into the test's own folder, under a `name`."""

    def make(kind: str = "Llama", *, name: str = "tiny", **changes: Any) -> Checkpoint:
        return write_checkpoint(tmp_path / name, kind, **changes)

    return make
