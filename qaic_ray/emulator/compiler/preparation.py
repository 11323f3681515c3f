"""A model made ready for its compile: outputs chosen, names checked, dims found, opset raised."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from onnx import version_converter

from ..lowering import cardops, graph
from ..lowering.dims import output_dims
from ..lowering.graph import GraphError

Dims = Tuple[int, ...]

_OWN_OPSET = 13
"""The oldest that what is added to a graph is written in."""

_SHOWN_OUTPUTS = 8


def select_outputs(model: Any, names: Sequence[str]) -> None:
    """Make the values of these names the only outputs of the model.

    A name is that of a value, or of a node, which stands for all its outputs; TensorFlow's `:0` may
    be left out, as the vendor's programs do.

    Raises:
        GraphError: for a name that is not in the model, or a value of which no type is known.
    """
    wanted: Dict[str, None] = {}
    for name in names:
        wanted.update(dict.fromkeys(_values_called(model, name)))
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


def check_names(model: Any) -> None:
    """Refuse inputs and outputs of which no program can have buffers, which are called by name.

    Raises:
        GraphError: for a name that is empty, that two of them have, or that nothing computes.
    """
    made = {name for node in model.graph.node for name in node.output}
    made.update(tensor.name for tensor in model.graph.initializer)
    given: Set[str] = set()
    for value in graph.inputs(model):
        if not value.name or value.name in given:
            what = f"two inputs '{value.name}'" if value.name else "an input without a name"
            raise GraphError(f"The graph has {what}: a buffer needs a name of its own")
        given.add(value.name)
    seen: Set[str] = set()
    for output in model.graph.output:
        name = output.name
        if not name or name in seen:
            what = f"two outputs '{name}'" if name else "an output without a name"
            raise GraphError(f"The graph has {what}: a buffer needs a name of its own")
        if name in given:
            raise GraphError(
                f"'{name}' is an input and an output of the graph: a buffer has one direction, so "
                "hand the value out by an Identity of another name"
            )
        if name not in made:
            raise GraphError(f"The output '{name}' is computed by no operator of the graph")
        seen.add(name)


def raised(model: Any) -> Any:
    """The model in an operator set that this compiler's own nodes can be added to; the same values.

    Raises:
        GraphError: where onnx cannot convert it.
    """
    opset = graph.opset_of(model)
    if opset >= _OWN_OPSET:
        return model
    try:
        return version_converter.convert_version(model, _OWN_OPSET)
    except (RuntimeError, ValueError) as error:
        raise GraphError(
            f"opset_version-{opset} cannot be converted to {_OWN_OPSET}, which int8, "
            f"retained states and the card's own operators need ({error}); export the model anew"
        ) from error


def has_card_operators(model: Any) -> bool:
    """Whether a node is one of the card's own operators."""
    return any((node.domain, node.op_type) in cardops.NAMES for node in model.graph.node)


def resolve(
    model: Any, symbols: Mapping[str, int], batch_size: Optional[int] = None
) -> Dict[str, Dims]:
    """Dims of every input and output under one specialization.

    An output's are what the graph computes: exporters declare names for its dims that nobody knows,
    or those of others. Only where they cannot be inferred is what is declared believed.

    Raises:
        GraphError: where a dimension of an input or an output has no value.
    """
    dims = input_dims(model, symbols, batch_size)
    inferred = output_dims(model, dims)
    symbols = dict(_leading(model, batch_size), **symbols)
    for value in model.graph.output:
        declared = _dims(value, symbols)
        shape = inferred.get(value.name, [None] * len(declared) or [None])
        if len(declared) != len(shape):
            declared = [-1] * len(shape)
        dims[value.name] = tuple(d if s is None else s for s, d in zip(shape, declared))
        if -1 in dims[value.name]:
            raise GraphError(f"The shape of output '{value.name}' cannot be inferred")
    return dims


def input_dims(
    model: Any, symbols: Mapping[str, int], batch_size: Optional[int]
) -> Dict[str, Dims]:
    """Dims of every input; `batch_size` is that of a first one that has none among the symbols."""
    dims: Dict[str, Dims] = {}
    symbols = dict(_leading(model, batch_size), **symbols)
    for value in graph.inputs(model):
        shape = _dims(value, symbols)
        if -1 in shape:
            raise GraphError(
                f"Dynamic dimension {_symbol_names(value)} of input '{value.name}' has no value; "
                "give it by -network-specialization-config or -onnx-define-symbol"
            )
        dims[value.name] = tuple(shape)
    return dims


def _values_called(model: Any, name: str) -> List[str]:
    made = [o for node in model.graph.node for o in node.output if o]
    for value in (name, f"{name}:0"):
        if value in made:
            return [value]
    for node in model.graph.node:
        if node.name == name:
            return [o for o in node.output if o]
    own = [output.name for output in model.graph.output]
    shown = ", ".join(own[:_SHOWN_OUTPUTS]) + (", ..." if len(own) > _SHOWN_OUTPUTS else "")
    raise GraphError(f"Output node '{name}' is not in the model, whose outputs are {shown}")


def _prune(model_graph: Any) -> None:
    """Remove the nodes that no output needs."""
    needed: Set[str] = {output.name for output in model_graph.output}
    for index in reversed(range(len(model_graph.node))):
        node = model_graph.node[index]
        if needed.isdisjoint(node.output):
            del model_graph.node[index]
        else:
            needed.update(node.input)


def _leading(model: Any, batch_size: Optional[int]) -> Dict[str, int]:
    if batch_size is None:
        return {}
    dims = [v.type.tensor_type.shape.dim for v in graph.inputs(model)]
    return {d[0].dim_param: batch_size for d in dims if len(d) and d[0].dim_param}


def _dims(value: Any, symbols: Mapping[str, int]) -> List[int]:
    result = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_value"):
            result.append(dim.dim_value)
        else:
            result.append(symbols.get(dim.dim_param, -1))
    return result


def _symbol_names(value: Any) -> str:
    dims = value.type.tensor_type.shape.dim
    names = [d.dim_param or "?" for d in dims if not d.HasField("dim_value")]
    return ", ".join(f"'{name}'" for name in names)
