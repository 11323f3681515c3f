"""Finds rotary embeddings in a graph, reads their tables off by running them, and checks them.

The form does not matter (a table in the model, frequencies times positions, any order of
operators): the nodes between a projection [B, heads, S, dim] and the rotated one are run on
halves of ones for every position of the context, which yields cosine and sine bit for bit, and
then on random inputs against com.microsoft's RotaryEmbedding. Knows nothing of attention.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np
from onnx import TensorProto, helper

from .gqa import POSITION_IDS
from .view import GraphView, NotLowered, Part, part_session, run_part

_HEADS_FIRST = [0, 2, 1, 3]
_TOLERANCE = 1e-5


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
            if part.key not in self._proven:
                self._proven[part.key] = self._prove(part, source)
        except NotLowered:
            return None
        tables = self._proven[part.key]
        return None if tables is None else Rotation(source, *tables)

    def _source(self, rotated: str) -> Optional[str]:
        """The one value with heads first that all of `rotated` is made of."""
        view, found = self._view, set()
        waiting, seen = [rotated], {rotated}
        while waiting:
            node = view.node(waiting.pop())
            if node is None:
                continue
            order = [list(a.ints) for a in node.attribute if a.name == "perm"]
            if node.op_type == "Transpose" and order == [_HEADS_FIRST]:
                found.add(node.output[0])
                continue
            for name in node.input:
                if name and name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return found.pop() if len(found) == 1 and rotated not in found else None

    def _prove(self, part: Part, source: str) -> Optional[Tuple[Any, Any]]:
        heads, dim = self._view.shape(source)[1], self._view.shape(source)[3]
        if not isinstance(heads, int) or not isinstance(dim, int) or dim % 2:
            return None
        run, half = part.session(), dim // 2
        ids = np.arange(self._ctx_len)[None]
        names = self._view.shape(POSITION_IDS)
        sizes = {n: s for n, s in zip(names, ids.shape) if isinstance(n, str)}

        def rotate(x: Any) -> Any:
            return run({source: x, POSITION_IDS: ids}, sizes)[0]

        ones = np.zeros((1, heads, self._ctx_len, dim), np.float32)
        ones[..., :half] = 1
        turned = rotate(ones)
        if turned.shape != ones.shape:
            return None
        cos = np.ascontiguousarray(turned[0, 0, :, :half])
        sin = np.ascontiguousarray(turned[0, 0, :, half:])
        x = np.random.default_rng(0).standard_normal(ones.shape).astype(np.float32)
        kernel = _kernel(self._view.model, cos, sin)
        close = np.allclose(kernel(x, ids), rotate(x), rtol=_TOLERANCE, atol=_TOLERANCE)
        return (cos, sin) if close else None


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


def _kernel(model: Any, cos: Any, sin: Any) -> Any:
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, None, None, 2 * cos.shape[1]]),
        helper.make_tensor_value_info(POSITION_IDS, TensorProto.INT64, [1, None]),
        helper.make_tensor_value_info("cos", TensorProto.FLOAT, list(cos.shape)),
        helper.make_tensor_value_info("sin", TensorProto.FLOAT, list(sin.shape)),
    ]
    outputs = [helper.make_empty_tensor_value_info("y")]
    graph = helper.make_graph([kernel_node("x", ("cos", "sin"), "y", 0)], "k", infos, outputs)
    session = part_session(model, graph)
    return lambda x, ids: run_part(session, {"x": x, POSITION_IDS: ids, "cos": cos, "sin": sin})[0]
