"""What JSON schemas say of the types of options, where pydantic cannot tell by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BeforeValidator

from qaic_ray.contract import MAX_SIZE
from qaic_ray.files.documents import shown
from qaic_ray.limits import MAX_CORES

_LENGTHS = [2**n for n in range(30)]
_LENGTH = f"({'|'.join(map(str, _LENGTHS))})"
_ID = {"type": "integer", "minimum": 0, "maximum": MAX_SIZE}

NUM_CORES: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": MAX_CORES}
PROMPT_LEN: dict[str, Any] = {
    "anyOf": [
        {"enum": _LENGTHS},
        {"type": "string", "pattern": rf"^{_LENGTH}(\+{_LENGTH})+$"},
    ]
}
DEVICES: dict[str, Any] = {
    "anyOf": [
        {"const": "all"},
        _ID,
        {"type": "array", "items": _ID, "minItems": 1, "uniqueItems": True},
    ]
}
DATE: dict[str, Any] = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].+)?$"}
_SOURCE: dict[str, Any] = {"type": "string", "minLength": 1}
SOURCES: dict[str, Any] = {
    "anyOf": [_SOURCE, {"type": "array", "items": _SOURCE, "minItems": 1, "maxItems": 1024}]
}
SHARD: dict[str, Any] = {
    "type": "string",
    "pattern": "^ *0*[1-9][0-9]{0,5} */ *0*[1-9][0-9]{0,5} *$",
}
SAMPLE: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": 10**9 - 1},
        {
            "type": "string",
            "pattern": r"^(?!0*(\.0*)?%)(100(\.0*)?|[0-9]{1,2}(\.[0-9]*)?)%$",
        },
    ]
}


class OneOf(BeforeValidator):
    """The check that a word is among known ones, which a schema names."""

    def __get_pydantic_json_schema__(self, _: Any, __: Any) -> dict[str, Any]:
        return {"enum": list(self.func.words)}  # type: ignore[union-attr]


def one_of(known: Iterable[str]) -> OneOf:
    """The check that a word is among the known ones; case does not matter."""
    words = tuple(known)

    def check(value: Any) -> Any:
        word = value.lower() if isinstance(value, str) else value
        if word not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {shown(value)}")
        return word

    check.words = words  # type: ignore[attr-defined]
    return OneOf(check)


class OneOrSeveral:
    """Of a list in whose place one value may stand.

    Args:
        bounds: of the list, as a schema has them.
    """

    def __init__(self, **bounds: int) -> None:
        self._bounds = bounds

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        found = handler(core) | self._bounds
        return {"anyOf": [found["items"], found]}
