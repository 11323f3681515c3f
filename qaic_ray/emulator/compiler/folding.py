"""Gives each MatMul a weight of its own: unshared, and not behind a Transpose.

A compiler folds `Transpose(weight)`, and packs a tied embedding where it is a MatMul's weight but
not where rows of it are looked up. Knows nothing of bytes: it says what each new weight is made
of.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, NamedTuple


class Source(NamedTuple):
    """The initializer that a new one is made of, as it is or transposed."""

    name: str
    transposed: bool


def own_weights(model: Any, *, separate: bool) -> Dict[str, Source]:
    """Rewrite a graph so that MatMul weights are initializers of their own; returns the new ones.

    Args:
        model: changed in place; new initializers are declared without bytes.
        separate: whether to copy a weight that is read by others too.
    """
    initializers = {t.name: t for t in model.graph.initializer}
    transposes = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if _is_matrix_transpose(node, initializers)
    }
    num_reads: Dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            num_reads[name] = num_reads.get(name, 0) + 1
    made: Dict[str, Source] = {}
    for node in model.graph.node:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.input[1]
        if weight in transposes:
            source = Source(transposes[weight], transposed=True)
        elif separate and weight in initializers and num_reads[weight] > 1:
            source = Source(weight, transposed=False)
        else:
            continue
        name = f"{source.name}/{'transposed' if source.transposed else 'matmul'}"
        if name not in made:
            made[name] = source
            tensor = initializers[source.name]
            dims = tensor.dims[::-1] if source.transposed else tensor.dims
            model.graph.initializer.add(name=name, data_type=tensor.data_type, dims=dims)
        node.input[1] = name
    _drop(model, transposes)
    return made


def _is_matrix_transpose(node: Any, initializers: Dict[str, Any]) -> bool:
    if node.op_type != "Transpose" or node.domain or node.input[0] not in initializers:
        return False
    order = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return len(initializers[node.input[0]].dims) == 2 and order in ([], [[1, 0]])


def _drop(model: Any, candidates: Iterable[str]) -> None:
    """Remove the nodes that make values which nobody reads any more."""
    graph = model.graph
    read = {o.name for o in graph.output}.union(*(node.input for node in graph.node))
    unread = set(candidates) - read
    for index in reversed(range(len(graph.node))):
        if unread.intersection(graph.node[index].output):
            del graph.node[index]
