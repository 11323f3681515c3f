"""The fields of a checkpoint's config.json, each read as the type and in the range it must have.

Knows nothing of what they mean. A field that is not what it must be is one sentence that names
file, key and value.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from qaic_ray.documents import shown
from qaic_ray.errors import CheckpointError

MAX_SIZE = 2**31 - 1
_LARGEST = sys.float_info.max


class Fields:
    """Fields of a JSON object.

    Args:
        values: the object.
        source: names it in errors, such as `config.json`.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def get(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        return self._values.get(key)

    def size(self, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        """A whole number from 1 to `most`; null counts as missing."""
        value = self._values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(key, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, least: float, most: float) -> float:
        """A number from `least` to `most`, never NaN; `default` where the key is missing."""
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "a number")
        # NaN is in no range, and a whole number may be larger than any float.
        if not max(least, -_LARGEST) <= value <= min(most, _LARGEST):
            raise self.error(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false; `default` where the key is missing."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A text; `default` where the key is missing or null."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where the key is missing or null."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of texts")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id or several; empty where the key is missing or null."""
        value = self._values.get(key)
        if value is None:
            return ()
        several = value if isinstance(value, list) else [value]
        for item in several:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= MAX_SIZE:
                raise self.error(key, "a token id, or a list of them")
        return tuple(several)

    def fields(self, key: str) -> Fields:
        """The fields of an object inside; none where the key is missing or null."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, f"{key} of {self._source}")

    def names(self) -> list[str]:
        """The keys."""
        return list(self._values)

    def absent(self, key: str) -> bool:
        """Whether there is no such key; null is one."""
        return key not in self._values

    def error(self, key: str, must: str) -> CheckpointError:
        """What to raise where the value of a key is not what it must be."""
        value = self._values.get(key)
        given = "is missing" if key not in self._values else f"is {shown(value)}"
        return CheckpointError(f"{key} in {self._source} {given}; it must be {must}.")
