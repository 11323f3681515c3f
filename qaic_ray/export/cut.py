"""Leaves layers out of an exported graph, so that a large model can be checked in little memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qaic_ray import contract

_LAYER = re.compile(r"^/model/layers\.(\d+)/")


def kept_layers(num_layers: int, level: str) -> tuple[int, ...]:
    """The layers that a check looks at: all, or the first and the last two."""
    if level == "full" or num_layers <= 4:
        return tuple(range(num_layers))
    return (0, 1, num_layers - 2, num_layers - 1)


def cut_layers(model: Any, keep: Sequence[int]) -> None:
    """Remove every other layer from an `onnx.ModelProto`, in place; its neighbours are joined.

    Layers keep their own numbers. What a removed layer would have handed on is replaced by what the
    kept layer below it hands on.
    """
    graph = model.graph
    results: dict[int, str] = {}
    for node in graph.node:
        if (layer := _layer_of(node.name)) is not None:
            results[layer] = node.output[0]  # nodes are in order, so the last one stays
    renamed, below = {}, None
    for layer, result in sorted(results.items()):
        if layer in keep:
            below = result
        elif below is not None:
            renamed[result] = below
    nodes = [n for n in graph.node if _layer_of(n.name) in (None, *keep)]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    used = {name for node in nodes for name in (*node.input, *node.output)}
    past = {
        name
        for layer in results.keys() - set(keep)
        for past in (contract.past_key(layer), contract.past_value(layer))
        for name in (past, contract.retained(past))
    }
    for field, kept in (
        (graph.node, nodes),
        (graph.input, [v for v in graph.input if v.name not in past]),
        (graph.output, [v for v in graph.output if v.name not in past]),
        (graph.value_info, [v for v in graph.value_info if v.name in used]),
        (graph.initializer, [t for t in graph.initializer if t.name in used]),
    ):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        del field[:]
        field.extend(copies)


def _layer_of(node_name: str) -> int | None:
    match = _LAYER.match(node_name)
    return int(match.group(1)) if match else None
