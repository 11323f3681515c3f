"""The graph of a decoder before its weights: authored as ONNX nodes, and simplified by onnxsim.

Operators, their order and their names are those of the published Llama exports; every MatMul with
a weight has it as a constant [K, N] right operand, which is what the compiler can hold in MXFP6.
Weights that stay in the checkpoint have its shape and type, and a Cast and a Transpose behind them.
onnxsim runs in a process of its own: it loads torch, and weights can be written meanwhile.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from qaic_ray import contract
from qaic_ray.contract import IoContract
from qaic_ray.errors import ExportError, UsageError
from qaic_ray.export.architecture import Architecture
from qaic_ray.export.builder import GraphBuilder, Value, WeightSpec
from qaic_ray.export.functions import card_functions
from qaic_ray.export.io_contracts import CacheIndexContract, PositionIdsContract
from qaic_ray.guard import guarded
from qaic_ray.options import ExportOptions
from qaic_ray.timeouts import DEFAULT_TIMEOUTS

COSINE_TABLE = "model.cos_cached"
SINE_TABLE = "model.sin_cached"

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
_STORED_TYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
}
_INT64_MAX = 2**63 - 1

Simplifier = Callable[
    [onnx.ModelProto, Path], AbstractContextManager[Callable[[], onnx.ModelProto]]
]
"""Starts on a model, with an empty folder for its files; the function that it gives waits for the
result. `simplifying` is the real one."""

# onnxsim loads torch where it is installed, which takes longer than all else; only GPUs need it.
_PROGRAM = """
import sys
sys.modules["torch"] = None
import onnx, onnxsim
model, _ = onnxsim.simplify(onnx.load(sys.argv[1]))
onnx.save(model, sys.argv[2])
"""


@dataclass(frozen=True)
class AuthoredGraph:
    """A model (`onnx.ModelProto`) whose weights are still graph inputs, and those weights."""

    model: Any
    weights: tuple[WeightSpec, ...]


def author(
    architecture: Architecture, options: ExportOptions, stored: Mapping[str, str] | None = None
) -> AuthoredGraph:
    """Write the graph of a decoder.

    Args:
        architecture: of the decoder.
        options: of the export.
        stored: safetensors' type of each tensor by its name, where weights stay in the checkpoint.

    Raises:
        UsageError: its heads cannot be shared out as the options say.
    """
    num_copies = options.replicate_kv_heads
    if architecture.num_groups % num_copies:
        raise UsageError(
            f"num_replicate_kv_heads must divide the {architecture.num_groups} query heads that "
            f"share one of the model's key and value heads; {num_copies} does not."
        )
    g = GraphBuilder(_TYPES[options.dtype])
    cached = replace(architecture, num_kv_heads=architecture.num_kv_heads * num_copies)
    decoder = _Decoder(g, cached, options, stored)
    decoder.write()
    functions = []
    if options.io is IoContract.POSITION_IDS:
        functions = card_functions(
            continuous=options.continuous_batching, opset=options.graph_opset, dtype=g.dtype
        )
    model = g.finish(
        architecture.kind,
        outputs=output_names(architecture, options),
        opset=options.graph_opset,
        functions=functions,
    )
    return AuthoredGraph(model, tuple(g.weights))


def output_names(architecture: Architecture, options: ExportOptions) -> list[str]:
    """The graph's outputs in the contract's order: the answer, then what stays on the card."""
    answer = contract.NEXT_TOKENS if options.next_tokens else contract.LOGITS
    states = contract.past_names(architecture.num_layers)
    if options.io is IoContract.CACHE_INDEX:
        states.append(contract.ATTENTION_MASK)
    return [answer, *(contract.retained(name) for name in states)]


class _Decoder:
    def __init__(
        self,
        g: GraphBuilder,
        architecture: Architecture,
        options: ExportOptions,
        stored: Mapping[str, str] | None,
    ) -> None:
        self._g = g
        self._a = architecture
        self._stored = stored
        self._options = options
        self._contract = (
            CacheIndexContract(g, architecture, options)
            if options.io is IoContract.CACHE_INDEX
            else PositionIdsContract(g, architecture, options)
        )

    def write(self) -> None:
        g, a = self._g, self._a
        name = "model.embed_tokens.weight"
        embedding = self._place(name, (a.vocab_size, a.hidden_size), name)
        hidden = g.gather("/model/embed_tokens", embedding, self._contract.input_ids)
        hidden = g.cast("/model/embed_tokens", hidden, g.dtype)
        hidden = self._scaled("/model", hidden, a.embedding_multiplier)
        self._rotary = (self._table(COSINE_TABLE), self._table(SINE_TABLE))
        for layer in range(a.num_layers):
            hidden = self._layer(layer, hidden)
        hidden = self._norm("model.norm", hidden, a.hidden_size)
        # What divides the logits can as well divide what they are made of.
        hidden = self._scaled("/model", hidden, 1.0 / a.logits_scaling)
        self._answer(self._contract.chosen(hidden))

    def _layer(self, layer: int, hidden: Value) -> Value:
        g, a = self._g, self._a
        module = f"model.layers.{layer}"
        scope = _scope(module)
        normed = self._norm(f"{module}.input_layernorm", hidden, a.hidden_size)
        attended = self._attention(layer, normed)
        attended = self._scaled(scope, attended, a.residual_multiplier)
        hidden = g.elementwise("Add", scope, hidden, attended)
        normed = self._norm(f"{module}.post_attention_layernorm", hidden, a.hidden_size)
        fed = self._scaled(scope, self._mlp(f"{module}.mlp", normed), a.residual_multiplier)
        return g.elementwise("Add", scope, hidden, fed)

    def _attention(self, layer: int, hidden: Value) -> Value:
        g, a = self._g, self._a
        module = f"model.layers.{layer}.self_attn"
        scope = _scope(module)
        query = self._rotate(scope, self._heads(module, "q", hidden, a.num_heads))
        key = self._rotate(scope, self._heads(module, "k", hidden, a.num_kv_heads))
        value = self._heads(module, "v", hidden, a.num_kv_heads)
        keys, values = self._contract.update(layer, key, value)
        keys, values = self._repeat(scope, keys), self._repeat(scope, values)
        scores = g.matmul(scope, query, g.transpose(scope, keys, [0, 1, 3, 2]))
        scores = self._scaled(scope, scores, a.attention_scale)
        weights = self._softmax(scope, self._contract.mask(scope, scores))
        mixed = g.transpose(scope, g.matmul(scope, weights, values), [0, 2, 1, 3])
        width = a.num_heads * a.head_dim
        joined = g.reshape(scope, mixed, [0, 0, width], ("batch_size", "seq_len", width))
        return self._linear(f"{module}.o_proj", joined, a.hidden_size, bias=a.output_bias)

    def _heads(self, module: str, which: str, hidden: Value, num_heads: int) -> Value:
        """[batch, heads, seq, head_dim] of a query, key or value projection."""
        g, a = self._g, self._a
        scope, copies = _scope(module), 1 if which == "q" else self._options.replicate_kv_heads
        projected = self._linear(
            f"{module}.{which}_proj",
            hidden,
            num_heads * a.head_dim,
            bias=a.qkv_bias,
            copies=copies,
        )
        shape = ("batch_size", "seq_len", num_heads, a.head_dim)
        split = g.reshape(scope, projected, [0, 0, num_heads, a.head_dim], shape)
        if a.qk_norm and which != "v":
            split = self._norm(f"{module}.{which}_norm", split, a.head_dim)
        return g.transpose(scope, split, [0, 2, 1, 3])

    def _rotate(self, scope: str, heads: Value) -> Value:
        g, half = self._g, self._a.head_dim // 2
        cosine, sine = self._rotary
        straight = g.elementwise("Mul", scope, heads, cosine)
        shape = (*heads.shape[:3], half)
        first, second = (
            g.op("Slice", scope, [heads, *(g.constant([n]) for n in (start, stop, 3, 1))], shape)
            for start, stop in ((0, half), (half, _INT64_MAX))
        )
        negated = g.elementwise("Neg", scope, second)
        turned = g.op("Concat", scope, [negated, first], heads.shape, axis=-1)
        return g.elementwise("Add", scope, straight, g.elementwise("Mul", scope, turned, sine))

    def _repeat(self, scope: str, heads: Value) -> Value:
        """Give every query head its own copy of the key or value head that it shares."""
        g, a = self._g, self._a
        if a.num_groups == 1:
            return heads
        batch, kv_heads, ctx_len, dim = heads.shape
        one_more = g.unsqueeze(scope, heads, 2)
        copies = (batch, kv_heads, a.num_groups, ctx_len, dim)
        pattern = g.constant([1, 1, a.num_groups, 1, 1])
        expanded = g.op("Expand", scope, [one_more, pattern], copies)
        shape = (batch, a.num_heads, ctx_len, dim)
        return g.reshape(scope, expanded, [0, a.num_heads, -1, a.head_dim], shape)

    def _softmax(self, scope: str, scores: Value) -> Value:
        """In float32 whatever the type of the graph."""
        g = self._g
        wide = g.cast(scope, scores, TensorProto.FLOAT)
        return g.cast(scope, g.op("Softmax", scope, [wide], wide.shape, axis=-1), g.dtype)

    def _mlp(self, module: str, hidden: Value) -> Value:
        g, a = self._g, self._a
        scope = _scope(module)
        gate = self._linear(f"{module}.gate_proj", hidden, a.intermediate_size, bias=a.mlp_bias)
        up = self._linear(f"{module}.up_proj", hidden, a.intermediate_size, bias=a.mlp_bias)
        sigmoid = g.elementwise("Sigmoid", f"{scope}/act_fn", gate)
        active = g.elementwise("Mul", f"{scope}/act_fn", gate, sigmoid)
        product = g.elementwise("Mul", scope, active, up)
        return self._linear(f"{module}.down_proj", product, a.hidden_size, bias=a.mlp_bias)

    def _answer(self, hidden: Value) -> None:
        """The graph's first output: logits of the chosen tokens, or their most likely ids."""
        g, a = self._g, self._a
        source = "model.embed_tokens.weight" if a.tied_embeddings else "lm_head.weight"
        weight = self._right_operand("lm_head", source, (a.hidden_size, a.vocab_size))
        shape, float32 = (*hidden.shape[:-1], a.vocab_size), TensorProto.FLOAT
        # The result that is the output of the graph has to be made under the output's name.
        name = None if self._options.next_tokens else contract.LOGITS
        narrow = g.dtype != float32
        output = None if narrow else name
        logits = g.op("MatMul", "/lm_head", [hidden, weight], shape, output=output)
        if narrow:
            logits = g.cast("", logits, float32, output=name)
        if self._options.next_tokens:
            self._next_tokens(logits)

    def _next_tokens(self, logits: Value) -> None:
        """Ids of the largest logits; the last dimension, vocab_size wide, becomes 1."""
        g = self._g
        output, int64 = contract.NEXT_TOKENS, TensorProto.INT64
        width = int(logits.shape[-1] or 0)
        if len(logits.shape) == 2:
            shape = ("batch_size", 1)
            g.op("ArgMax", "", [logits], shape, dtype=int64, output=output, axis=1, keepdims=1)
            return
        flat = g.reshape("", logits, [-1, width], (None, width))
        ids = g.op("ArgMax", "", [flat], (None, 1), dtype=int64, axis=1, keepdims=1)
        pattern = g.constant([-1, 1, 1])
        if self._options.logits != "last":
            pattern = g.shape_of("", -1, g.dimension("", logits, 1), 1)
        g.op("Reshape", "", [ids, pattern], (*logits.shape[:-1], 1), output=output)

    def _linear(
        self, module: str, value: Value, width: int, *, bias: bool, copies: int = 1
    ) -> Value:
        """A projection; with `copies` every head of its output is there so many times."""
        g, scope, dim = self._g, _scope(module), self._a.head_dim if copies > 1 else 1
        source = f"{module}.weight"
        rows = int(value.shape[-1] or 0)
        weight = self._right_operand(module, source, (rows, width), copies=copies, copied_rows=dim)
        product = g.matmul(scope, value, weight)
        if not bias:
            return product
        source = f"{module}.bias"
        added = self._weight(source, width, copies=copies, copied_rows=dim)
        return g.elementwise("Add", scope, added, product)

    def _norm(self, module: str, value: Value, width: int) -> Value:
        weight = self._weight(f"{module}.weight", width)
        return self._contract.norm(_scope(module), value, weight, self._a.rms_norm_eps)

    def _weight(self, name: str, *shape: int, **how: int) -> Value:
        """A weight in the type that is computed with."""
        scope = _scope(name.rpartition(".")[0])
        return self._g.cast(scope, self._place(name, shape, name, **how), self._g.dtype)

    def _right_operand(self, module: str, source: str, shape: tuple[int, int], **how: int) -> Value:
        """[K, N], the weight of a MatMul; the checkpoint has [N, K]."""
        name, scope = f"{module}.weight", _scope(module)
        if self._stored is None:
            return self._place(name, shape, source, transpose=True, **how)
        g, rows = self._g, self._place(name, shape[::-1], source)
        return g.transpose(scope, g.cast(scope, rows, g.dtype), [1, 0])

    def _place(self, name: str, shape: tuple[int, ...], source: str, **how: Any) -> Value:
        """A weight as it is stored."""
        # A tensor that is missing is found when the weights are planned.
        kind = None if self._stored is None else self._stored.get(source)
        return self._g.weight(
            name, shape, source=source, dtype=_STORED_TYPES.get(kind or ""), **how
        )

    def _table(self, name: str) -> Value:
        """[batch, 1, seq, head_dim]: the rows of a rotary table for every token."""
        g, a = self._g, self._a
        table = g.weight(name, (a.max_position, a.head_dim), source=None)
        rows = g.gather("/model/rotary_emb", table, self._contract.position_ids)
        return g.unsqueeze("/model/rotary_emb", rows, 1)

    def _scaled(self, scope: str, value: Value, factor: float) -> Value:
        if factor == 1.0:
            return value
        return self._g.elementwise("Mul", scope, value, self._g.constant(factor, self._g.dtype))


def _scope(module: str) -> str:
    """`model.layers.3.self_attn` -> `/model/layers.3/self_attn`."""
    return "/" + re.sub(r"\.(?!\d)", "/", module)


@contextmanager
def simplifying(model: onnx.ModelProto, scratch: Path) -> Iterator[Callable[[], onnx.ModelProto]]:
    """Start onnxsim on a model without weights; all of it is ended with the block.

    Yields:
        A function that waits for the simplified model, whose interface and node names are those
        of `model`. It raises ExportError where onnxsim failed or changed what it must keep.
    """
    source, output = scratch / "authored.onnx", scratch / "simplified.onnx"
    onnx.save(model, source)
    argv = [sys.executable, "-c", _PROGRAM, str(source), str(output)]
    with (
        (scratch / "onnxsim.log").open("w+b") as log,
        # The library starts processes of its own.
        guarded(argv, log, end_s=DEFAULT_TIMEOUTS.guard_s) as process,
    ):

        def result() -> onnx.ModelProto:
            if process.wait() != 0 or not output.is_file():
                log.seek(0)
                last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise ExportError(f"onnxsim failed on the exported graph: {last}")
            simplified = onnx.load(output)
            _check_kept(model, simplified)
            return simplified

        yield result


@contextmanager
def as_authored(model: onnx.ModelProto, _scratch: Path) -> Iterator[Callable[[], onnx.ModelProto]]:
    """In the place of `simplifying`, for graphs whose weights stay in the checkpoint.

    onnxsim finds nothing to change there (a test compares), and takes more time and memory than
    all the rest of such an export.
    """
    yield lambda: model


def _check_kept(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Inputs, outputs and custom functions stay as they were."""
    for what, old, new in (
        ("inputs", list(before.graph.input), list(after.graph.input)),
        ("outputs", list(before.graph.output), list(after.graph.output)),
        ("custom functions", _functions(before), _functions(after)),
    ):
        if old != new:
            raise ExportError(f"onnxsim changed the {what} of the exported graph.")


def _functions(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(function.domain, function.name) for function in model.functions}
