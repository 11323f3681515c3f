"""Moves the weights of a graph into `constants.bin`, rounded and packed as the flags say.

Knows which weights are a MatMul's; `constants.py` knows how each kind is stored.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, NamedTuple, Set

import numpy as np
from onnx import TensorProto, numpy_helper

from ..container.constants import (
    FLOAT16,
    FLOAT32,
    ConstantsWriter,
    is_float,
    open_initializer,
    replace_by_stub,
    to_float16,
    to_float32,
)
from ..lowering.graph import INLINE_ELEMENTS, has_subgraphs
from .folding import own_weights


class Precision(NamedTuple):
    """How the weights are stored."""

    convert_to_fp16: bool
    mxfp6_matmul: bool

    @property
    def kind(self) -> str:
        """Kind of the constants that are no MXFP6."""
        return FLOAT16 if self.convert_to_fp16 else FLOAT32


def store_weights(
    model: Any, writer: ConstantsWriter, *, folder: str, precision: Precision
) -> None:
    """Move each large initializer into `writer`, and round what stays in the graph.

    The model keeps a float32 (or integer) stand-in without bytes for each moved tensor. Inline
    bytes are dropped as soon as they are written. `folder` is what external data is relative to.
    """
    plain = not has_subgraphs(model)
    made = own_weights(model, separate=precision.mxfp6_matmul) if plain else {}
    packed = matmul_weights(model) if plain and precision.mxfp6_matmul else {}
    store = _Store(writer, precision, packed)
    graph = model.graph
    tensors = {t.name: t for t in graph.initializer}
    read = set(tensors)
    if plain:
        read = {o.name for o in graph.output}.union(*(node.input for node in graph.node))
    for name, tensor in tensors.items():
        if name in made:
            continue
        array = open_initializer(tensor, folder)
        for copy, source in made.items():
            if source.name == name:
                store.add(tensors[copy], array.T if source.transposed else array)
        if name in read:
            store.add(tensor, array)
        del array
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in read:
            del graph.initializer[index]
    for node in graph.node:
        _round_constant(node, precision)


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
            if is_float(tensor):
                values = _rounded(array, tensor.data_type, self._precision)
            else:
                values = np.array(array)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        elif not is_float(tensor):
            self._writer.add(tensor.name, array, tensor.data_type, array.dtype.name)
            replace_by_stub(tensor, tensor.data_type)
        else:
            self._add_float(tensor, array)
            replace_by_stub(tensor, TensorProto.FLOAT)

    def _add_float(self, tensor: Any, array: Any) -> None:
        k_is_last = self._packed.get(tensor.name)
        if k_is_last is None:
            self._writer.add(tensor.name, array, tensor.data_type, self._precision.kind)
        else:
            self._writer.add_mxfp6(tensor.name, array, tensor.data_type, transposed=k_is_last)


def _rounded(array: Any, data_type: int, precision: Precision) -> Any:
    values = to_float32(np.array(array), data_type)
    if precision.convert_to_fp16:
        values = to_float16(values)[0]
    return np.asarray(values, np.float32)


def _round_constant(node: Any, precision: Precision) -> None:
    if node.op_type not in ("Constant", "ConstantOfShape") or node.domain:
        return
    for attribute in node.attribute:
        if attribute.name == "value" and is_float(attribute.t):
            array = numpy_helper.to_array(attribute.t).astype(np.float32)
            values = _rounded(array, TensorProto.FLOAT, precision)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        elif attribute.name == "value_float":
            attribute.f = float(_rounded(np.float32(attribute.f), TensorProto.FLOAT, precision))
        elif attribute.name == "value_floats":
            values = _rounded(np.array(attribute.floats), TensorProto.DOUBLE, precision)
            attribute.floats[:] = values.tolist()
