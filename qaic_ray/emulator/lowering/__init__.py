"""From the reference graph to the fastest graph with the same results on a CPU.

Attention over a cache that stays in place (GroupQueryAttention), rotary embeddings and RMS norms
become one operator each. A graph is lowered as a whole or not at all: where any retained state is
used in a way that is not known, the reference graph runs (`docs/emulated-sdk/formats.md`).

The lowered graph takes rows of any length without padding: `position_ids` are all valid, two more
inputs say how long each row's context is (`SEQLENS`, `TOTAL`), and each past input has to be the
same memory as its retained output. The `joint` graph beside it is for several rows of a few tokens
(speculation), one kernel a token.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..numbers import kv_cache
from . import interface, norms, rotary, search, selection
from .attention import (
    ATTENTION_MASK,
    INPUT_IDS,
    SEQLENS,
    TOKEN_SIZES,
    TOTAL,
    Attention,
    Cache,
    joint_nodes,
    kernel_node,
    token_name,
)
from .attention import (
    BATCH_INDEX as BATCH_INDEX,
)
from .attention import (
    CACHE_INDEX as CACHE_INDEX,
)
from .attention import (
    COMP_CTX_LENGTHS as COMP_CTX_LENGTHS,
)
from .attention import (
    NUM_LOGITS_TO_KEEP as NUM_LOGITS_TO_KEEP,
)
from .attention import (
    POSITION_IDS as POSITION_IDS,
)
from .graph import State, expand, replace_by_stub
from .graph import has_subgraphs as has_subgraphs
from .view import HEADS_FIRST, GraphView, NotLowered, is_heads_first


class Lowered(NamedTuple):
    """A lowered model, and the new float32 tables that it reads beside the weights.

    `joint` is the same model for a fixed number of tokens of several rows, where it was asked for.
    """

    model: Any
    joint: Optional[Any]
    tables: Dict[str, Any]


def lower(
    model: Any,
    states: Mapping[str, State],
    values: Callable[[str], Any],
    lens: Tuple[int, int],
) -> Lowered:
    """Lower a float32 model whose states are not rounded yet.

    Args:
        model: as `graph.widen_to_float32` leaves it.
        states: retained input -> its output and rounding.
        values: reads an initializer that is stored apart.
        lens: positions that a row can have, and tokens of each row that a model of joint rows is
            for (0: no such model).

    Raises:
        NotLowered: saying what about the graph is not known.
    """
    view = GraphView(model, values)
    caches = {name: state for name, state in states.items() if name != ATTENTION_MASK}
    mask = states.get(ATTENTION_MASK)
    interface.check(view, caches, mask)
    ctx_len, joint_length = lens
    attentions = search.find(view, caches, mask, ctx_len)
    outputs = view.outputs - ({mask.output} if mask is not None else set())
    finder, tables = rotary.RotaryFinder(view, ctx_len), _Tables()
    found_norms = [n for n in map(norms.NormFinder(view).find, view.nodes) if n is not None]

    results = sorted(outputs - {state.output for state in caches.values()})
    padded_left = mask is not None
    taken = [selection.find(view, name, padded_left=padded_left) for name in results]
    selections = {found.taken: found for found in taken if found is not None}

    def rewritten(length: int) -> Any:
        rewriter = _Rewriter(view, finder, tables, length)
        for found in attentions:
            rewriter.replace(found)
        for norm in found_norms:
            rewriter.replace_norm(norm)
        for found_selection in selections.values():
            rewriter.replace_selection(found_selection)
        return rewriter.finish(outputs)

    joint = rewritten(joint_length) if joint_length else None
    return Lowered(rewritten(0), joint, tables.arrays)


class _Tables:
    """New constants, each kept once."""

    def __init__(self) -> None:
        self.arrays: Dict[str, Any] = {}
        self._names: Dict[bytes, str] = {}

    def name(self, array: Any) -> str:
        data = array.tobytes()
        if data not in self._names:
            self._names[data] = f"lowered/table_{len(self.arrays)}"
            self.arrays[self._names[data]] = array
        return self._names[data]


class _Rewriter:
    def __init__(
        self, view: GraphView, finder: rotary.RotaryFinder, tables: _Tables, joint_length: int
    ) -> None:
        self._view = view
        self._finder = finder
        self._tables = tables
        self._joint_length = joint_length
        self._states: List[str] = []
        self._added: Dict[int, List[Any]] = {}
        self._dropped: Set[int] = set()
        self._initializers: List[Any] = []
        self._shapes: Dict[Tuple[int, ...], str] = {}

    def replace(self, found: Attention) -> None:
        """Put the kernel in the place of one attention."""
        view = self._view
        nodes: List[Any] = []
        query = self._rotated(found.query, found.num_heads, nodes)
        key = self._rotated(found.key.update, found.num_kv_heads, nodes)
        value = self._flat(found.value.update, found.num_kv_heads, nodes)
        key = self._round(key, found.key, nodes)
        value = self._round(value, found.value, nodes)
        joined = self._joined(found)
        output = joined or found.output + "/flat"
        if self._joint_length:
            nodes += joint_nodes(found, (query, key, value), output, self._joint_length)
        else:
            nodes.append(kernel_node(found, (query, key, value), output))
        if joined is None:
            split, dims = found.output + "/split", [0, 0, found.num_heads, found.head_dim]
            nodes.append(self._reshape(output, dims, split))
            nodes.append(self._transpose(split, found.output))
        for present in (found.key.present, found.value.present):
            self._states.append(present)
            self._dropped.add(view.producer[present])
        last = view.producer[joined or found.output]
        self._dropped.add(last)
        self._added[last] = nodes

    def replace_norm(self, norm: norms.Norm) -> None:
        """Put one operator in the place of a norm that is written out."""
        norm = self._of_heads(norm)
        last = self._view.producer[norm.output]
        self._dropped.add(last)
        self._added[last] = [norms.kernel_node(norm, self._tables.name(norm.weight))]

    def _of_heads(self, norm: norms.Norm) -> norms.Norm:
        """A norm for which heads are made rows, and heads again: of the heads as they are."""
        before, after = self._view.node(norm.source), self._only_reader(norm.output)
        if before is None or after is None or {before.op_type, after.op_type} != {"Reshape"}:
            return norm
        source, output = before.input[0], after.output[0]
        same = self._view.same_shape(source, output)
        if not same or self._view.shape(source)[-1] != norm.weight.size:
            return norm
        return norm._replace(source=source, output=output)

    def replace_selection(self, found: selection.Selection) -> None:
        """Put the one form in the place of how the wanted tokens are taken."""
        nodes, constants = selection.kernel_nodes(found)
        last = self._view.producer[found.taken]
        self._dropped.add(last)
        self._added[last] = nodes
        arrays = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        self._initializers.extend(arrays)

    def _joined(self, found: Attention) -> Any:
        """The value [B, S, heads * dim] made of the output, where nothing else reads it."""
        view = self._view
        width = found.num_heads * found.head_dim
        turned = self._only_reader(found.output)
        if turned is None or not is_heads_first(turned):
            return None
        joined = self._only_reader(turned.output[0])
        if joined is None or joined.op_type != "Reshape" or joined.output[0] in view.outputs:
            return None
        try:
            shape = view.shape(joined.output[0])
        except NotLowered:
            return None
        fits = len(shape) == 3 and shape[2] == width
        return joined.output[0] if fits else None

    def _only_reader(self, name: str) -> Optional[Any]:
        """The one node that reads a value, past those that leave it as it is."""
        while name not in self._view.outputs:
            readers = self._view.readers(name)
            if len(readers) != 1:
                return None
            if readers[0].op_type != "Identity":
                return readers[0]
            name = readers[0].output[0]
        return None

    def _rotated(self, name: str, num_heads: int, nodes: List[Any]) -> str:
        rotation = self._finder.find(name)
        if rotation is None:
            return self._flat(name, num_heads, nodes)
        source = self._flat(rotation.source, num_heads, nodes)
        tables = (self._tables.name(rotation.cos), self._tables.name(rotation.sin))
        nodes.append(rotary.kernel_node(source, tables, name + "/rotated", num_heads))
        return name + "/rotated"

    def _flat(self, name: str, num_heads: int, nodes: List[Any]) -> str:
        """`name` [B, heads, S, dim] as [B, S, heads * dim]; the value it was made of, if it was."""
        view = self._view
        width = num_heads * int(view.shape(name, rank=4)[3])
        node = view.node(name)
        source, made = name + "/seq", False
        if node is not None and is_heads_first(node):
            source, made = node.input[0], True
            before = view.node(source)
            if before is not None and before.op_type == "Reshape":
                shape = view.shapes.get(before.input[0], ())
                if len(shape) == 3 and shape[2] == width:
                    return str(before.input[0])
        if not made:
            nodes.append(self._transpose(name, source))
        nodes.append(self._reshape(source, [0, 0, width], name + "/flat"))
        return name + "/flat"

    def _round(self, name: str, cache: Cache, nodes: List[Any]) -> str:
        if cache.rounding is None:
            return name
        target = cache.present + "/update"
        added, initializers = kv_cache.rounding_nodes(cache.rounding, name, target, 3)
        nodes.extend(added)
        self._initializers.extend(initializers)
        return target

    def _transpose(self, source: str, target: str) -> Any:
        return helper.make_node("Transpose", [source], [target], name=target, perm=HEADS_FIRST)

    def _reshape(self, source: str, dims: List[int], target: str) -> Any:
        key = tuple(dims)
        if key not in self._shapes:
            self._shapes[key] = f"lowered/shape_{len(self._shapes)}"
            array = np.array(dims, np.int64)
            self._initializers.append(numpy_helper.from_array(array, self._shapes[key]))
        return helper.make_node("Reshape", [source, self._shapes[key]], [target], name=target)

    def finish(self, outputs: Set[str]) -> Any:
        """The whole lowered model, with these of its outputs."""
        view = self._view
        nodes: List[Any] = []
        for index, node in enumerate(view.nodes):
            nodes.extend(self._added.get(index, ()))
            if index not in self._dropped:
                nodes.append(node)
        nodes = [self._plain(self._measured(node)) for node in nodes]
        nodes, constants = interface.take_constants_out(view, interface.needed(nodes, outputs))
        model = onnx.ModelProto()
        model.CopyFrom(view.model)
        graph = model.graph
        del graph.node[:]
        del graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend([*self._initializers, *constants])
        for name, array in self._tables.arrays.items():
            graph.initializer.add(name=name, dims=array.shape)
            replace_by_stub(graph.initializer[-1], TensorProto.FLOAT)
        read = {name for node in nodes for name in node.input}
        if read & interface.CACHE_ONLY:
            raise NotLowered(f"{read & interface.CACHE_ONLY} is read by more than the cache")
        interface.remove(graph.input, interface.CACHE_ONLY)
        interface.remove(graph.output, view.outputs - outputs)
        interface.keep(graph.initializer, read)
        for value in graph.output:
            interface.set_dims(value, view.shape(value.name))
        self._add_interface(graph)
        interface.free_rows(graph, view)
        return expand(model)

    def _measured(self, node: Any) -> Any:
        """A node that tells the number of rows by an input of the cache, told by the tokens."""
        if node.op_type != "Shape" or node.domain or node.input[0] not in interface.CACHE_ONLY:
            return node
        bounds = {a.name: a.i for a in node.attribute}
        taken = slice(bounds.get("start", 0), bounds.get("end"))
        dims, tokens = (self._view.shape(name)[taken] for name in (node.input[0], INPUT_IDS))
        if dims != tokens:
            return node
        same = onnx.NodeProto.FromString(node.SerializeToString())
        same.input[0] = INPUT_IDS
        return same

    def _plain(self, node: Any) -> Any:
        """A node that splits the last axis of tokens, by a constant where it was computed."""
        if node.op_type != "Reshape" or node.domain or node.input[0] not in self._view.shapes:
            return node
        try:
            before, after = (self._view.shape(name) for name in (node.input[0], node.output[0]))
        except NotLowered:
            return node
        split = [dim for dim in after[2:] if isinstance(dim, int)]
        if len(before) != 3 or len(after) != 4 or before[:2] != after[:2] or len(split) < 2:
            return node
        return self._reshape(node.input[0], [0, 0, *split], node.output[0])

    def _add_interface(self, graph: Any) -> None:
        """The inputs, outputs and constants that the kernels have on top."""
        length, lengths = self._joint_length, [SEQLENS]
        if length:
            lengths = [token_name(SEQLENS, token) for token in range(length)]
            ones = numpy_helper.from_array(np.ones(length, np.int64), TOKEN_SIZES)
            graph.initializer.append(ones)
        batch = self._view.shape(INPUT_IDS)[0]
        for name in lengths:
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, [batch]))
        graph.input.append(helper.make_tensor_value_info(TOTAL, TensorProto.INT32, []))
        presents = [o for o in graph.output if o.name in self._states]
        for token in range(length - 1):
            for present in presents:
                # An output, because only those can be given memory.
                graph.output.add().CopyFrom(present)
                graph.output[-1].name = token_name(present.name, token)
