"""`-output-node-name`: other outputs than the model's own, and only the graph that they need."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Set

from ..lowering import graph
from ..lowering.graph import GraphError

_SHOWN = 8


def select(model: Any, names: Sequence[str]) -> None:
    """Make the values of these names the only outputs of the model.

    A name is that of a value, or of a node, which stands for all its outputs; TensorFlow's `:0` may
    be left out, as the vendor's programs do.

    Raises:
        GraphError: for a name that is not in the model, or a value of which no type is known.
    """
    wanted: Dict[str, None] = {}
    for name in names:
        wanted.update(dict.fromkeys(_values(model, name)))
    known = {value.name: value for value in model.graph.output}
    if not set(wanted) <= set(known):
        inferred = graph.infer_shapes(model)
        for value in [*inferred.value_info, *inferred.input]:
            known.setdefault(value.name, value)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise GraphError(f"The type of output '{missing[0]}' cannot be inferred")
    chosen = [type(known[name]).FromString(known[name].SerializeToString()) for name in wanted]
    del model.graph.output[:]
    model.graph.output.extend(chosen)
    if not graph.has_subgraphs(model):
        _prune(model.graph)


def _values(model: Any, name: str) -> List[str]:
    made = [o for node in model.graph.node for o in node.output if o]
    for value in (name, f"{name}:0"):
        if value in made:
            return [value]
    for node in model.graph.node:
        if node.name == name:
            return [o for o in node.output if o]
    own = [output.name for output in model.graph.output]
    more = ", ..." if len(own) > _SHOWN else ""
    raise GraphError(
        f"Output node '{name}' is not in the model, whose outputs are {', '.join(own[:_SHOWN])}"
        f"{more}"
    )


def _prune(model_graph: Any) -> None:
    """Remove the nodes that no output needs."""
    needed: Set[str] = {output.name for output in model_graph.output}
    for index in reversed(range(len(model_graph.node))):
        node = model_graph.node[index]
        if needed.isdisjoint(node.output):
            del model_graph.node[index]
        else:
            needed.update(node.input)
