"""`qaic-api-test`: of the vendor's test program, the options that `qaic-runner` has too."""

from __future__ import annotations

from typing import Sequence

from . import main as run


def main(argv: Sequence[str]) -> int:
    """Run it as `qaic-runner` does; 1 where anything failed."""
    return run(argv, "qaic-api-test")
