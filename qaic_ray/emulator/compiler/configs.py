"""The compiler's config files: specializations, custom IO and MDP partition.

Each reader raises `ConfigError` with what the vendor's reader says, as far as that is public.
"""

from __future__ import annotations

import json
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from ..documents import Refusal, is_number, parse_mapping, read_text, shown

PRECISIONS = ("float", "float16", "mxint8")

_PRECISION_KEYS = ("FP16NodeInstanceNames", "FP32NodeInstanceNames")
_ENCODING_KEYS = ("activation_encodings", "param_encodings")
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-37, 1e37
_IO_LINE = re.compile(r"^\s*(-\s+)?(IOName|Precision|Layout)\s*:\s*(.*?)\s*$")


class ConfigError(Refusal):
    """A config file that the compiler refuses; the message is its text."""


class Partition(NamedTuple):
    """Devices that one program is spread over, and the cores used on each."""

    num_devices: int
    num_cores: int


class Encoding(NamedTuple):
    """The 256 levels of a value, or of each channel of a weight: `scale * (level + offset)`."""

    scale: Tuple[float, ...]
    offset: Tuple[int, ...]


def _read_json(path: str) -> Any:
    try:
        return json.loads(read_text(path, ConfigError))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"[json.exception.parse_error.101] parse error in {path}: {str(error)[:200]}"
        ) from error


def _json_type(value: Any) -> str:
    """What the vendor's JSON library calls a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def read_specializations(path: str, *, named: bool) -> List[Dict[str, int]]:
    """Specializations, each symbol -> size.

    `named` says whether this compiler knows the `{"name", "symbols"}` form; an older one fails on
    it as the vendor's does. The flat form is known to all. Values are strings.
    """
    document = _read_json(path)
    entries = document.get("specializations") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: 'specializations' must be a list with at least one entry")
    texts = [_strings(entry, named=named) for entry in entries]
    return [{key: _size(key, text) for key, text in entry.items()} for entry in texts]


def _strings(entry: Any, *, named: bool) -> Dict[str, str]:
    if named and isinstance(entry, dict) and "symbols" in entry:
        entry = entry["symbols"]
    if not isinstance(entry, dict):
        raise _type_error("object", entry)
    for value in entry.values():
        if not isinstance(value, str):
            raise _type_error("string", value)
    return entry


def _type_error(wanted: str, value: Any) -> ConfigError:
    return ConfigError(
        f"[json.exception.type_error.302] type must be {wanted}, but is {_json_type(value)}"
    )


def _size(key: str, text: str) -> int:
    if not re.match(r"^[0-9]{1,9}$", text, re.ASCII) or int(text) == 0:
        raise ConfigError(f"Invalid value '{text[:40]}' for symbol '{key[:40]}' in specializations")
    return int(text)


def read_custom_io(path: str) -> Dict[str, str]:
    """IO name -> precision, from the flat YAML list of `IOName` and `Precision` pairs."""
    precisions: Dict[str, str] = {}
    name = ""
    for number, line in enumerate(read_text(path, ConfigError).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _IO_LINE.match(line.split(" #")[0])
        if match is None or (match[1] is None and not name):
            raise ConfigError(
                f"Failed to parse custom IO file {path}: line {number}: {shown(line)}"
            )
        value = match[3].strip("'\"")
        if match[2] == "IOName":
            name = value
        elif match[2] == "Precision":
            if value.lower() not in PRECISIONS:
                raise ConfigError(
                    f"Unsupported precision '{value[:40]}' for IO '{name[:40]}' in {path}; "
                    f"supported: {', '.join(PRECISIONS)}"
                )
            precisions[name] = value.lower()
    return precisions


def read_node_precisions(path: str) -> List[str]:
    """Names, or first outputs, of the nodes that a node-precision file keeps in fp16 or fp32."""
    document = parse_mapping(read_text(path, ConfigError), path, ConfigError)
    names: List[str] = []
    for key in _PRECISION_KEYS:
        rows = document.get(key) or []
        # Names that are numbers stand there without quotes.
        if not isinstance(rows, list) or not all(isinstance(row, (str, int)) for row in rows):
            raise ConfigError(f"{path}: {key} must be a list of names")
        names += map(str, rows)
    if not any(key in document for key in _PRECISION_KEYS):
        raise ConfigError(f"{path}: it has none of {', '.join(_PRECISION_KEYS)}")
    return names


def read_encodings(path: str) -> Dict[str, Encoding]:
    """The 8-bit encodings of a file that AIMET exports beside an ONNX model, as JSON or YAML.

    Forms 0.6 (a mapping of names) and 1.0 (a list with names) are read. Values of 16 bits and more,
    and those of floating point, have none here.

    Raises:
        ConfigError: for another form, fewer bits, blocks, and numbers that are no encoding.
    """
    document = parse_mapping(read_text(path, ConfigError), path, ConfigError)
    rows: List[Tuple[str, Any]] = []
    for key in _ENCODING_KEYS:
        part = document.get(key) or []
        if isinstance(part, dict):
            rows += [(str(name), row) for name, row in part.items()]
        elif isinstance(part, list) and all(isinstance(row, dict) for row in part):
            rows += [(str(row.get("name")), row) for row in part]
        else:
            raise ConfigError(f"{path}: {key} must be a mapping of names, or a list with names")
    if not any(key in document for key in _ENCODING_KEYS):
        raise ConfigError(
            f"{path} has none of {', '.join(_ENCODING_KEYS)}: give the encodings that AIMET "
            "exports with an ONNX model"
        )
    found = ((name, _encoding(f"{path}: {shown(name)}", row)) for name, row in rows)
    return {name: encoding for name, encoding in found if encoding is not None}


def _encoding(where: str, row: Any) -> Optional[Encoding]:
    channels = row if isinstance(row, list) else [row]
    if not channels or not all(isinstance(channel, dict) for channel in channels):
        raise ConfigError(f"{where} must be an encoding, or a list with one for each channel")
    bits = channels[0].get("bitwidth", channels[0].get("bw"))
    if str(channels[0].get("dtype", "int")).lower() == "float" or bits in (16, 31, 32):
        return None
    if bits != 8 or "BLOCK" in str(channels[0].get("enc_type")).upper():
        raise ConfigError(f"{where} has other encodings than those of 8 bits, one or one a channel")
    scales = [scale for channel in channels for scale in _listed(channel.get("scale"))]
    offsets = [offset for channel in channels for offset in _listed(channel.get("offset"))]
    if len(scales) != len(offsets) or not scales:
        raise ConfigError(f"{where} must have a scale and an offset for each channel")
    for scale, offset in zip(scales, offsets):
        if not is_number(scale) or not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE:
            raise ConfigError(f"{where}: {shown(str(scale))} is no scale")
        if not is_number(offset) or offset != int(offset) or not -255 <= offset <= 0:
            raise ConfigError(f"{where}: offset {shown(str(offset))} is not in [-255, 0]")
    return Encoding(tuple(map(float, scales)), tuple(map(int, offsets)))


def _listed(value: Any) -> List[Any]:
    return value if isinstance(value, list) else [value]


def read_partition(path: str) -> Partition:
    """The devices of an MDP partition file; one partition, every device with the same cores."""
    document = _read_json(path)
    partitions = document.get("partitions") if isinstance(document, dict) else None
    if not isinstance(partitions, list) or not partitions:
        raise ConfigError(f"{path}: 'partitions' must be a list with at least one entry")
    devices: List[Tuple[int, int]] = []
    for partition in partitions:
        rows = partition.get("devices") if isinstance(partition, dict) else None
        if not isinstance(rows, list) or not rows:
            raise ConfigError(f"{path}: each partition needs a list of 'devices'")
        devices.extend(_device(path, row) for row in rows)
    ids = {device for device, _ in devices}
    if ids != set(range(len(ids))):
        raise ConfigError(f"{path}: deviceId must count from 0, not {shown(str(sorted(ids)))}")
    return Partition(len(ids), max(cores for _, cores in devices))


def _device(path: str, row: Any) -> Tuple[int, int]:
    fields = row if isinstance(row, dict) else {}
    device, cores = fields.get("deviceId"), fields.get("numCores")
    for value, least in ((device, 0), (cores, 1)):
        if type(value) is not int or not least <= value < 1 << 16:
            raise ConfigError(
                f"{path}: a device needs 'deviceId' from 0 on and 'numCores' from 1 on"
            )
    return int(str(device)), int(str(cores))
