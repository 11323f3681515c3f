"""Moves the weights of a graph into `constants.bin`, rounded and packed as the flags say.

Each MatMul is given a weight of its own before: unshared, and not behind a Transpose or a Cast. A
compiler folds `Transpose(Cast(weight))`, and packs a tied embedding where it is a MatMul's weight
but not where rows of it are looked up.
"""

from __future__ import annotations

import math
import os
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Set

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from ..container.constants import FLOAT16, FLOAT32, ConstantsWriter, to_float16, to_float32
from ..documents import Refusal, shown
from ..lowering.graph import FLOATS, INLINE_ELEMENTS, has_subgraphs, replace_by_stub
from .extdata import ExternalTensor

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class ConstantError(Refusal):
    """A weight that cannot be read; the message says which and why."""


class Precision(NamedTuple):
    """How the weights are stored."""

    convert_to_fp16: bool
    mxfp6_matmul: bool

    @property
    def kind(self) -> str:
        """Kind of the constants that are no MXFP6."""
        return FLOAT16 if self.convert_to_fp16 else FLOAT32


class WeightFiles(NamedTuple):
    """Where the bytes of a model's initializers are, if not in it.

    `folder` is what ONNX's external data is relative to; `external` are the weights that lie in
    files of a checkpoint.
    """

    folder: str
    external: Mapping[str, ExternalTensor] = {}

    def open(self, tensor: Any) -> Any:
        """An initializer's array, bfloat16 as uint16: a view of its bytes, memory-mapped in files.

        Raises:
            ConstantError, ExternalDataError: where the file is missing, too short or outside of the
                folder.
        """
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name in self.external:
            return self.external[tensor.name].open(tensor.name, tensor.data_type)
        return open_initializer(tensor, self.folder)


def store_weights(
    model: Any, writer: ConstantsWriter, *, files: WeightFiles, precision: Precision
) -> None:
    """Move each large initializer into `writer`, and round what stays in the graph.

    The model keeps a float32 (or integer) stand-in without bytes for each moved tensor. Inline
    bytes are dropped as soon as they are written.
    """
    plain = not has_subgraphs(model)
    made = _own_weights(model, separate=precision.mxfp6_matmul) if plain else {}
    packed = matmul_weights(model) if plain else {}
    store = _Store(writer, precision, packed)
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    read = set(tensors)
    if plain:
        read = {o.name for o in graph.output}.union(*(node.input for node in graph.node))
    for name, tensor in tensors.items():
        if name in made:
            continue
        array = files.open(tensor)
        for copy, source in made.items():
            if source.name == name:
                store.add(tensors[copy], source.values(array, tensor.data_type))
        if name in read:
            store.add(tensor, array)
        del array
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]
    for node in graph.node:
        round_constant(node, precision)


def matmul_weights(model: Any) -> Dict[str, bool]:
    """Initializers that are only ever a constant MatMul or Gemm weight -> whether K is last."""
    candidates: Dict[str, bool] = {}
    refused: Set[str] = {o.name for o in model.graph.output}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            weight = position == 1 and node.op_type in ("MatMul", "Gemm") and not node.domain
            transposed = weight and any(a.name == "transB" and a.i for a in node.attribute)
            if not weight or candidates.setdefault(name, transposed) != transposed:
                refused.add(name)
    return {
        t.name: candidates[t.name]
        for t in model.graph.initializer
        if t.name in candidates and t.name not in refused and len(t.dims) >= 2
    }


class _Store:
    def __init__(
        self, writer: ConstantsWriter, precision: Precision, packed: Mapping[str, bool]
    ) -> None:
        self._writer = writer
        self._precision = precision
        self._packed = packed

    def add(self, tensor: Any, array: Any) -> None:
        """Write one tensor, or round it where it is small; `tensor` then has no other bytes."""
        if array.size < INLINE_ELEMENTS:
            values = np.array(array)
            if _is_float(tensor):
                values = _rounded(array, tensor.data_type, self._precision)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        elif _is_float(tensor):
            self._add_float(tensor, array)
            replace_by_stub(tensor, TensorProto.FLOAT)
        elif array.dtype.kind in "biuc":
            self._writer.add(tensor.name, array, tensor.data_type, array.dtype.name)
            replace_by_stub(tensor, tensor.data_type)
        else:
            kind = TensorProto.DataType.Name(tensor.data_type)
            raise ConstantError(
                f"The constant '{tensor.name}' is of the type {kind}, which is refused"
            )

    def _add_float(self, tensor: Any, array: Any) -> None:
        k_is_last = self._packed.get(tensor.name)
        kind = self._precision.kind
        if k_is_last is not None and self._precision.mxfp6_matmul:
            self._writer.add_mxfp6(tensor.name, array, tensor.data_type, transposed=k_is_last)
        elif k_is_last is False and array.ndim == 2:
            self._writer.add_panels(tensor.name, array, tensor.data_type, kind)
        else:
            self._writer.add(tensor.name, array, tensor.data_type, kind)


def _rounded(array: Any, data_type: int, precision: Precision) -> Any:
    values = to_float32(np.array(array), data_type)
    values = to_float16(values)[0] if precision.convert_to_fp16 else values
    return np.asarray(values, np.float32)


def round_constant(node: Any, precision: Precision) -> None:
    """Make float32 of the numbers of a Constant, rounded as the flags say."""
    if node.op_type not in ("Constant", "ConstantOfShape") or node.domain:
        return
    for attribute in node.attribute:
        if attribute.name == "value" and _is_float(attribute.t):
            array = numpy_helper.to_array(attribute.t).astype(np.float32)
            values = _rounded(array, TensorProto.FLOAT, precision)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        elif attribute.name == "value_float":
            attribute.f = float(_rounded(np.float32(attribute.f), TensorProto.FLOAT, precision))
        elif attribute.name == "value_floats":
            values = _rounded(np.array(attribute.floats), TensorProto.DOUBLE, precision)
            attribute.floats[:] = values.tolist()


def _is_float(tensor: Any) -> bool:
    """Whether an initializer holds numbers that the precision flags round."""
    return tensor.data_type in FLOATS


def open_initializer(tensor: Any, directory: str) -> Any:
    """An initializer's array: a view of its bytes, memory-mapped where it is external.

    bfloat16 comes as uint16.

    Raises:
        ConstantError: where the external file is missing, too short or outside of the folder, or
            the initializer contradicts itself.
    """
    try:
        return _opened(tensor, directory)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ConstantError(f"The constant '{tensor.name}' is malformed: {error}") from error


def _opened(tensor: Any, directory: str) -> Any:
    if tensor.data_location != TensorProto.EXTERNAL:
        if tensor.data_type == TensorProto.BFLOAT16 and tensor.raw_data:
            return np.frombuffer(tensor.raw_data, np.uint16).reshape(tuple(tensor.dims))
        return numpy_helper.to_array(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = os.path.normpath(os.path.join(directory, location))
    if os.path.isabs(location) or not path.startswith(os.path.normpath(directory) + os.sep):
        raise ConstantError(
            f"External data of '{tensor.name}' lies outside of the model's folder: {location}"
        )
    bfloat = tensor.data_type == TensorProto.BFLOAT16
    dtype = np.dtype(np.uint16) if bfloat else helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    needed = math.prod(shape) * dtype.itemsize
    try:
        offset = int(entries.get("offset", 0))
        if os.path.getsize(path) < offset + needed:
            raise ConstantError(
                f"External data of '{tensor.name}' is too short: "
                f"{path} needs {needed} bytes from {offset}"
            )
        return np.memmap(path, dtype, "r", offset, shape) if needed else np.empty(shape, dtype)
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConstantError(
            f"External data of '{tensor.name}' cannot be read: {shown(path)} ({reason})"
        ) from error


class _Source(NamedTuple):
    """The initializer that a new one is made of: as it is, transposed, or rounded to float16."""

    name: str
    transposed: bool = False
    halved: bool = False

    def values(self, array: Any, data_type: int) -> Any:
        """The new initializer's array."""
        if self.halved:
            array = to_float16(to_float32(array, data_type))[0]
        return array.T if self.transposed else array


def _fold_casts(model: Any, initializers: Dict[str, Any]) -> Dict[str, _Source]:
    """Remove Casts of constants: to a type that holds the same values, or to float16.

    Returns:
        The initializers that are rounded to float16, declared without bytes in the model.
    """
    graph = model.graph
    kept = {o.name for o in graph.output}
    read: Dict[str, str] = {}
    made: Dict[str, _Source] = {}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type != "Cast" or node.domain or node.output[0] in kept:
            continue
        tensor = initializers.get(next(iter(node.input), ""))
        if tensor is None or tensor.data_type not in FLOATS:
            continue
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if to == tensor.data_type or (to == TensorProto.FLOAT and tensor.data_type in _NARROW):
            read[node.output[0]] = tensor.name
        elif to == TensorProto.FLOAT16:
            name = f"{tensor.name}/float16"
            if name not in made:
                made[name] = _Source(tensor.name, halved=True)
                graph.initializer.add(name=name, data_type=to, dims=tensor.dims)
            read[node.output[0]] = name
        else:
            continue
        del graph.node[index]
    for node in graph.node if read else ():
        node.input[:] = [read.get(name, name) for name in node.input]
    return made


def _own_weights(model: Any, *, separate: bool) -> Dict[str, _Source]:
    """Rewrite a graph so that MatMul weights are initializers of their own; returns the new ones.

    Args:
        model: changed in place; new initializers are declared without bytes.
        separate: whether to copy a weight that is read by others too.
    """
    made = _fold_casts(model, {t.name: t for t in model.graph.initializer})
    initializers = {t.name: t for t in model.graph.initializer}
    transposes = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if _is_matrix_transpose(node, initializers)
    }
    num_reads: Dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            num_reads[name] = num_reads.get(name, 0) + 1
    for node in model.graph.node:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.input[1]
        transposed = weight in transposes
        if not transposed and not (separate and weight in initializers and num_reads[weight] > 1):
            continue
        own = transposes.get(weight, weight)
        name = f"{own}/{'transposed' if transposed else 'matmul'}"
        if name not in made:
            made[name] = made.get(own, _Source(own))._replace(transposed=transposed)
            tensor = initializers[own]
            dims = tensor.dims[::-1] if transposed else tensor.dims
            model.graph.initializer.add(name=name, data_type=tensor.data_type, dims=dims)
        node.input[1] = name
    _drop(model, transposes)
    return made


def _is_matrix_transpose(node: Any, initializers: Dict[str, Any]) -> bool:
    if node.op_type != "Transpose" or node.domain or node.input[0] not in initializers:
        return False
    order = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return len(initializers[node.input[0]].dims) == 2 and order in ([], [[1, 0]])


def _drop(model: Any, candidates: Iterable[str]) -> None:
    """Remove the nodes of `candidates` whose values are not read any more."""
    graph = model.graph
    read = {o.name for o in graph.output}.union(*(node.input for node in graph.node))
    unread = set(candidates) - read
    for index in reversed(range(len(graph.node))):
        if unread.intersection(graph.node[index].output):
            del graph.node[index]
