"""A small fake of the seam to `execution.py`: a counter model that needs no ONNX and takes no time.

Inputs: input_ids (int64 [B,S]), past (float32 [B,C], retained). Outputs: logits (float32 [B,1,V])
and past_RetainedState. Each run adds the sum of a row's ids to its `past`, and logits are filled
with `past`'s first element.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qaic_ray.emulator.container import QpcError, aicapi
from qaic_ray.emulator.container.netdesc import Binding


class NoMatchingDimension(Exception):
    pass


class ShapeError(Exception):
    pass


def num_threads_of_environment() -> int:
    return 1


class CompiledProgram:
    """`open("cores=7,batch=2")`: the path is the configuration."""

    def __init__(self, **options: int) -> None:
        self.name = "counter"
        self.num_cores = options.get("cores", 14)
        self.num_devices = options.get("devices", 1)
        self.apps_version = "1.20"
        self.hardware = "ai100"
        self.batch = options.get("batch", 2)
        self.vocab = options.get("vocab", 8)
        self.constants_bytes = options.get("constants", 1 << 20)
        self.activation_bytes = options.get("activation", 1 << 20)
        self.num_specializations = options.get("specializations", 2)
        b, v = self.batch, self.vocab
        float_, int_ = aicapi.FLOAT_TYPE, aicapi.INT64_I_TYPE
        self.bindings = (
            Binding("past", 0, float_, True, (b, 4), b * 16, True),
            Binding("input_ids", 1, int_, True, (b, 8), b * 64, False),
            Binding("logits", 2, float_, False, (b, 1, v), b * v * 4, False),
            Binding("past_RetainedState", 3, float_, False, (b, 4), b * 16, True),
        )
        self.allowed_shapes: tuple[Any, ...] = ()
        if self.num_specializations > 1:
            self.allowed_shapes = tuple(
                ((float_, (b, 4)), (int_, (b, s)), (float_, (b, 1, v)), (float_, (b, 4)))
                for s in (8, 1)
            )

    @classmethod
    def open(cls, path: str) -> CompiledProgram:
        if path.startswith("missing"):
            raise FileNotFoundError(path)
        if path.startswith("damaged"):
            raise QpcError("bad magic")
        pairs = (part.split("=") for part in path.split(",") if part)
        return cls(**{key: int(value) for key, value in pairs})

    def io_descriptor(self) -> bytes:
        desc = aicapi.IoDesc(program_name=self.name)
        for b in self.bindings:
            desc.selected_set.bindings.add(
                name=b.name,
                index=b.index,
                type=b.type,
                dir=aicapi.BUFFER_IO_TYPE_INPUT if b.is_input else aicapi.BUFFER_IO_TYPE_OUTPUT,
                dims=b.dims,
                size=b.size,
                is_partial_buf_allowed=b.is_partial_buf_allowed,
            )
        for shapes in self.allowed_shapes:
            entry = desc.allowed_shapes.add()
            for type_, dims in shapes:
                entry.shapes.add(type=type_, dims=dims)
        return desc.SerializeToString()


class LoadedProgram:
    def __init__(self, qpc: CompiledProgram, num_threads: int, **_: object) -> None:
        self.qpc = qpc

    def activate(self) -> Activation:
        return Activation(self.qpc)


class Activation:
    def __init__(self, qpc: CompiledProgram) -> None:
        self._qpc = qpc
        self._out: dict[tuple[int, ...], np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        self._past = np.zeros((self._qpc.batch, 4), np.float32)

    def run(
        self, inputs: dict[str, np.ndarray], outputs: dict[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        ids = inputs["input_ids"]
        lengths = {8} if not self._qpc.allowed_shapes else {8, 1}
        if ids.shape[0] != self._qpc.batch or ids.shape[1] not in lengths:
            raise NoMatchingDimension("No matching dimension found")
        if "past" in inputs:
            self._past = np.array(inputs["past"])
        self._past = self._past + ids.sum(axis=1, keepdims=True, dtype=np.float32)
        results: dict[str, np.ndarray] = {}
        if "logits" in outputs:
            dims = (self._qpc.batch, 1, self._qpc.vocab)
            if outputs["logits"] != dims:
                raise ShapeError(f"logits are {dims}")
            results["logits"] = np.broadcast_to(self._past[:, :1, None], dims).copy()
        if "past_RetainedState" in outputs:
            results["past_RetainedState"] = self._past
        return results
