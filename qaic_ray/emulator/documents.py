"""Reads JSON, YAML and text from files of unknown origin, for the whole emulated SDK.

The result is the value, or the caller's own error, which names the file and says what is wrong in
one line. qaic_ray has a reader of its own, which is not on the paths of the programs that this
package runs in.
"""

from __future__ import annotations

import json
import math
import os
import stat
from typing import Any, Dict, Type

MAX_FILE_BYTES = 16 << 20
MAX_NODES = 1_000_000
"""Of a YAML document with every alias written out."""
MAX_NUMBER = 1 << 53

_MAX_SHOWN = 80
_MAX_MESSAGE = 2000
_FAILED = "Failed to open file: {}: "  # the vendor's words


class Refusal(Exception):
    """An error whose message is one line of a sane length, whatever it repeats of its input."""

    def __init__(self, text: str) -> None:
        if not text.isprintable():
            text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
        super().__init__(text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}...")


def read_text(path: str, raises: Type[Exception], called: str = "") -> str:
    """The text of a UTF-8 file of at most `MAX_FILE_BYTES`; `called` names the variable."""
    refusal = f"{called}={path} cannot be read: " if called else _FAILED.format(path)
    try:
        # A pipe would be waited for, and a device never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise raises(f"{refusal}it is not a file")
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise raises(f"{refusal}{reason}") from error
    if len(data) > MAX_FILE_BYTES:
        raise raises(f"Failed to read file: {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise raises(f"Failed to read file: {path} is not UTF-8 text") from error


def parse_json(text: str, name: str, raises: Type[Exception]) -> Any:
    """The value of a JSON text; `name` is for the message."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise raises(f"{name} is not JSON: {_reason(error)}") from error


def parse_mapping(text: str, name: str, raises: Type[Exception]) -> Dict[str, Any]:
    """The mapping in a YAML text, or in a JSON text where there is no PyYAML."""
    try:
        import yaml
    except ImportError:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise raises(
                f"{name} is not JSON ({_reason(error)}); install PyYAML to read YAML, or write JSON"
            ) from error
    else:
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise raises(f"{name} is not YAML: {_reason(error)}") from error
        if _num_nodes(content) > MAX_NODES:
            raise raises(f"{name} means more than {MAX_NODES} values: write fewer aliases")
    if not isinstance(content, dict):
        raise raises(f"{name} must be a mapping of names to values")
    return content


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and not a truth value, that a float and a string can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -MAX_NUMBER <= value <= MAX_NUMBER and math.isfinite(value)


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and never long."""
    if isinstance(value, str):
        value = value[: _MAX_SHOWN + 1]
    elif isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, int) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        return "a number of more than 15 digits"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    text = " ".join(str(error).split())
    return text if len(text) <= 3 * _MAX_SHOWN else f"{text[: 3 * _MAX_SHOWN]}..."


def _num_nodes(value: Any) -> int:
    count, pending = 0, [value]
    while pending and count <= MAX_NODES:
        inner = pending.pop()
        count += 1
        if isinstance(inner, dict):
            pending.extend(inner.values())
        elif isinstance(inner, list):
            pending.extend(inner)
    return count
