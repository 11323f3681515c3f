"""Fixtures of every folder: a tiny Llama, compiled by the emulated SDK in any shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tiny_qpcs import TinyQpcs


# No test may mean the machine's speed.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyQpcs:
    """QPCs of one tiny Llama, made as they are asked for, and what transformers answers."""
    # Imported here: most tests need no torch.
    from tiny_qpcs import TinyQpcs

    return TinyQpcs(tmp_path_factory.mktemp("tiny"))
