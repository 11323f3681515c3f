"""The compiled step of a program: where its weights are in the QPC, and whether there is one.

There is none without llvmlite, on a processor that has no kernels, and for a graph that the step
does not know; onnxruntime computes then. Why is said once.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, Dict, Mapping, Optional

import numpy as np
from onnx import TensorProto, numpy_helper

from ..kernels import machine
from ..numbers import panels
from ..step.fuse import NotFused, fuse
from .constants import Constant, panels_of, read_constant, stored_view

_log = logging.getLogger(__name__)

EXACT, FAST = "exact", "fast"
NUMERICS = (EXACT, FAST)
NUMERICS_VARIABLE = "QAIC_EMULATOR_NUMERICS"
KERNELS_VARIABLE = "QAIC_EMULATOR_KERNELS"
"""`step`, or `onnxruntime` to do without the compiled step."""

_ALIGN = 64


def numerics_of_environment(otherwise: str = EXACT) -> str:
    """What `QAIC_EMULATOR_NUMERICS` says, `exact` or `fast`; else what the SDK was made for.

    Raises:
        ValueError: where it says anything else.
    """
    text = os.environ.get(NUMERICS_VARIABLE) or otherwise
    if text not in NUMERICS:
        raise ValueError(f"{NUMERICS_VARIABLE} is {text!r}: give exact or fast")
    return text


def planes_of(numerics: str) -> int:
    """Planes of 8 bits of an activation that meets an MXFP6 weight; 0 for float32 as it is."""
    target = machine.processor()
    if target is None:
        return 0
    if numerics == FAST:
        if not target.multiplies_bytes:
            _say_once("this processor has no kernel for 8-bit activations; it computes exactly")
        return 1 if target.multiplies_bytes else 0
    # Three planes are as fine as float32, and quicker where four bytes are multiplied at once.
    return 3 if target.kind == machine.AVX512 else 0


def make_kernels() -> None:
    """Compile the kernels of this machine now, where that was not done, so that no card has to."""
    if os.environ.get(KERNELS_VARIABLE) != "onnxruntime" and machine.processor() is not None:
        from ..kernels.native import step_function

        step_function()


def open_step(
    name: str, model: Any, constants: Mapping[str, Constant], segment: Any, *,
    roundings: Mapping[str, str], numerics: str, digest: str,
) -> Optional[Any]:  # fmt: skip
    """A `StepProgram` of a lowered model, or None; `digest` is the QPC's."""
    if os.environ.get(KERNELS_VARIABLE) == "onnxruntime":
        return None
    if machine.processor() is None:
        _say_once("no compiled kernels here (llvmlite is missing, or this processor has none)")
        return None
    try:
        fused = fuse(model, roundings)
    except NotFused as reason:
        _log.warning("%s runs without the compiled step: %s", name, reason)
        return None
    from ..step.choice import most_packed
    from ..step.program import StepProgram

    source = _StepConstants(model, constants, segment)
    program = StepProgram(fused, source.weight, source.table, planes_of(numerics))
    program.most_packed = most_packed(program, digest)
    return program


@functools.lru_cache(maxsize=None)
def _say_once(text: str) -> None:
    _log.warning("emulated cards: %s", text)


class _StepConstants:
    def __init__(self, model: Any, constants: Mapping[str, Constant], segment: Any) -> None:
        self._inline: Dict[str, Any] = {t.name: t for t in model.graph.initializer}
        self._constants = constants
        self._segment = segment

    def weight(self, name: str) -> Any:
        """Panels of a MatMul's weight: those of the QPC, or made of what lies otherwise."""
        from ..step.program import Weight

        constant = self._constants.get(name)
        if constant is not None and constant.in_panels and not constant.transposed:
            return Weight(panels_of(self._segment, constant), constant.kind, constant.shape[0])
        made = panels.of_floats(np.asarray(self._array(name), np.float32))
        room = np.empty(made.nbytes + _ALIGN, np.uint8)
        start = -room.ctypes.data % _ALIGN
        aligned = room[start : start + made.nbytes].reshape(len(made), -1)
        aligned[:] = made.view(np.uint8).reshape(aligned.shape)
        return Weight(aligned, "float32", made.shape[1])

    def table(self, name: str) -> Any:
        """Any other constant: float16 where it is looked up as it is stored, else float32."""
        constant = self._constants.get(name)
        if constant is not None and self._inline[name].data_type == TensorProto.FLOAT16:
            return stored_view(self._segment, constant)
        return np.asarray(self._array(name), np.float32)

    def _array(self, name: str) -> Any:
        constant = self._constants.get(name)
        if constant is None:
            return numpy_helper.to_array(self._inline[name])
        return read_constant(self._segment, constant)
