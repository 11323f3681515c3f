"""Dims of the values of a graph whose inputs have static ones.

onnx's own inference gives up where a shape is made of other shapes in ways that exporters like
(`Unsqueeze`, `Where`, `Range` on the way). Here one walk carries the values of small constants
along with the dims, so that what depends on dims alone is computed.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from . import cardops
from .graph import ONNX_ERRORS, GraphError, infer_shapes, opset_of
from .graph import inputs as graph_inputs

Dims = Tuple[int, ...]
NamedDims = Optional[Tuple[Any, ...]]

# Sizes for a graph's dimensions: no product of two of them is one of them, and a slice of a cache
# to a compute-context length is as long as that.
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)
_RISING = (
    *("batch_size", "num_logits_to_keep", "seq_len"),
    *("full_batch_size", "comp_ctx_lengths", "ctx_len"),
)

_MAX_ELEMENTS = 1024
"""Larger values than this are no part of a shape, and are not computed."""

# What onnx's reference implementation raises where it lacks an operator or a type.
_NOT_COMPUTED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


def output_dims(model: Any, inputs: Mapping[str, Dims]) -> Dict[str, Tuple[Any, ...]]:
    """Dims of each output of which the rank can be told, from those of the inputs; None: unknown.

    What the model declares of its outputs and of the values inside it has no say.

    Raises:
        GraphError: where an operator cannot take what it is given.
    """
    inferred = infer_shapes(model, inputs)
    found = {value.name: _partial_dims(value.type) for value in inferred.output}
    if any(dims is None or None in dims for dims in found.values()):
        walk = _walked(model, inputs)
        found = {name: _both(dims, walk.partial_dims(name)) for name, dims in found.items()}
    return {name: dims for name, dims in found.items() if dims is not None}


def _both(one: NamedDims, other: NamedDims) -> NamedDims:
    if one is None or other is None or len(one) != len(other):
        return one or other
    return tuple(b if a is None else a for a, b in zip(one, other))


def _partial_dims(kind: Any) -> NamedDims:
    if not kind.tensor_type.HasField("shape"):
        return None
    sizes = kind.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in sizes)


def named_dims(model: Any) -> Dict[str, NamedDims]:
    """Dims of all values: numbers, names of the inputs' dimensions, or None where it is neither.

    Two walks with other sizes for the same names: what is the same in both is a number.

    Raises:
        GraphError: where an operator cannot take what it is given.
    """
    values = {v.name: v.type.tensor_type.shape.dim for v in graph_inputs(model)}
    names = {d.dim_param for dims in values.values() for d in dims if d.dim_param}
    middle = len(_RISING) / 2
    rising = sorted(names, key=lambda n: _RISING.index(n) if n in _RISING else middle)
    walks = []
    for primes in (_PRIMES, _PRIMES[1:]):
        sizes = dict(zip(rising, primes))
        given = {
            name: [d.dim_value or sizes.get(d.dim_param, 1) for d in dims]
            for name, dims in values.items()
        }
        walks.append((_walked(model, given), {size: name for name, size in sizes.items()}))
    return {name: _named(walks, name) for name in walks[0][0].names()}


def _named(walks: List[Tuple[_Walk, Dict[int, str]]], name: str) -> NamedDims:
    found = [(walk.dims(name), symbols) for walk, symbols in walks]
    (one, symbols), (other, other_symbols) = found
    if one is None or other is None or len(one) != len(other):
        return None
    return tuple(
        a if a == b else symbols.get(a) if symbols.get(a) == other_symbols.get(b) else None
        for a, b in zip(one, other)
    )


def _walked(model: Any, inputs: Mapping[str, Sequence[int]]) -> _Walk:
    walk = _Walk(model)
    for value in graph_inputs(model):
        walk.learn(value.name, value.type.tensor_type.elem_type, inputs[value.name])
    for node in model.graph.node:
        walk.visit(node)
    return walk


class _Walk:
    """What is known of the values made so far: their types with dims, and small ones' content."""

    def __init__(self, model: Any) -> None:
        self._ir_version, self._opset = model.ir_version, opset_of(model)
        self._opsets = list(model.opset_import)
        self._versions = {o.domain: o.version for o in self._opsets}
        self._types: Dict[str, Any] = {}
        self._values: Dict[str, Any] = {}
        self._computed: Dict[Tuple[bytes, ...], List[Any]] = {}
        for tensor in model.graph.initializer:
            self.learn(tensor.name, tensor.data_type, tensor.dims)
            external = tensor.data_location == TensorProto.EXTERNAL
            if not external and math.prod(tensor.dims) <= _MAX_ELEMENTS:
                # One that cannot be read is refused by name where the weights are stored.
                with contextlib.suppress(ValueError, TypeError):
                    self._values[tensor.name] = numpy_helper.to_array(tensor)

    def learn(self, name: str, elem_type: int, dims: Iterable[int]) -> None:
        self._types[name] = helper.make_tensor_type_proto(elem_type, list(dims))

    def names(self) -> Iterable[str]:
        return self._types

    def partial_dims(self, name: str) -> NamedDims:
        kind = self._types.get(name)
        return None if kind is None else _partial_dims(kind)

    def dims(self, name: str) -> Optional[Dims]:
        dims = self.partial_dims(name)
        return None if dims is None or None in dims else dims

    def visit(self, node: Any) -> None:
        """Take in what a node makes."""
        if (node.domain, node.op_type) in cardops.NAMES:
            self._visit_card_operator(node)
            return
        if all(not name or name in self._types for name in node.input):
            self._types.update(self._infer(node))
        self._compute(node)

    def _visit_card_operator(self, node: Any) -> None:
        data, kind = self.dims(node.input[0]), (node.domain, node.op_type)
        if data is None:
            return
        dims: Dims = data
        if kind in (cardops.GATHER, cardops.GATHER_CB):
            slots = self.dims(node.input[1])
            indices = self.dims(node.input[2 if kind == cardops.GATHER_CB else 1])
            if slots is None or indices is None:
                return
            num_rows = slots[0] if kind == cardops.GATHER_CB else data[0]
            dims = (num_rows, data[1], indices[-1], *data[3:])
        elem_type = self._types[node.input[0]].tensor_type.elem_type
        self.learn(node.output[0], elem_type, dims)

    def _infer(self, node: Any) -> Dict[str, Any]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, self._versions.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return {}
        types = {name: self._types[name] for name in node.input if name}
        content = {n: numpy_helper.from_array(self._values[n]) for n in types if n in self._values}
        try:
            made = shape_inference.infer_node_outputs(
                schema, node, types, content, opset_imports=self._opsets
            )
        except ONNX_ERRORS as error:
            if any(a.HasField("g") for a in node.attribute):
                return {}  # its graph may read values that are not among its inputs
            raise GraphError(
                f"[Operator-'{node.name}', opset_version-{self._opset}, "
                f"ir_version-{self._ir_version}] : {node.op_type}: {error}"
            ) from error
        return dict(made)

    def _compute(self, node: Any) -> None:
        if node.op_type == "Shape" and not node.domain:
            dims = self.dims(node.input[0])
            if dims is None:
                return
            bounds = {a.name: a.i for a in node.attribute}
            taken = dims[bounds.get("start", 0) : bounds.get("end", len(dims))]
            self._keep(node.output[0], np.array(taken, np.int64))
            return
        if node.domain or not all(not name or name in self._values for name in node.input):
            return
        sizes = [self.dims(name) for name in node.output]
        if any(size is None or math.prod(size) > _MAX_ELEMENTS for size in sizes):
            return
        for name, value in zip(node.output, self._evaluate(node)):
            if isinstance(value, (np.ndarray, np.generic)):
                self._keep(name, np.asarray(value))

    def _keep(self, name: str, value: Any) -> None:
        self._values[name] = value
        self.learn(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)

    def _evaluate(self, node: Any) -> List[Any]:
        """What a node makes of known values; the same computation is done once for all layers."""
        feeds = {name: self._values[name] for name in node.input if name}
        bare = onnx.NodeProto(op_type=node.op_type, attribute=node.attribute)
        key = (
            bare.SerializeToString(),
            *(f"{feeds[n].dtype}{feeds[n].shape}".encode() if n else b"" for n in node.input),
            *(feeds[n].tobytes() for n in node.input if n),
        )
        if key not in self._computed:
            self._computed[key] = self._run_alone(node, feeds)
        return self._computed[key]

    def _run_alone(self, node: Any, feeds: Mapping[str, Any]) -> List[Any]:
        # Imported here: it takes a while, and most models name all their dims.
        from onnx.reference import ReferenceEvaluator

        values = [onnx.ValueInfoProto(name=n, type=self._types[n]) for n in feeds]
        outputs = [onnx.ValueInfoProto(name=n) for n in node.output]
        graph = helper.make_graph([node], "node", values, outputs)
        try:
            model = helper.make_model(graph, opset_imports=self._opsets)
            return list(ReferenceEvaluator(model).run(None, dict(feeds)))
        except _NOT_COMPUTED:
            return []
