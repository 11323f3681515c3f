"""An ONNX file made ready to run as a card would: weights apart, card operators, rounded KV cache.

The result is the reference graph: always correct, for any graph that onnxruntime can run.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from ..documents import Refusal
from ..numbers import kv_cache
from . import cardops

RETAINED_SUFFIX = "_RetainedState"

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
# Only that it is external counts; the table of constants says where each tensor lies.
_STUB_LOCATION = "constants.bin"
INLINE_ELEMENTS = 64
"""Tensors of fewer elements stay in the graph."""

_LARGE_TABLE = 1 << 20
_MIN_OPSET = 7
"""The oldest that onnxruntime runs."""

_MICROSOFT = "com.microsoft"
ONNX_ERRORS = (ValueError, RuntimeError, InferenceError, ValidationError)


class GraphError(Refusal):
    """A model that cannot be compiled; the message is what the compiler prints."""


class State(NamedTuple):
    """A retained input's output, and what it is rounded to when it is kept (None: not at all)."""

    output: str
    rounding: Optional[str]


def load(path: str) -> Any:
    """The model without its external data, other functions than the card's own inlined.

    Raises:
        GraphError: where there is no readable ONNX model of a known form.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise GraphError(f"Cannot open ONNX model file: {path} ({error.strerror})") from error
    except ValueError as error:
        raise GraphError(f"Cannot open ONNX model file: {path} ({error})") from error
    except DecodeError as error:
        raise GraphError(f"Unable to parse ONNX model: {path}") from error
    if not model.graph.output or not model.graph.node:
        raise GraphError(f"Unable to parse ONNX model: {path} has no graph")
    opset = opset_of(model)
    if opset < _MIN_OPSET:
        raise GraphError(f"opset_version-{opset} is not supported, the oldest is {_MIN_OPSET}")
    foreign = [(f.domain, f.name) for f in model.functions]
    foreign = [key for key in foreign if key not in cardops.NAMES]
    if foreign:
        model = _inliner().inline_selected_functions(model, foreign)
    del model.functions[:]
    _check_operators(model)
    _take_constants_out(model)
    return model


def _inliner() -> Any:
    # Imported here: programs that only run a QPC may live with an onnx before 1.15.
    try:
        from onnx import inliner
    except ImportError as error:
        raise GraphError(
            f"onnx {onnx.__version__} cannot inline functions; install onnx 1.15 or newer"
        ) from error
    return inliner


def _take_constants_out(model: Any) -> None:
    """Make initializers of the large Constant nodes, as some exporters write weights so."""
    graph = model.graph
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type == "Constant" and [a.name for a in node.attribute] == ["value"]:
            tensor = node.attribute[0].t
            if math.prod(tensor.dims) >= INLINE_ELEMENTS:
                tensor.name = node.output[0]
                graph.initializer.append(tensor)
                del graph.node[index]


def replace_by_stub(tensor: Any, data_type: int) -> None:
    """Leave an initializer's name and shape, and that its bytes are a constant of the program."""
    stub = TensorProto(name=tensor.name, data_type=data_type, dims=tensor.dims)
    stub.data_location = TensorProto.EXTERNAL
    stub.external_data.add(key="location", value=_STUB_LOCATION)
    tensor.CopyFrom(stub)


def has_subgraphs(model: Any) -> bool:
    """Whether a node has a graph of its own, which may read any value of the main one."""
    kinds = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    return any(a.type in kinds for node in model.graph.node for a in node.attribute)


def _check_operators(model: Any) -> None:
    """Refuse an unknown operator, as the vendor's compiler does."""
    versions = {i.domain: i.version for i in model.opset_import}
    for node in model.graph.node:
        known = (node.domain, node.op_type) in cardops.NAMES or node.domain == _MICROSOFT
        domain = "" if node.domain == "ai.onnx" else node.domain
        if not known and not onnx.defs.has(node.op_type, versions.get(node.domain, 1), domain):
            raise GraphError(
                f"[Operator-'{node.name}', opset_version-{opset_of(model)}, "
                f"ir_version-{model.ir_version}] : {node.op_type}: Unsupported operator"
            )


def opset_of(model: Any) -> int:
    """Version of the default operator set."""
    versions = [i.version for i in model.opset_import if i.domain in ("", "ai.onnx")]
    return int(max(versions, default=0))


def expand(model: Any, states: Optional[Mapping[str, State]] = None) -> Any:
    """The model with the card's operators replaced by plain ones, for onnxruntime to run.

    Use the returned one only. Outputs of `states` have the dims of their inputs.
    """
    graph = model.graph
    given = {value.name: str(value.type.tensor_type.shape) for value in inputs(model)}
    given.update({state.output: given[name] for name, state in (states or {}).items()})
    _choose_booleans(model)
    _set_nodes(graph, cardops.expand(list(graph.node), given))
    model.functions.extend(cardops.functions(opset_of(model)))
    import_domain(model, cardops.LOCAL)
    import_domain(model, _MICROSOFT)
    # onnxruntime would expand the functions too, but refuses some of them before opset 16.
    inlined = _inliner().inline_local_functions(model)
    for index, node in enumerate(inlined.graph.node):
        # Some of its optimizers make two nodes of one name out of nodes without names.
        node.name = f"{node.name or node.op_type}#{index}"
    return inlined


def _choose_booleans(model: Any) -> None:
    """Write `Where` between booleans, which onnxruntime cannot compute, with And and Or."""
    values = [*model.graph.input, *model.graph.output]
    if all(v.type.tensor_type.elem_type != TensorProto.BOOL for v in values):
        return
    inferred = infer_shapes(model)
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    booleans = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BOOL}
    nodes: List[Any] = []
    for node in model.graph.node:
        if node.op_type != "Where" or node.domain or node.output[0] not in booleans:
            nodes.append(node)
            continue
        (condition, chosen, other), name = node.input, node.output[0]
        names = [f"{name}/{part}" for part in ("chosen", "not", "other")]
        nodes += [
            helper.make_node("And", [condition, chosen], names[:1]),
            helper.make_node("Not", [condition], names[1:2]),
            helper.make_node("And", [names[1], other], names[2:]),
            helper.make_node("Or", [names[0], names[2]], [name], name=node.name),
        ]
    _set_nodes(model.graph, nodes)


def import_domain(model: Any, domain: str) -> None:
    """Let a model use the operators of another domain."""
    if not any(i.domain == domain for i in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, 1))


def structure(model: Any) -> Any:
    """A copy of a model without the bytes of its weights."""
    copy = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = copy.graph
    graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) < INLINE_ELEMENTS:
            graph.initializer.add().CopyFrom(tensor)
        else:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            replace_by_stub(graph.initializer[-1], tensor.data_type)
    return copy


def infer_shapes(model: Any, dims: Optional[Mapping[str, Sequence[int]]] = None) -> Any:
    """A copy of the graph of a model with what is known of its values' shapes.

    With `dims` of its inputs, they are what is known, and nothing that is declared of other values.

    Raises:
        GraphError: where types contradict each other; not with `dims`.
    """
    copy = structure(model)
    copy.functions.extend(cardops.shape_functions(opset_of(model)))
    import_domain(copy, cardops.CLOUD)
    import_domain(copy, cardops.AISW)
    import_domain(copy, _MICROSOFT)
    if dims is not None:
        forget_shapes(copy.graph)
        for value in inputs(copy):
            elem_type = value.type.tensor_type.elem_type
            value.type.CopyFrom(helper.make_tensor_type_proto(elem_type, dims[value.name]))
    try:
        known = onnx.shape_inference.infer_shapes(copy, check_type=dims is None, data_prop=True)
    except ONNX_ERRORS as error:
        raise GraphError(f"Shape inference failed: {error}") from error
    return known.graph


def forget_shapes(model_graph: Any) -> None:
    """Take away what is declared of the dims of outputs and of values inside, of inner graphs too.

    It may be wrong, and onnxruntime shares memory by it.
    """
    for value in [*model_graph.output, *model_graph.value_info]:
        value.type.tensor_type.ClearField("shape")
    for attribute in (a for node in model_graph.node for a in node.attribute):
        for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
            forget_shapes(inner)


def retained_pairs(model: Any) -> Dict[str, str]:
    """Input -> output of each state that a program may keep: `X` and `X_RetainedState`."""
    outputs = {o.name for o in model.graph.output}
    states = {i.name: i.name + RETAINED_SUFFIX for i in inputs(model)}
    return {name: output for name, output in states.items() if output in outputs}


def inputs(model: Any) -> List[Any]:
    """Inputs that a caller gives: those that are no initializer."""
    initializers = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in initializers]


def is_float_input(model: Any, name: str) -> bool:
    """Whether an input holds floating point."""
    return any(i.name == name and i.type.tensor_type.elem_type in FLOATS for i in inputs(model))


def compute_kind(value: Any) -> str:
    """Numpy name of the dtype that an input is computed in."""
    elem_type = value.type.tensor_type.elem_type
    if elem_type in FLOATS:
        return "float32"
    return str(helper.tensor_dtype_to_np_dtype(elem_type).name)


def widen_to_float32(model: Any) -> None:
    """Make every value of another floating type float32: what it is computed with."""
    narrow = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    graph = model.graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                attribute.i = TensorProto.FLOAT


def narrow_lookups(model: Any, kinds: Dict[str, str]) -> None:
    """Look rows up in a large float16 table as it is stored, and widen only those rows.

    `kinds`: constant -> how it is stored. The values are the same; the table need not be decoded.
    """
    if has_subgraphs(model):
        return
    graph = model.graph
    readers: Dict[str, List[Any]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            lookup = node.op_type == "Gather" and not node.domain and position == 0
            readers.setdefault(name, []).append(node if lookup else None)
    tables = [
        t
        for t in graph.initializer
        if kinds.get(t.name) == kv_cache.FLOAT16
        and math.prod(t.dims) >= _LARGE_TABLE
        and None not in readers.get(t.name, [None])
    ]
    widened: Dict[str, str] = {}
    for tensor in tables:
        tensor.data_type = TensorProto.FLOAT16
        for node in readers[tensor.name]:
            widened[node.output[0]] = node.output[0] + "/float16"
    nodes: List[Any] = []
    for node in graph.node:
        name = node.output[0]
        nodes.append(node)
        if name in widened:
            node.output[0] = widened[name]
            nodes.append(
                helper.make_node("Cast", [widened[name]], [name], name=name, to=TensorProto.FLOAT)
            )
    _set_nodes(graph, nodes)


def _set_nodes(graph: Any, nodes: List[Any]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def round_states(model: Any, states: Mapping[str, State]) -> None:
    """Round each state where it is made, so that every reader sees what the card would hold."""
    graph = model.graph
    roundings = {s.output: s.rounding for s in states.values() if s.rounding is not None}
    given = {i.name: len(i.type.tensor_type.shape.dim) for i in graph.input}
    ranks = {state.output: given[name] for name, state in states.items()}
    nodes: List[Any] = []
    for node in graph.node:
        nodes.append(node)
        for name in [o for o in node.output if o in roundings]:
            exact = name + "/exact"
            node.output[list(node.output).index(name)] = exact
            added, initializers = kv_cache.rounding_nodes(roundings[name], exact, name, ranks[name])
            nodes.extend(added)
            graph.initializer.extend(initializers)
    _set_nodes(graph, nodes)
