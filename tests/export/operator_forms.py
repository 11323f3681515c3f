"""Operator forms: how public exports that compile on cards use each operator, and who does not.

A form is an operator with its attributes, and of every input the type, the rank and whether it is
constant. The known ones are in `operator_forms.json`, with their sources. Knows nothing of what a
graph computes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

FORMS_FILE = Path(__file__).with_name("operator_forms.json")

OLDEST_OPSET, NEWEST_OPSET = 13, 17

CONSTANT, SHAPE, DATA = 0, 1, 2
"""What an input depends on: nothing, the sizes of a specialization only, or what is computed."""

_KINDS = ("constant", "shape", "data")
# Of one kind for a compiler that turns every float into float16.
_TYPES = {
    TensorProto.FLOAT: "float",
    TensorProto.FLOAT16: "float",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.BOOL: "bool",
}


@dataclass(frozen=True)
class Input:
    """One input of an operator; `kind` is `CONSTANT`, `SHAPE` or `DATA`."""

    dtype: str
    rank: int
    kind: int

    def __str__(self) -> str:
        return f"{self.dtype} rank {self.rank} {_KINDS[self.kind]}"

    @classmethod
    def parse(cls, text: str) -> Input:
        """Read what `str` gives."""
        dtype, _, rank, kind = text.split()
        return cls(dtype, int(rank), _KINDS.index(kind))


@dataclass(frozen=True)
class Form:
    """One use of an operator; `attributes` is JSON with axes counted from the front.

    The inputs of a Concat are one here: as many as there are, and as constant as the least.
    """

    operator: str
    attributes: str
    inputs: tuple[Input, ...]

    def covers(self, other: Form) -> bool:
        """Whether a compiler that takes this form takes `other`, which is at least as constant."""
        return (
            (self.operator, self.attributes) == (other.operator, other.attributes)
            and [(i.dtype, i.rank) for i in self.inputs]
            == [(i.dtype, i.rank) for i in other.inputs]
            and all(
                theirs.kind <= ours.kind
                for ours, theirs in zip(self.inputs, other.inputs, strict=True)
            )
        )

    def __str__(self) -> str:
        return f"{self.operator} {self.attributes} ({', '.join(map(str, self.inputs))})"


def operator_forms(
    model: Any, types: Mapping[str, tuple[int, int]], constants: Collection[str] = ()
) -> dict[Form, str]:
    """The forms of an `onnx.ModelProto`, each with the name of a node that has it.

    Args:
        model: its functions are not looked into.
        types: element type and rank of every value.
        constants: inputs that stand for weights.
    """
    graph = model.graph
    kinds = {value.name: DATA for value in graph.input}
    kinds |= dict.fromkeys([*constants, *(t.name for t in graph.initializer)], CONSTANT)
    found: dict[Form, str] = {}
    for node in graph.node:
        names = [name for name in node.input if name]
        kind = max((kinds[name] for name in names), default=CONSTANT)
        if node.op_type == "Shape":
            kind = SHAPE
        kinds |= dict.fromkeys(node.output, kind)
        # What depends on no data is folded away when the sizes are known.
        if kind == DATA or node.op_type == "Shape":
            inputs = [Input(_TYPES[types[n][0]], types[n][1], kinds[n]) for n in names]
            found.setdefault(_form(node, inputs), node.name)
    return found


def unknown_forms(found: Mapping[Form, str], opset: int) -> dict[Form, str]:
    """Those that no known form covers, in a graph of that opset."""
    known = known_forms(opset)
    return {
        form: name
        for form, name in found.items()
        if not any(k.covers(form) for k in known.get(form.operator, ()))
    }


@cache
def known_forms(opset: int) -> Mapping[str, list[Form]]:
    """Known forms by operator, of the sources whose operators mean the same in that opset."""
    document = json.loads(FORMS_FILE.read_text(encoding="utf-8"))
    opsets = {name: source["opset"] for name, source in document["sources"].items()}
    known: dict[str, list[Form]] = {}
    for operator, entries in document["forms"].items():
        for entry in entries:
            if any(_means_the_same(operator, opsets[name], opset) for name in entry["sources"]):
                inputs = tuple(map(Input.parse, entry["inputs"]))
                form = Form(operator, json.dumps(entry["attributes"], sort_keys=True), inputs)
                known.setdefault(operator, []).append(form)
    return known


def _means_the_same(operator: str, one: int, other: int) -> bool:
    """Whether the later version of an operator only has more types and more attributes."""
    if "::" in operator:
        return True
    older, newer = sorted((one, other))
    schemas = [onnx.defs.get_schema(operator, opset) for opset in (older, newer)]
    before, after = ({k: v.default_value for k, v in s.attributes.items()} for s in schemas)
    inputs = [[i.name for i in s.inputs] for s in schemas]
    return inputs[0] == inputs[1] and all(after.get(k) == v for k, v in before.items())


def _form(node: Any, inputs: list[Input]) -> Form:
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    if node.op_type == "Concat":
        inputs = [Input(inputs[0].dtype, inputs[0].rank, max(i.kind for i in inputs))]
    attributes = {} if node.domain else dict(_defaults(node.op_type, OLDEST_OPSET))
    newer = {} if node.domain else _defaults(node.op_type, NEWEST_OPSET)
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        known_later = attribute.name in newer and attribute.name not in attributes
        if known_later and value == newer[attribute.name]:
            continue
        if node.op_type == "Cast":
            attributes["to"] = _TYPES[value]
        elif attribute.type in (AttributeProto.INT, AttributeProto.INTS):
            attributes[attribute.name] = value
    for name in {"axis", "axes"} & attributes.keys():
        attributes[name] = _from_front(attributes[name], inputs[0].rank)
    return Form(operator, json.dumps(attributes, sort_keys=True), tuple(inputs))


@cache
def _defaults(operator: str, opset: int) -> Mapping[str, Any]:
    """The whole-number attributes that an operator has when nothing is said."""
    return {
        name: attribute.default_value.i
        for name, attribute in onnx.defs.get_schema(operator, opset).attributes.items()
        if attribute.default_value.type == AttributeProto.INT
    }


def _from_front(axes: Any, rank: int) -> Any:
    if isinstance(axes, int):
        return axes + rank if axes < 0 else axes
    return [axis + rank if axis < 0 else axis for axis in axes]
