"""Finds where a graph takes the tokens whose logits are wanted, and writes it in one form.

Exporters flatten, gather and measure in many ways. The nodes between all tokens and the taken ones
are run on ragged rows, and have to take the tokens that end with the highest position, or the first
ones of a row that has fewer. In their place comes one lookup in the flat list of all tokens, by an
index [rows, kept] that is made of positions alone.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from onnx import TensorProto, helper

from .attention import INPUT_IDS, NUM_LOGITS_TO_KEEP, POSITION_IDS
from .view import GraphView, NotLowered, Part

_TAKING_OPS = {
    "Gather", "GatherND", "GatherElements", "Reshape", "Flatten", "Slice", "Squeeze", "Unsqueeze",
    "Expand", "Identity", "Cast", "Transpose",
}  # fmt: skip

_CTX_LEN = 16

# Positions of each row, and how many tokens are kept where that is asked: rows of one length, later
# ones, ragged, single tokens.
_CASES: Tuple[Tuple[List[List[int]], int], ...] = (
    ([[0, 1, 2, 3]], 1),
    ([[5, 6, 7, -1, -1]], 2),
    ([[0, 1, -1], [4, 5, 6]], 3),
    ([[3], [0], [9]], 1),
)
_LEFT_CASES = (([[0, 1, 2, 3]], 1), ([[0, 0, 1], [4, 5, 6]], 1), ([[3], [0], [9]], 1))


class Selection(NamedTuple):
    """`taken` is what is taken of `source` [B, S, width]: [B, kept, width], or [B, width]."""

    source: str
    taken: str
    width: int
    is_flat: bool
    keeps_many: bool


def find(view: GraphView, output: str, *, padded_left: bool) -> Optional[Selection]:
    """The selection before the MatMul that an output is made by, None where none is known."""
    node = view.node(output)
    while node is not None and node.op_type != "MatMul":
        node = view.node(node.input[0]) if node.input else None
    if node is None:
        return None
    try:
        return _of(view, node.input[0], padded_left)
    except NotLowered:
        return None


def _of(view: GraphView, taken: str, padded_left: bool) -> Optional[Selection]:
    tokens, source = view.shape(INPUT_IDS), taken
    node = view.node(taken)
    while node is not None and node.op_type in _TAKING_OPS and not node.domain:
        source = node.input[0]
        node = view.node(source)
    shape = view.shape(source)
    if source == taken or len(shape) != 3 or shape[:2] != tokens or not isinstance(shape[2], int):
        return None
    part = Part(view, (source, POSITION_IDS, NUM_LOGITS_TO_KEEP), (taken,))
    keeps_many = NUM_LOGITS_TO_KEEP in part.used
    run, rng, rank = part.session(), np.random.default_rng(0), 0
    inputs = [view.shapes.get(name, ()) for name in view.inputs]
    others = {dim: _CTX_LEN for dims in inputs for dim in dims if isinstance(dim, str)}
    kept_names = view.shapes.get(NUM_LOGITS_TO_KEEP, ())
    for positions, count in _LEFT_CASES if padded_left else _CASES:
        where = np.array(positions, np.int64)
        kept = count if keeps_many else 1
        hidden = rng.standard_normal((*where.shape, shape[2])).astype(np.float32)
        sizes = dict(others, **{n: s for n, s in zip(tokens, where.shape) if isinstance(n, str)})
        sizes.update({n: kept for n in kept_names if isinstance(n, str)})
        feeds = {source: hidden, POSITION_IDS: where}
        feeds[NUM_LOGITS_TO_KEEP] = np.zeros((kept, 1), np.int64)
        made = run(feeds, sizes)[0]
        rank = made.ndim
        first = np.maximum(where.argmax(axis=1) + 1 - kept, 0)
        columns = first[:, None] + np.arange(kept)
        wanted = np.take_along_axis(hidden, columns[..., None], axis=1)
        if rank not in (2, 3) or not np.array_equal(made.reshape(wanted.shape), wanted):
            return None
    return Selection(source, taken, shape[2], rank == 2, keeps_many)


class _Writer:
    def __init__(self, prefix: str) -> None:
        self.nodes: List[Any] = []
        self.constants: Dict[str, Any] = {}
        self._prefix = prefix

    def constant(self, value: Any) -> str:
        name = f"{self._prefix}/constant_{len(self.constants)}"
        self.constants[name] = np.array(value, np.int64)
        return name

    def add(self, kind: str, *inputs: str, **attributes: int) -> str:
        name = f"{self._prefix}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def end(self, kind: str, inputs: List[str], output: str) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], output))


def kernel_nodes(found: Selection) -> Tuple[List[Any], Dict[str, Any]]:
    """The nodes of the one form, and their int64 constants by name."""
    w = _Writer(f"lowered/{found.taken}")
    zero, one, first_axis = w.constant(0), w.constant(1), w.constant([1])
    # onnxruntime's ArgMax has no INT64 form.
    narrow = w.add("Cast", POSITION_IDS, to=TensorProto.INT32)
    column = w.add("ArgMax", narrow, axis=1, keepdims=1)
    if found.keeps_many:
        kept = w.add("Gather", w.add("Shape", NUM_LOGITS_TO_KEEP), zero)
        first = w.add("Sub", w.add("Add", column, one), kept)
        column = w.add("Add", w.add("Max", first, zero), w.add("Range", zero, kept, one))
    dims = w.add("Shape", POSITION_IDS)
    rows, length = w.add("Gather", dims, zero), w.add("Gather", dims, one)
    starts = w.add("Mul", w.add("Range", zero, rows, one), length)
    index = w.add("Add", w.add("Unsqueeze", starts, first_axis), column)
    flat = w.constant([-1, found.width])
    every = w.add("Reshape", found.source, flat)
    if found.is_flat:
        w.end("Reshape", [w.add("Gather", every, index), flat], found.taken)
    else:
        w.end("Gather", [every, index], found.taken)
    return w.nodes, w.constants
