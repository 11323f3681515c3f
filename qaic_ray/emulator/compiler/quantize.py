"""int8 by calibration: values and weights on a grid of 256 levels, as the vendor's options say.

What a card computes in int8 is here the same operator between a QuantizeLinear and a
DequantizeLinear; sums are as wide as a card's. Covered: schemas, calibrations, per-channel weights,
biases, nodes kept in floating point. Inferred: which operators a card has in int8 (`QUANTIZED`),
and that an activation function is fused with what it follows.
"""

from __future__ import annotations

from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Set

import numpy as np

from ..container.constants import to_float32
from ..lowering import graph
from ..lowering.graph import FLOATS, GraphError
from . import calibration, configs
from .calibration import Range
from .levels import (
    UINT8_WHERE_POSITIVE,
    Grid,
    Rewriter,
    extremes,
    grid_of,
    grid_of_offsets,
    levels_of,
)
from .weights import WeightFiles

_WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""Operators with a weight as second input -> the axis of its output channels."""
_FUSED = frozenset(["Relu", "Clip", "LeakyRelu"])
_ONE_INPUT = frozenset(["Clip", "Sigmoid", "Tanh", "Softmax", "AveragePool", "GlobalAveragePool"])
QUANTIZED = (
    frozenset(["Add", "Sub", "Mul", "Concat", "HardSwish"]) | _ONE_INPUT | _FUSED.union(_WEIGHTED)
)
"""Operators that are computed in int8; those that only move values are on its grid anyway."""


class Quantization(NamedTuple):
    """What the options say; operators of `kept_types` and `kept_nodes` stay floating point.

    A kept node is named by itself or by its first output.
    """

    activations: str = UINT8_WHERE_POSITIVE
    constants: str = UINT8_WHERE_POSITIVE
    calibration: str = "None"
    percentile: float = 100.0
    num_bins: int = 512
    bias_bits: int = 32
    channelwise: bool = False
    rowwise: bool = False
    kept_types: FrozenSet[str] = frozenset()
    kept_nodes: FrozenSet[str] = frozenset()
    list_file: Optional[str] = None
    random: Optional[str] = None
    profile: Optional[str] = None
    encodings: Optional[str] = None

    @property
    def has_inputs(self) -> bool:
        """Whether ranges are found with inputs of the user's."""
        return any(f is not None for f in (self.list_file, self.profile, self.encodings))


def profile(model: Any, asked: Quantization, dims: Mapping[str, Any], files: WeightFiles) -> Any:
    """Ranges of every value that quantization needs, by running the model.

    Raises:
        GraphError, ConfigError: where the model or the inputs do not fit.
    """
    inputs = graph.inputs(model)
    data = calibration.samples(asked.list_file, asked.random, inputs, dims)
    return calibration.observe(
        model, files, _Plan(model, asked).measured, data, num_bins=asked.num_bins
    )


def apply(
    model: Any, asked: Quantization, dims: Mapping[str, Any], files: WeightFiles
) -> Dict[str, Any]:
    """Quantize a model in place; what the report says of it.

    Raises:
        GraphError, ConfigError: where the model, the inputs or the profile do not fit.
    """
    if asked.encodings is not None:
        return apply_encodings(model, asked.encodings, files)
    if asked.profile is None:
        ranges = profile(model, asked, dims, files)
    else:
        ranges = calibration.read_profile(asked.profile)
    plan = _Plan(model, asked)
    missing = [name for name in plan.measured if name not in ranges]
    if missing:
        raise GraphError(
            f"The quantization profile has no range of '{missing[0]}': make it of this model and "
            "these options with -dump-profile"
        )
    _Quantizer(model, files, asked, ranges=ranges, plan=plan).run()
    source = asked.profile or asked.list_file
    data = f"random ({asked.random or 'gaussian'})" if source is None else source
    return {
        "ranges_from": data,
        "activations": asked.activations,
        "constants": asked.constants,
        "calibration": asked.calibration,
        "channelwise": asked.channelwise,
        "rowwise": asked.rowwise,
        "quantized_nodes": len(plan.nodes),
        "floating_point_nodes": len(plan.floating),
        "names_not_in_the_model": plan.unknown,
    }


class _Plan:
    """Which nodes are quantized, and which values have to be measured for that."""

    def __init__(self, model: Any, asked: Quantization) -> None:
        self.constants = {t.name: t for t in model.graph.initializer}
        self.nodes: List[Any] = []
        self.floating: List[Any] = []
        floats = _float_values(model)
        for node in model.graph.node:
            data = self.data_inputs(node)
            is_float = data and floats.issuperset([*data, node.output[0]])
            kept = node.op_type in asked.kept_types
            kept = kept or not asked.kept_nodes.isdisjoint([node.name, node.output[0]])
            fits = node.op_type in QUANTIZED and not node.domain and not kept
            (self.nodes if fits and is_float else self.floating).append(node)
        names = {name for node in model.graph.node for name in (node.name, *node.output[:1])}
        self.unknown = sorted(asked.kept_nodes - names)
        """Of the nodes that are to be kept, the names that no node has."""
        self._own = {node.output[0] for node in self.nodes}
        self.wide = set() if graph.has_subgraphs(model) else self._fused(model)
        """Outputs that a fused activation function reads as they are."""
        wanted = dict.fromkeys(n for node in self.nodes for n in self._values(node))
        self.measured = [name for name in wanted if name not in self.wide]

    def _fused(self, model: Any) -> Set[str]:
        readers: Dict[str, List[Any]] = {o.name: [None] for o in model.graph.output}
        for node in model.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        found = set()
        for node in self.nodes:
            after = readers.get(node.output[0], [])
            if len(after) != 1 or after[0] is None or node.op_type in _ONE_INPUT:
                continue
            if after[0].op_type in _FUSED and after[0].output[0] in self._own:
                found.add(node.output[0])
        return found

    def data_inputs(self, node: Any) -> List[str]:
        """The inputs that are quantized values: no weights, biases or bounds."""
        if node.op_type in _WEIGHTED:
            return [name for name in node.input[:2] if name not in self.constants]
        names = node.input[:1] if node.op_type in _ONE_INPUT | _FUSED else node.input
        return [name for name in names if name and name not in self.constants]

    def is_made_quantized(self, name: str) -> bool:
        """Whether a quantized node makes this value."""
        return name in self._own

    def _values(self, node: Any) -> List[str]:
        return [*self.data_inputs(node), node.output[0]]


def _float_values(model: Any) -> Set[str]:
    """Names of the values that are floating point, whose type a program computes as float32."""
    inferred = graph.infer_shapes(model)
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    found = {v.name for v in values if v.type.tensor_type.elem_type in FLOATS}
    return found | {t.name for t in model.graph.initializer if t.data_type in FLOATS}


def _output_channels(node: Any, rank: int) -> Optional[int]:
    """The axis of a weight's output channels; None where it has none of its own."""
    is_convolution = node.op_type in ("Conv", "ConvTranspose")
    set_attributes = {a.name: a.i for a in node.attribute}
    if node.op_type == "ConvTranspose" and set_attributes.get("group", 1) > 1:
        return None
    axis = 0 if set_attributes.get("transB") else _WEIGHTED[node.op_type]
    return axis if rank == 2 or is_convolution else None


class _Quantizer(Rewriter):
    def __init__(
        self,
        model: Any,
        files: WeightFiles,
        asked: Quantization,
        *,
        ranges: Mapping[str, Range],
        plan: _Plan,
    ) -> None:
        super().__init__(model.graph)
        self._files = files
        self._constants = plan.constants
        self._asked = asked
        self._ranges = ranges
        self._plan = plan
        self._grids: Dict[str, Grid] = {}
        self._read: Dict[str, str] = {}
        """Value -> its quantized form, for values that floating point makes."""

    def run(self) -> None:
        quantized = {id(node) for node in self._plan.nodes}
        for node in list(self.graph.node):
            if id(node) not in quantized:
                self.nodes.append(node)
                continue
            self._quantize(node)
        self.replace_nodes()

    def _quantize(self, node: Any) -> None:
        data = set(self._plan.data_inputs(node))
        for position, name in enumerate(node.input):
            if name in data:
                node.input[position] = self._value(name)
            elif name in self._constants and self._is_constant_operand(node, position):
                node.input[position] = self._constant(node, position, name)
        output = node.output[0]
        if output in self._plan.wide:
            self.nodes.append(node)
            return
        node.output[0] = f"{output}/wide"
        self.nodes.append(node)
        self.add_grid(f"{output}/wide", output, self._grid(output))

    def _is_constant_operand(self, node: Any, position: int) -> bool:
        if self._constants[node.input[position]].data_type not in FLOATS:
            return False
        return position == 0 or node.op_type not in _ONE_INPUT | _FUSED

    def _value(self, name: str) -> str:
        """The quantized form of a value: itself where a quantized node makes it."""
        if self._plan.is_made_quantized(name):
            return name
        if name not in self._read:
            self._read[name] = f"{name}/quantized"
            self.add_grid(name, self._read[name], self._grid(name))
        return self._read[name]

    def _grid(self, name: str) -> Grid:
        if name not in self._grids:
            asked = self._asked
            bounds = calibration.bounds_of(self._ranges[name], asked.calibration, asked.percentile)
            self._grids[name] = grid_of(*bounds, asked.activations)
        return self._grids[name]

    def _constant(self, node: Any, position: int, name: str) -> str:
        """The quantized form of a constant operand: a weight, a bias or another number."""
        array, kind = self._files.open(self._constants[name]), self._constants[name].data_type
        is_weight = position == 1 and node.op_type in _WEIGHTED
        is_bias = position == 2 and node.op_type in _WEIGHTED
        if is_bias and self._asked.bias_bits == 32:
            return self._wide_bias(node, name, to_float32(array, kind))
        axis = self._channel_axis(node, array) if is_weight else None
        made = f"{name}/quantized" + ("" if axis is None else f"/{axis}")
        if made in self._read:
            return made
        self._read[made] = made
        grid = grid_of(*extremes(array, kind, axis), self._asked.constants)
        self._grids[made] = grid
        self.store(made, levels_of(array, kind, grid, axis), grid, axis)
        return made

    def _channel_axis(self, node: Any, array: Any) -> Optional[int]:
        is_convolution = node.op_type in ("Conv", "ConvTranspose")
        if not (self._asked.channelwise if is_convolution else self._asked.rowwise):
            return None
        return _output_channels(node, array.ndim)

    def _wide_bias(self, node: Any, name: str, array: Any) -> str:
        """A bias on the grid of the sums: the input's scale times the weight's."""
        made = f"{node.output[0]}/bias"
        source, weight = node.input[0], node.input[1]
        of_input = self._grids.get(source.rsplit("/quantized", 1)[0]) or self._grids.get(source)
        of_weight = self._grids.get(weight)
        if of_input is None or of_weight is None:
            return name
        scale = (of_input.scale * of_weight.scale).astype(np.float32)
        # Whatever a bias is, its sums fit 32 bits: a smaller scale would not keep it.
        least = np.abs(array).max(initial=0.0) / (1 << 30)
        scale = np.maximum(scale, np.float32(max(least, np.finfo(np.float32).tiny)))
        axis = 0 if np.ndim(scale) else None
        if axis is not None and array.shape != scale.shape:
            return name
        grid = Grid(scale, np.zeros(np.shape(scale), np.int32))
        self.store(made, grid.levels(array, axis), grid, axis)
        return made


def apply_encodings(model: Any, path: str, files: WeightFiles) -> Dict[str, Any]:
    """Put values and weights of a model on the levels that a file gives; what the report says.

    Raises:
        ConfigError: where the file is refused.
        GraphError: where it is not of this model.
    """
    return _Encoder(model, path, files).run()


class _Encoder(Rewriter):
    """Levels from a file: what it gives none is floating point, as it is where they were found."""

    def __init__(self, model: Any, path: str, files: WeightFiles) -> None:
        super().__init__(model.graph)
        self._path, self._files = path, files
        self._given = configs.read_encodings(path)
        self._constants = {t.name: t for t in model.graph.initializer if t.data_type in FLOATS}
        self._inputs = [value.name for value in graph.inputs(model)]
        self._floats = _float_values(model)
        self._read: Dict[str, str] = {}

    def run(self) -> Dict[str, Any]:
        made = [name for node in self.graph.node for name in node.output]
        values = [n for n in (*self._inputs, *made) if n in self._given and n in self._floats]
        weights = [name for name in self._constants if name in self._given]
        unknown = sorted(self._given.keys() - {*values, *weights})
        if not values and not weights:
            raise GraphError(
                f"None of the {len(unknown)} names of {self._path} with 8 bits is in the model: "
                "give the encodings that were exported with it"
            )
        for name in weights:
            self._read_weight(name)
        for name in self._inputs:
            if name in values:
                self._read[name] = f"{name}/quantized"
                self.add_grid(name, self._read[name], self._grid(name))
        for node in list(self.graph.node):
            node.input[:] = [self._read.get(name, name) for name in node.input]
            self.nodes.append(node)
            for position, name in enumerate(node.output):
                if name in values:
                    node.output[position] = f"{name}/wide"
                    self.add_grid(f"{name}/wide", name, self._grid(name))
        self.replace_nodes()
        return {
            "ranges_from": self._path,
            "quantized_values": len(values),
            "quantized_weights": len(weights),
            "names_not_in_the_model": unknown,
        }

    def _grid(self, name: str) -> Grid:
        encoding = self._given[name]
        if len(encoding.scale) > 1:
            raise GraphError(
                f"{self._path}: '{name}' has {len(encoding.scale)} scales, and only weights have "
                "one for each channel"
            )
        return grid_of_offsets(encoding.scale[0], encoding.offset[0])

    def _read_weight(self, name: str) -> None:
        tensor, encoding = self._constants[name], self._given[name]
        if len(encoding.scale) == 1:
            axis, grid = None, self._grid(name)
        else:
            axis, grid = self._axis(name), grid_of_offsets(encoding.scale, encoding.offset)
        array, made = self._files.open(tensor), f"{name}/quantized"
        self.store(made, levels_of(array, tensor.data_type, grid, axis), grid, axis)
        self._read[name] = made

    def _axis(self, name: str) -> int:
        """The axis of a weight that has as many channels as scales."""
        dims, num_scales = self._constants[name].dims, len(self._given[name].scale)
        for node in self.graph.node:
            if node.op_type in _WEIGHTED and not node.domain and name in node.input[1:2]:
                axis = _output_channels(node, len(dims))
                if axis is not None and dims[axis] == num_scales:
                    return axis
        raise GraphError(
            f"{self._path}: '{name}' has {num_scales} scales, which is not the number of output "
            f"channels of a weight of shape {list(dims)}"
        )
