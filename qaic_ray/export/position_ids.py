"""The `position-ids` contract inside the graph: inputs, cache update, mask and the row of logits.

Every token has a position of its own, -1 for padding, and is written to that place of the cache.
"""

from __future__ import annotations

from onnx import TensorProto

from qaic_ray import contract
from qaic_ray.export.architecture import Architecture
from qaic_ray.export.builder import GraphBuilder, Shape, Value
from qaic_ray.export.functions import AISW_DOMAIN, CLOUD_DOMAIN, SKIP, has_ctx_len_input
from qaic_ray.options import ExportOptions

INT32 = TensorProto.INT32
INT64 = TensorProto.INT64


class PositionIdsContract:
    """The inputs and the KV cache of one graph; construction declares the inputs in order."""

    def __init__(self, g: GraphBuilder, architecture: Architecture, options: ExportOptions) -> None:
        self._g = g
        self._options = options
        rows = "full_batch_size" if options.continuous_batching else "batch_size"
        shape = (rows, architecture.num_kv_heads, "ctx_len", architecture.head_dim)
        self.input_ids = g.input(contract.INPUT_IDS, INT64, ("batch_size", "seq_len"))
        self.position_ids = g.input(contract.POSITION_IDS, INT64, ("batch_size", "seq_len"))
        self._past = {
            name: g.input(name, g.dtype, shape)
            for name in contract.past_names(architecture.num_layers)
        }
        self._computed: Value | None = None
        if options.comp_ctx_lengths:
            name = contract.COMP_CTX_LENGTHS
            self._computed = g.input(name, INT64, (name,))
        self._slots: tuple[Value, ...] = ()
        if options.continuous_batching:
            self._slots = (g.input(contract.BATCH_INDEX, INT64, ("batch_size", 1)),)
        self._kept: Value | None = None
        if options.logits == contract.NUM_LOGITS_TO_KEEP:
            name = contract.NUM_LOGITS_TO_KEEP
            self._kept = g.input(name, INT64, (name, 1))
        self._prepare()

    def _prepare(self) -> None:
        """What all layers share: where to write, what to read, what to mask."""
        g, scope = self._g, "/model"
        self._write_at = self.position_ids
        if self._slots:
            padding = g.elementwise("Less", scope, self.position_ids, g.constant(0))
            self._write_at = g.elementwise(
                "Where", scope, padding, g.constant(SKIP), self.position_ids
            )
        # Only as many positions of the cache as the input is long are read and masked.
        self._context = "ctx_len" if self._computed is None else contract.COMP_CTX_LENGTHS
        measured, axis = self._past[contract.past_key(0)], 2
        if self._computed is not None:
            measured, axis = self._computed, 0
        self._ctx_len = g.dimension(scope, measured, axis)
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
        """Write a layer's new keys and values, and read back what its queries may see."""
        g, scope = self._g, f"/model/layers.{layer}/self_attn"
        keys = self._cycle(scope, contract.past_key(layer), key)
        values = self._cycle(scope, contract.past_value(layer), value)
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
        shape: Shape = ("batch_size", past.shape[1], self._context, past.shape[3])
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
        narrow = g.cast("", self.position_ids, INT32)
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
