"""Rounding of a tensor to what a card keeps in its KV cache: as ONNX nodes, and of an array."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from . import mxint8

FLOAT16 = "float16"
MXINT8 = "mxint8"


def nodes(kind: str, source: str, target: str, rank: int) -> Tuple[List[Any], List[Any]]:
    """Nodes and initializers that round float32 `source` [rank dims] to `kind` and back.

    `kind` is `FLOAT16` or `MXINT8`; MXINT8 has its blocks of 32 along the last axis.
    """
    if kind == FLOAT16:
        return _round_float16(source, target), []
    return _round_mxint8(source, target, rank)


def apply(kind: Optional[str], values: Any) -> Any:
    """Round an array as `nodes` does."""
    if kind == FLOAT16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return mxint8.quantize(values) if kind == MXINT8 else values


def _round_float16(source: str, target: str) -> List[Any]:
    half = target + "/float16"
    return [
        helper.make_node("Cast", [source], [half], name=half, to=TensorProto.FLOAT16),
        helper.make_node("Cast", [half], [target], name=target, to=TensorProto.FLOAT),
    ]


def _round_mxint8(source: str, target: str, rank: int) -> Tuple[List[Any], List[Any]]:
    # An element is a multiple of 2**(e - 6), at most 127 of them, e being the exponent of the
    # block's largest magnitude. To find e, the number of powers of two that are reached is
    # counted: exact, where a logarithm is not.
    powers = np.ldexp(np.float32(1), np.arange(-126, 128))
    constants = {
        "powers": powers,
        "steps": np.ldexp(np.concatenate([powers[:1], powers]), -6),
        "blocks": np.array([0] * (rank - 1) + [-1, mxint8.BLOCK]),
        "limit": np.float32(127),
        "minus": np.float32(-127),
        "axes": np.array([-1]),
        "one": np.array([1]),
    }

    def name(key: str) -> str:
        return f"{target}/{key}"

    def node(kind: str, inputs: str, outputs: str, **attributes: int) -> Any:
        made = [name(key) for key in outputs.split()]
        return helper.make_node(
            kind, [name(k) for k in inputs.split()], made, made[0], **attributes
        )

    made = [
        helper.make_node("Identity", [source], [name("whole")]),
        node("Shape", "whole", "shape"),
        node("Reshape", "whole blocks", "x"),
        node("Abs", "x", "magnitude"),
        # TopK is a maximum whose form is the same in every opset.
        node("TopK", "magnitude one", "largest index", axis=-1),
        node("GreaterOrEqual", "largest powers", "reached"),
        node("Cast", "reached", "counted", to=TensorProto.INT64),
        node("ReduceSum", "counted axes", "exponent", keepdims=1),
        node("Gather", "steps exponent", "step"),
        node("Div", "x step", "scaled"),
        node("Round", "scaled", "rounded"),
        node("Clip", "rounded minus limit", "cut"),
        node("Mul", "cut step", "back"),
        node("Reshape", "back shape", "result"),
        helper.make_node("Identity", [name("result")], [target]),
    ]
    return made, [numpy_helper.from_array(a, name(k)) for k, a in constants.items()]
