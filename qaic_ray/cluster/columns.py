"""Columns as Ray Data has them, to values as JSON has them, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def plain(value: Any) -> Any:
    """A value of a column as JSON has it; NaN is how a table has a number that is missing."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        return None if math.isnan(value) else int(value)
    return value


def objects(values: Iterable[Any]) -> NDArray[Any]:
    """A column of Python objects: lists of one length would make a table of it."""
    items = list(values)
    column = np.empty(len(items), object)
    for at, item in enumerate(items):
        column[at] = item
    return column
