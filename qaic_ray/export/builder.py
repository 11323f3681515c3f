"""Builds an ONNX graph node by node and keeps the type and shape of every value.

Scopes, shapes and operators come from the caller. Nodes and values are named as PyTorch's exporter
names them: `/model/layers.3/self_attn/q_proj/MatMul`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dim = int | str | None
Shape = tuple[Dim, ...]

_IR_VERSIONS = {13: 7, 17: 8}
"""By opset, as in the published exports: a compiler of that time may read no later one."""

PRODUCER = "qaic-ray"
"""`producer_name` of the graphs that we write."""

_COMPARISONS = ("Greater", "Less")
_RANKS = ("scalar", "vector", "matrix")


@dataclass(frozen=True)
class Value:
    """A value of the graph: its name, element type (of `onnx.TensorProto`) and shape."""

    name: str
    dtype: int
    shape: Shape


@dataclass(frozen=True)
class WeightSpec:
    """A tensor of the graph whose bytes come later, from the checkpoint or from a table.

    `shape` is the one in the graph; with `transpose` the checkpoint's is its reverse. `source` is
    the name in the checkpoint, None for a rotary table. Every block of `copied_rows` rows of the
    checkpoint (a head) is stored `copies` times, one after the other. `dtype` is the type in the
    graph (of `onnx.TensorProto`) where it is not that of the others.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    transpose: bool = False
    copies: int = 1
    copied_rows: int = 1
    dtype: int | None = None

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The checkpoint's shape."""
        rows, *others = self.shape[::-1] if self.transpose else self.shape
        return (rows // self.copies, *others)

    @property
    def least_elements(self) -> int:
        """Values of the smallest block that can be written: one row, or one head with copies."""
        return self.copies * self.copied_rows * prod(self.source_shape[1:])


class GraphBuilder:
    """One graph under construction.

    Args:
        dtype: element type of weights and activations.
    """

    def __init__(self, dtype: int) -> None:
        self.dtype = dtype
        self.weights: list[WeightSpec] = []
        self._inputs: list[Value] = []
        self._outputs: list[Value] = []
        self._nodes: list[onnx.NodeProto] = []
        self._inner: list[Value] = []
        self._constants: dict[str, TensorProto] = {}
        self._shapes: dict[str, Value] = {}
        self._sizes: dict[str, Value] = {}
        self._num_uses: dict[str, int] = {}

    def input(self, name: str, dtype: int, shape: Shape) -> Value:
        """Declare a graph input."""
        value = Value(name, dtype, shape)
        self._inputs.append(value)
        return value

    def weight(self, name: str, shape: tuple[int, ...], *, source: str | None, **how: Any) -> Value:
        """Declare a tensor that is written beside the model; `how` are fields of `WeightSpec`."""
        spec = WeightSpec(name, shape, source, **how)
        self.weights.append(spec)
        return Value(name, spec.dtype or self.dtype, shape)

    def constant(self, values: Any, dtype: int = TensorProto.INT64) -> Value:
        """A small constant; equal ones are one initializer."""
        array = np.asarray(values, dtype=helper.tensor_dtype_to_np_dtype(dtype))
        text = "x".join(str(v) for v in array.ravel().tolist())
        name = f"constant_{array.dtype}_{_RANKS[array.ndim]}_{text}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return Value(name, dtype, array.shape)

    def op(
        self,
        kind: str,
        scope: str,
        inputs: Sequence[Value],
        shape: Shape,
        *,
        dtype: int | None = None,
        output: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """Add a node.

        Args:
            kind: the operator.
            scope: path of the module that the node belongs to, as in the checkpoint.
            inputs: its inputs.
            shape: of its one result.
            dtype: of its result, the first input's where not given.
            output: name of the result where it is a graph output.
            domain: of the operator.
            attributes: of the operator.
        """
        path = f"{scope}/{kind}"
        num_uses = self._num_uses.get(path, 0)
        self._num_uses[path] = num_uses + 1
        name = f"{path}_{num_uses}" if num_uses else path
        value = Value(
            output or f"{name}_output_0", inputs[0].dtype if dtype is None else dtype, shape
        )
        names = [i.name for i in inputs]
        self._nodes.append(
            helper.make_node(kind, names, [value.name], name=name, domain=domain, **attributes)
        )
        (self._outputs if output else self._inner).append(value)
        return value

    def elementwise(self, kind: str, scope: str, *inputs: Value) -> Value:
        """An operator whose result has the broadcast shape of its inputs.

        The result has the last input's type, or is bool for a comparison.
        """
        dtype = TensorProto.BOOL if kind in _COMPARISONS else inputs[-1].dtype
        return self.op(kind, scope, inputs, broadcast(*(i.shape for i in inputs)), dtype=dtype)

    def matmul(self, scope: str, left: Value, right: Value) -> Value:
        """[.., M, K] times [.., K, N]."""
        batch = broadcast(left.shape[:-2], right.shape[:-2])
        return self.op("MatMul", scope, [left, right], (*batch, left.shape[-2], right.shape[-1]))

    def reshape(self, scope: str, value: Value, pattern: Sequence[int], shape: Shape) -> Value:
        """`pattern` is ONNX's: 0 keeps a dimension, -1 is the rest; `shape` is what it gives."""
        return self.op("Reshape", scope, [value, self.constant(pattern)], shape)

    def transpose(self, scope: str, value: Value, order: Sequence[int]) -> Value:
        """Permute the dimensions."""
        shape = tuple(value.shape[i] for i in order)
        return self.op("Transpose", scope, [value], shape, perm=list(order))

    def unsqueeze(self, scope: str, value: Value, *axes: int) -> Value:
        """Insert dimensions of 1; `axes` are their places in the result, rising."""
        shape = list(value.shape)
        for axis in axes:
            shape.insert(axis, 1)
        return self.op("Unsqueeze", scope, [value, self.constant(axes)], tuple(shape))

    def gather(self, scope: str, data: Value, indices: Value, *, axis: int = 0) -> Value:
        """Entries of `data` at `indices`, along an axis that counts from the front."""
        shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
        return self.op("Gather", scope, [data, indices], shape, axis=axis)

    def range(self, scope: str, stop: Value, name: str) -> Value:
        """0 to `stop`, a dimension called `name`."""
        span = [self.constant(0), stop, self.constant(1)]
        return self.op("Range", scope, span, (name,), dtype=TensorProto.INT64)

    def shape_of(self, scope: str, *sizes: Value | int) -> Value:
        """A shape made of dimensions (scalars, from `dimension`) and numbers."""
        parts = []
        for size in sizes:
            if isinstance(size, int):
                parts.append(self.constant([size]))
                continue
            if size.name not in self._sizes:
                self._sizes[size.name] = self.unsqueeze(scope, size, 0)
            parts.append(self._sizes[size.name])
        return self.op("Concat", scope, parts, (len(sizes),), axis=0)

    def concat(self, scope: str, *parts: Value) -> Value:
        """Join along the last axis, whose sizes are numbers."""
        width = sum(int(part.shape[-1] or 0) for part in parts)
        return self.op("Concat", scope, parts, (*parts[0].shape[:-1], width), axis=-1)

    def expand(self, scope: str, value: Value, pattern: Value, shape: Shape) -> Value:
        """Broadcast to `pattern`, which gives `shape`."""
        return self.op("Expand", scope, [value, pattern], shape)

    def cast(self, scope: str, value: Value, dtype: int, *, output: str | None = None) -> Value:
        """Cast; no node where the type is right already and no graph output has to be made."""
        if value.dtype == dtype and output is None:
            return value
        return self.op("Cast", scope, [value], value.shape, dtype=dtype, output=output, to=dtype)

    def dimension(self, scope: str, value: Value, axis: int) -> Value:
        """The size of one dimension as a scalar, which specialization makes a constant."""
        shape = self._shapes.get(value.name)
        if shape is None:
            shape = self.op("Shape", scope, [value], (len(value.shape),), dtype=TensorProto.INT64)
            self._shapes[value.name] = shape
        return self.gather(scope, shape, self.constant(axis))

    def finish(
        self,
        name: str,
        *,
        outputs: Sequence[str],
        opset: int,
        functions: Sequence[onnx.FunctionProto],
    ) -> Any:
        """The `onnx.ModelProto`; its weights are graph inputs until their bytes have a place.

        `outputs` gives their order.
        """
        made = {value.name: value for value in self._outputs}
        weights = [Value(w.name, w.dtype or self.dtype, w.shape) for w in self.weights]
        graph = helper.make_graph(
            self._nodes,
            name,
            [_value_info(v) for v in (*self._inputs, *weights)],
            [_value_info(made[output]) for output in outputs],
            initializer=list(self._constants.values()),
            value_info=[_value_info(v) for v in self._inner],
        )
        domains = dict.fromkeys(f.domain for f in functions)
        return helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid("", opset),
                *(helper.make_opsetid(domain, 1) for domain in domains),
            ],
            functions=functions,
            ir_version=_IR_VERSIONS[opset],
            producer_name=PRODUCER,
        )


def broadcast(*shapes: Shape) -> Shape:
    """The shape that ONNX broadcasting gives; two different names never meet."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    result: list[Dim] = []
    for dims in zip(*padded, strict=True):
        sizes = [d for d in dict.fromkeys(dims) if d != 1]
        if len(sizes) > 1:
            raise ValueError(f"shapes {shapes} do not broadcast")
        result.append(sizes[0] if sizes else 1)
    return tuple(result)


def _value_info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, value.dtype, list(value.shape))
