"""The model-local ONNX functions that the card's compiler replaces by kernels of its own.

Names and signatures are the vendor's; the bodies say in plain operators what the kernels do with
indices inside the cache. What they do with an index outside it (nothing) is said by
`use_plain_functions`, for runtimes that have no such kernels.
"""

from __future__ import annotations

from typing import Any

import onnx

CLOUD_DOMAIN = "com.qualcomm.cloud"
AISW_DOMAIN = "com.qti.aisw.onnx"
PLAIN_DOMAIN = "qaic_ray.plain"

_CACHE_FUNCTIONS = {"CtxScatter", "CtxScatterCB", "CtxGather", "CtxGatherCB"}

SKIP = 2**31 - 1
"""The cache index that a kernel neither reads nor writes (INT32_MAX)."""

RMS_NORM = """
CustomRMSNorm <epsilon> (hidden_states, weight) => (normed)
{{
    hidden = Cast <to = 1> (hidden_states)
    scale = Cast <to = 1> (weight)
    two = Constant <value_float = 2.0> ()
    square = Pow (hidden, two)
    mean = ReduceMean <axes = [-1], keepdims = 1> (square)
    eps = Constant <value_float : float = @epsilon> ()
    shifted = Add (mean, eps)
    root = Sqrt (shifted)
    inverse = Reciprocal (root)
    unit = Mul (hidden, inverse)
    scaled = Mul (scale, unit)
    normed = Cast <to = {dtype}> (scaled)
}}
"""

# Indices of every element: of its row, of its head, of its position.
_ROWS = """
    row_axes = Constant <value_ints = [2, 3]> ()
    rows_4d = Unsqueeze (batch_index, row_axes)
    row_index = Expand (rows_4d, shape)"""
_HEADS = """
    heads = Range (i0, num_heads, i1)
    head_axes = Constant <value_ints = [0, 2, 3]> ()
    heads_4d = Unsqueeze (heads, head_axes)
    head_index = Expand (heads_4d, shape)"""
_SCATTERED = """
    position_axes = Constant <value_ints = [1, 3]> ()
    positions_4d = Unsqueeze (position_ids, position_axes)
    position_index = Expand (positions_4d, shape)
    indices = Concat <axis = 3> (row_index, head_index, position_index)
    updated = ScatterND (data, indices, updates)
}"""
_GATHERED = """
    expanded = Expand (ctx_indices, shape)
    last_axis = Constant <value_ints = [-1]> ()
    indices = Unsqueeze (expanded, last_axis)
    gathered = GatherND <batch_dims = 2> (data, indices)
}"""

# Row b, head h, token s: `updates` goes to slot position_ids[b, s].
CTX_SCATTER = f"""
CtxScatter (data, position_ids, updates) => (updated)
{{
    i0 = Constant <value_int = 0> ()
    i1 = Constant <value_int = 1> ()
    v1 = Constant <value_ints = [1]> ()
    batch_and_heads = Constant <value_ints = [0, 1]> ()
    data_shape = Shape (data)
    batch_size = Gather (data_shape, i0)
    num_heads = Gather (data_shape, i1)
    rows_and_heads = Gather (data_shape, batch_and_heads)
    ids_shape = Shape (position_ids)
    seq_len = Gather (ids_shape, v1)
    shape = Concat <axis = 0> (rows_and_heads, seq_len, v1)
    rows = Range (i0, batch_size, i1)
    row_axes = Constant <value_ints = [1, 2, 3]> ()
    rows_4d = Unsqueeze (rows, row_axes)
    row_index = Expand (rows_4d, shape){_HEADS}{_SCATTERED}
"""

# The same, and row b of the batch is row batch_index[b] of the cache.
CTX_SCATTER_CB = f"""
CtxScatterCB (data, batch_index, position_ids, updates) => (updated)
{{
    i0 = Constant <value_int = 0> ()
    i1 = Constant <value_int = 1> ()
    v0 = Constant <value_ints = [0]> ()
    v1 = Constant <value_ints = [1]> ()
    data_shape = Shape (data)
    num_heads = Gather (data_shape, i1)
    num_heads_1d = Gather (data_shape, v1)
    ids_shape = Shape (position_ids)
    batch_size = Gather (ids_shape, v0)
    seq_len = Gather (ids_shape, v1)
    shape = Concat <axis = 0> (batch_size, num_heads_1d, seq_len, v1){_ROWS}{_HEADS}{_SCATTERED}
"""

# Row b, head h: the slots that ctx_indices[b, 0] names.
CTX_GATHER = f"""
CtxGather (data, ctx_indices, comp_ctx_len) => (gathered)
{{
    batch_and_heads = Constant <value_ints = [0, 1]> ()
    v1 = Constant <value_ints = [1]> ()
    data_shape = Shape (data)
    rows_and_heads = Gather (data_shape, batch_and_heads)
    ctx_len = Reshape (comp_ctx_len, v1)
    shape = Concat <axis = 0> (rows_and_heads, ctx_len){_GATHERED}
"""

# Its form up to opset 13: as many slots as the cache has.
CTX_GATHER_13 = f"""
CtxGather (data, ctx_indices) => (gathered)
{{
    axes = Constant <value_ints = [0, 1, 2]> ()
    data_shape = Shape (data)
    shape = Gather (data_shape, axes){_GATHERED}
"""

# The same, and row b of the batch is row batch_index[b] of the cache.
CTX_GATHER_CB = f"""
CtxGatherCB (data, batch_index, ctx_indices) => (gathered)
{{
    i0 = Constant <value_int = 0> ()
    i1 = Constant <value_int = 1> ()
    v0 = Constant <value_ints = [0]> ()
    v1 = Constant <value_ints = [1]> ()
    v2 = Constant <value_ints = [2]> ()
    data_shape = Shape (data)
    num_heads = Gather (data_shape, i1)
    num_heads_1d = Gather (data_shape, v1)
    slots_shape = Shape (batch_index)
    batch_size = Gather (slots_shape, v0)
    indices_shape = Shape (ctx_indices)
    ctx_len = Gather (indices_shape, v2)
    shape = Concat <axis = 0> (batch_size, num_heads_1d, ctx_len, v1){_ROWS}{_HEADS}
    v3 = Constant <value_ints = [3]> ()
    positions_4d = Unsqueeze (ctx_indices, v3)
    position_index = Expand (positions_4d, shape)
    indices = Concat <axis = 3> (row_index, head_index, position_index)
    gathered = GatherND (data, indices)
}}
"""

# The cache gets one slot more, which takes the writes that a kernel drops and is cut off again.
_PLAIN_SCATTER = """
{name} ({inputs}) => (updated)
{{
    i0 = Constant <value_int = 0> ()
    v0 = Constant <value_ints = [0]> ()
    v1 = Constant <value_ints = [1]> ()
    v2 = Constant <value_ints = [2]> ()
    data_shape = Shape (data)
    ctx_len = Gather (data_shape, v2)
    too_low = Less (position_ids, i0)
    too_high = GreaterOrEqual (position_ids, ctx_len)
    outside = Or (too_low, too_high)
    positions = Where (outside, ctx_len, position_ids)
    spare = Slice (data, v0, v1, v2)
    wide = Concat <axis = 2> (data, spare)
    written = {domain}.{name} ({arguments})
    updated = Slice (written, v0, ctx_len, v2)
}}
"""

# What is gathered for an index outside the cache is masked afterwards, so any row will do.
_PLAIN_GATHER = """
{name} ({inputs}) => (gathered)
{{
    i0 = Constant <value_int = 0> ()
    v2 = Constant <value_ints = [2]> ()
    data_shape = Shape (data)
    ctx_len = Gather (data_shape, v2)
    outside = GreaterOrEqual (ctx_indices, ctx_len)
    inside = Where (outside, i0, ctx_indices)
    gathered = {domain}.{name} ({arguments})
}}
"""


def has_ctx_len_input(opset: int) -> bool:
    """Whether the gather functions have the context's length as an input: from opset 17 on."""
    return opset >= 17


def card_functions(
    *, continuous: bool, opset: int, dtype: int = onnx.TensorProto.FLOAT
) -> list[onnx.FunctionProto]:
    """The functions of an exported graph whose activations have the type `dtype`."""
    told = has_ctx_len_input(opset)
    cache = (CTX_SCATTER, CTX_GATHER if told else CTX_GATHER_13)
    if continuous:
        inputs = "ctx_indices, comp_ctx_len)" if told else "ctx_indices)"
        cache = (CTX_SCATTER_CB, CTX_GATHER_CB.replace("ctx_indices)", inputs, 1))
    norm = _function(RMS_NORM.format(dtype=dtype), AISW_DOMAIN, opset)
    return [norm, *(_function(text, CLOUD_DOMAIN, opset) for text in cache)]


def use_plain_functions(model: Any) -> None:
    """Make a model's functions do what the kernels do with indices outside the cache, in place.

    The model's own function is kept under another domain and called from the new one.
    """
    cache = [f for f in model.functions if f.domain == CLOUD_DOMAIN and f.name in _CACHE_FUNCTIONS]
    if not cache:
        return
    plain = [_plain(function) for function in cache]
    for function in cache:
        function.domain = PLAIN_DOMAIN
    model.functions.extend(plain)
    model.opset_import.append(onnx.helper.make_opsetid(PLAIN_DOMAIN, 1))


def _plain(function: onnx.FunctionProto) -> onnx.FunctionProto:
    scatter = "updates" in function.input
    renamed = (
        {"data": "wide", "position_ids": "positions"} if scatter else {"ctx_indices": "inside"}
    )
    text = (_PLAIN_SCATTER if scatter else _PLAIN_GATHER).format(
        name=function.name,
        domain=PLAIN_DOMAIN,
        inputs=", ".join(function.input),
        arguments=", ".join(renamed.get(name, name) for name in function.input),
    )
    return _function(text, CLOUD_DOMAIN, function.opset_import[0].version, PLAIN_DOMAIN)


def _function(text: str, domain: str, opset: int, *uses: str) -> onnx.FunctionProto:
    imports = ", ".join(f'"{d}" : {v}' for d, v in (("", opset), *((u, 1) for u in uses)))
    header = f'<domain: "{domain}", opset_import: [{imports}]>'
    return onnx.parser.parse_function(header + text)
