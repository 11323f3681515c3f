"""Why a run ended before every row of its input had an answer or an error of its own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cause(str, Enum):
    """Why a run ended early, which decides how it can be resumed."""

    CARDS = "cards"
    """Every card was lost; prompts that were left have no answer."""
    INPUT = "input"
    """The input could not be read to its end; all that was read of it is answered."""
    CHANGED = "changed"
    """What answers depend on was not the same at the end: they may be of either."""


@dataclass(frozen=True)
class BrokenOff:
    """Why a run is not complete: its cause, and a sentence."""

    cause: Cause
    error: str
