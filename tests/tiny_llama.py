"""A two-layer Llama in QEfficient's interface as ONNX text, and the same model in plain numpy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

INT32_MAX = 2147483647

_HEAD = """
<ir_version: 8, opset_import: ["": 17, "com.qualcomm.cloud": 1, "com.qti.aisw.onnx": 1]>
llama ({inputs}) => ({outputs})
{{
  zero = Constant <value = int64 {{0}}> ()
  one = Constant <value = int64 {{1}}> ()
  skip = Constant <value = int64 {{2147483647}}> ()
  i0 = Constant <value = int64[1] {{0}}> ()
  i1 = Constant <value = int64[1] {{1}}> ()
  i2 = Constant <value = int64[1] {{2}}> ()
  i3 = Constant <value = int64[1] {{3}}> ()
  axis2 = Constant <value = int64[1] {{2}}> ()
  heads_4d = Constant <value = int64[4] {{0, 0, {heads}, {dim}}}> ()
  kv_4d = Constant <value = int64[4] {{0, 0, {kv}, {dim}}}> ()
  flat = Constant <value = int64[3] {{0, 0, {hidden}}}> ()
  half = Constant <value = int64[1] {{{half}}}> ()
  full = Constant <value = int64[1] {{{dim}}}> ()
  last = Constant <value = int64[1] {{-1}}> ()
  scale = Constant <value = float {{{scale}}}> ()
  nought = Constant <value = float {{0}}> ()
  padding = Less (position_ids, zero)
  {scatter_pos}
  {ctx_1d}
  ctx = Squeeze (ctx_1d)
  kv_range = Range (zero, ctx, one)
  kv_3d = Unsqueeze (kv_range, i0)
  kv_index = Unsqueeze (kv_3d, i0)
  limit_2d = ReduceMax <axes = [1], keepdims = 1> (position_ids)
  limit = Unsqueeze (limit_2d, last)
  invalid = Greater (kv_index, limit)
  ctx_indices = Where (invalid, skip, kv_index)
  invalid_4d = Unsqueeze (invalid, last)
  invalid_v = Unsqueeze (invalid, i3)
  row_positions = Unsqueeze (position_ids, last)
  masked_3d = Greater (kv_index, row_positions)
  masked = Unsqueeze (masked_3d, i1)
  safe_positions = Max (position_ids, zero)
  cos_3d = Gather (cos_table, safe_positions)
  sin_3d = Gather (sin_table, safe_positions)
  cos = Unsqueeze (cos_3d, i1)
  sin = Unsqueeze (sin_3d, i1)
  hidden_0 = Gather (embed, input_ids)
"""

_LAYER = """
  normed_{i} = com.qti.aisw.onnx.CustomRMSNorm <epsilon = 0.00001> (hidden_{i}, norm1_{i})
  q_{i} = MatMul (normed_{i}, wq_{i})
  k_{i} = MatMul (normed_{i}, wk_{i})
  v_{i} = MatMul (normed_{i}, wv_{i})
  q4_{i} = Reshape (q_{i}, heads_4d)
  k4_{i} = Reshape (k_{i}, kv_4d)
  v4_{i} = Reshape (v_{i}, kv_4d)
  qt_{i} = Transpose <perm = [0, 2, 1, 3]> (q4_{i})
  kt_{i} = Transpose <perm = [0, 2, 1, 3]> (k4_{i})
  vt_{i} = Transpose <perm = [0, 2, 1, 3]> (v4_{i})
  qcos_{i} = Mul (qt_{i}, cos)
  qa_{i} = Slice (qt_{i}, i0, half, i3)
  qb_{i} = Slice (qt_{i}, half, full, i3)
  qn_{i} = Neg (qb_{i})
  qr_{i} = Concat <axis = -1> (qn_{i}, qa_{i})
  qsin_{i} = Mul (qr_{i}, sin)
  qrope_{i} = Add (qcos_{i}, qsin_{i})
  kcos_{i} = Mul (kt_{i}, cos)
  ka_{i} = Slice (kt_{i}, i0, half, i3)
  kb_{i} = Slice (kt_{i}, half, full, i3)
  kn_{i} = Neg (kb_{i})
  kr_{i} = Concat <axis = -1> (kn_{i}, ka_{i})
  ksin_{i} = Mul (kr_{i}, sin)
  krope_{i} = Add (kcos_{i}, ksin_{i})
  past_key_{i}_RetainedState = {scatter} (past_key_{i}, {slots}scatter_pos, krope_{i})
  past_value_{i}_RetainedState = {scatter} (past_value_{i}, {slots}scatter_pos, vt_{i})
  kg_{i} = {gather} (past_key_{i}_RetainedState, {slots}ctx_indices, ctx)
  vg_{i} = {gather} (past_value_{i}_RetainedState, {slots}ctx_indices, ctx)
  vz_{i} = Where (invalid_v, nought, vg_{i})
  krep5_{i} = Unsqueeze (kg_{i}, i2)
  vrep5_{i} = Unsqueeze (vz_{i}, i2)
  dims_{i} = Shape (kg_{i})
  d0_{i} = Slice (dims_{i}, i0, i2)
  d1_{i} = Slice (dims_{i}, i2, four)
  groups_{i} = Concat <axis = 0> (d0_{i}, num_groups, d1_{i})
  kexp_{i} = Expand (krep5_{i}, groups_{i})
  vexp_{i} = Expand (vrep5_{i}, groups_{i})
  merged_{i} = Concat <axis = 0> (i0_copy, all_heads, d1_{i})
  kall_{i} = Reshape (kexp_{i}, merged_{i})
  vall_{i} = Reshape (vexp_{i}, merged_{i})
  ktr_{i} = Transpose <perm = [0, 1, 3, 2]> (kall_{i})
  raw_{i} = MatMul (qrope_{i}, ktr_{i})
  scaled_{i} = Mul (raw_{i}, scale)
  cut_{i} = Where (masked, minus, scaled_{i})
  probs_{i} = Softmax <axis = -1> (cut_{i})
  mix_{i} = MatMul (probs_{i}, vall_{i})
  mixt_{i} = Transpose <perm = [0, 2, 1, 3]> (mix_{i})
  mixf_{i} = Reshape (mixt_{i}, flat)
  attn_{i} = MatMul (mixf_{i}, wo_{i})
  after_{i} = Add (hidden_{i}, attn_{i})
  normed2_{i} = com.qti.aisw.onnx.CustomRMSNorm <epsilon = 0.00001> (after_{i}, norm2_{i})
  gate_{i} = MatMul (normed2_{i}, wgate_{i})
  up_{i} = MatMul (normed2_{i}, wup_{i})
  sig_{i} = Sigmoid (gate_{i})
  silu_{i} = Mul (gate_{i}, sig_{i})
  act_{i} = Mul (silu_{i}, up_{i})
  down_{i} = MatMul (act_{i}, wdown_{i})
  hidden_{j} = Add (after_{i}, down_{i})
"""

_TAIL = """
  final = com.qti.aisw.onnx.CustomRMSNorm <epsilon = 0.00001> (hidden_{n}, norm)
  positions_32 = Cast <to = 6> (position_ids)
  last_token = ArgMax <axis = 1, keepdims = 1> (positions_32)
  last_3d = Unsqueeze (last_token, last)
  picked_shape = Concat <axis = 0> (minus1_2, width)
  batch_dims = Shape (input_ids)
  batch_1d = Slice (batch_dims, i0, i1)
  row_shape = Concat <axis = 0> (batch_1d, i1, width)
  picked_index = Expand (last_3d, row_shape)
  picked = GatherElements <axis = 1> (final, picked_index)
  logits = MatMul (picked, lm_head)
}}
"""


@dataclass
class TinyLlama:
    """Sizes and random weights of a small Llama; `continuous` adds slots and `batch_index`.

    `edits` replace text of each layer, to make graphs that differ in one thing.
    """

    continuous: bool = True
    num_layers: int = 2
    hidden: int = 32
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn: int = 48
    vocab: int = 61
    max_positions: int = 64
    seed: int = 0
    edits: tuple[tuple[str, str], ...] = ()
    comp_ctx_lengths: bool = False
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        kv = self.num_kv_heads * self.head_dim
        sizes = {"embed": (self.vocab, self.hidden), "lm_head": (self.hidden, self.vocab)}
        for i in range(self.num_layers):
            sizes[f"wq_{i}"] = (self.hidden, self.hidden)
            sizes[f"wk_{i}"] = sizes[f"wv_{i}"] = (self.hidden, kv)
            sizes[f"wo_{i}"] = (self.hidden, self.hidden)
            sizes[f"wgate_{i}"] = sizes[f"wup_{i}"] = (self.hidden, self.ffn)
            sizes[f"wdown_{i}"] = (self.ffn, self.hidden)
        for name, shape in sizes.items():
            std = 1.0 if name == "embed" else shape[0] ** -0.5
            self.weights[name] = (rng.standard_normal(shape) * std).astype(np.float32)
        for i in range(self.num_layers):
            for name in (f"norm1_{i}", f"norm2_{i}"):
                self.weights[name] = 1 + 0.1 * rng.standard_normal(self.hidden, np.float32)
        self.weights["norm"] = 1 + 0.1 * rng.standard_normal(self.hidden, np.float32)
        angle = np.arange(self.max_positions)[:, None] * 10000.0 ** (
            -np.arange(self.head_dim // 2) / (self.head_dim // 2)
        )
        angle = np.concatenate([angle, angle], axis=1)
        self.weights["cos_table"] = np.cos(angle).astype(np.float32)
        self.weights["sin_table"] = np.sin(angle).astype(np.float32)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def past_names(self) -> list[str]:
        return [f"past_{k}.{i}" for i in range(self.num_layers) for k in ("key", "value")]

    def onnx(self) -> Any:
        """The model in QEfficient's interface (domains, names, dims, INT32_MAX as skip)."""
        rows = "full_batch_size" if self.continuous else "batch_size"
        shape = f"float[{rows}, {self.num_kv_heads}, ctx_len, {self.head_dim}]"
        past = [f"{shape} {name.replace('.', '_')}" for name in self.past_names()]
        inputs = ["int64[batch_size, seq_len] input_ids", "int64[batch_size, seq_len] position_ids"]
        inputs += past
        if self.continuous:
            inputs.append("int64[batch_size, 1] batch_index")
        ctx_1d = "past_dims = Shape (past_key_0)\n  ctx_1d = Slice (past_dims, i2, i3)"
        if self.comp_ctx_lengths:
            inputs.append("int64[comp_ctx_lengths] comp_ctx_lengths")
            ctx_1d = "ctx_1d = Shape (comp_ctx_lengths)"
        outputs = [f"float[batch_size, 1, {self.vocab}] logits"]
        outputs += [p + "_RetainedState" for p in past]
        suffix, slots = ("CB", "batch_index, ") if self.continuous else ("", "")
        scatter_pos = "scatter_pos = Identity (position_ids)"
        if self.continuous:
            scatter_pos = "scatter_pos = Where (padding, skip, position_ids)"
        text = _HEAD.format(
            inputs=", ".join(inputs), outputs=", ".join(outputs), heads=self.num_heads,
            kv=self.num_kv_heads, dim=self.head_dim, half=self.head_dim // 2, hidden=self.hidden,
            scale=self.head_dim**-0.5, scatter_pos=scatter_pos, ctx_1d=ctx_1d,
        )  # fmt: skip
        layer = _LAYER
        for old, new in self.edits:
            assert old in layer
            layer = layer.replace(old, new)
        for i in range(self.num_layers):
            text += layer.format(
                i=i, j=i + 1, slots=slots, scatter=f"com.qualcomm.cloud.CtxScatter{suffix}",
                gather=f"com.qualcomm.cloud.CtxGather{suffix}",
            )  # fmt: skip
        text += _TAIL.format(n=self.num_layers)
        model = onnx.parser.parse_model(text)
        constants = {
            "four": [4], "num_groups": [self.num_heads // self.num_kv_heads],
            "all_heads": [self.num_heads], "i0_copy": [0], "width": [self.hidden],
            "minus1_2": [-1, 1],
        }  # fmt: skip
        for name, value in constants.items():
            array = np.array(value, np.int64)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        model.graph.initializer.append(numpy_helper.from_array(np.float32(-np.inf), "minus"))
        for name, array in self.weights.items():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        _put_dots_into_names(model.graph)
        onnx.checker.check_model(model)
        return model


def _put_dots_into_names(graph: Any) -> None:
    # ONNX text has no dots in names.
    def dotted(name: str) -> str:
        return re.sub(r"^past_(key|value)_", r"past_\1.", name)

    for value in [*graph.input, *graph.output]:
        value.name = dotted(value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [dotted(name) for name in names]


class NumpyLlama:
    """The same model, one token at a time, in float64: the truth that programs are held to.

    `round_kv` rounds keys and values as they are written.
    """

    def __init__(self, sizes: TinyLlama, weights: dict[str, np.ndarray], round_kv: Any = None):
        self.sizes = sizes
        self.weights = {k: v.astype(np.float64) for k, v in weights.items()}
        self.round_kv = round_kv or (lambda x: x)
        self.cache: dict[tuple[int, int], dict[int, tuple[Any, Any]]] = {}

    def forward(self, slot: int, token: int, position: int) -> np.ndarray:
        """Logits after `token` at `position` of `slot`; what is in the cache up to there counts."""
        s, w = self.sizes, self.weights
        x = w["embed"][token]
        for i in range(s.num_layers):
            h = self._norm(x, w[f"norm1_{i}"])
            q = self._rope((h @ w[f"wq_{i}"]).reshape(s.num_heads, -1), position)
            k = self._rope((h @ w[f"wk_{i}"]).reshape(s.num_kv_heads, -1), position)
            v = (h @ w[f"wv_{i}"]).reshape(s.num_kv_heads, -1)
            cache = self.cache.setdefault((slot, i), {})
            cache[position] = (self.round_kv(k), self.round_kv(v))
            nothing = (np.zeros_like(k), np.zeros_like(v))
            pairs = [cache.get(p, nothing) for p in range(position + 1)]
            group = s.num_heads // s.num_kv_heads
            keys = np.stack([p[0] for p in pairs]).repeat(group, axis=1)
            values = np.stack([p[1] for p in pairs]).repeat(group, axis=1)
            scores = np.einsum("hd,thd->ht", q, keys) / np.sqrt(s.head_dim)
            probs = np.exp(scores - scores.max(1, keepdims=True))
            probs /= probs.sum(1, keepdims=True)
            x = x + np.einsum("ht,thd->hd", probs, values).reshape(-1) @ w[f"wo_{i}"]
            h = self._norm(x, w[f"norm2_{i}"])
            gate = h @ w[f"wgate_{i}"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"wup_{i}"])) @ w[f"wdown_{i}"]
        return self._norm(x, w["norm"]) @ w["lm_head"]

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def _rope(self, x: np.ndarray, position: int) -> np.ndarray:
        half = x.shape[1] // 2
        turned = np.concatenate([-x[:, half:], x[:, :half]], axis=1)
        return (
            x * self.weights["cos_table"][position] + turned * self.weights["sin_table"][position]
        )
