"""`constants.bin`: weights rounded and packed into it, and out of it into onnxruntime's memory.

One tensor at a time and in pieces, so that a model of any size passes through little memory.
Float constants become float16 under `-convert-to-fp16` (IEEE: ties to even, beyond 65504 becomes
infinity), MatMul weights MXFP6 under `-mxfp6-matmul`; all come back as float32.

A weight that only ever is a MatMul's right operand is packed by onnxruntime into a copy of its
own; what it was packed from is then given back to the system. A float16 table that is only
looked up in stays a view of the file.
"""

from __future__ import annotations

import functools
import math
import mmap
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Set, Tuple

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from ..lowering.view import ORT_ERRORS
from ..numbers import mxfp6, panels
from . import QpcError, QpcWriter

FLOAT16 = "float16"
FLOAT32 = "float32"
MXFP6 = "mxfp6"
KINDS = frozenset([FLOAT16, FLOAT32, MXFP6, "int64", "int32", "int16", "int8", "uint8", "bool"])

_ALIGN_BYTES = 64
_PIECE = 1 << 22
_PANELS_AT_ONCE = 32


class Constant(NamedTuple):
    """Where and how one tensor lies in `constants.bin`.

    `kind` is `float16`, `float32`, `mxfp6` or a numpy dtype name of integers. A transposed MXFP6
    tensor is stored as its transpose, because its K axis is its last one. MatMul weights are stored
    in panels (`numbers/panels.py`): all MXFP6 ones, one after the other where there are several
    matrices, and of the others those that say so.
    """

    name: str
    shape: Tuple[int, ...]
    kind: str
    offset: int
    size_bytes: int
    transposed: bool = False
    in_panels: bool = False


class Rounding(NamedTuple):
    """What `-convert-to-fp16` did to one tensor."""

    num_underflows: int
    num_overflows: int


def to_float32(array: Any, data_type: int) -> Any:
    """Values of an array as float32 (bfloat16 comes as uint16); a view where it is one already."""
    if data_type == TensorProto.BFLOAT16 and array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def to_float16(values: Any) -> Tuple[Any, Rounding]:
    """Round to float16 as IEEE says; and how many values became zero or infinity by it."""
    with np.errstate(over="ignore", under="ignore"):
        half = values.astype(np.float16)
    zeros = int(np.count_nonzero(half.view(np.uint16) & 0x7FFF == 0))
    underflows = zeros - int(np.count_nonzero(values == 0)) if zeros else 0
    overflows = 0
    if not np.isfinite(half).all():
        overflows = int(np.count_nonzero(np.isinf(half) & np.isfinite(values)))
    return half, Rounding(underflows, overflows)


class ConstantsWriter:
    """Streams tensors into the open segment of a container, and keeps the table of them."""

    def __init__(self, writer: QpcWriter) -> None:
        self._writer = writer
        self.table: List[Constant] = []
        self.roundings: Dict[str, Rounding] = {}

    def add(self, name: str, array: Any, data_type: int, kind: str) -> None:
        """Append one tensor as `kind` (see `Constant`)."""
        self._writer.align(_ALIGN_BYTES)
        start = self._writer.write(b"")
        flat = array.reshape(-1)
        for first in range(0, flat.size, _PIECE):
            piece = flat[first : first + _PIECE]
            if kind == FLOAT16:
                self._writer.write(self._half(name, to_float32(piece, data_type)))
            elif kind == FLOAT32:
                self._writer.write(np.ascontiguousarray(to_float32(piece, data_type)))
            else:
                self._writer.write(np.ascontiguousarray(piece))
        self._close(Constant(name, tuple(array.shape), kind, start, 0))

    def add_panels(self, name: str, array: Any, data_type: int, kind: str) -> None:
        """Append a MatMul weight [K, N] as float16 or float32 panels."""
        self._writer.align(_ALIGN_BYTES)
        start = self._writer.write(b"")
        for piece in _columns(array):
            values = to_float32(piece, data_type)
            if kind == FLOAT16:
                values = self._half(name, values)
            self._writer.write(panels.of_floats(values))
        self._close(Constant(name, tuple(array.shape), kind, start, 0, in_panels=True))

    def add_mxfp6(self, name: str, array: Any, data_type: int, *, transposed: bool) -> None:
        """Append a MatMul weight [..., K, N] (or [..., N, K] where transposed) as MXFP6."""
        self._writer.align(_ALIGN_BYTES)
        start = self._writer.write(b"")
        for matrix in array.reshape((-1, *array.shape[-2:])):
            for piece in _columns(matrix.T if transposed else matrix):
                packed = mxfp6.encode(to_float32(piece, data_type))
                self._writer.write(panels.of_mxfp6(packed))
        self._close(Constant(name, tuple(array.shape), MXFP6, start, 0, transposed, True))

    def add_float32(self, name: str, array: Any) -> None:
        """Append a float32 table as it is."""
        self.add(name, array, TensorProto.FLOAT, FLOAT32)

    def read(self, name: str) -> Any:
        """One tensor that was added, as it is computed with."""
        constant = next(c for c in self.table if c.name == name)
        return read_constant(self._writer.open_segment(), constant)

    def _half(self, name: str, values: Any) -> Any:
        half, rounding = to_float16(values)
        before = self.roundings.get(name, Rounding(0, 0))
        self.roundings[name] = Rounding(
            before.num_underflows + rounding.num_underflows,
            before.num_overflows + rounding.num_overflows,
        )
        return half

    def _close(self, constant: Constant) -> None:
        size = self._writer.write(b"") - constant.offset
        self.table.append(constant._replace(size_bytes=size))


def _columns(matrix: Any) -> Iterator[Any]:
    """Pieces [K, some of N], of whole panels but for the last."""
    width = max(1, _PIECE // max(1, matrix.shape[0]) // panels.WIDTH) * panels.WIDTH
    for first in range(0, matrix.shape[1], width):
        yield matrix[:, first : first + width]


def stored_view(segment: Any, constant: Constant) -> Any:
    """A view of one tensor as it is stored; None for one in panels.

    Raises:
        QpcError: where the table does not fit the segment.
    """
    end = constant.offset + constant.size_bytes
    if constant.offset < 0 or end > len(segment) or _stored_bytes(constant) != constant.size_bytes:
        raise QpcError(f"constant '{constant.name}' does not fit into constants.bin")
    if constant.in_panels:
        return None
    data = segment[constant.offset : end]
    return data.view(np.dtype(constant.kind)).reshape(constant.shape)


def read_constant(segment: Any, constant: Constant, out: Any = None) -> Any:
    """One tensor as it is computed with: float32, or its integer type; into `out` if given.

    Raises:
        QpcError: where the table does not fit the segment.
    """
    values = stored_view(segment, constant)
    if out is None:
        widened = values is None or constant.kind == FLOAT16
        out = np.empty(constant.shape, np.float32 if widened else values.dtype)
    if values is not None:
        np.copyto(out, values)
    elif out.size:
        _read_panels(segment[constant.offset :][: constant.size_bytes], constant, out)
    return out


def panels_of(segment: Any, constant: Constant) -> Any:
    """A view of a MatMul weight's panels: uint8 [panels, bytes of a panel].

    Raises:
        QpcError: where the table does not fit the segment.
    """
    stored_view(segment, constant)
    data = segment[constant.offset : constant.offset + constant.size_bytes]
    columns = constant.shape[-2] if constant.transposed else constant.shape[-1]
    return data.reshape(panels.num_panels(columns), -1)


def _stored_bytes(constant: Constant) -> int:
    shape = constant.shape
    if not constant.in_panels:
        return math.prod(shape) * np.dtype(constant.kind).itemsize
    rows, columns = (shape[-1], shape[-2]) if constant.transposed else shape[-2:]
    if constant.kind == MXFP6:
        return math.prod(shape[:-2]) * math.prod(panels.mxfp6_shape(rows, columns))
    size = np.dtype(constant.kind).itemsize
    return math.prod(shape[:-2]) * panels.num_panels(columns) * panels.WIDTH * rows * size


def _read_panels(data: Any, constant: Constant, out: Any) -> None:
    matrices = out.reshape((-1, *out.shape[-2:]))
    for matrix, stored in zip(matrices, data.reshape(len(matrices), -1)):
        weight = matrix.T if constant.transposed else matrix
        rows, columns = weight.shape
        by_panel = stored.reshape(panels.num_panels(columns), -1)
        for number in range(0, len(by_panel), _PANELS_AT_ONCE):
            piece = by_panel[number : number + _PANELS_AT_ONCE]
            into = weight[:, number * panels.WIDTH :][:, : len(piece) * panels.WIDTH]
            if constant.kind == MXFP6:
                shaped = piece.reshape(len(piece), -1, panels.TILE_BYTES)
                mxfp6.decode(panels.to_mxfp6(shaped, into.shape[1]), rows, out=into)
            else:
                values = piece.view(np.dtype(constant.kind))
                shaped = values.reshape(len(piece), rows, panels.WIDTH)
                np.copyto(into, panels.to_floats(shaped, into.shape[1]))


class Weights:
    """Decoded constants of one graph.

    Args:
        model: a graph whose initializers without bytes are constants.
        constants: the table of them, by name.
        segment: the bytes of `constants.bin`, memory-mapped.
    """

    def __init__(self, model: Any, constants: Mapping[str, Constant], segment: Any) -> None:
        self._constants = constants
        self._segment = segment
        self._packed = _packed_by_onnxruntime(model)
        self._maps: Dict[str, mmap.mmap] = {}
        self.arrays: Dict[str, Any] = {}
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                self.arrays[tensor.name] = self._load(tensor.name, tensor.data_type)

    def _load(self, name: str, data_type: int) -> Any:
        constant = self._constants[name]
        view = stored_view(self._segment, constant)
        dtype = helper.tensor_dtype_to_np_dtype(data_type)
        if view is not None and view.dtype == dtype:
            return view
        if name not in self._packed:
            return read_constant(self._segment, constant)
        size = math.prod(constant.shape) * dtype.itemsize
        self._maps[name] = mmap.mmap(-1, size)
        out = np.frombuffer(self._maps[name], dtype).reshape(constant.shape)
        return read_constant(self._segment, constant, out)

    def release(self) -> None:
        """Give the memory of packed weights back; their arrays read as zeros from now on."""
        for memory in self._maps.values():
            memory.madvise(mmap.MADV_DONTNEED)

    def restore(self) -> None:
        """Undo `release`."""
        for name in self._maps:
            read_constant(self._segment, self._constants[name], self.arrays[name])

    def session(self, model: Any, num_threads: int, profile: str = "") -> Any:
        """An onnxruntime session over these weights; they have to live as long as it.

        It writes a profile of its operators into a file that begins with `profile`, if given.
        """
        options = _options(num_threads)
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        return _open(model, options, self.arrays)


def _options(num_threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Quantized operators are computed with wide sums, as a card's are: the integer kernels of some
    # processors saturate in between.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _open(model: Any, options: Any, arrays: Mapping[str, Any]) -> Any:
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ORT_ERRORS as error:
        raise QpcError(f"the graph cannot run here: {error}") from error


@functools.lru_cache(maxsize=None)
def packs_into_its_own_memory() -> bool:
    """Whether this onnxruntime copies MatMul weights when a session is made; found by trying."""
    weight = np.ones((64, 64), np.float32)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w")
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "matmul", infos[:1], infos[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = _open(model, _options(1), {"w": weight})
    weight[:] = 0
    return bool(np.all(session.run(None, {"x": np.ones((1, 64), np.float32)})[0] == 64))


def _packed_by_onnxruntime(model: Any) -> Set[str]:
    uses: Dict[str, List[bool]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            fits = node.op_type == "MatMul" and not node.domain and position == 1
            uses.setdefault(name, []).append(fits)
    return {
        t.name
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and all(uses.get(t.name, [False]))
    }
