"""What a card keeps of its KV cache: float16 or MXINT8; packing, and rounding as ONNX nodes.

MXINT8 (OCP MX 1.0): 32 values share a power of two, 33 bytes a block. An element is an 8-bit two's
complement number of 64ths, rounded to nearest, ties to even, cut at 127 (-128 is not used). The
exponent byte comes first.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from . import (
    EXPONENT_BIAS,
    NAN_EXPONENT,
    decode_blocks,
    encode_blocks,
    exponents,
    is_broken,
    magnitudes,
    scales,
)

FLOAT16 = "float16"
MXINT8 = "mxint8"

BLOCK = 32
BLOCK_BYTES = 33

_LIMIT = 127


def encode(x: Any) -> Any:
    """Pack along the last axis; returns uint8 [..., ceil(n / 32), 33]."""
    return encode_blocks(x, BLOCK, BLOCK_BYTES, _encode)


def decode(packed: Any, n: int) -> Any:
    """Unpack into float32 [..., n]."""
    return decode_blocks(packed, n, BLOCK, _decode)


def quantize(x: Any) -> Any:
    """The float32 values that an array has as MXINT8."""
    return decode(encode(x), x.shape[-1])


def _encode(x: Any, out: Any) -> None:
    bits = magnitudes(x)
    largest = bits.max(axis=1)
    exponent = exponents(largest)
    broken = is_broken(largest)
    scaled = np.where(broken[:, None], np.float32(0), x)
    scaled *= np.ldexp(np.float32(1), -np.where(broken, 0, exponent))[:, None]
    scaled *= np.float32(64)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -_LIMIT, _LIMIT, out=scaled)
    exponent_bytes = exponent + EXPONENT_BIAS
    out[:, 0] = np.where(broken, NAN_EXPONENT, exponent_bytes)
    out[:, 1:] = scaled.astype(np.int8).view(np.uint8)


def _decode(packed: Any) -> Any:
    values = np.ascontiguousarray(packed[:, 1:]).view(np.int8).astype(np.float32)
    values *= np.float32(1 / 64)
    values *= scales(packed[:, 0])[:, None]
    return values


def rounding_nodes(kind: str, source: str, target: str, rank: int) -> Tuple[List[Any], List[Any]]:
    """Nodes and initializers that round float32 `source` [rank dims] to `kind` and back.

    `kind` is `FLOAT16` or `MXINT8`; MXINT8 has its blocks of 32 along the last axis.
    """
    if kind == FLOAT16:
        return _round_float16(source, target), []
    return _round_mxint8(source, target, rank)


def rounded(kind: Optional[str], values: Any) -> Any:
    """An array rounded to `kind` (None: as it is), as `rounding_nodes` does."""
    if kind == FLOAT16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return quantize(values) if kind == MXINT8 else values


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
        "steps": np.ldexp(np.concatenate([powers[:1] / 2, powers]), -6),
        "blocks": np.array([0] * (rank - 1) + [-1, BLOCK]),
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
