"""The two I/O contracts inside the graph: inputs, cache update, mask and the row of logits.

`position-ids`: every token has a position of its own, -1 for padding, and is written to that place
of the cache. `cache-index`: rows are padded on the left, so all of them write the same cache slots,
from `cache_index` on; the attention mask says which slots of a row are tokens, and stays on the
card. Only plain operators there, in the forms of the published recipe, because the compilers of its
time know no others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from onnx import TensorProto

from qaic_ray import contract
from qaic_ray.contract import IoContract
from qaic_ray.export.architecture import Architecture
from qaic_ray.export.builder import GraphBuilder, Value
from qaic_ray.export.functions import AISW_DOMAIN, CLOUD_DOMAIN, SKIP, has_ctx_len_input
from qaic_ray.options import ExportOptions

INT64 = TensorProto.INT64
BOOL = TensorProto.BOOL

MASKED = -32000.0
"""Added to a score once for padding and once for a later key: float16 holds the sum of both, and a
padded query, all of whose keys are masked, still has a softmax."""


class _Contract(ABC):
    """The inputs that both contracts have; construction declares all inputs in order."""

    def __init__(self, g: GraphBuilder, architecture: Architecture, options: ExportOptions) -> None:
        self._g = g
        self._options = options
        self._num_kv_heads = architecture.num_kv_heads
        rows = "full_batch_size" if options.continuous_batching else "batch_size"
        shape = (rows, architecture.num_kv_heads, "ctx_len", architecture.head_dim)
        self.input_ids = g.input(contract.INPUT_IDS, INT64, ("batch_size", "seq_len"))
        if options.io is IoContract.CACHE_INDEX:
            self._tokens = g.input(contract.ATTENTION_MASK, BOOL, ("batch_size", "ctx_len"))
        self.position_ids = g.input(contract.POSITION_IDS, INT64, ("batch_size", "seq_len"))
        self._past = {
            name: g.input(name, g.dtype, shape)
            for name in contract.past_names(architecture.num_layers)
        }

    def update(self, layer: int, key: Value, value: Value) -> tuple[Value, Value]:
        """Write a layer's new keys and values, and give what its queries may see of the cache."""
        scope = f"/model/layers.{layer}/self_attn"
        keys = self._cycle(scope, contract.past_key(layer), key)
        return keys, self._cycle(scope, contract.past_value(layer), value)

    @abstractmethod
    def _cycle(self, scope: str, name: str, update: Value) -> Value:
        """Write keys or values into the cache of this name, and read it."""


class PositionIdsContract(_Contract):
    """Rows of any length, each token at a position of its own."""

    def __init__(self, g: GraphBuilder, architecture: Architecture, options: ExportOptions) -> None:
        super().__init__(g, architecture, options)
        lengths, kept = contract.COMP_CTX_LENGTHS, contract.NUM_LOGITS_TO_KEEP
        computed = g.input(lengths, INT64, (lengths,)) if options.comp_ctx_lengths else None
        self._slots: tuple[Value, ...] = ()
        if options.continuous_batching:
            self._slots = (g.input(contract.BATCH_INDEX, INT64, ("batch_size", 1)),)
        self._kept = g.input(kept, INT64, (kept, 1)) if options.logits == kept else None
        # Only as many positions of the cache as the input is long are read and masked.
        self._context = "ctx_len" if computed is None else lengths
        self._prepare(computed)

    def _prepare(self, computed: Value | None) -> None:
        """What all layers share: where to write, what to read, what to mask."""
        g, scope = self._g, "/model"
        self._write_at = self.position_ids
        if self._slots:
            padding = g.elementwise("Less", scope, self.position_ids, g.constant(0))
            self._write_at = g.elementwise(
                "Where", scope, padding, g.constant(SKIP), self.position_ids
            )
        measured = (self._past[contract.past_key(0)], 2) if computed is None else (computed, 0)
        self._ctx_len = g.dimension(scope, *measured)
        positions = g.range(scope, self._ctx_len, self._context)
        positions = g.unsqueeze(scope, positions, 0, 1)
        own = g.unsqueeze(scope, self.position_ids, 2)
        later = g.elementwise("Greater", scope, positions, own)
        self._masked = g.unsqueeze(scope, later, 1)
        limit = g.op(
            "ReduceMax", scope, [self.position_ids], ("batch_size", 1), axes=[1], keepdims=1
        )
        limit = g.unsqueeze(scope, limit, 1)
        beyond = g.elementwise("Greater", scope, positions, limit)
        self._read_at = g.elementwise("Where", scope, beyond, g.constant(SKIP), positions)
        self._beyond = g.unsqueeze(scope, beyond, 3)

    def norm(self, scope: str, hidden: Value, weight: Value, epsilon: float) -> Value:
        """RMS norm over the last axis: the card has a kernel of its own for it."""
        return self._g.op(
            "CustomRMSNorm",
            scope,
            [hidden, weight],
            hidden.shape,
            domain=AISW_DOMAIN,
            epsilon=epsilon,
        )

    def update(self, layer: int, key: Value, value: Value) -> tuple[Value, Value]:
        """See `_Contract.update`."""
        g, scope = self._g, f"/model/layers.{layer}/self_attn"
        keys, values = super().update(layer, key, value)
        # A slot never written may hold anything, and 0 times infinity is not 0.
        zero = g.constant(0, g.dtype)
        return keys, g.elementwise("Where", scope, self._beyond, zero, values)

    def _cycle(self, scope: str, name: str, update: Value) -> Value:
        g, past, suffix = self._g, self._past[name], "CB" if self._slots else ""
        written = g.op(
            f"CtxScatter{suffix}",
            scope,
            [past, *self._slots, self._write_at, update],
            past.shape,
            output=contract.retained(name),
            domain=CLOUD_DOMAIN,
        )
        shape = ("batch_size", past.shape[1], self._context, past.shape[3])
        length = [self._ctx_len] if has_ctx_len_input(self._options.graph_opset) else []
        return g.op(
            f"CtxGather{suffix}",
            scope,
            [written, *self._slots, self._read_at, *length],
            shape,
            domain=CLOUD_DOMAIN,
        )

    def mask(self, scope: str, scores: Value) -> Value:
        """Scores with minus infinity where a key is later than its query."""
        g = self._g
        nothing = g.constant(float("-inf"), scores.dtype)
        return g.elementwise("Where", scope, self._masked, nothing, scores)

    def chosen(self, hidden: Value) -> Value:
        """[batch, tokens, hidden] of the tokens whose logits are asked for.

        The rows are counted in one flat list, so that one Gather along one axis is enough.
        """
        if self._options.logits == "all":
            return hidden
        g, width = self._g, int(hidden.shape[-1] or 0)
        column = self._last_column()
        if self._kept is not None:
            column = self._columns_up_to(column, self._kept)
        seq_len = g.dimension("", self.position_ids, 1)
        rows = g.range("", g.dimension("", self.position_ids, 0), "batch_size")
        starts = g.unsqueeze("", g.elementwise("Mul", "", rows, seq_len), 1)
        flat = g.reshape("", hidden, [-1, width], (None, width))
        return g.gather("", flat, g.elementwise("Add", "", starts, column))

    def _last_column(self) -> Value:
        """[batch, 1]: of every row the token with the highest position."""
        g = self._g
        # onnxruntime's ArgMax has no INT64 form, so the published graphs take INT32 too.
        narrow = g.cast("", self.position_ids, TensorProto.INT32)
        return g.op("ArgMax", "", [narrow], ("batch_size", 1), dtype=INT64, axis=1, keepdims=1)

    def _columns_up_to(self, last: Value, kept: Value) -> Value:
        """[batch, num_logits_to_keep]: the tokens that end with the last one, or the first ones.

        Only the length of `kept` counts.
        """
        g = self._g
        length = g.dimension("", kept, 0)
        short = g.elementwise("Less", "", last, length)
        after = g.elementwise("Add", "", last, g.constant(1))
        first = g.elementwise("Sub", "", after, length)
        first = g.elementwise("Where", "", short, g.constant(0), first)
        span = g.range("", length, contract.NUM_LOGITS_TO_KEEP)
        return g.elementwise("Add", "", first, g.unsqueeze("", span, 0))


class CacheIndexContract(_Contract):
    """Rows in lockstep, padded on the left."""

    def __init__(self, g: GraphBuilder, architecture: Architecture, options: ExportOptions) -> None:
        super().__init__(g, architecture, options)
        self._cache_index = g.input(contract.CACHE_INDEX, INT64, (1,))
        scope = "/model"
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
            [self._tokens, g.concat(scope, rows, slot), true],
            self._tokens.shape,
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

    def _cycle(self, scope: str, name: str, update: Value) -> Value:
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
