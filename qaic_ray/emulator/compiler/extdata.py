"""Weights that are graph inputs: the model's metadata names the safetensors file of each one.

`com.qti.aisw.extdata` is what QEfficient writes (weight_spec.json, versions 5 to 7). Read with the
standard library and numpy alone, because an SDK folder has no safetensors package; every number of
a header is checked before it is used.
"""

from __future__ import annotations

import json
import math
import os
import stat
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from onnx import TensorProto

from ..container.constants import to_float32
from ..documents import MAX_FILE_BYTES, parse_json, shown
from ..lowering import graph
from ..lowering.graph import GraphError

METADATA_KEY = "com.qti.aisw.extdata"
ROOT_VARIABLE = "AIC_EXTERNAL_DATA_ROOT"
"""A folder that `files` are looked for in first."""

VERSIONS = (5, 6, 7)
_PLAIN_ROLE = "weight"
_FORMAT = "safetensors"
_MAX_HEADER_BYTES = 100 << 20
_MAX_SIZE = 1 << 53
_MAX_RANK = 32
_MAX_SAID = 1000
_PARAMETER_ENDS = (".weight", ".bias")

# safetensors' name of a type: ONNX's, and numpy's of the bytes (a bfloat16 is two of them).
_TYPES = {
    "F64": (TensorProto.DOUBLE, "<f8"),
    "F32": (TensorProto.FLOAT, "<f4"),
    "F16": (TensorProto.FLOAT16, "<f2"),
    "BF16": (TensorProto.BFLOAT16, "<u2"),
    "I64": (TensorProto.INT64, "<i8"),
    "I32": (TensorProto.INT32, "<i4"),
    "I16": (TensorProto.INT16, "<i2"),
    "I8": (TensorProto.INT8, "|i1"),
    "U8": (TensorProto.UINT8, "|u1"),
    "BOOL": (TensorProto.BOOL, "|b1"),
}
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class ExternalDataError(GraphError):
    """An external weight that is not what the graph needs; the message names it."""


class ExternalTensor(NamedTuple):
    """Where a tensor lies: `dtype` is safetensors' name of its type, `offset` from byte 0 on."""

    path: str
    dtype: str
    shape: Tuple[int, ...]
    offset: int
    num_bytes: int

    def open(self, name: str, data_type: int) -> Any:
        """The array, mapped; copied where `data_type` (ONNX's) is a wider one.

        bfloat16 comes as uint16.

        Raises:
            ExternalDataError: where the file has changed since its header was read.
        """
        own_type, numpy_type = _TYPES[self.dtype]
        if not self.num_bytes:
            return np.empty(self.shape, numpy_type)
        try:
            array = np.memmap(self.path, numpy_type, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ExternalDataError(
                f"External data of {shown(name)} cannot be read: {self.path} ({reason})"
            ) from error
        return array if own_type == data_type else to_float32(array, own_type)


class Entry(NamedTuple):
    """A graph input, and the file and key that its values have."""

    name: str
    path: str
    key: str


class Spec(NamedTuple):
    """What the metadata says; files may lie in `data_root` and `model_root`, where not empty."""

    entries: List[Entry]
    data_root: str
    model_root: str


def attach(model: Any, folder: str) -> Dict[str, ExternalTensor]:
    """Make constants of the graph inputs that the model's metadata has places for.

    Args:
        model: changed in place; the constants have no bytes in it.
        folder: the model's.

    Returns:
        Where the bytes of each of them lie; empty for a model without such metadata.

    Raises:
        ExternalDataError: where metadata, files and graph do not fit together.
    """
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    if not texts:
        return {}
    if len(texts) > 1:
        raise ExternalDataError(f"The model has the metadata {METADATA_KEY} {len(texts)} times")
    spec = read_spec(texts[0])
    places = _Places(spec, folder)
    inputs = {value.name: value for value in graph.inputs(model)}
    found: Dict[str, ExternalTensor] = {}
    for entry in spec.entries:
        if entry.name not in inputs:
            raise ExternalDataError(
                f"External data of {shown(entry.name)}: the graph has no such input"
            )
        if entry.name in found:
            raise ExternalDataError(f"{METADATA_KEY} has an entry of {shown(entry.name)} twice")
        found[entry.name] = _fitting(inputs[entry.name], places.tensor(entry))
    for name in inputs:
        if name not in found and (name in places.keys or name.endswith(_PARAMETER_ENDS)):
            raise ExternalDataError(
                f"The graph input {shown(name)} is a weight, and {METADATA_KEY} has no entry of it"
            )
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name in found:
            del model.graph.input[index]
    for name, tensor in found.items():
        model.graph.initializer.add(
            name=name,
            data_type=inputs[name].type.tensor_type.elem_type,
            dims=tensor.shape,
            data_location=TensorProto.EXTERNAL,
        )
    return found


def files_of(model: Any, folder: str) -> List[str]:
    """The files that a model's metadata names, as `attach` finds them; `model` stays as it is.

    Raises:
        ExternalDataError: as `attach`, of metadata and paths.
    """
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    specs = [read_spec(text) for text in texts]
    return sorted({_Places(spec, folder).path(e) for spec in specs for e in spec.entries})


def read_spec(text: str) -> Spec:
    """Check the metadata, also in the older forms that QEfficient's reader takes.

    Raises:
        ExternalDataError: naming what is wrong in it.
    """
    if len(text) > MAX_FILE_BYTES:
        raise ExternalDataError(f"{METADATA_KEY} is larger than {MAX_FILE_BYTES} bytes")
    document = parse_json(text, METADATA_KEY, ExternalDataError)
    if not isinstance(document, dict):
        raise ExternalDataError(f"{METADATA_KEY} must be an object, not {shown(document)}")
    version = document.get("version", VERSIONS[0])
    if type(version) is not int or version not in VERSIONS:
        raise ExternalDataError(
            f"{METADATA_KEY} has the version {shown(version)}; this compiler reads "
            f"{', '.join(map(str, VERSIONS))}"
        )
    listed = document.get("files", document.get("checkpoint_files", []))
    inputs = document.get("inputs")
    if not isinstance(listed, list) or not isinstance(inputs, list):
        raise ExternalDataError(f"{METADATA_KEY} must have lists of files and inputs")
    files = [_file(entry) for entry in listed]
    entries = [_entry(item, files) for item in inputs]
    data_root, model = (_folder(document, key) for key in ("external_data_root", "model_id"))
    present = [entry for entry in entries if entry is not None]
    return Spec(present, data_root, os.path.dirname(model))


def _folder(document: Dict[str, Any], key: str) -> str:
    """An absolute path without `..`; empty where there is none, as for the id of a hub."""
    value = document.get(key)
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise ExternalDataError(f"{key} of {METADATA_KEY} must be a text, not {shown(value)}")
    return os.path.normpath(value) if value and os.path.isabs(value) else ""


def _file(entry: Any) -> str:
    path = entry.get("path") if isinstance(entry, dict) else entry
    kind = entry.get("format", _FORMAT) if isinstance(entry, dict) else _FORMAT
    if kind != _FORMAT:
        raise ExternalDataError(
            f"{METADATA_KEY} has a file of the format {shown(kind)}; this compiler reads {_FORMAT}"
        )
    return _path(path)


def _path(path: Any) -> str:
    if not isinstance(path, str) or not path or "\0" in path:
        raise ExternalDataError(f"{METADATA_KEY} names a file {shown(path)}, which is no path")
    if ".." in path.split("/"):
        raise ExternalDataError(f"{METADATA_KEY} names {shown(path)}, which leaves its folder")
    return path


def _said(path: str) -> str:
    return path if path.isprintable() and len(path) <= _MAX_SAID else shown(path)


def _entry(item: Any, files: Sequence[str]) -> Optional[Entry]:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(name, str) or not name:
        raise ExternalDataError(f"{METADATA_KEY} has an input without a name: {shown(item)}")
    location = item.get("location")
    if location is None:
        return None  # of a buffer that older exporters left in the graph
    role = item.get("role", _PLAIN_ROLE)
    if role != _PLAIN_ROLE or item.get("quantization") is not None:
        raise ExternalDataError(
            f"External data of {shown(name)} is quantized already ({shown(role)}); this compiler "
            "reads plain weights: export without MXFP6, and give -mxfp6-matmul here"
        )
    place, key = (
        (location.get("file"), location.get("key")) if isinstance(location, dict) else (None, None)
    )
    if not isinstance(key, str):
        raise ExternalDataError(f"The location of {shown(name)} in {METADATA_KEY} has no key")
    if type(place) is int and 0 <= place < len(files):
        return Entry(name, files[place], key)
    if isinstance(place, str):
        return Entry(name, _path(place), key)
    raise ExternalDataError(
        f"The location of {shown(name)} in {METADATA_KEY} has the file {shown(place)}; there are "
        f"{len(files)}"
    )


class _Places:
    """Finds the files of a spec, and reads the header of each one once."""

    def __init__(self, spec: Spec, folder: str) -> None:
        named = os.path.expanduser(os.environ.get(ROOT_VARIABLE, ""))
        roots = [named, spec.data_root, folder, spec.model_root]
        self._roots = list(dict.fromkeys(os.path.abspath(root) for root in roots if root))
        self._headers: Dict[str, Dict[str, ExternalTensor]] = {}

    @property
    def keys(self) -> Dict[str, None]:
        """Keys of all files that were read."""
        return dict.fromkeys(key for header in self._headers.values() for key in header)

    def tensor(self, entry: Entry) -> ExternalTensor:
        """Where an entry's tensor lies.

        Raises:
            ExternalDataError: where file or key are not there.
        """
        path = self.path(entry)
        if path not in self._headers:
            self._headers[path] = read_header(path)
        tensor = self._headers[path].get(entry.key)
        if tensor is None:
            raise ExternalDataError(
                f"External data of {shown(entry.name)}: {path} has no {shown(entry.key)}"
            )
        return tensor

    def path(self, entry: Entry) -> str:
        """The file of an entry: in the first root that has it."""
        if os.path.isabs(entry.path):
            path = os.path.normpath(entry.path)
            if not any(path.startswith(os.path.join(root, "")) for root in self._roots):
                raise ExternalDataError(
                    f"External data of {shown(entry.name)} lies outside of the folders that it may "
                    f"lie in: {_said(path)}"
                )
            candidates = [path]
        else:
            candidates = [os.path.join(root, entry.path) for root in self._roots]
        for path in candidates:
            if os.path.exists(path):
                return path
        tried = ", ".join(map(_said, candidates))
        raise ExternalDataError(
            f"External data of {shown(entry.name)} is not there: {tried}; {ROOT_VARIABLE} may name "
            f"the folder of {shown(entry.path)}"
        )


def read_header(path: str) -> Dict[str, ExternalTensor]:
    """The tensors of a safetensors file by name: 8 bytes of length, that much JSON, then bytes.

    Raises:
        ExternalDataError: where the file cannot be read, or is not what its header says.
    """
    try:
        # A pipe would be waited for, and a device never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ExternalDataError(f"{path} is not a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ExternalDataError(f"{path} is not a safetensors file, or is cut short")
            data = file.read(length)
    except OSError as error:
        raise ExternalDataError(
            f"External data cannot be read: {path} ({error.strerror})"
        ) from error
    return parse_header(data, size, path)


def parse_header(data: bytes, size: int, path: str) -> Dict[str, ExternalTensor]:
    """Check a header; `size` is the whole file's.

    Raises:
        ExternalDataError: naming what is wrong in it.
    """
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExternalDataError(f"The header of {path} is not JSON") from error
    if not isinstance(document, dict):
        raise ExternalDataError(f"The header of {path} is not an object")
    document.pop("__metadata__", None)
    start = 8 + len(data)
    found = {}
    for name, fields in document.items():
        fields = fields if isinstance(fields, dict) else {}
        dtype: Any = fields.get("dtype")
        shape: Any = fields.get("shape")
        place: Any = fields.get("data_offsets")
        if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(place, 2):
            raise ExternalDataError(f"The header of {path} is malformed at {shown(name)}")
        begin, end = place
        fits = dtype not in _TYPES or end - begin == math.prod(shape) * _item_bytes(dtype)
        if not begin <= end <= size - start or not fits:
            raise ExternalDataError(f"The header of {path} gives {shown(name)} an impossible place")
        found[name] = ExternalTensor(path, dtype, tuple(shape), start + begin, end - begin)
    return found


def _are_sizes(value: Any, length: Optional[int] = None) -> bool:
    if not isinstance(value, list) or length not in (None, len(value)) or len(value) > _MAX_RANK:
        return False
    return all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)


def _item_bytes(dtype: str) -> int:
    return int(np.dtype(_TYPES[dtype][1]).itemsize)


def _fitting(value: Any, tensor: ExternalTensor) -> ExternalTensor:
    """The tensor, if shape and type are those of the graph input.

    Raises:
        ExternalDataError: naming both.
    """
    dims = value.type.tensor_type.shape.dim
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
    if -1 in shape:
        raise ExternalDataError(
            f"The graph input {shown(value.name)}, a weight, has no fixed shape"
        )
    if shape != tensor.shape:
        raise ExternalDataError(
            f"External data of {shown(value.name)} has the shape {list(tensor.shape)} in "
            f"{tensor.path}; the graph has {list(shape)}"
        )
    wanted = value.type.tensor_type.elem_type
    stored = _TYPES.get(tensor.dtype, (None,))[0]
    if stored != wanted and not (wanted == TensorProto.FLOAT and stored in _HALVES):
        raise ExternalDataError(
            f"External data of {shown(value.name)} is {shown(tensor.dtype)} in {tensor.path}; the "
            f"graph has {TensorProto.DataType.Name(wanted)}"
        )
    return tensor
