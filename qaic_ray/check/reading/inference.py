"""Shapes of a graph's values under one specialization, by ONNX's own shape inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from qaic_ray.check.facts import Dims

MAX_SIZE = 2**31


def shapes(model: Any, sizes: Mapping[str, int]) -> dict[str, Dims]:
    """Value -> shape, of those whose shape can be known.

    Args:
        model: without the data of its weights; is not changed.
        sizes: symbol -> size; other symbols stay unknown.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            size = sizes.get(dim.dim_param, 0)
            if dim.dim_param and 0 < size < MAX_SIZE:
                dim.dim_value = size
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")  # exporters write that of their example
    del graph.value_info[:]
    known_domains = {entry.domain for entry in copy.opset_import}
    for domain in {node.domain for node in graph.node} - known_domains:
        copy.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError):
        # What the operators say of each other is looked at where it is known: here, nothing is.
        inferred = graph
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    known: dict[str, Dims] = dict(found)
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            known.setdefault(value.name, _dims(value.type.tensor_type.shape))
    return known


def _dims(shape: Any) -> Dims:
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in shape.dim)
