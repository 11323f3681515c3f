"""Finds rotary embeddings in a graph, reads their tables off by running them, and checks them.

The form does not matter (a table in the model, frequencies times positions, any order of
operators): the nodes between a projection [B, heads, S, dim] and the rotated one are run on
halves of ones for every position of the context, which yields cosine and sine bit for bit, and
then on random inputs against com.microsoft's RotaryEmbedding.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np
from onnx import helper

from .attention import POSITION_IDS
from .view import GraphView, NotLowered, Part, is_heads_first, part_session, run_part

_TOLERANCE = 1e-5
_PIECE = 1024


class Rotation(NamedTuple):
    """A rotary embedding of `source` [B, heads, S, dim] with tables [ctx_len, dim / 2]."""

    source: str
    cos: Any
    sin: Any


class RotaryFinder:
    """Finds rotations up to `ctx_len` positions; equal parts are run once."""

    def __init__(self, view: GraphView, ctx_len: int) -> None:
        self._view = view
        self._ctx_len = ctx_len
        self._proven: Dict[str, Optional[Tuple[Any, Any]]] = {}

    def find(self, rotated: str) -> Optional[Rotation]:
        """The rotation that makes `rotated`, None where it is none that the kernel computes."""
        try:
            source = self._source(rotated)
            if source is None:
                return None
            part = Part(self._view, (source, POSITION_IDS), (rotated,))
            key = part.key()
            if key not in self._proven:
                self._proven[key] = self._prove(part, source)
        except NotLowered:
            return None
        tables = self._proven[key]
        return None if tables is None else Rotation(source, *tables)

    def _source(self, rotated: str) -> Optional[str]:
        """The one value with heads first that all of `rotated` is made of."""
        view, found = self._view, set()
        waiting, seen = [rotated], {rotated}
        while waiting:
            node = view.node(waiting.pop())
            if node is None:
                continue
            if is_heads_first(node):
                found.add(node.output[0])
                continue
            for name in node.input:
                if name and name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return found.pop() if len(found) == 1 and rotated not in found else None

    def _prove(self, part: Part, source: str) -> Optional[Tuple[Any, Any]]:
        _, heads, _, dim = self._view.shape(source, rank=4)
        if not isinstance(heads, int) or not isinstance(dim, int) or dim % 2:
            return None
        run, rng = part.session(), np.random.default_rng(0)
        names = self._view.shape(POSITION_IDS, rank=2)
        # Some tables are cut to the length of the cache.
        inputs = [self._view.shapes.get(name, ()) for name in self._view.inputs]
        others = {dim: 1 for dims in inputs for dim in dims if isinstance(dim, str)}
        others.update({dims[2]: self._ctx_len for dims in inputs if dims[2:]})
        cos, sin = (np.empty((self._ctx_len, dim // 2), np.float32) for _ in range(2))
        for start in range(0, self._ctx_len, _PIECE):
            ids = np.arange(start, min(start + _PIECE, self._ctx_len))[None]
            sizes = dict(others, **{n: s for n, s in zip(names, ids.shape) if isinstance(n, str)})
            halves = np.zeros((1, heads, ids.size, dim), np.float32)
            halves[..., : dim // 2] = 1
            x = rng.standard_normal(halves.shape).astype(np.float32)
            turned = run({source: halves, POSITION_IDS: ids}, sizes)[0]
            if turned.shape != halves.shape:
                return None
            cos[ids[0]], sin[ids[0]] = np.split(turned[0, 0], 2, axis=1)
            expected = run({source: x, POSITION_IDS: ids}, sizes)[0]
            made = self._kernel(x, ids, cos, sin)
            if not np.allclose(made, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                return None
        return cos, sin

    def _kernel(self, x: Any, ids: Any, cos: Any, sin: Any) -> Any:
        feeds = {"x": x, POSITION_IDS: ids, "cos": cos, "sin": sin}
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ]
        outputs = [helper.make_empty_tensor_value_info("y")]
        node = kernel_node("x", ("cos", "sin"), "y", 0)
        graph = helper.make_graph([node], "rotary", infos, outputs)
        return run_part(part_session(self._view.model, graph), feeds)[0]


def kernel_node(source: str, tables: Tuple[str, str], output: str, num_heads: int) -> Any:
    """RotaryEmbedding over [B, S, heads * dim] (or [B, heads, S, dim] with `num_heads` 0)."""
    return helper.make_node(
        "RotaryEmbedding",
        [source, POSITION_IDS, *tables],
        [output],
        name=output,
        domain="com.microsoft",
        num_heads=num_heads,
    )
