"""Small models that are no language models: one with two inputs and outputs, one with a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from qaic_ray.emulator import compiler

ROWS, WIDTH, CLASSES, VOCABULARY = 2, 4, 3, 7


def two_inputs(seed: int = 0) -> Any:
    """scores = features @ W + mean over words of E[words]; best = argmax of scores."""
    values = np.random.default_rng(seed)
    weight = values.standard_normal((WIDTH, CLASSES), np.float32)
    table = values.standard_normal((VOCABULARY, CLASSES), np.float32)
    nodes = [
        helper.make_node("MatMul", ["features", "W"], ["projected"]),
        helper.make_node("Gather", ["E", "words"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Add", ["projected", "mean"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", WIDTH]),
        helper.make_tensor_value_info("words", TensorProto.INT64, ["batch", "length"]),
    ]
    outputs = [
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES]),
        helper.make_tensor_value_info("best", TensorProto.INT64, ["batch"]),
    ]
    weights = [numpy_helper.from_array(weight, "W"), numpy_helper.from_array(table, "E")]
    return _model(helper.make_graph(nodes, "two", inputs, outputs, weights))


def adding_up() -> Any:
    """total_RetainedState = total + x, where total stays on the card; doubled = 2 * that."""
    nodes = [
        helper.make_node("Add", ["total", "x"], ["total_RetainedState"]),
        helper.make_node("Add", ["total_RetainedState", "total_RetainedState"], ["doubled"]),
    ]
    both = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in ("x", "total")]
    names = ("total_RetainedState", "doubled")
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in names]
    return _model(helper.make_graph(nodes, "sum", both, outputs))


def _model(graph: Any) -> Any:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def compile_net(folder: Path, model: Any, *flags: str) -> Path:
    """The model compiled in this process; the folder of its QPC."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "net.onnx")
    always = ["-aic-hw", "-aic-hw-version=2.0", "-compile-only"]
    symbols = [f"-onnx-define-symbol=batch,{ROWS}", "-onnx-define-symbol=length,5"]
    qpc = folder / "qpc"
    argv = [f"-m={folder / 'net.onnx'}", f"-aic-binary-dir={qpc}", *always, *symbols, *flags]
    assert compiler.main(argv) == 0
    return qpc


def inputs_of(seed: int, rows: int = ROWS) -> dict[str, Any]:
    """Inputs of `two_inputs`."""
    values = np.random.default_rng(seed)
    return {
        "features": values.standard_normal((rows, WIDTH), np.float32),
        "words": values.integers(0, VOCABULARY, (rows, 5)),
    }


def truth(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime makes of them."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))
