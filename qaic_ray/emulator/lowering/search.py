"""Finds the attention of each layer in a graph, and has it proven that one kernel is it.

The search is by structure and loose: from the cache's scatter to the two MatMuls around a Softmax.
Attentions that differ in names only are proven once (`proof`).
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Set, Tuple

from . import proof
from .attention import (
    ATTENTION_MASK,
    BATCH_INDEX,
    CACHE_INDEX,
    POSITION_IDS,
    Attention,
    Cache,
)
from .cardops import SCATTER, SCATTER_CB
from .graph import State
from .view import GraphView, NotLowered, Part

_SCATTER_ND = ("", "ScatterND")
_DATA_OPS = {
    "Where", "Unsqueeze", "Squeeze", "Expand", "Reshape", "Transpose", "Cast", "Identity", "Tile",
    "Slice", "CtxGather", "CtxGatherCB", "Mul",
}  # fmt: skip
_SHAPING_OPS = {"Identity", "Reshape", "Expand"}
_SCORE_OPS = {"Cast", "Identity", "Where", "Mul", "Div", "Add", "Clip", "Max"}


def find(
    view: GraphView, states: Mapping[str, State], mask: Optional[State], ctx_len: int
) -> List[Attention]:
    """The attentions of a graph, one per pair of retained states, each proven.

    Args:
        view: the graph.
        states: retained keys and values.
        mask: the retained attention mask, where rows are padded on the left.
        ctx_len: positions that a row can have.

    Raises:
        NotLowered: where a state is used in any other way.
    """
    keys: Dict[int, Cache] = {}
    values: List[Tuple[int, Cache]] = []
    for past, state in states.items():
        cache = _cache(view, past, state)
        index = _matmul_of(view, state.output)
        softmax = _softmax_before(view, view.nodes[index].input[0])
        if softmax is None:
            keys[index] = cache
        else:
            values.append((softmax, cache))
    if len(keys) != len(values) or 2 * len(keys) != len(states):
        raise NotLowered("keys and values do not come in pairs")
    proven: Dict[str, Attention] = {}
    found = []
    for softmax, value in values:
        matmul = _matmul_before(view, softmax, set(keys))
        attention = _attention(view, keys[matmul], value, view.nodes[matmul].input[0])
        part = _part(view, attention, mask)
        key = part.key()
        if key not in proven:
            proven[key] = proof.proven(part, attention, ctx_len)
        found.append(attention._replace(scale=proven[key].scale, window=proven[key].window))
    return found


def _cache(view: GraphView, past: str, state: State) -> Cache:
    present = state.output
    node = view.node(present)
    kind = None if node is None else (node.domain, node.op_type)
    if node is None or kind not in (SCATTER, SCATTER_CB, _SCATTER_ND):
        raise NotLowered(f"{present} is not made by CtxScatter or ScatterND")
    continuous = kind == SCATTER_CB
    if node.input[0] != past:
        raise NotLowered(f"{present} is not written into {past}")
    readers = {id(n) for n in view.readers(past) if n.op_type != "Shape"}
    if readers != {id(node)}:
        raise NotLowered(f"{past} is read elsewhere too")
    return Cache(past, present, _unchanged(view, node.input[-1]), state.rounding, continuous)


def _unchanged(view: GraphView, name: str) -> str:
    """What a value was before operators that leave it as it is, of whatever they measure."""
    node = view.node(name)
    while (
        node is not None and node.op_type in _SHAPING_OPS and view.same_shape(node.input[0], name)
    ):
        name = node.input[0]
        node = view.node(name)
    return name


def _matmul_of(view: GraphView, present: str) -> int:
    """The one MatMul that a cache flows into."""
    waiting, seen, found = [present], {present}, set()
    while waiting:
        for index in view.consumers.get(waiting.pop(), ()):
            node = view.nodes[index]
            if node.op_type == "MatMul":
                found.add(index)
            elif node.op_type in _DATA_OPS and node.output[0] not in seen:
                seen.add(node.output[0])
                waiting.append(node.output[0])
            elif node.op_type != "Shape" and node.output[0] not in seen:
                raise NotLowered(f"{present} flows into {node.op_type}")
    if len(found) != 1:
        raise NotLowered(f"{present} flows into {len(found)} MatMuls")
    return found.pop()


def _softmax_before(view: GraphView, name: str) -> Optional[int]:
    for _ in range(4):
        index = view.producer.get(name)
        if index is None:
            return None
        node = view.nodes[index]
        if node.op_type == "Softmax":
            return index
        if node.op_type not in ("Cast", "Identity", "Where", "Mul"):
            return None
        name = node.input[1] if node.op_type == "Where" else node.input[0]
    return None


def _matmul_before(view: GraphView, softmax: int, matmuls: Set[int]) -> int:
    waiting, seen = list(view.nodes[softmax].input), set()
    while waiting:
        index = view.producer.get(waiting.pop())
        if index is None or index in seen:
            continue
        seen.add(index)
        if index in matmuls:
            return index
        if view.nodes[index].op_type in _SCORE_OPS:
            waiting.extend(view.nodes[index].input)
    raise NotLowered("a Softmax has no scores from a cache")


def _attention(view: GraphView, key: Cache, value: Cache, query: str) -> Attention:
    output = view.nodes[_matmul_of(view, value.present)].output[0]
    _, heads, _, dim = view.shape(query, rank=4)
    kv_heads = view.shape(key.past, rank=4)[1]
    if not all(isinstance(n, int) for n in (heads, dim, kv_heads)) or heads % kv_heads:
        raise NotLowered(f"the heads of {query} are not static")
    return Attention(query, key, value, output, heads, kv_heads, dim)


def _part(view: GraphView, attention: Attention, mask: Optional[State]) -> Part:
    key, value = attention.key, attention.value
    inputs = (attention.query, key.update, value.update, key.past, value.past)
    outputs = (attention.output, key.present, value.present)
    if mask is not None:
        return Part(view, (*inputs, ATTENTION_MASK, CACHE_INDEX), (*outputs, mask.output))
    return Part(view, (*inputs, POSITION_IDS, BATCH_INDEX), outputs)
