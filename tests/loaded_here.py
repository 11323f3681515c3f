"""What transformers does in a child, done in this process: to start one takes a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qaic_ray.model import chat


@contextmanager
def loaded_here() -> Iterator[None]:
    """In the place of children that load tokenizers, for tests of what is loaded."""

    def ask(task: dict[str, Any], cpu_s: int) -> None:
        failure = chat._failure(task | {"cpu_s": cpu_s})
        if failure is not None:
            raise chat.ChildFailed(failure["error"], is_final=failure["is_final"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "ask_child", ask)
        patch.setattr(chat, "_limit_cpu", lambda _: None)
        yield
