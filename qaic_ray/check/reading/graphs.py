"""An ONNX model as facts: headers and shapes, without the bytes of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from qaic_ray.check.facts import GraphFacts, OperatorFacts, TensorFacts, ValueFacts
from qaic_ray.check.reading import extdata, inference
from qaic_ray.check.reading.wire import KEPT_BYTES, WireError, slim_model
from qaic_ray.files.documents import shown
from qaic_ray.files.folders import inside
from qaic_ray.weight_files.spec import METADATA_KEY

AISW, CLOUD, MICROSOFT = "com.qti.aisw.onnx", "com.qualcomm.cloud", "com.microsoft"
CARD_DOMAINS = frozenset({AISW, CLOUD})
"""Domains whose functions compilers have kernels for: they are looked at from outside."""

LARGE_ELEMENTS = 64
"""A `Constant` of fewer is no weight."""
MAX_EXPANDED = 1_000_000
"""The most operators that functions may mean when they are written out."""

_BITS = {
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 6),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ"), 8),
}
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial")
_DAMAGE = (DecodeError, WireError, ValueError, TypeError, RuntimeError)
"""What the readers of damaged files raise."""


def type_name(number: int) -> str:
    """ONNX's name of an element type."""
    known: Mapping[int, str] = {v: k for k, v in TensorProto.DataType.items()}
    return known.get(number, f"type {number}")


def read_graph(
    path: Path, place: str, sizes: Sequence[Mapping[str, int]] | None = ()
) -> GraphFacts:
    """The facts of an ONNX file.

    Args:
        path: of the file.
        place: names it in findings.
        sizes: symbol -> size, of each specialization that shapes are wanted of; None for none.
    """
    try:
        data = slim_model(path)
        model = onnx.ModelProto.FromString(data)
        _check_functions(model)
    except OSError as error:
        return _unreadable(place, f"{path} cannot be read: {error.strerror}.")
    except _DAMAGE as error:
        why = " ".join(str(error).split()).rstrip(".")
        return _unreadable(place, f"{path.name} is no ONNX model that can be read: {why[:200]}.")
    if not model.graph.node or not model.graph.output:
        return _unreadable(place, f"{path.name} has no operators, or no outputs.")
    try:
        return _facts(model, path, place, sizes)
    except _DAMAGE as error:
        why = " ".join(str(error).split()).rstrip(".")
        return _unreadable(place, f"{path.name} contradicts itself: {why[:200]}.")


def _unreadable(place: str, why: str) -> GraphFacts:
    return GraphFacts(place, (("onnx-unreadable", why),))


def _facts(
    model: Any, path: Path, place: str, sizes: Sequence[Mapping[str, int]] | None
) -> GraphFacts:
    functions = frozenset((f.domain, f.name) for f in model.functions)
    model = _inlined(model)
    graph = model.graph
    tensors = {_name(tensor.name): tensor for tensor in _tensors(graph)}
    names = {tensor.name for tensor in graph.initializer}
    values = [v for v in graph.input if v.name not in names]
    faults = list(_external_faults(tensors, path.parent))
    weight_inputs: frozenset[str] = frozenset()
    text = next((_name(p.value) for p in model.metadata_props if p.key == METADATA_KEY), "")
    if text:
        shapes = {_name(v.name): _value(v).dims for v in values}
        weight_inputs, more = extdata.look(text, path.parent, shapes)
        faults += [("extdata", fault) for fault in more]
    return GraphFacts(
        place=place,
        faults=tuple(faults),
        file_bytes=path.stat().st_size,
        inputs=tuple(map(_value, values)),
        outputs=tuple(map(_value, graph.output)),
        tensors={name: _tensor(tensor) for name, tensor in tensors.items()},
        nodes=tuple(map(_node, graph.node)),
        fixed=_fixed(graph, names),
        shapes=() if sizes is None else tuple(inference.shapes(model, s) for s in sizes or ({},)),
        functions=functions,
        weight_inputs=weight_inputs,
    )


def _check_functions(model: Any) -> None:
    """Refuse functions that call themselves, or mean more operators than a model has."""
    bodies = {(f.domain, f.name): f for f in model.functions}
    counts: dict[tuple[str, str], int] = {}
    path: list[tuple[str, str]] = []

    def count(nodes: Any) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            total += of_function(key) if key in bodies else 1
            for attribute in node.attribute:
                total += count(attribute.g.node) if attribute.HasField("g") else 0
            if total > MAX_EXPANDED:
                raise WireError(f"its functions mean more than {MAX_EXPANDED} operators")
        return total

    def of_function(key: tuple[str, str]) -> int:
        if key in path or len(path) > 50:
            raise WireError(f"its function {shown(key[1])} calls itself")
        if key not in counts:
            path.append(key)
            counts[key] = count(bodies[key].node)
            path.pop()
        return counts[key]

    count(model.graph.node)


def _inlined(model: Any) -> Any:
    """The model with every function written out that is not the card's own."""
    foreign = [(f.domain, f.name) for f in model.functions if f.domain not in CARD_DOMAINS]
    if not foreign:
        return model
    from onnx import inliner

    return inliner.inline_selected_functions(model, foreign)


def _tensors(graph: Any) -> Iterator[Any]:
    """Initializers, and constants of some size under the name of their value."""
    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant" and not node.domain and node.output:
            for attribute in node.attribute:
                tensor = _constant(attribute)
                if tensor is not None:
                    tensor.name = node.output[0]
                    yield tensor


def _constant(attribute: Any) -> Any:
    """The value of a `Constant`, where it is floating point or large."""
    if attribute.name == "value" and attribute.HasField("t"):
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        values = attribute.floats if attribute.name == "value_floats" else [attribute.f]
        return numpy_helper.from_array(np.array(values, np.float32))
    return None


def _name(value: str | bytes) -> str:
    """A text of a model; protobuf gives the bytes where they are no text."""
    if isinstance(value, bytes):
        raise WireError(f"a name in it is not UTF-8: {shown(value)}")
    return value


def _tensor(tensor: Any) -> TensorFacts:
    name, kind, dims = _name(tensor.name), type_name(tensor.data_type), tuple(tensor.dims)
    elements = math.prod(max(0, dim) for dim in dims)
    entries = {_name(entry.key): _name(entry.value) for entry in tensor.external_data}
    offset = entries.get("offset", "0")
    return TensorFacts(
        name=name,
        type=kind,
        dims=dims,
        num_bytes=(elements * _BITS.get(kind, 32) + 7) // 8,
        location=entries.get("location", ""),
        offset=int(offset) if offset.isdigit() and len(offset) < 20 else 0,
        largest=_largest(tensor, kind, elements),
    )


def _largest(tensor: Any, kind: str, elements: int) -> float:
    is_small = 0 < elements * _BITS.get(kind, 32) // 8 <= KEPT_BYTES
    if kind not in ("FLOAT", "DOUBLE") or not is_small or tensor.data_location:
        return 0.0
    try:
        with np.errstate(invalid="ignore"):  # of signalling NaNs
            array = np.abs(numpy_helper.to_array(tensor).astype(np.float64))
    except _DAMAGE:
        return 0.0  # a reader of values says so, with the tensor's name
    finite = array[np.isfinite(array)]
    return float(finite.max()) if finite.size else 0.0


def _value(value: Any) -> ValueFacts:
    tensor = value.type.tensor_type
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else _name(dim.dim_param)
        for dim in tensor.shape.dim
    )
    return ValueFacts(_name(value.name), type_name(tensor.elem_type), dims)


def _node(node: Any) -> OperatorFacts:
    label = _name(node.name or (node.output[0] if node.output else node.op_type))
    domain = "" if node.domain == "ai.onnx" else _name(node.domain)
    inputs, outputs = tuple(map(_name, node.input)), tuple(map(_name, node.output))
    return OperatorFacts(_name(node.op_type), domain, label, inputs, outputs)


def _fixed(graph: Any, names: set[str]) -> frozenset[str]:
    """Values that depend on weights and on shapes alone: a compiler can compute them."""
    fixed = set(names)
    for node in graph.node:
        if node.op_type in _RANDOM:
            continue
        has_graph = any(a.HasField("g") for a in node.attribute)
        given = [name for name in node.input if name]
        is_fixed = node.op_type in ("Constant", "Shape", "Size") or (
            bool(given) and not has_graph and fixed.issuperset(given)
        )
        if is_fixed:
            fixed.update(node.output)
    return frozenset(fixed)


def _external_faults(tensors: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with the files that hold weights; one sentence a file."""
    needed: dict[str, int] = {}
    for tensor in map(_tensor, tensors.values()):
        if tensor.location:
            end = tensor.offset + tensor.num_bytes
            needed[tensor.location] = max(needed.get(tensor.location, 0), end)
    for location, end in needed.items():
        try:
            path = folder / inside(location)
        except ValueError as error:
            yield "weights-missing", f"Weights are in {shown(location)}: {error}."
            continue
        try:
            size = path.stat().st_size if path.is_file() else None
        except (OSError, ValueError):
            size = None
        if size is None:
            yield "weights-missing", f"Weights are in {shown(location)}, which is not there."
        elif size < end:
            yield "weights-short", f"{location} has {size} bytes, and weights in it need {end}."
