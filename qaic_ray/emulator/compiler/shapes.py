"""Static shapes of a program: symbols of the specializations put into a graph's dimensions."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from onnx import TensorProto

from ..container import aicapi
from ..lowering.dims import output_dims
from ..lowering.graph import GraphError
from ..lowering.graph import inputs as graph_inputs

Dims = Tuple[int, ...]

TYPES = {
    TensorProto.FLOAT: aicapi.FLOAT_TYPE,
    TensorProto.FLOAT16: aicapi.FLOAT_16_TYPE,
    TensorProto.BFLOAT16: aicapi.BFLOAT16_TYPE,
    TensorProto.INT64: aicapi.INT64_I_TYPE,
    TensorProto.INT32: aicapi.INT32_I_TYPE,
    TensorProto.INT16: aicapi.INT16_Q_TYPE,
    TensorProto.INT8: aicapi.INT8_TYPE,
    TensorProto.BOOL: aicapi.INT8_TYPE,
    TensorProto.UINT8: aicapi.UINT8_Q_TYPE,
}
ITEM_BYTES = {
    aicapi.FLOAT_TYPE: 4,
    aicapi.FLOAT_16_TYPE: 2,
    aicapi.BFLOAT16_TYPE: 2,
    aicapi.INT64_I_TYPE: 8,
    aicapi.INT32_I_TYPE: 4,
    aicapi.INT32_Q_TYPE: 4,
    aicapi.INT16_Q_TYPE: 2,
    aicapi.INT8_TYPE: 1,
    aicapi.INT8_Q_TYPE: 1,
    aicapi.UINT8_Q_TYPE: 1,
}


def binding_type(value: Any) -> int:
    """The descriptor's type of a graph input or output.

    Raises:
        GraphError: for a type that a card does not have.
    """
    elem_type = value.type.tensor_type.elem_type
    if elem_type not in TYPES:
        name = TensorProto.DataType.Name(elem_type)
        raise GraphError(f"Unsupported data type {name} of input or output '{value.name}'")
    return TYPES[elem_type]


def resolve(
    model: Any, symbols: Mapping[str, int], batch_size: Optional[int] = None
) -> Dict[str, Dims]:
    """Dims of every input and output under one specialization.

    `batch_size` is the value of a first dimension that has none among the symbols.

    Raises:
        GraphError: where a dimension of an input has no value, or an output's cannot be inferred.
    """
    dims: Dict[str, Dims] = {}
    if batch_size is not None:
        symbols = dict(_leading(model, batch_size), **symbols)
    for value in graph_inputs(model):
        shape = _dims(value, symbols)
        if -1 in shape:
            raise GraphError(
                f"Dynamic dimension {_symbol_names(value)} of input '{value.name}' has no value; "
                "give it by -network-specialization-config or -onnx-define-symbol"
            )
        dims[value.name] = tuple(shape)
    outputs = {o.name: _dims(o, symbols) for o in model.graph.output}
    if any(-1 in shape or not shape for shape in outputs.values()):
        # Exporters leave out an output's rank, or make names for its dims that nobody knows.
        inferred = output_dims(model, dims)
        outputs.update(
            {n: list(inferred.get(n, [-1])) for n, s in outputs.items() if -1 in s or not s}
        )
    for name, shape in outputs.items():
        if -1 in shape:
            raise GraphError(f"The shape of output '{name}' cannot be inferred")
        dims[name] = tuple(shape)
    return dims


def _leading(model: Any, batch_size: int) -> Dict[str, int]:
    dims = [v.type.tensor_type.shape.dim for v in graph_inputs(model)]
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


def largest(shapes: Sequence[Mapping[str, Dims]]) -> Dict[str, Dims]:
    """Per input and output, the dims with the most elements of all specializations."""

    def size(dims: Dims) -> int:
        count = 1
        for dim in dims:
            count *= dim
        return count

    return {name: max((s[name] for s in shapes), key=size) for name in shapes[0]}
