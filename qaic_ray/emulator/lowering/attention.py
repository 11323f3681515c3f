"""Finds the attention of each layer in a graph, and proves that one GroupQueryAttention is it.

The search is by structure and loose: from the cache's scatter to the two MatMuls around a Softmax.
The proof is by numbers: the nodes that were found run on random inputs of all forms that the
lowered graph will be used for (first and later chunks, padding, ragged rows, decode, idle rows),
and com.microsoft's kernel has to give the same result and the same cache, with past and present in
one memory. Attentions that differ in names only are proven once.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from .cardops import CLOUD
from .graph import State
from .view import ORT_ERRORS, GraphView, NotLowered, Part, part_session

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
BATCH_INDEX = "batch_index"
COMP_CTX_LENGTHS = "comp_ctx_lengths"
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
SEQLENS = "lowered/seqlens_k"
TOTAL = "lowered/total_sequence_length"
TOKEN_SIZES = "lowered/token_sizes"

_TOLERANCE = 2e-5
_SLOTS, _CTX = 3, 8
_DATA_OPS = {
    "Where", "Unsqueeze", "Squeeze", "Expand", "Reshape", "Transpose", "Cast", "Identity", "Tile",
    "Slice", "CtxGather", "CtxGatherCB", "Mul",
}  # fmt: skip
_SCORE_OPS = {"Cast", "Identity", "Where", "Mul", "Div", "Add", "Clip", "Max"}


class Cache(NamedTuple):
    """One retained key or value: its input, its output, and the node that writes it."""

    past: str
    present: str
    update: str
    rounding: Optional[str]
    is_continuous: bool


class Attention(NamedTuple):
    """One layer's attention: query [B, heads, S, dim], updates [B, kv_heads, S, dim]."""

    query: str
    key: Cache
    value: Cache
    output: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


def find(view: GraphView, states: Mapping[str, State]) -> List[Attention]:
    """The attentions of a graph, one per pair of retained states, each proven.

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
    proven: Dict[str, float] = {}
    found = []
    for softmax, value in values:
        matmul = _matmul_before(view, softmax, set(keys))
        attention = _attention(view, keys[matmul], value, view.nodes[matmul].input[0])
        part = _part(view, attention)
        key = part.key()
        if key not in proven:
            proven[key] = _prove(part, attention)
        found.append(attention._replace(scale=proven[key]))
    return found


def _cache(view: GraphView, past: str, state: State) -> Cache:
    present = state.output
    node = view.node(present)
    if node is None or node.domain != CLOUD or node.op_type not in ("CtxScatter", "CtxScatterCB"):
        raise NotLowered(f"{present} is not made by CtxScatter")
    continuous = node.op_type == "CtxScatterCB"
    if node.input[0] != past:
        raise NotLowered(f"{present} is not written into {past}")
    readers = {id(n) for n in view.readers(past) if n.op_type != "Shape"}
    if readers != {id(node)}:
        raise NotLowered(f"{past} is read elsewhere too")
    return Cache(past, present, node.input[-1], state.rounding, continuous)


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
    return Attention(query, key, value, output, heads, kv_heads, dim, 0.0)


def _part(view: GraphView, attention: Attention) -> Part:
    key, value = attention.key, attention.value
    inputs = (attention.query, key.update, value.update, key.past, value.past)
    outputs = (attention.output, key.present, value.present)
    return Part(view, (*inputs, POSITION_IDS, BATCH_INDEX), outputs)


def kernel_node(attention: Attention, flat: Tuple[str, str, str], output: str) -> Any:
    """GroupQueryAttention over [B, S, heads * dim] values; `output` has that form too."""
    key, value = attention.key, attention.value
    inputs = [*flat, key.past, value.past, SEQLENS, TOTAL]
    return _kernel_node(attention, inputs, [output, key.present, value.present])


def joint_nodes(
    attention: Attention, flat: Tuple[str, str, str], output: str, length: int
) -> List[Any]:
    """As `kernel_node`, for `length` tokens of every row, by one kernel a token.

    Over a past, a kernel takes several tokens of one row, or one token of several rows. Each of
    these writes into the memory that the one before it has written into.
    """
    nodes, parts = [], []
    for kind, name in zip(("query", "key", "value"), flat):
        parts.append([f"{output}/{kind}/{token}" for token in range(length)])
        nodes.append(helper.make_node("Split", [name, TOKEN_SIZES], parts[-1], axis=1))
    state = [attention.key.past, attention.value.past]
    mixed = [f"{output}/{token}" for token in range(length)]
    for token in range(length):
        inputs = [*(names[token] for names in parts), *state, token_name(SEQLENS, token), TOTAL]
        state = [attention.key.present, attention.value.present]
        if token < length - 1:
            state = [token_name(name, token) for name in state]
        nodes.append(_kernel_node(attention, inputs, [mixed[token], *state]))
    nodes.append(helper.make_node("Concat", mixed, [output], name=output, axis=1))
    return nodes


def joint_length(model: Any) -> int:
    """Tokens of every row that a graph of joint rows takes, 0 for any other graph."""
    return sum(i.name.startswith(token_name(SEQLENS, "")) for i in model.graph.input)


def token_name(name: str, token: Any) -> str:
    """What belongs to one token in a graph of joint rows."""
    return f"{name}/{token}"


def _kernel_node(attention: Attention, inputs: List[str], outputs: List[str]) -> Any:
    return helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        name=outputs[0],
        domain="com.microsoft",
        num_heads=attention.num_heads,
        kv_num_heads=attention.num_kv_heads,
        scale=attention.scale,
    )


def _prove(part: Part, attention: Attention) -> float:
    """Run the part and the kernel on the same inputs; returns the scale that makes them equal.

    Raises:
        NotLowered: where none does.
    """
    run = part.session()
    rng = np.random.default_rng(0)
    cases = [_case(attention, rng, *shape) for shape in _CASES]
    expected = [run(case.feeds(attention), _named_sizes(part, case)) for case in cases]
    for scale in _scales(part, attention.head_dim):
        candidate = attention._replace(scale=scale)
        kernel = _kernel(part.view.model, candidate)
        if all(case.equal(candidate, kernel, want) for case, want in zip(cases, expected)):
            return scale
    raise NotLowered(f"{attention.output} is not the attention that the kernel computes")


def _named_sizes(part: Part, case: Case) -> Dict[Any, int]:
    # Names of dims are the exporter's own; they are read off the inputs whose meaning is known.
    view, sizes = part.view, {}
    batch, length = case.positions.shape
    known = [(POSITION_IDS, (batch, length)), (BATCH_INDEX, (batch, 1))]
    known += [(n, case.past.shape) for n in part.inputs if n.startswith("past")]
    for name, dims in known:
        for dim, size in zip(view.shapes.get(name, ()), dims):
            if isinstance(dim, str):
                sizes[dim] = size
    for name in view.inputs & {COMP_CTX_LENGTHS}:
        sizes.update({d: _CTX for d in view.shapes[name] if isinstance(d, str)})
    return sizes


def _scales(part: Part, head_dim: int) -> List[float]:
    """What the scores may be multiplied by: the usual, and every number in the part."""
    scales = [head_dim**-0.5, 1.0]
    names = part.constants + [n.output[0] for n in part.nodes if n.op_type == "Constant"]
    for name in names:
        array = np.asarray(part.view.constant(name))
        if array.size == 1 and array.dtype.kind == "f":
            number = float(array.reshape(()))
            if 0 < number < np.inf:
                scales += [number, 1 / number]
    return list(dict.fromkeys(scales))


class Case(NamedTuple):
    """One set of inputs: valid positions first in each row, -1 after them."""

    query: Any
    key: Any
    value: Any
    past: Any
    positions: Any
    slots: Any

    def feeds(self, attention: Attention) -> Dict[str, Any]:
        """Inputs of the part that was cut out."""
        return {
            attention.query: self.query,
            attention.key.update: self.key,
            attention.value.update: self.value,
            attention.key.past: self.past,
            attention.value.past: -self.past,
            POSITION_IDS: self.positions,
            BATCH_INDEX: self.slots,
        }

    def equal(self, attention: Attention, kernel: Any, expected: List[Any]) -> bool:
        """Whether the kernel, row by row and without padding, gives what the part gave."""
        keys, values = self.past.copy(), -self.past
        for row, slot in enumerate(self.slots[:, 0]):
            valid = self.positions[row] >= 0
            if not valid.any():
                continue
            flat = [_flat(x[row : row + 1, :, valid]) for x in (self.query, self.key, self.value)]
            total = self.positions[row].max() + 1
            out = kernel(flat, (keys[slot : slot + 1], values[slot : slot + 1]), total)
            wanted = _flat(expected[0][row : row + 1, :, valid])
            if not np.allclose(out, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                return False
        return np.array_equal(keys, expected[1]) and np.array_equal(values, expected[2])


def _flat(x: Any) -> Any:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1))


# Positions of each row, and its slot: first chunk, later chunk, padded, ragged, decode, idle row.
_CASES = (
    ([[0, 1, 2]], [1]),
    ([[3, 4, 5]], [2]),
    ([[2, 3, -1]], [0]),
    ([[0, 1, 2, 3], [4, 5, -1, -1]], [2, 0]),
    ([[7], [0], [4]], [0, 1, 2]),
    ([[5], [-1], [2]], [0, 1, 2]),
)


def _case(attention: Attention, rng: Any, positions: Any, slots: Any) -> Case:
    where = np.array(positions, np.int64)
    batch, length = where.shape
    num_slots = _SLOTS if attention.key.is_continuous else batch
    index = slots if attention.key.is_continuous else range(batch)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    return Case(
        random(batch, attention.num_heads, length, attention.head_dim),
        random(batch, attention.num_kv_heads, length, attention.head_dim),
        random(batch, attention.num_kv_heads, length, attention.head_dim),
        random(num_slots, attention.num_kv_heads, _CTX, attention.head_dim),
        where,
        np.array(list(index), np.int64)[:, None],
    )


def _kernel(model: Any, attention: Attention) -> Any:
    flat = ("query", "key", "value")
    widths = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, None, w * attention.head_dim])
        for n, w in zip(flat, widths)
    ]
    cache = [1, attention.num_kv_heads, _CTX, attention.head_dim]
    pasts = (attention.key.past, attention.value.past)
    infos += [helper.make_tensor_value_info(n, TensorProto.FLOAT, cache) for n in pasts]
    infos.append(helper.make_tensor_value_info(SEQLENS, TensorProto.INT32, [1]))
    infos.append(helper.make_tensor_value_info(TOTAL, TensorProto.INT32, []))
    names = ("output", attention.key.present, attention.value.present)
    outputs = [helper.make_empty_tensor_value_info(n) for n in names]
    graph = helper.make_graph([kernel_node(attention, flat, "output")], "kernel", infos, outputs)
    session = part_session(model, graph)

    def call(values: List[Any], caches: Tuple[Any, Any], total: int) -> Any:
        """Result [B, S, heads * dim]; the caches are written in place, as when it is used."""
        binding = session.io_binding()
        for name, array in zip(flat, values):
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input(SEQLENS, np.array([total - 1], np.int32))
        binding.bind_cpu_input(TOTAL, np.array(total, np.int32))
        binding.bind_output("output")
        for cache, array in zip((attention.key, attention.value), caches):
            shared = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(cache.past, shared)
            binding.bind_ortvalue_output(cache.present, shared)
        try:
            session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise NotLowered(f"the kernel refuses {attention.output}: {error}") from error
        return binding.get_outputs()[0].numpy()

    return call
