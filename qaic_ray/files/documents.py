"""Reads JSON, YAML and text files, and paths, that somebody has written, as checked types.

A value is of the type that was asked for, or there is an error of ours that names the file, the key
and the value. No library's exception comes out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qaic_ray.errors import QaicRayError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails
    from yaml import SafeLoader

MAX_DOCUMENT_BYTES = 64 * 2**20
"""The longest document: a tokenizer of a million merges has half of it."""
MAX_NODES = 1_000_000
"""The most values of a YAML document, where a few lines of aliases can mean billions."""
MAX_SHOWN_CHARS = 80

# Kinds of pydantic's faults -> what names the bound, and our words before it.
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
# Kinds of pydantic's faults -> what the value has to be. A field with `{}` is of the fault.
_KINDS = {
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
    "dataclass_exact_type": "an object",
    "is_instance_of": "an object ({class})",
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "none_required": "null",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "too_short": "at least {min_length} long",
    "too_long": "at most {max_length} long",
    "string_too_short": "at least {min_length} long",
    "string_too_long": "at most {max_length} long",
}
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

T = TypeVar("T")


def user_path(text: str | os.PathLike[str], what: str) -> Path:
    """A path that somebody has written, with `~` expanded.

    Args:
        text: the path.
        what: names it in errors: an option or a key.

    Raises:
        UsageError: no file system takes it as a path.
    """
    raw = os.fspath(text)
    try:
        path = Path(raw).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(path)  # refuses a NUL, a name that is too long, half a surrogate pair
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{what} is {shown(raw)}, which is no path: {_reason(error)}.") from error
    return path


def read_text(
    path: Path,
    *,
    raises: type[QaicRayError] = UsageError,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    makes: str = "",
) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: of the file.
        raises: the error to raise.
        max_bytes: a longer file is refused before it is read.
        makes: where it is not there, a command that makes one: `qaic-ray key NAME > keys`.
    """
    try:
        # Opening a pipe would wait for its writer.
        if path.exists() and not path.is_file():
            raise raises(f"{path} is not a file.")
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise raises(missing_file(path, makes=makes)) from error
    except (OSError, ValueError) as error:
        raise raises(f"{path} cannot be read: {_reason(error)}.") from error
    if len(data) > max_bytes:
        raise raises(f"{path} has more than {max_bytes >> 20} MiB, which is no such document.")
    if data.startswith(_UTF16_MARKS):
        raise raises(f"{path} is UTF-16: save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise raises(
            f"{path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}."
        ) from error


def missing_file(path: Path, *, makes: str = "") -> str:
    """What is said of a file that is not there: which one was meant perhaps, or what makes one."""
    if path.is_symlink():
        return f"{path} is a link to {shown(os.readlink(path))}, which is not there."
    if not path.parent.is_dir():
        return f"There is no file {path}, since there is no folder {path.parent}."
    with suppress(OSError):
        # Without what a suffix has in common: `a.yaml` is no near word of `b.yaml`.
        names = {Path(name).stem: name for name in sorted(os.listdir(path.parent))}
        near = get_close_matches(path.stem, names, n=1)
        if near:
            return f"There is no file {path}; did you mean {path.with_name(names[near[0]])}?"
    return f"There is no file {path}: {f'`{makes}` makes one' if makes else 'check its path'}."


def read_object(path: Path, *, raises: type[QaicRayError] = UsageError) -> dict[str, Any]:
    """The JSON object that a file holds."""
    value = parse_json(read_text(path, raises=raises), str(path), raises=raises)
    return as_object(value, str(path), raises=raises)


def parse_json(text: str, source: str, *, raises: type[QaicRayError] = UsageError) -> Any:
    """The value of a JSON text.

    Args:
        text: the document.
        source: names it in errors.
        raises: the error to raise.
    """
    try:
        return json.loads(text)
    # Damage; a number of 5,000 digits; 10,000 brackets.
    except (ValueError, RecursionError) as error:
        raise raises(f"{source} is not JSON that can be read: {_reason(error)}.") from error


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON; NaN and infinities, which JSON has not, become null.

    Args:
        value: of types that JSON has.
        indent: spaces a level; None: all on one line.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def as_object(
    value: Any, source: str, *, raises: type[QaicRayError] = UsageError
) -> dict[str, Any]:
    """A value of JSON that must be an object."""
    if not isinstance(value, dict):
        raise raises(f"{source} must hold a JSON object, not {shown(value)}.")
    return value


def read_yaml(path: Path, *, raises: type[QaicRayError] = UsageError) -> Any:
    """The value that a YAML file holds; see `parse_yaml`."""
    return parse_yaml(read_text(path, raises=raises), str(path), raises=raises)


def parse_yaml(text: str, source: str, *, raises: type[QaicRayError] = UsageError) -> Any:
    """The value of a YAML text: plain data, no key twice, dates as texts.

    Args:
        text: the document.
        source: names it in errors.
        raises: the error to raise, also for a text whose aliases mean more than `MAX_NODES` values.
    """
    import yaml

    try:
        value = yaml.load(text, _plain_loader())
        if _num_nodes(value, MAX_NODES) > MAX_NODES:
            raise raises(f"{source} means more than {MAX_NODES} values: write fewer aliases.")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise raises(f"{source} is not YAML that can be read: {_reason(error)}.") from error
    return value


@lru_cache(maxsize=1)
def _plain_loader() -> type[SafeLoader]:
    """`yaml.SafeLoader` where a key given twice is an error, and `2026-01-01` is a text."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                # What is merged (`<<`) gives way to the node's own keys.
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    PlainLoader.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return PlainLoader


def checked(
    kind: type[T], value: Any, source: str, *, raises: type[QaicRayError] = UsageError
) -> T:
    """A value of a document as a type, by pydantic.

    Args:
        kind: any type that pydantic knows: a model, a dataclass, `dict[str, int]`.
        value: of the document.
        source: names it in errors.
        raises: the error to raise.
    """
    from pydantic import ValidationError

    try:
        adapter: TypeAdapter[T] = _adapter(cast("Any", kind))
        return adapter.validate_python(value)
    except ValidationError as error:
        raise raises(f"{source}: {first_error(error)}") from error
    except RecursionError as error:
        raise raises(f"{source} is nested too deep to be read.") from error


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> Any:
    """pydantic's reader of a type: made in milliseconds, so once."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def first_error(error: ValidationError) -> str:
    """The first fault that pydantic found, as the rest of a sentence."""
    first = error.errors(include_url=False)[0]
    place = place_of(first["loc"])
    if len(place) > MAX_SHOWN_CHARS or not place.isprintable():
        place = shown(place)  # keys are the writer's too
    if first["type"] in ("missing", "missing_argument"):
        return f"the key '{place}' is missing."
    if first["type"] in _UNKNOWN:
        return f"there is no key '{place}' here: leave it out."
    where = f"{place}: " if place else ""
    if (must := must_be(first)) is not None:
        return f"{where}{must}, not {shown(first['input'])}."
    said = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return f"{where}{said}."  # it names the value that it means
    return f"{where}{with_given(said, first['input'])}."


def place_of(location: Sequence[str | int]) -> str:
    """Where in a document something stands, as people write it: `compile.ctx_len[0]`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return "".join(steps).removeprefix(".")


def must_be(fault: ErrorDetails) -> str | None:
    """What a value must be, where pydantic says that it is of another type, or beyond a bound."""
    kind = fault["type"]
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {fault['ctx'][name]}"
    return f"must be {_KINDS[kind].format(**fault.get('ctx', {}))}" if kind in _KINDS else None


def with_given(said: str, value: object) -> str:
    """What is wrong with a value, and the value where that does not name it."""
    given = shown(value)
    return said if said.endswith(f"not {given}") else f"{said} (given: {given})"


def shown(value: object) -> str:
    """A value as an error shows it: on one line, and never long."""
    if isinstance(value, str):
        # Cut before it is escaped: what is shown of a million characters must not cost as much.
        text = repr(value[: MAX_SHOWN_CHARS + 1])
    elif isinstance(value, Mapping):
        text = f"an object of {len(value)} keys" if value else "{}"
    elif isinstance(value, (list, tuple)) and len(value) > 8:
        text = f"a list of {len(value)}"
    elif isinstance(value, int) and value.bit_length() > 256:
        text = "a number of more than 70 digits"
    else:
        text = _repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def _repr(value: object) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a huge number, or nesting, inside a short list
        return f"a {type(value).__name__}"


def _reason(error: Exception) -> str:
    """A library's reason, on one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 3 * MAX_SHOWN_CHARS else f"{text[: 3 * MAX_SHOWN_CHARS]}..."


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _num_nodes(value: Any, limit: int) -> int:
    """The number of values with every alias written out; counting ends past `limit`."""
    count, pending = 0, [value]
    while pending and count <= limit:
        inner = pending.pop()
        count += 1
        if isinstance(inner, dict):
            pending.extend(inner.values())
        elif isinstance(inner, list):
            pending.extend(inner)
    return count


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, one phrase each: `sampling.temperature was 0.7 and is 0.8`."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{name} was {_leaf(before.get(name))} and is {_leaf(after.get(name))}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _leaf(value: object) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
