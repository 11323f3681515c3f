"""Producers, consumers and shapes of a graph's values, and parts of it that can be run alone.

`Part` cuts the nodes between some values out of a graph and runs them, which is how the lowering
makes sure that what it puts in a part's place computes the same.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Set, Tuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state

from .dims import named_dims
from .graph import GraphError, expand, infer_shapes

Dim = Any
Shape = Tuple[Dim, ...]

HEADS_FIRST = [0, 2, 1, 3]


class NotLowered(Exception):
    """A graph, or a part of it, does not have the form that a faster one is known for."""


class GraphView:
    """Producers, consumers and shapes of a model's values. The model must not change meanwhile.

    Args:
        model: main-graph nodes only; other functions than the card's are inlined.
        values: reads an initializer whose bytes are not in the model.
    """

    def __init__(self, model: Any, values: Callable[[str], Any]) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.producer: Dict[str, int] = {}
        self.consumers: Dict[str, List[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.output:
                self.producer[name] = index
            for name in node.input:
                self.consumers.setdefault(name, []).append(index)
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.inputs = {i.name for i in model.graph.input} - set(self.initializers)
        self.outputs = {o.name for o in model.graph.output}
        self.shapes, self.types = _shapes(model)
        self._is_walked = False
        self._values = values

    def node(self, name: str) -> Optional[Any]:
        """The node that makes a value, None for an input or initializer."""
        index = self.producer.get(name)
        return None if index is None else self.nodes[index]

    def readers(self, name: str) -> List[Any]:
        """The nodes that read a value."""
        return [self.nodes[i] for i in self.consumers.get(name, ())]

    def constant(self, name: str) -> Optional[Any]:
        """The array of an initializer or Constant node, None for anything else."""
        tensor = self.initializers.get(name)
        if tensor is not None:
            if tensor.data_location == TensorProto.EXTERNAL:
                return self._values(name)
            return numpy_helper.to_array(tensor)
        node = self.node(name)
        if node is None or node.op_type != "Constant" or not node.attribute:
            return None
        attribute = node.attribute[0]
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        return np.asarray(helper.get_attribute_value(attribute))

    def shape(self, name: str, *, rank: Optional[int] = None) -> Shape:
        """Dims of a value: ints, or names of dimensions.

        Raises:
            NotLowered: where a dim is unknown, or there are not `rank` of them.
        """
        shape = self.shapes.get(name)
        if (shape is None or None in shape) and not self._is_walked:
            self._walk()
            shape = self.shapes.get(name)
        if shape is None or None in shape or rank not in (None, len(shape)):
            raise NotLowered(f"the shape of {name} is unknown")
        return shape

    def same_shape(self, one: str, other: str) -> bool:
        """Whether two values are known to have the same dims."""
        try:
            return self.shape(one) == self.shape(other)
        except NotLowered:
            return False

    def _walk(self) -> None:
        """Learn dims that inference does not see, because exporters compute them on the way."""
        self._is_walked = True
        try:
            walked = named_dims(self.model)
        except GraphError as error:
            raise NotLowered(str(error)) from error
        for name, dims in walked.items():
            known = self.shapes.get(name)
            if dims is not None and (known is None or None in known):
                self.shapes[name] = dims


def _shapes(model: Any) -> Tuple[Dict[str, Shape], Dict[str, int]]:
    try:
        graph = infer_shapes(model)
    except GraphError as error:
        raise NotLowered(str(error)) from error
    shapes: Dict[str, Shape] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    types = defaultdict(int, {t.name: t.data_type for t in model.graph.initializer})
    # Exporters make up names for dims that they do not know; those of inputs get a value.
    names = {d.dim_param for i in graph.input for d in i.type.tensor_type.shape.dim}
    for value in list(graph.value_info) + list(graph.input) + list(graph.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(_dim(d, names) for d in tensor.shape.dim)
    return shapes, types


def _dim(dim: Any, names: Set[str]) -> Dim:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param if dim.dim_param and dim.dim_param in names else None


def is_heads_first(node: Any) -> bool:
    """Whether a node transposes [B, S, heads, dim] to [B, heads, S, dim], or back."""
    order = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return node.op_type == "Transpose" and order == [HEADS_FIRST]


class Part:
    """The nodes that make `outputs` from `inputs` and constants; runs alone.

    A `Shape` node ends the search: what it measures becomes an input of which only the shape
    counts (`measured`).

    Raises:
        NotLowered: where the nodes need any other value.
    """

    def __init__(self, view: GraphView, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.view = view
        self.measured: List[str] = []
        self.constants: List[str] = []
        self.used: List[str] = []
        self.nodes = [view.nodes[i] for i in self._search()]

    def _search(self) -> List[int]:
        view, found = self.view, set()
        waiting, seen = list(self.outputs), set(self.outputs)
        while waiting:
            name = waiting.pop()
            if name in self.inputs:
                self.used.append(name)
                continue
            if name in view.initializers:
                self.constants.append(name)
                continue
            if name not in view.producer:
                raise NotLowered(f"{self.outputs[0]} needs {name}")
            index = view.producer[name]
            found.add(index)
            node = view.nodes[index]
            if node.op_type == "Shape" and not node.domain:
                known = self.used if node.input[0] in self.inputs else self.measured
                known.append(node.input[0])
                continue
            for needed in node.input:
                if needed and needed not in seen:
                    seen.add(needed)
                    waiting.append(needed)
        made = {name for index in found for name in view.nodes[index].output}
        self.measured = [name for name in self.measured if name not in made]
        return sorted(found)

    def key(self) -> str:
        """Equal for parts that compute the same by the same nodes, whatever their names."""
        short: Dict[str, str] = {}

        def rename(name: str) -> str:
            return short.setdefault(name, f"v{len(short)}") if name else ""

        digest = hashlib.sha256()
        for name in self.inputs:
            digest.update(f"{rename(name)}:{self.view.shapes.get(name)}".encode())
        for node in self.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = ""
            copy.ClearField("doc_string")
            copy.ClearField("metadata_props")
            copy.input[:] = [rename(n) for n in node.input]
            copy.output[:] = [rename(n) for n in node.output]
            digest.update(copy.SerializeToString(deterministic=True))
        for name in sorted(self.constants, key=rename):
            array = np.asarray(self.view.constant(name))
            digest.update(f"{rename(name)}:{array.dtype}:{array.shape}".encode())
            digest.update(array.tobytes())
        for name in sorted(self.measured, key=rename):
            digest.update(f"{rename(name)}:{self.view.shape(name)}".encode())
        digest.update(",".join(rename(n) for n in self.outputs).encode())
        return digest.hexdigest()

    def numbers(self, kind: str = "f") -> List[Any]:
        """Every positive number of the part that is a constant of its own, of a numpy kind."""
        names = self.constants + [n.output[0] for n in self.nodes if n.op_type == "Constant"]
        arrays = [np.asarray(self.view.constant(name)) for name in names]
        found = [a.reshape(()).item() for a in arrays if a.size == 1 and a.dtype.kind == kind]
        return [number for number in dict.fromkeys(found) if 0 < number < np.inf]

    def session(self) -> Callable[[Mapping[str, Any], Mapping[Dim, int]], List[Any]]:
        """A function that runs the part: (arrays of the inputs, sizes of named dims) -> outputs."""
        names = list(dict.fromkeys(self.used + self.measured))
        # A dim may be unknown here: what is given has it.
        infos = [
            helper.make_tensor_value_info(n, self.view.types[n], self.view.shapes.get(n))
            for n in names
        ]
        initializers = [
            numpy_helper.from_array(self.view.constant(n), n) for n in sorted(set(self.constants))
        ]
        outputs = [helper.make_empty_tensor_value_info(n) for n in self.outputs]
        graph = helper.make_graph(self.nodes, "part", infos, outputs, initializers)
        session = part_session(self.view.model, graph)

        def call(arrays: Mapping[str, Any], sizes: Mapping[Dim, int]) -> List[Any]:
            feeds = {}
            for name in names:
                if name in arrays:
                    feeds[name] = arrays[name]
                    continue
                dims = [d if isinstance(d, int) else sizes.get(d) for d in self.view.shape(name)]
                if None in dims:
                    raise NotLowered(f"the size of {name} is unknown")
                kind = helper.tensor_dtype_to_np_dtype(self.view.types[name])
                feeds[name] = np.zeros(dims, kind)
            return run_part(session, feeds)

        return call


def part_session(model: Any, graph: Any) -> Any:
    """A session of `graph` under the operator sets and functions of `model`.

    Raises:
        NotLowered: where onnxruntime refuses it.
    """
    part = expand(
        helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(
            part.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ORT_ERRORS as error:
        raise NotLowered(f"onnxruntime refuses a part: {error}") from error


def run_part(session: Any, feeds: Mapping[str, Any]) -> List[Any]:
    """Outputs of one run; inputs that the part does not have are left out.

    Raises:
        NotLowered: where the run fails.
    """
    known = {i.name for i in session.get_inputs()}
    try:
        return list(session.run(None, {k: v for k, v in feeds.items() if k in known}))
    except ORT_ERRORS as error:
        raise NotLowered(f"a part cannot run: {error}") from error


ORT_ERRORS: Tuple[Any, ...] = (
    *(
        value
        for value in vars(onnxruntime_pybind11_state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
    RuntimeError,
    ValueError,
)
"""What onnxruntime raises; it has no common type for them."""
