"""Float16 headroom: the largest magnitude of every activation of a graph.

A card computes in float16, where a larger value overflows. The graph gets one more scalar output
for each activation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto, helper

from qaic_ray.export.tensors import FLOAT16_MAX

EMBEDDING = "/model/embed_tokens/"
"""Scope of the first activations; values that do not depend on it are indices and masks."""

_LAYER = re.compile(r"^(?:/model/layers|past_key|past_value)\.(\d+)")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_PREFIX = "largest:"


@dataclass(frozen=True)
class Activation:
    """The largest magnitude seen of a value of the graph; `layer` is None outside the layers."""

    layer: int | None
    name: str
    largest: float


def watch_activations(model: Any) -> dict[str, str]:
    """Give an `onnx.ModelProto` one more scalar output for each of its activations, in place.

    Returns:
        Names of those outputs, each with the name of its activation.
    """
    graph = model.graph
    made = _activations(graph)
    watched = {}
    for value in [*graph.value_info, *graph.output]:
        kind = value.type.tensor_type.elem_type
        if kind not in _FLOATS or value.name not in made:
            continue
        name = _PREFIX + value.name
        wide, size = f"{name}/wide", f"{name}/size"
        graph.node.extend(
            [
                helper.make_node("Cast", [value.name], [wide], to=TensorProto.FLOAT),
                helper.make_node("Abs", [wide], [size]),
                helper.make_node("ReduceMax", [size], [name], keepdims=0),
            ]
        )
        watched[name] = value.name
    graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in watched)
    return watched


def _activations(graph: Any) -> set[str]:
    """Values that depend on the embedding, without masked scores, which are meant to be huge."""
    made: set[str] = set()
    producers = {}
    masked = set()
    for node in graph.node:
        producers[node.output[0]] = node
        if node.name.startswith(EMBEDDING) or made.intersection(node.input):
            made.update(node.output)
        if node.op_type == "Softmax":
            before = producers[node.input[0]]
            masked |= {node.input[0], *(before.input if before.op_type == "Cast" else ())}
    return made - masked


def beyond_float16(largest: Mapping[str, float]) -> tuple[Activation, ...]:
    """Activations that float16 cannot hold, by layer."""
    found = [
        Activation(layer_of(name), name, size)
        for name, size in largest.items()
        if not size <= FLOAT16_MAX
    ]
    return tuple(sorted(found, key=lambda a: (a.layer is None, a.layer or 0, a.name)))


def largest_activation(largest: Mapping[str, float]) -> Activation:
    """The activation with the largest magnitude."""
    name = max(largest, key=lambda n: largest[n])
    return Activation(layer_of(name), name, largest[name])


def layer_of(name: str) -> int | None:
    """The layer of a node or a cache, by its name; None outside the layers."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None
