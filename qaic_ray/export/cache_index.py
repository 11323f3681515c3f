"""The `cache-index` contract inside the graph: inputs, cache update, mask and the row of logits.

Rows are padded on the left, so all of them write the same cache slots, from `cache_index` on; the
attention mask says which slots of a row are tokens, and stays on the card. Only plain operators in
the forms of the published recipe, because the compilers of its time know no others.
"""

from __future__ import annotations

from onnx import TensorProto

from qaic_ray import contract
from qaic_ray.export.architecture import Architecture
from qaic_ray.export.builder import GraphBuilder, Value
from qaic_ray.options import ExportOptions

INT64 = TensorProto.INT64
BOOL = TensorProto.BOOL

MASKED = -32000.0
"""Added to a score once for padding and once for a later key: float16 holds the sum of both, and a
padded query, all of whose keys are masked, still has a softmax."""


class CacheIndexContract:
    """The inputs and the KV cache of one graph; construction declares the inputs in order."""

    def __init__(self, g: GraphBuilder, architecture: Architecture, options: ExportOptions) -> None:
        self._g = g
        self._options = options
        self._num_kv_heads = architecture.num_kv_heads
        shape = ("batch_size", architecture.num_kv_heads, "ctx_len", architecture.head_dim)
        self.input_ids = g.input(contract.INPUT_IDS, INT64, ("batch_size", "seq_len"))
        self._mask = g.input(contract.ATTENTION_MASK, BOOL, ("batch_size", "ctx_len"))
        self.position_ids = g.input(contract.POSITION_IDS, INT64, ("batch_size", "seq_len"))
        self._past = {
            name: g.input(name, g.dtype, shape)
            for name in contract.past_names(architecture.num_layers)
        }
        self._cache_index = g.input(contract.CACHE_INDEX, INT64, (1,))
        self._prepare()

    def _prepare(self) -> None:
        """What all layers share: where to write, what to mask."""
        g, scope = self._g, "/model"
        self._batch_size = g.dimension(scope, self.input_ids, 0)
        self._seq_len = g.dimension(scope, self.input_ids, 1)
        span = g.range(scope, self._seq_len, "seq_len")
        slots = g.elementwise("Add", scope, span, self._cache_index)
        rows = g.range(scope, self._batch_size, "batch_size")
        rows = g.reshape(scope, rows, [-1, 1, 1], ("batch_size", 1, 1))
        self._write_at = self._cache_indices(rows, slots)
        self._bias = self._mask_bias(self._marked(rows), slots)

    def _cache_indices(self, rows: Value, slots: Value) -> Value:
        """[batch, heads, seq, 3]: an index for every head_dim of the update, as compilers want."""
        g, scope, heads = self._g, "/model", self._num_kv_heads
        shape = ("batch_size", heads, "seq_len")
        pattern = g.shape_of(scope, self._batch_size, heads, self._seq_len)
        numbers = g.constant([[head] for head in range(heads)])
        expanded = [g.expand(scope, part, pattern, shape) for part in (rows, numbers, slots)]
        return g.concat(scope, *(g.unsqueeze(scope, part, 3) for part in expanded))

    def _marked(self, rows: Value) -> Value:
        """The mask with the last token's slot set; in decode only the graph sets it."""
        g, scope = self._g, "/model"
        after = g.elementwise("Add", scope, self._cache_index, self._seq_len)
        last = g.elementwise("Sub", scope, after, g.constant(1))
        shape = ("batch_size", 1)
        pattern = g.shape_of(scope, self._batch_size, 1)
        slot = g.unsqueeze(scope, g.expand(scope, last, pattern, shape), 2)
        true = g.expand(scope, g.constant(True, BOOL), pattern, shape)
        return g.op(
            "ScatterND",
            scope,
            [self._mask, g.concat(scope, rows, slot), true],
            self._mask.shape,
            output=contract.retained(contract.ATTENTION_MASK),
        )

    def _mask_bias(self, mask: Value, slots: Value) -> Value:
        """[batch, 1, seq, ctx]: what is added to the scores."""
        g, scope = self._g, "/model"
        masked = g.constant(MASKED, g.dtype)
        ctx_len = g.dimension(scope, self._past[contract.past_key(0)], 2)
        keys = g.reshape(scope, g.range(scope, ctx_len, "ctx_len"), [1, -1], (1, "ctx_len"))
        queries = g.reshape(scope, slots, [-1, 1], ("seq_len", 1))
        later = g.elementwise("Greater", scope, keys, queries)
        zero = g.constant(0, g.dtype)
        causal = g.elementwise("Where", scope, later, masked, zero)
        causal = g.unsqueeze(scope, causal, 0, 1)
        tokens = g.cast(scope, g.unsqueeze(scope, mask, 1, 2), g.dtype)
        padding = g.elementwise("Sub", scope, g.constant(1, g.dtype), tokens)
        padding = g.elementwise("Mul", scope, padding, masked)
        return g.elementwise("Add", scope, padding, causal)

    def norm(self, scope: str, hidden: Value, weight: Value, epsilon: float) -> Value:
        """RMS norm over the last axis in float32; scaled before squaring, for float16's range."""
        g, width = self._g, int(hidden.shape[-1] or 0)
        if len(hidden.shape) == 4:  # the recipe's norms have three dimensions
            rows = g.reshape(scope, hidden, [0, -1, width], ("batch_size", None, width))
            normed = self.norm(scope, rows, weight, epsilon)
            return g.reshape(scope, normed, [0, -1, int(hidden.shape[2] or 0), width], hidden.shape)
        shape, float32 = (*hidden.shape[:-1], 1), TensorProto.FLOAT
        wide = g.cast(scope, hidden, float32)
        scaled = g.elementwise("Mul", scope, wide, g.constant(width**-0.5, float32))
        squares = g.elementwise("Pow", scope, scaled, g.constant(2, float32))
        mean = g.op("ReduceSum", scope, [squares, g.constant([-1])], shape, keepdims=1)
        shifted = g.elementwise("Add", scope, mean, g.constant(epsilon, float32))
        root = g.elementwise("Sqrt", scope, shifted)
        inverse = g.elementwise("Div", scope, g.constant(1, float32), root)
        unit = g.cast(scope, g.elementwise("Mul", scope, wide, inverse), g.dtype)
        return g.elementwise("Mul", scope, weight, unit)

    def update(self, layer: int, key: Value, value: Value) -> tuple[Value, Value]:
        """Write a layer's new keys and values, and give its whole cache."""
        scope = f"/model/layers.{layer}/self_attn"
        keys = self._write(scope, contract.past_key(layer), key)
        return keys, self._write(scope, contract.past_value(layer), value)

    def _write(self, scope: str, name: str, update: Value) -> Value:
        past = self._past[name]
        return self._g.op(
            "ScatterND",
            scope,
            [past, self._write_at, update],
            past.shape,
            output=contract.retained(name),
        )

    def mask(self, scope: str, scores: Value) -> Value:
        """Scores far below all others where a key is padding or later than its query."""
        return self._g.elementwise("Add", scope, scores, self._bias)

    def chosen(self, hidden: Value) -> Value:
        """[batch, hidden] of the last token, which padding on the left puts last in every row."""
        if self._options.logits == "all":
            return hidden
        return self._g.gather("", hidden, self._g.constant(-1), axis=1)
