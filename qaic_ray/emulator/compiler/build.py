"""Writes the program of one compile: static shapes, rounded weights, graphs, descriptor."""

from __future__ import annotations

import json
import math
import os
import zlib
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from onnx import TensorProto

from .. import lowering
from ..container import (
    AI100,
    MDP_META_INFO,
    SEGMENTS,
    ConstantsDesc,
    QpcWriter,
    aicapi,
    metadata,
    netdesc,
    network,
)
from ..container.constants import ConstantsWriter
from ..lowering import graph
from ..lowering.graph import GraphError, State
from ..lowering.view import NotLowered
from ..numbers import kv_cache
from . import calibration, extdata, preparation, quantize
from .configs import Partition
from .quantize import Quantization
from .report import Report
from .weights import Precision, WeightFiles, store_weights

Dims = Tuple[int, ...]

_MAX_JOINT_LENGTH = 16
"""A graph of joint rows has a kernel a token: with many tokens it is no longer the faster one."""

_FLOATS = (aicapi.FLOAT_TYPE, aicapi.FLOAT_16_TYPE, aicapi.BFLOAT16_TYPE)
_ONNX_TO_IO_TYPE = {
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
_IO_TYPES = {
    "float": aicapi.FLOAT_TYPE,
    kv_cache.FLOAT16: aicapi.FLOAT_16_TYPE,
    kv_cache.MXINT8: aicapi.INT8_TYPE,
}


class Build(NamedTuple):
    """Everything a compile needs to know, checked.

    `symbols` has one entry a specialization, `io_precisions` is IO name -> precision, `batch_size`
    the value of a leading dimension that no symbol gives one, `outputs` what the program's outputs
    are in place of the model's, `reads_extdata` whether weights may be in files of a checkpoint.
    """

    model_path: str
    target: str
    apps_version: str
    precision: Precision
    partition: Partition
    symbols: List[Dict[str, int]]
    io_precisions: Dict[str, str]
    retained: bool
    batch_size: Optional[int]
    hardware: str = AI100
    outputs: Tuple[str, ...] = ()
    quantization: Optional[Quantization] = None
    reads_extdata: bool = True

    @property
    def network_name(self) -> str:
        """Name of the program: the model's file name."""
        return os.path.splitext(os.path.basename(self.model_path))[0]

    def facts(self) -> Dict[str, Any]:
        """What the compile's report says of it."""
        return {
            "model": self.model_path,
            "network_name": self.network_name,
            "apps_version": self.apps_version,
            "hardware": self.hardware,
            **self.precision._asdict(),
            **self.partition._asdict(),
            "specializations": self.symbols,
            "io_precisions": self.io_precisions,
            "retained_state": self.retained,
            "output_node_names": list(self.outputs),
        }


def write(build: Build, model: Any, path: str) -> Report:
    """Write the program of `model` (as `graph.load` gives it; it is consumed) to a new file.

    Raises:
        GraphError: where the model cannot be compiled.
        ConstantError: where a weight cannot be read.
    """
    model, files = _prepared(build, model)
    states = _states(build, model)
    described = _describe(build, model, states)
    graph.forget_shapes(model.graph)
    kinds = {i.name: graph.compute_kind(i) for i in graph.inputs(model)}
    quantized = None
    if build.quantization is not None:
        dims = preparation.input_dims(model, build.symbols[0], build.batch_size)
        quantized = quantize.apply(model, build.quantization, dims, files)
    with open(path, "wb") as file:
        devices = (MDP_META_INFO,) if build.partition.num_devices > 1 else ()
        writer = QpcWriter(file, (*SEGMENTS, *devices))
        constants = ConstantsWriter(writer)
        store_weights(model, constants, files=files, precision=build.precision)
        graph.widen_to_float32(model)
        graph.narrow_lookups(model, {c.name: c.kind for c in constants.table})
        lens = _ctx_len(described, states), _joint_length(build.symbols)
        graphs, not_lowered = _lowered(model, states, constants, lens)
        graph.round_states(model, states)
        graphs[network.REFERENCE] = graph.expand(model, states).SerializeToString()
        desc = ConstantsDesc.of(writer.size())
        writer.end_segment()
        program = network.NetworkElf(
            apps_version=build.apps_version,
            hardware=build.hardware,
            convert_to_fp16=build.precision.convert_to_fp16,
            mxfp6_matmul=build.precision.mxfp6_matmul,
            num_devices=build.partition.num_devices,
            states={name: state.output for name, state in states.items()},
            roundings={name: s.rounding for name, s in states.items() if s.rounding is not None},
            mxint8=_packed(build, described),
            constants=constants.table,
            input_kinds=kinds,
            graphs=graphs,
        )
        needed = metadata.serialize(_needs(build, described, desc))
        parts = [network.serialize(program, needed), netdesc.serialize(described), desc.pack()]
        for data in (*parts, *(_partition_json(build.partition) for _ in devices)):
            writer.write(data)
            writer.end_segment()
        writer.finish(zlib.crc32(needed))
    external = sorted({tensor.path for tensor in files.external.values()})
    return Report(_warnings(constants), not_lowered, quantized, external)


def _needs(build: Build, described: netdesc.Network, desc: ConstantsDesc) -> metadata.Needs:
    buffers = described.dma_buffers()
    return metadata.Needs(described.name, build.hardware, described.num_cores, buffers, desc)


def _partition_json(partition: Partition) -> bytes:
    """The devices of a program for several, in the form of `-mdp-load-partition-config`."""
    devices = [
        {"deviceId": i, "numCores": partition.num_cores} for i in range(partition.num_devices)
    ]
    return json.dumps({"partitions": [{"name": "Partition0", "devices": devices}]}).encode()


def profile(build: Build, model: Any, path: str) -> None:
    """Write the quantization profile of `model` in place of a program.

    Raises:
        GraphError, ConfigError, ConstantError, OSError: as `write`.
    """
    assert build.quantization is not None
    model, files = _prepared(build, model)
    graph.forget_shapes(model.graph)
    dims = preparation.input_dims(model, build.symbols[0], build.batch_size)
    ranges = quantize.profile(model, build.quantization, dims, files)
    calibration.write_profile(path, ranges)


def _prepared(build: Build, model: Any) -> Tuple[Any, WeightFiles]:
    """The model with the outputs that are asked for, and where the bytes of its weights are.

    Weights that are graph inputs are constants then, and what is to be added to the graph can be.
    """
    folder = os.path.dirname(os.path.abspath(build.model_path))
    files = WeightFiles(folder, extdata.attach(model, folder) if build.reads_extdata else {})
    if build.outputs:
        preparation.select_outputs(model, build.outputs)
    preparation.check_names(model)
    for value in (*graph.inputs(model), *model.graph.output):
        _binding_type(value)
    retained = build.retained and graph.retained_pairs(model)
    if build.quantization is not None or retained or preparation.has_card_operators(model):
        model = preparation.raised(model)
    return model, files


def _packed(build: Build, described: netdesc.Network) -> List[str]:
    names = [io.name for io in described.inputs + described.outputs]
    return [name for name in names if build.io_precisions.get(name) == kv_cache.MXINT8]


def _states(build: Build, model: Any) -> Dict[str, State]:
    states = {}
    pairs = graph.retained_pairs(model) if build.retained else {}
    for name, output in pairs.items():
        kind = build.io_precisions.get(output, build.io_precisions.get(name))
        if kind in (None, "float"):
            kind = kv_cache.FLOAT16 if build.precision.convert_to_fp16 else None
        states[name] = State(output, kind if graph.is_float_input(model, name) else None)
    return states


def _lowered(
    model: Any, states: Mapping[str, State], constants: ConstantsWriter, lens: Tuple[int, int]
) -> Any:
    """Graphs by name (none or lowered ones), and why there is none; `lens`: context, joint rows."""
    if not states:
        return {}, None
    try:
        lowered = lowering.lower(model, states, constants.read, lens)
    except NotLowered as reason:
        return {}, str(reason)
    for name, array in lowered.tables.items():
        constants.add_float32(name, array)
    graphs = {network.LOWERED: lowered.model.SerializeToString()}
    if lowered.joint is not None:
        graphs[network.JOINT] = lowered.joint.SerializeToString()
    return graphs, None


def _ctx_len(described: netdesc.Network, states: Mapping[str, State]) -> int:
    sizes = [io.dims[2] for io in described.inputs if io.name in states and len(io.dims) == 4]
    return max(sizes, default=0)


def _joint_length(symbols: List[Dict[str, int]]) -> int:
    """Tokens of a row in the longest shape of several rows that keeps the logits of every token."""
    lens = [
        s["seq_len"]
        for s in symbols
        if s.get("num_logits_to_keep", 0) == s.get("seq_len") and s.get("batch_size", 1) > 1
    ]
    return max((n for n in lens if 1 < n <= _MAX_JOINT_LENGTH), default=0)


def _warnings(constants: ConstantsWriter) -> List[str]:
    return [
        f"Warning: {count} values of constant '{name}' will {what} after conversion to 16-bit"
        for name, rounding in constants.roundings.items()
        for count, what in (
            (rounding.num_underflows, "underflow"),
            (rounding.num_overflows, "overflow"),
        )
        if count
    ]


def _describe(build: Build, model: Any, states: Mapping[str, State]) -> netdesc.Network:
    resolved = [preparation.resolve(model, symbols, build.batch_size) for symbols in build.symbols]
    for dims in resolved:
        _check_states(states, dims)
        _pack(build, dims)
    largest = _largest(resolved)
    varying = {name for name in largest if len({entry[name] for entry in resolved}) > 1}
    empty = next((n for n, dims in largest.items() if not all(0 < d < 2**31 for d in dims)), None)
    if empty is not None:
        raise GraphError(f"'{empty}' has the shape {list(largest[empty])}: no buffer is that big")
    for name in varying & set(states):
        raise GraphError(f"Retained state '{name}' has different shapes in the specializations")
    partial = varying | set(states) | {state.output for state in states.values()}
    # Inputs keep the model's order, which programs bind by position. Outputs stand in the order in
    # which the graph makes them: retained states before logits, CLIP's hidden state before its
    # pooled one. The vendor's stable-diffusion programs read that by position too.
    made = _made_order(model)
    results = sorted(model.graph.output, key=lambda value: made.get(value.name, -1))
    sides: List[List[netdesc.Io]] = []
    for values in (graph.inputs(model), results):
        ios = [
            netdesc.Io(v.name, _io_type(build, v), largest[v.name], v.name in partial)
            for v in values
        ]
        sides.append(ios)
    order = sides[0] + sides[1]
    allowed = [tuple((io.type, entry[io.name]) for io in order) for entry in resolved]
    return netdesc.Network(
        name=build.network_name,
        inputs=tuple(sides[0]),
        outputs=tuple(sides[1]),
        num_cores=build.partition.num_cores,
        batch_size=build.symbols[0].get("batch_size", build.batch_size or 1),
        allowed_shapes=tuple(allowed) if len(allowed) > 1 else (),
    )


def _check_states(states: Mapping[str, State], dims: Mapping[str, Dims]) -> None:
    for name, state in states.items():
        if dims[name] != dims[state.output]:
            raise GraphError(
                f"Retained state '{name}' has the shape {list(dims[name])} and its output "
                f"'{state.output}' {list(dims[state.output])}: what stays on the card keeps its "
                "shape"
            )


def _pack(build: Build, dims: Dict[str, Dims]) -> None:
    """Make the last axis of each packed buffer its bytes."""
    for name, kind in build.io_precisions.items():
        if kind == kv_cache.MXINT8 and name in dims:
            *outer, width = dims[name]
            if width % kv_cache.BLOCK:
                raise GraphError(
                    f"'{name}' cannot be mxint8: its last dimension is {width}, not a multiple "
                    f"of {kv_cache.BLOCK}"
                )
            dims[name] = (*outer, width // kv_cache.BLOCK * kv_cache.BLOCK_BYTES)


def _binding_type(value: Any) -> int:
    """The descriptor's type of a graph input or output.

    Raises:
        GraphError: for a type that a card does not have.
    """
    elem_type = value.type.tensor_type.elem_type
    if elem_type not in _ONNX_TO_IO_TYPE:
        name = TensorProto.DataType.Name(elem_type)
        raise GraphError(f"Unsupported data type {name} of input or output '{value.name}'")
    return _ONNX_TO_IO_TYPE[elem_type]


def _largest(resolved: Sequence[Mapping[str, Dims]]) -> Dict[str, Dims]:
    """Per input and output, the dims with the most elements of all specializations."""
    return {name: max((dims[name] for dims in resolved), key=math.prod) for name in resolved[0]}


def _io_type(build: Build, value: Any) -> int:
    type_ = _binding_type(value)
    kind = build.io_precisions.get(value.name)
    return _IO_TYPES[kind] if kind is not None and type_ in _FLOATS else type_


def _made_order(model: Any) -> Dict[str, int]:
    """Per value that a node of the graph makes, its place among all of them."""
    made = (name for node in model.graph.node for name in node.output)
    return {name: place for place, name in enumerate(made)}
