"""Adds the operator forms of an ONNX file to the package's list of known ones.

    python tests/export/collect_forms.py SOURCE model.onnx

SOURCE is a key under `sources` of `operator_forms.json`. The graph is run once on small inputs,
because what its reshapes give cannot be inferred.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from operator_forms import FORMS_FILE, operator_forms

from qaic_ray.export.functions import use_plain_functions

SIZES = {
    "batch_size": 2,
    "seq_len": 2,
    "ctx_len": 16,
    "full_batch_size": 4,
    "comp_ctx_lengths": 8,
}


def types_of(model: Any) -> dict[str, tuple[int, int]]:
    """Element type and rank of every value, from running the graph."""
    runnable = onnx.ModelProto.FromString(model.SerializeToString())
    use_plain_functions(runnable)
    _replace_bool_where(runnable)
    names = [name for node in runnable.graph.node for name in node.output]
    made = {value.name for value in runnable.graph.output}
    runnable.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in made)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        runnable.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {value.name: _sample(value) for value in runnable.graph.input}
    results = dict(zip(names, session.run(names, feed), strict=True)) | feed
    types = {
        name: (helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype), np.asarray(array).ndim)
        for name, array in results.items()
    }
    for tensor in runnable.graph.initializer:
        types[tensor.name] = (tensor.data_type, len(tensor.dims))
    return types


def _replace_bool_where(model: Any) -> None:
    """onnxruntime has no Where for bools, which samplers use; integers will do for the ranks."""
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Where" or kinds.get(node.input[2]) != TensorProto.BOOL:
            nodes.append(node)
            continue
        wide = [f"{node.output[0]}/{i}" for i in range(3)]
        for name, made in zip(node.input[1:], wide[:2], strict=True):
            nodes.append(helper.make_node("Cast", [name], [made], to=TensorProto.INT64))
        nodes.append(helper.make_node("Where", [node.input[0], *wide[:2]], [wide[2]]))
        nodes.append(helper.make_node("Cast", [wide[2]], list(node.output), to=TensorProto.BOOL))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _sample(value: Any) -> Any:
    kind = value.type.tensor_type
    dims = [d.dim_value or SIZES.get(d.dim_param, 2) for d in kind.shape.dim]
    array = np.zeros(dims, helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if kind.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
        array += 0.5
    return array


def main(source: str, path: str) -> None:
    document = json.loads(FORMS_FILE.read_text(encoding="utf-8"))
    if source not in document["sources"]:
        raise SystemExit(f"{FORMS_FILE.name} has no source {source!r}.")
    model = onnx.load(path)
    for form in operator_forms(model, types_of(model)):
        entries = document["forms"].setdefault(form.operator, [])
        fields = {
            "attributes": json.loads(form.attributes),
            "inputs": [str(value) for value in form.inputs],
        }
        known = next((e for e in entries if {k: e[k] for k in fields} == fields), None)
        if known is None:
            known = fields | {"sources": []}
            entries.append(known)
        known["sources"] = sorted({*known["sources"], source})
    forms = {
        operator: sorted(entries, key=lambda e: json.dumps(e, sort_keys=True))
        for operator, entries in sorted(document["forms"].items())
    }
    FORMS_FILE.write_text(_text(document | {"forms": forms}))


def _text(document: dict[str, Any]) -> str:
    """JSON with one form a line."""
    lines = [
        "{",
        f'  "sources": {json.dumps(document["sources"], indent=2)},'.replace("\n", "\n  "),
    ]
    lines.append('  "forms": {')
    operators = []
    for operator, entries in document["forms"].items():
        rows = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        operators.append(f"    {json.dumps(operator)}: [\n{rows}\n    ]")
    return "\n".join([*lines, ",\n".join(operators), "  }", "}"]) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
