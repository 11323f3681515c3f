"""The card's own operators in plain ONNX, with the card's meaning.

QEfficient's exports call `CustomRMSNorm`, `CtxScatter`, `CtxGather` and their continuous-batching
forms. On a card, a scatter to a position below 0 or at and beyond ctx_len writes nothing, and what
a gather from such an index yields is never used (here it is zero).

A graph is kept with these operators while it is searched, and expanded when it is to run. What a
scatter or gather derives from its indices is the same in every layer, so it is computed once.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Tuple

import onnx
from onnx import helper

CLOUD = "com.qualcomm.cloud"
AISW = "com.qti.aisw.onnx"
LOCAL = "qaic.emulator"

RMS_NORM = (AISW, "CustomRMSNorm")
SCATTER = (CLOUD, "CtxScatter")
SCATTER_CB = (CLOUD, "CtxScatterCB")
GATHER = (CLOUD, "CtxGather")
GATHER_CB = (CLOUD, "CtxGatherCB")
SCATTER_3D = (CLOUD, "CtxScatter3D")
SCATTER_3D_CB = (CLOUD, "CtxScatterCB3D")
NAMES = frozenset(
    [RMS_NORM, SCATTER, SCATTER_CB, GATHER, GATHER_CB, SCATTER_3D, SCATTER_3D_CB],
)

_SCALARS = """
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  i0 = Constant <value = int64[1] {0}> ()
  i1 = Constant <value = int64[1] {1}> ()
  i2 = Constant <value = int64[1] {2}> ()
  i3 = Constant <value = int64[1] {3}> ()
  i4 = Constant <value = int64[1] {4}> ()
  last = Constant <value = int64[1] {-1}> ()
  ctx_len_1d = Slice (dims, i2, i3)
  ctx_len = Squeeze (ctx_len_1d)"""

# The cache gets one more position, which takes the writes that a card drops and is cut off again.
_SCATTER_INDEX = """
{name} ({inputs}) => (indices, spare, ctx_len_1d)
{{
  dims = Shape (data){scalars}
  around = Constant <value = int64[2] {{1, 2}}> ()
  before = Constant <value = int64[2] {{0, 2}}> ()
  position = Cast <to = 7> (position_ids)
  below = Less (position, zero)
  beyond = GreaterOrEqual (position, ctx_len)
  skipped = Or (below, beyond)
  target = Where (skipped, ctx_len, position)
  outer = Slice (dims, i0, i2)
  inner = Slice (dims, i3, i4)
  spare_shape = Concat <axis = 0> (outer, i1, inner)
  spare_zero = Cast <to = 1> (zero)
  spare = Expand (spare_zero, spare_shape)
  update_dims = Shape (updates)
  index_shape = Slice (update_dims, i0, i3)
  num_heads_1d = Slice (update_dims, i1, i2)
  num_heads = Squeeze (num_heads_1d)
  {rows}
  row_3d = Unsqueeze (rows, around)
  row_index = Expand (row_3d, index_shape)
  heads = Range (zero, num_heads, one)
  head_3d = Unsqueeze (heads, before)
  head_index = Expand (head_3d, index_shape)
  target_3d = Unsqueeze (target, i1)
  target_index = Expand (target_3d, index_shape)
  row_4d = Unsqueeze (row_index, last)
  head_4d = Unsqueeze (head_index, last)
  target_4d = Unsqueeze (target_index, last)
  indices = Concat <axis = -1> (row_4d, head_4d, target_4d)
}}
"""
_SCATTER_APPLY = """
ScatterApply (data, updates, indices, spare, ctx_len_1d) => (output)
{
  start = Constant <value = int64[1] {0}> ()
  axis = Constant <value = int64[1] {2}> ()
  roomy = Concat <axis = 2> (data, spare)
  written = ScatterND (roomy, indices, updates)
  output = Slice (written, start, ctx_len_1d, axis)
}
"""
# Without heads: positions are axis 1 of data, and data may be of any type.
_SCATTER_3D = """
{name} ({inputs}) => (output)
{{
  dims = Shape (data)
  zero = Constant <value = int64 {{0}}> ()
  one = Constant <value = int64 {{1}}> ()
  i0 = Constant <value = int64[1] {{0}}> ()
  i1 = Constant <value = int64[1] {{1}}> ()
  i2 = Constant <value = int64[1] {{2}}> ()
  last = Constant <value = int64[1] {{-1}}> ()
  length_1d = Slice (dims, i1, i2)
  length = Squeeze (length_1d)
  position = Cast <to = 7> (position_ids)
  below = Less (position, zero)
  beyond = GreaterOrEqual (position, length)
  skipped = Or (below, beyond)
  target = Where (skipped, length, position)
  update_dims = Shape (updates)
  index_shape = Slice (update_dims, i0, i2)
  {rows}
  row_2d = Unsqueeze (rows, i1)
  row_index = Expand (row_2d, index_shape)
  target_index = Expand (target, index_shape)
  row_3d = Unsqueeze (row_index, last)
  target_3d = Unsqueeze (target_index, last)
  indices = Concat <axis = -1> (row_3d, target_3d)
  spare = Slice (data, i0, i1, i1)
  roomy = Concat <axis = 1> (data, spare)
  written = ScatterND (roomy, indices, updates)
  output = Slice (written, i0, length_1d, i1)
}}
"""
_GATHER_INDEX = """
{name} ({inputs}) => (indices, valid)
{{
  dims = Shape (data){scalars}
  index = Cast <to = 7> (ctx_indices)
  {outer}
  index_dims = Shape (index)
  num_gathered = Slice (index_dims, i2, i3)
  index_shape = Concat <axis = 0> (outer, num_gathered)
  low = GreaterOrEqual (index, zero)
  high = Less (index, ctx_len)
  inside = And (low, high)
  safe = Where (inside, index, zero)
  safe_3d = Expand (safe, index_shape)
  indices = Unsqueeze (safe_3d, last)
  valid_3d = Expand (inside, index_shape)
  valid = Unsqueeze (valid_3d, last)
}}
"""
_GATHER_APPLY = """
GatherApply (data, indices, valid) => (output)
{
  nothing = Constant <value = float {0.0}> ()
  taken = GatherND <batch_dims = 2> (data, indices)
  output = Where (valid, taken, nothing)
}
"""
_GATHER_APPLY_CB = """
GatherApplyCB (data, batch_index, indices, valid) => (output)
{
  nothing = Constant <value = float {0.0}> ()
  flat = Constant <value = int64[1] {-1}> ()
  wide = Cast <to = 7> (batch_index)
  slots = Reshape (wide, flat)
  rows = Gather <axis = 0> (data, slots)
  taken = GatherND <batch_dims = 2> (rows, indices)
  output = Where (valid, taken, nothing)
}
"""
_ROW_RANGE = """num_rows_1d = Slice (update_dims, i0, i1)
  num_rows = Squeeze (num_rows_1d)
  rows = Range (zero, num_rows, one)"""
_ROW_SLOTS = """slots = Cast <to = 7> (batch_index)
  rows = Reshape (slots, last)"""
_OUTER_SLOTS = """slot_dims = Shape (batch_index)
  num_slots = Slice (slot_dims, i0, i1)
  num_heads = Slice (dims, i1, i2)
  outer = Concat <axis = 0> (num_slots, num_heads)"""


def _index(text: str, name: str, inputs: str, **parts: str) -> str:
    return text.format(name=name, inputs=inputs, scalars=_SCALARS, **parts)


_FUNCTIONS = {
    "ScatterIndex": _index(
        _SCATTER_INDEX, "ScatterIndex", "data, position_ids, updates", rows=_ROW_RANGE
    ),
    "ScatterIndexCB": _index(
        _SCATTER_INDEX,
        "ScatterIndexCB",
        "data, batch_index, position_ids, updates",
        rows=_ROW_SLOTS,
    ),
    "GatherIndex": _index(
        _GATHER_INDEX, "GatherIndex", "data, ctx_indices", outer="outer = Slice (dims, i0, i2)"
    ),
    "GatherIndexCB": _index(
        _GATHER_INDEX, "GatherIndexCB", "data, batch_index, ctx_indices", outer=_OUTER_SLOTS
    ),
    "Scatter3D": _SCATTER_3D.format(
        name="Scatter3D", inputs="data, position_ids, updates", rows=_ROW_RANGE
    ),
    "Scatter3DCB": _SCATTER_3D.format(
        name="Scatter3DCB", inputs="data, batch_index, position_ids, updates", rows=_ROW_SLOTS
    ),
    "ScatterApply": _SCATTER_APPLY,
    "GatherApply": _GATHER_APPLY,
    "GatherApplyCB": _GATHER_APPLY_CB,
}


def expand(nodes: List[Any], given: Mapping[str, str]) -> List[Any]:
    """The same nodes with the card's operators replaced; they need `functions`.

    Args:
        nodes: in order.
        given: input -> its shape; caches of one shape share what is derived from indices.
    """
    expander = _Expander(given)
    return [made for node in nodes for made in expander.expand(node)]


def functions(opset: int) -> List[Any]:
    """The model-local functions that `expand` calls; valid from opset 13 on."""
    header = f'<domain: "{LOCAL}", opset_import: ["" : {opset}]>'
    return [onnx.parser.parse_function(header + text) for text in _FUNCTIONS.values()]


_SHAPES = {
    RMS_NORM: "CustomRMSNorm (hidden, weight) => (output) { output = Mul (hidden, weight) }",
    SCATTER: "CtxScatter (data, positions, updates) => (output) { output = Identity (data) }",
    SCATTER_CB: "CtxScatterCB (data, slots, positions, updates) => (output) "
    "{ output = Identity (data) }",
    SCATTER_3D: "CtxScatter3D (data, positions, updates) => (output) { output = Identity (data) }",
    SCATTER_3D_CB: "CtxScatterCB3D (data, slots, positions, updates) => (output) "
    "{ output = Identity (data) }",
}


def shape_functions(opset: int) -> List[Any]:
    """Functions with the names of the card's operators that are right in shape and type only."""
    return [
        onnx.parser.parse_function(f'<domain: "{domain}", opset_import: ["" : {opset}]>' + text)
        for (domain, _), text in _SHAPES.items()
    ]


def rms_norm(node: Any) -> Any:
    """CustomRMSNorm as onnxruntime's own operator."""
    epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
    return rms_norm_node(list(node.input), list(node.output), node.name, epsilon)


def rms_norm_node(inputs: List[str], outputs: List[str], name: str, epsilon: float) -> Any:
    """onnxruntime's own operator for the RMS norm of inputs[0] times inputs[1]."""
    return helper.make_node(
        "SimplifiedLayerNormalization",
        inputs,
        outputs,
        name=name,
        axis=-1,
        epsilon=epsilon,
        stash_type=1,
    )


class _Expander:
    def __init__(self, given: Mapping[str, str]) -> None:
        self._shapes = dict(given)
        self._shared: Dict[Tuple[Any, ...], List[str]] = {}

    def expand(self, node: Any) -> List[Any]:
        kind = (node.domain, node.op_type)
        if kind == RMS_NORM:
            return [rms_norm(node)]
        if kind in (SCATTER_3D, SCATTER_3D_CB):
            suffix = "CB" if kind == SCATTER_3D_CB else ""
            return [self._apply(node, f"Scatter3D{suffix}", list(node.input))]
        if kind in (SCATTER, SCATTER_CB):
            suffix = "CB" if kind == SCATTER_CB else ""
            data, *index, updates = node.input
            if data in self._shapes:
                self._shapes[node.output[0]] = self._shapes[data]
            made, derived = self._derive(node, f"ScatterIndex{suffix}", [data, *index, updates], 3)
            inputs = [data, updates, *derived]
            return [*made, self._apply(node, "ScatterApply", inputs)]
        if kind in (GATHER, GATHER_CB):
            suffix = "CB" if kind == GATHER_CB else ""
            # Newer exports give the number of gathered positions too; the indices tell it as well.
            data, *index = node.input[: 3 if suffix else 2]
            made, derived = self._derive(node, f"GatherIndex{suffix}", [data, *index], 2)
            slots = index[:-1]
            inputs = [data, *slots, *derived]
            return [*made, self._apply(node, f"GatherApply{suffix}", inputs)]
        return [node]

    def _derive(
        self, node: Any, kind: str, inputs: List[str], num_outputs: int
    ) -> Tuple[List[Any], List[str]]:
        """What is derived from indices; made by no node where another layer has it already."""
        shape = self._shapes.get(inputs[0])
        # Updates are as high as the cache and as long as the index: they need no place in the key.
        index = inputs[1:-1] if kind.startswith("Scatter") else inputs[1:]
        key = (kind, *index, shape)
        if shape is not None and key in self._shared:
            return [], self._shared[key]
        outputs = [f"{node.output[0]}/index_{i}" for i in range(num_outputs)]
        self._shared[key] = outputs
        return [helper.make_node(kind, inputs, outputs, domain=LOCAL)], outputs

    def _apply(self, node: Any, kind: str, inputs: List[str]) -> Any:
        return helper.make_node(kind, inputs, list(node.output), name=node.name, domain=LOCAL)
