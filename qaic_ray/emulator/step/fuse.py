"""From a lowered graph to the operations of a step, or the reason why there are none.

A value is a row a token: [tokens, width], whatever the graph calls its dims. Every node has to be
known; then the step computes what the graph does, in fewer passes. What only positions go into is
the choice of rows whose logits are wanted; it is run on a few examples to see what it chooses.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ..kernels import operations as op
from ..lowering.attention import INPUT_IDS, NUM_LOGITS_TO_KEEP, POSITION_IDS
from ..lowering.view import ORT_ERRORS

LANES = 16


class NotFused(Exception):
    """A lowered graph has something that the step does not know; it runs on onnxruntime."""


class Operation(NamedTuple):
    """`inputs` are values, `constants` initializers, `numbers` what the kind has beside them."""

    kind: int
    out: int
    inputs: Tuple[int, ...]
    constants: Tuple[str, ...] = ()
    numbers: Tuple[float, ...] = ()


class Fused(NamedTuple):
    """A step's operations in order.

    Attributes:
        widths: numbers in a row of each value.
        operations: a STORE's value stands for the cache that it has written.
        results: output -> its value.
        kept: what `SELECT` keeps: `last`, `num_logits_to_keep`; `all` where there is none.
    """

    widths: List[int]
    operations: List[Operation]
    results: Dict[str, int]
    kept: str


def fuse(model: Any, roundings: Mapping[str, str]) -> Fused:
    """The operations of a lowered model.

    Args:
        model: its large initializers have a shape only.
        roundings: retained input -> how it is rounded.

    Raises:
        NotFused: saying what is not known.
    """
    fuser = _Fuser(model, roundings)
    for node in model.graph.node:
        fuser.take(node)
    results = {
        o.name: fuser.value(o.name) for o in model.graph.output if o.name not in fuser.written
    }
    picked = fuser.kept != "all"
    for name, value in results.items():
        if (value in fuser.picked) is not picked:
            raise NotFused(f"{name} is of other tokens than the other results")
        if any(o.kind == op.SELECT and o.out == value for o in fuser.operations):
            raise NotFused(f"{name} is taken out as it is")
    operations = _joined(fuser.operations, set(results.values()))
    return Fused(fuser.widths, operations, results, fuser.kept)


def _joined(operations: List[Operation], results: Set[int]) -> List[Operation]:
    """With x * sigmoid(x) * y as one operation."""
    readers: Dict[int, int] = {}
    for operation in operations:
        for value in operation.inputs:
            readers[value] = readers.get(value, 0) + 1
    made = {o.out: o for o in operations}
    dropped: Set[int] = set()
    for index, operation in enumerate(operations):
        if operation.kind != op.MULTIPLY or len(operation.inputs) != 2:
            continue
        for one, other in (operation.inputs, operation.inputs[::-1]):
            source = made.get(one)
            if source is None or readers[one] > 1 or one in results:
                continue
            if source.kind == op.SIGMOID and source.inputs == (other,):
                joined = operation._replace(kind=op.SILU, inputs=(other,))
            elif source.kind == op.SILU:
                joined = operation._replace(kind=op.SILU_TIMES, inputs=(*source.inputs, other))
            else:
                continue
            operations[index] = made[operation.out] = joined
            if joined.kind == op.SILU:
                readers[other] -= 1
            dropped.add(one)
            break
    return [o for o in operations if o.out not in dropped]


class _Fuser:
    def __init__(self, model: Any, roundings: Mapping[str, str]) -> None:
        self.widths: List[int] = []
        self.operations: List[Operation] = []
        self.written: Set[str] = set()
        self.picked: Set[int] = set()
        self.kept = "all"
        self._model = model
        self._roundings = roundings
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._values: Dict[str, int] = {}
        self._halves: Set[str] = set()
        self._groups: Dict[str, int] = {}
        self._of_positions: Set[str] = {POSITION_IDS, NUM_LOGITS_TO_KEEP}
        self._index_nodes: List[Any] = []
        self._sizes: Set[str] = set()
        self._skipped: Dict[str, str] = {}
        self._known: Dict[str, Callable[[Any], None]] = {
            "Gather": self._gather,
            "Cast": self._cast,
            "SimplifiedLayerNormalization": self._norm,
            "MatMul": self._product,
            "Add": self._binary,
            "Mul": self._binary,
            "Sigmoid": self._sigmoid,
            "Reshape": self._reshape,
            "RotaryEmbedding": self._rotary,
            "GroupQueryAttention": self._attention,
            "ArgMax": self._argmax,
        }

    def value(self, name: str) -> int:
        """The value that a name has."""
        if name not in self._values:
            raise NotFused(f"{name} is not a row of numbers a token")
        return self._values[name]

    def take(self, node: Any) -> None:
        """Take in the next node."""
        inputs = [name for name in node.input if name]
        free = [name for name in inputs if name not in self._initializers]
        if all(name in self._of_positions for name in free) and node.op_type != "RotaryEmbedding":
            self._of_positions.update(node.output)
            self._index_nodes.append(node)
            return
        if self._is_rounding(node):
            return
        if all(name in self._sizes for name in free) or node.op_type == "Shape":
            self._sizes.update(node.output)
            return
        known = self._known.get(node.op_type)
        if known is None:
            raise NotFused(f"{node.output[0]} is made by {node.op_type}")
        known(node)

    def _add(
        self,
        kind: int,
        name: str,
        inputs: Tuple[int, ...],
        *,
        width: int,
        constants: Tuple[str, ...] = (),
        numbers: Tuple[float, ...] = (),
    ) -> None:
        of_some = {value in self.picked for value in inputs}
        if len(of_some) > 1 or (True in of_some and kind in (op.SELECT, op.STORE, op.ATTEND)):
            raise NotFused(f"{name} is made of some tokens and of all")
        self._values[name] = len(self.widths)
        if kind == op.SELECT or True in of_some:
            self.picked.add(self._values[name])
        self.widths.append(width)
        made = Operation(kind, self._values[name], inputs, constants, numbers)
        self.operations.append(made)

    def _shape(self, name: str) -> Tuple[int, ...]:
        if name not in self._initializers:
            raise NotFused(f"{name} is no constant")
        return tuple(self._initializers[name].dims)

    def _number(self, name: str) -> Optional[float]:
        tensor = self._initializers.get(name)
        if tensor is None or np.prod(tensor.dims) != 1:
            return None
        if tensor.data_location == TensorProto.EXTERNAL:
            return None
        return float(numpy_helper.to_array(tensor).reshape(()))

    def _is_rounding(self, node: Any) -> bool:
        """Whether a node is part of rounding a cache's update to MXINT8."""
        name = node.output[0]
        if name.endswith("/update/whole") and node.op_type == "Identity":
            target = name[: -len("/whole")]
            source = self.value(node.input[0])
            self._skipped[target] = target + "/"
            self._add(op.ROUND_MXINT8, target, (source,), width=self.widths[source])
            if self.widths[source] % 32:
                raise NotFused(f"{target} is not made of blocks of 32")
            return True
        return name in self._skipped or any(name.startswith(s) for s in self._skipped.values())

    def _gather(self, node: Any) -> None:
        source, index = node.input
        axis = _attributes(node).get("axis", 0)
        if index == INPUT_IDS and source in self._initializers and axis == 0:
            num_rows, width = self._shape(source)
            self._add(
                op.EMBED, node.output[0], (), width=width, constants=(source,), numbers=(num_rows,)
            )
            if self._initializers[source].data_type == TensorProto.FLOAT16:
                self._halves.add(node.output[0])
        elif index in self._of_positions and axis == 0:
            value = self.value(source)
            self.kept = self._choice(index)
            self._add(op.SELECT, node.output[0], (value,), width=self.widths[value])
        else:
            raise NotFused(f"{node.output[0]} is looked up in another way")

    def _cast(self, node: Any) -> None:
        source, target = node.input[0], node.output[0]
        to = _attributes(node)["to"]
        value = self.value(source)
        if to == TensorProto.FLOAT or (to == TensorProto.FLOAT16 and source in self._halves):
            self._values[target] = value
        elif to == TensorProto.FLOAT16:
            self._add(op.ROUND_HALF, target, (value,), width=self.widths[value])
        else:
            raise NotFused(f"{target} is cast to another type")
        if to == TensorProto.FLOAT16:
            self._halves.add(target)
        self._groups[target] = self._groups.get(source, 1)

    def _norm(self, node: Any) -> None:
        source, weight = node.input[:2]
        value, attributes = self.value(source), _attributes(node)
        width, groups = self.widths[value], self._groups.get(source, 1)
        if attributes.get("axis", -1) not in (-1, 3 if groups > 1 else 2) or len(node.output) > 1:
            raise NotFused(f"{node.output[0]} is a norm of another form")
        if self._shape(weight) != (width // groups,) or (groups > 1 and width // groups % LANES):
            raise NotFused(f"{node.output[0]} is a norm of another width")
        numbers = (attributes.get("epsilon", 1e-5), groups)
        self._add(
            op.NORM, node.output[0], (value,), width=width, constants=(weight,), numbers=numbers
        )
        self._groups[node.output[0]] = groups

    def _product(self, node: Any) -> None:
        source, weight = node.input
        value, shape = self.value(source), self._shape(weight)
        if len(shape) != 2 or shape[0] != self.widths[value] or self._groups.get(source, 1) > 1:
            raise NotFused(f"{node.output[0]} is a product of another form")
        if shape[0] % 4:
            raise NotFused(f"{weight} does not have rows in fours")
        self._add(op.PRODUCT, node.output[0], (value,), width=shape[1], constants=(weight,))

    def _binary(self, node: Any) -> None:
        target, kind = node.output[0], op.ADD if node.op_type == "Add" else op.MULTIPLY
        names = sorted(node.input, key=lambda name: name in self._initializers)
        groups = {self._groups.get(name, 1) for name in names if name not in self._initializers}
        first = self.value(names[0])
        width = self.widths[first]
        if groups != {1}:
            raise NotFused(f"{target} joins values by head")
        if names[1] not in self._initializers:
            other = self.value(names[1])
            if self.widths[other] != width:
                raise NotFused(f"{target} joins values of different widths")
            self._add(kind, target, (first, other), width=width)
            return
        number = self._number(names[1])
        if number is not None and kind == op.MULTIPLY:
            self._add(op.SCALE, target, (first,), width=width, numbers=(number,))
        elif self._shape(names[1]) == (width,):
            self._add(kind, target, (first,), width=width, constants=(names[1],))
        else:
            raise NotFused(f"{target} joins a constant of another shape")

    def _sigmoid(self, node: Any) -> None:
        value = self.value(node.input[0])
        self._add(op.SIGMOID, node.output[0], (value,), width=self.widths[value])

    def _reshape(self, node: Any) -> None:
        source, shape, target = node.input[0], node.input[1], node.output[0]
        value = self.value(source)
        dims: List[int] = []
        if shape in self._initializers:
            dims = numpy_helper.to_array(self._initializers[shape]).tolist()
        width = self.widths[value]
        if dims in ([0, 0, width], [-1, width]):
            self._groups[target] = 1
        elif len(dims) == 4 and dims[:2] == [0, 0] and dims[2] * dims[3] == width:
            self._groups[target] = dims[2]
        elif width != 1:
            raise NotFused(f"{target} has another shape")
        self._values[target] = value

    def _rotary(self, node: Any) -> None:
        source, positions, cos, sin = node.input
        value, attributes = self.value(source), _attributes(node)
        heads, half = attributes.get("num_heads", 0), self._shape(cos)[1]
        width = self.widths[value]
        if positions != POSITION_IDS or heads * half * 2 != width or attributes.get("interleaved"):
            raise NotFused(f"{node.output[0]} is rotated in another way")
        self._add(
            op.ROTATE,
            node.output[0],
            (value,),
            width=width,
            constants=(cos, sin),
            numbers=(heads, half * 2),
        )

    def _attention(self, node: Any) -> None:
        query, key, value, past_key, past_value = node.input[:5]
        attributes = _attributes(node)
        known = {"num_heads", "kv_num_heads", "scale", "local_window_size"}
        if set(attributes) - known or any(node.input[7:]):
            raise NotFused(f"{node.output[0]} has an attention of another form")
        heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
        width = self.widths[self.value(query)]
        dim = width // heads
        stored = []
        for update, past, present in (
            (key, past_key, node.output[1]), (value, past_value, node.output[2])
        ):  # fmt: skip
            source = self.value(update)
            if self.widths[source] != kv_heads * dim:
                raise NotFused(f"{present} has rows of another width")
            self._add(
                op.STORE, present, (source,), width=1, constants=(past,), numbers=(kv_heads, dim)
            )
            self.written.add(present)
            stored.append(self._values[present])
        inputs = (self.value(query), *stored)
        scale, window = attributes.get("scale", dim**-0.5), attributes.get("local_window_size", -1)
        numbers = (heads, kv_heads, dim, scale, max(window, 0))
        self._add(
            op.ATTEND,
            node.output[0],
            inputs,
            width=width,
            constants=(past_key, past_value),
            numbers=numbers,
        )

    def _argmax(self, node: Any) -> None:
        value = self.value(node.input[0])
        axis = _attributes(node).get("axis", 0)
        if axis not in (1, -1, 2):
            raise NotFused(f"{node.output[0]} is the largest along another axis")
        self._add(op.ARGMAX, node.output[0], (value,), width=1)

    def _choice(self, index: str) -> str:
        """What rows an index of flattened tokens chooses; run on rows of several tokens."""
        with_kept = any(NUM_LOGITS_TO_KEEP in node.input for node in self._index_nodes)
        names = [POSITION_IDS, *([NUM_LOGITS_TO_KEEP] if with_kept else [])]
        infos = [helper.make_tensor_value_info(n, TensorProto.INT64, [None, None]) for n in names]
        out = [helper.make_empty_tensor_value_info(index)]
        used = {name for node in self._index_nodes for name in node.input}
        constants = [t for n, t in self._initializers.items() if n in used]
        graph = helper.make_graph(self._index_nodes, "index", infos, out, constants)
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        model.ir_version = self._model.ir_version
        try:
            session = ort.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            for num_rows, num_tokens, start in ((1, 1, 0), (1, 5, 3), (3, 4, 0), (2, 6, 9)):
                positions = np.tile(np.arange(start, start + num_tokens), (num_rows, 1))
                kept = min(2, num_tokens) if with_kept else 1
                feeds = {POSITION_IDS: positions}
                if with_kept:
                    feeds[NUM_LOGITS_TO_KEEP] = np.zeros((kept, 1), np.int64)
                made = session.run([index], feeds)[0]
                ends = np.arange(1, num_rows + 1)[:, None] * num_tokens
                if not np.array_equal(made, ends + np.arange(-kept, 0)):
                    raise NotFused(f"{index} chooses other tokens than the last")
        except ORT_ERRORS as error:
            raise NotFused(f"{index} cannot be computed: {error}") from error
        return NUM_LOGITS_TO_KEEP if with_kept else "last"


def _attributes(node: Any) -> Dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def load_model(data: bytes) -> Any:
    """A graph as the QPC has it."""
    return onnx.ModelProto.FromString(data)
