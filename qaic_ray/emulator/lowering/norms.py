"""Finds RMS norms that are written out in plain operators, and checks them.

The recipe's graphs have no operator of their own for them. Found are a multiplication by a weight
along the last axis, and one value that the other factor is made of; the nodes between the two are
run on values of several magnitudes against onnxruntime's own operator. Their constants are as the
card holds them: one over the root of the width, rounded to float16, makes all results larger or
smaller by the same factor.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
from onnx import TensorProto, helper

from .cardops import rms_norm_node
from .view import GraphView, NotLowered, Part, part_session, run_part

_TOLERANCE = 1e-5
_MAGNITUDES = (1e-3, 1.0, 30.0)
_LARGE = 1e6
_MOST = 1e-2
_BETWEEN = {"Cast", "Identity"}
_OPS = _BETWEEN | {
    "Mul", "Div", "Pow", "Add", "Sqrt", "Reciprocal", "ReduceSum", "ReduceMean", "Constant",
    "Shape", "Gather", "Squeeze", "Unsqueeze", "Slice",
}  # fmt: skip


class Scale(NamedTuple):
    """How a norm is scaled beside its weight: `epsilon` under the root, and a `factor`."""

    epsilon: float
    factor: float


class Norm(NamedTuple):
    """`output` is the RMS norm of `source` over its last axis, times `weight` [width]."""

    source: str
    weight: Any
    epsilon: float
    output: str


class NormFinder:
    """Finds norms; those that differ in names only are run once."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._proven: Dict[str, Optional[Scale]] = {}

    def find(self, node: Any) -> Optional[Norm]:
        """The norm that a node ends, None where it ends none."""
        if node.op_type != "Mul" or node.domain:
            return None
        for name, unit in (node.input, reversed(node.input)):
            shape = self._view.shapes.get(name, ())
            if len(shape) != 1 or shape[0] == 1 or name not in self._view.initializers:
                continue
            for source in self._sources(unit):
                scale = self._scale(source, unit, shape[0])
                if scale is not None:
                    weight = self._view.constant(name) * np.float32(scale.factor)
                    return Norm(source, weight, scale.epsilon, node.output[0])
        return None

    def _sources(self, unit: str) -> List[str]:
        """What a value may be the unit of: each factor of it."""
        node = self._view.node(self._bare(unit))
        if node is None or node.op_type not in ("Mul", "Div"):
            return []
        found = [self._bare(name) for name in node.input]
        # The factor that is one over the root of something is not what is normed.
        made = [self._view.node(name) for name in found]
        return [
            name
            for name, maker in zip(found, made)
            if name not in self._view.initializers
            and (maker is None or maker.op_type not in ("Div", "Reciprocal", "Sqrt", "Constant"))
        ]

    def _bare(self, name: str) -> str:
        view = self._view
        node = view.node(name)
        while (
            node is not None
            and node.op_type in _BETWEEN
            and view.types.get(node.input[0]) == TensorProto.FLOAT
        ):
            name = node.input[0]
            node = view.node(name)
        return name

    def _scale(self, source: str, unit: str, width: int) -> Optional[Scale]:
        view = self._view
        try:
            if self._last_dim(source) != width:
                return None
            part = Part(view, (source,), (unit,))
            if not {n.op_type for n in part.nodes} <= _OPS or any(n.domain for n in part.nodes):
                return None
            key = part.key()
            if key not in self._proven:
                self._proven[key] = self._prove(part, source, width)
        except NotLowered:
            return None
        return self._proven[key]

    def _last_dim(self, name: str) -> Any:
        shape = self._view.shapes.get(name) or (None,)
        return shape[-1] if shape[-1] is not None else self._view.shape(name)[-1]

    def _prove(self, part: Part, source: str, width: int) -> Optional[Scale]:
        """The scale with which the operator computes the part, None where none is."""
        run, rng = part.session(), np.random.default_rng(0)
        *outer, _ = self._view.shapes[source]
        sizes = {dim: 2 for dim in outer if isinstance(dim, str)}

        def made(x: Any) -> Any:
            return run({source: x}, sizes)[0]

        x = rng.standard_normal([2] * len(outer) + [width]).astype(np.float32)
        # Where epsilon does not count any more, the largest value tells the factor.
        large = made(x * np.float32(_LARGE)).astype(np.float64)
        if large.shape != x.shape:
            return None
        root = np.sqrt(np.square(x, dtype=np.float64).mean(axis=-1, keepdims=True))
        factor = float(np.median(large * root / x))
        if not abs(factor - 1) < _MOST:
            return None
        inputs = [x * np.float32(magnitude) for magnitude in _MAGNITUDES]
        expected = [made(some) for some in inputs]
        for number in part.numbers():
            scale = Scale(number * factor**2, factor)
            kernel = self._kernel(len(outer) + 1, width, scale)
            found = [run_part(kernel, {"x": some})[0] for some in inputs]
            if all(
                np.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)
                for one, other in zip(found, expected)
            ):
                return scale
        return None

    def _kernel(self, rank: int, width: int, scale: Scale) -> Any:
        dims = [None] * (rank - 1) + [width]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
        weight = np.full(width, scale.factor, np.float32)
        constant = helper.make_tensor("weight", TensorProto.FLOAT, [width], weight)
        node = rms_norm_node(["x", "weight"], ["y"], "y", scale.epsilon)
        outputs = [helper.make_empty_tensor_value_info("y")]
        graph = helper.make_graph([node], "norm", [x], outputs, [constant])
        return part_session(self._view.model, graph)


def kernel_node(norm: Norm, weight: str) -> Any:
    """The norm as one operator; `weight` is the name that its weight has."""
    return rms_norm_node([norm.source, weight], [norm.output], norm.output, norm.epsilon)
