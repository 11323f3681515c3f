"""Inputs, outputs and constants of the lowered graph, and which graphs have them.

The lowered graph has no inputs that say which slots are meant, states as many as it has rows, and
constants where a graph has nodes for them.
"""

from __future__ import annotations

from typing import Any, List, Mapping, Optional, Set, Tuple

from onnx import TensorProto, numpy_helper

from .attention import (
    ATTENTION_MASK,
    BATCH_INDEX,
    CACHE_INDEX,
    COMP_CTX_LENGTHS,
    INPUT_IDS,
    NUM_LOGITS_TO_KEEP,
    POSITION_IDS,
)
from .graph import State, has_subgraphs
from .view import GraphView, NotLowered

CACHE_ONLY = {BATCH_INDEX, COMP_CTX_LENGTHS, ATTENTION_MASK, CACHE_INDEX}
"""Inputs that the lowered graph has no use for: they say which slots are meant."""


def check(view: GraphView, states: Mapping[str, State], mask: Optional[State]) -> None:
    """Refuse a graph whose inputs and outputs are not those of a decoder with a cache.

    Raises:
        NotLowered: saying which is not.
    """
    needed, kept = {INPUT_IDS, POSITION_IDS}, [*states.values()]
    known = needed | {BATCH_INDEX, COMP_CTX_LENGTHS, NUM_LOGITS_TO_KEEP} | set(states)
    if mask is not None:
        needed = needed | {ATTENTION_MASK, CACHE_INDEX}
        known, kept = needed | set(states), [*kept, mask]
    if has_subgraphs(view.model):
        raise NotLowered("a node has a graph of its own")
    if not states or not needed <= view.inputs <= known:
        unknown = sorted(view.inputs - known) or sorted(needed - view.inputs) or ["no past"]
        raise NotLowered(f"its inputs are of another kind ({', '.join(unknown)})")
    sizes = [view.shape(name, rank=4)[axis] for name in states for axis in (0, 2)]
    if any(isinstance(size, int) for size in (*view.shape(INPUT_IDS, rank=2), *sizes)):
        raise NotLowered("rows, tokens or context have one size only")
    if view.types[POSITION_IDS] != TensorProto.INT64:
        raise NotLowered(f"{POSITION_IDS} is not INT64")
    batch, length = view.shape(INPUT_IDS)
    per_token = {length, *view.shapes.get(NUM_LOGITS_TO_KEEP, ())[:1]}
    for name in view.outputs - {state.output for state in kept}:
        shape = view.shape(name)
        rest = shape[2:] if len(shape) > 2 and shape[1] in per_token else shape[1:]
        if shape[0] != batch or not all(isinstance(d, int) for d in rest):
            raise NotLowered(f"{name} does not have one row per row of {INPUT_IDS}")


def take_constants_out(view: GraphView, nodes: List[Any]) -> Tuple[List[Any], List[Any]]:
    """The nodes that are no constants, and those that are as initializers."""
    others, initializers = [], []
    for node in nodes:
        array = view.constant(node.output[0]) if node.op_type == "Constant" else None
        if array is None or array.dtype.kind not in "fiub":
            others.append(node)
        else:
            initializers.append(numpy_helper.from_array(array, node.output[0]))
    return others, initializers


def needed(nodes: List[Any], outputs: Set[str]) -> List[Any]:
    """The nodes that some outputs are made of."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def remove(values: Any, names: Set[str]) -> None:
    """Take inputs or outputs of these names away."""
    for index in reversed(range(len(values))):
        if values[index].name in names:
            del values[index]


def keep(initializers: Any, names: Set[str]) -> None:
    """Keep the initializers of these names."""
    kept = [t for t in initializers if t.name in names]
    copies = [TensorProto.FromString(t.SerializeToString()) for t in kept]
    del initializers[:]
    initializers.extend(copies)


def set_dims(value: Any, dims: Tuple[Any, ...]) -> None:
    """Give an output the names of dimensions that inputs have too."""
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for dim in dims:
        if isinstance(dim, int):
            shape.dim.add(dim_value=dim)
        else:
            shape.dim.add(dim_param=dim)


def free_rows(graph: Any, view: GraphView) -> None:
    """Let the lowered graph run over any rows and slots: states as many as there are rows."""
    batch = view.shape(INPUT_IDS)[0]
    rows = batch if isinstance(batch, str) else "rows"
    for value in list(graph.input) + list(graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) and value.name != NUM_LOGITS_TO_KEEP:
            dims[0].dim_param = rows
