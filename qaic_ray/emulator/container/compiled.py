"""A parsed QPC: its bindings, specializations and states, and its constants as they lie on disk."""

from __future__ import annotations

import hashlib
import os
from typing import Any, Sequence

from . import (
    CONSTANTS,
    CONSTANTS_DESC,
    INTEGRITY,
    NETWORK,
    NETWORK_DESC,
    ConstantsDesc,
    Container,
    QpcError,
    aicapi,
    netdesc,
    network,
)


class CompiledProgram:
    """A parsed, validated program; its constants are memory-mapped, not read.

    Attributes:
        bindings: inputs then outputs, in the compiler's own order inside each kind.
        dma_buffers: what carries them between host and card.
        allowed_shapes: per specialization (type, dims) in binding order; empty when there is one.
        states: retained input -> its output.
        constants_bytes: DRAM that loading takes.
        activation_bytes: DRAM that an activation takes on top: its states and its buffers.
    """

    def __init__(self, container: Container) -> None:
        self.path = container.path
        if INTEGRITY not in container.segments:
            raise network.refusal(bytes(container.segment(NETWORK)))
        container.check([NETWORK, NETWORK_DESC, CONSTANTS_DESC])
        described = netdesc.parse(bytes(container.segment(NETWORK_DESC)))
        self._container = container
        self.program = network.parse(bytes(container.segment(NETWORK)))
        self.name = described.name
        self.num_cores = described.num_cores
        self.num_devices = self.program.num_devices
        self.apps_version = self.program.apps_version
        self.hardware = self.program.hardware
        self.convert_to_fp16 = self.program.convert_to_fp16
        self.mxfp6_matmul = self.program.mxfp6_matmul
        self.states = self.program.states
        self.graphs = self.program.graphs
        self.allowed_shapes = described.allowed_shapes
        self.bindings = described.bindings()
        self.dma_buffers = described.dma_buffers()
        self._check_states()
        self.constants_bytes = len(container.segment(CONSTANTS))
        self._check_constants()
        kept = set(self.states.values())
        self.activation_bytes = sum(b.size for b in self.bindings if b.name not in kept)

    @classmethod
    def open(cls, path: str) -> CompiledProgram:
        """Open a QPC folder or file.

        Raises:
            QpcError: where there is none, or it is damaged.
        """
        return cls(Container(os.fspath(path)))

    def _check_states(self) -> None:
        inputs = {b.name for b in self.bindings if b.is_input}
        outputs = {b.name for b in self.bindings if not b.is_input}
        if inputs != set(self.program.input_kinds):
            raise QpcError(f"{self.path} has other inputs than its graph")
        if not (set(self.states) <= inputs and set(self.states.values()) <= outputs):
            raise QpcError(f"{self.path} retains a state that it has no binding for")

    def _check_constants(self) -> None:
        desc = ConstantsDesc.parse(bytes(self._container.segment(CONSTANTS_DESC)))
        if sum(desc) != self.constants_bytes:
            raise QpcError(f"{self.path} has {self.constants_bytes} bytes of constants, not {desc}")

    def digest(self) -> str:
        """What tells this program from any other."""
        parts = hashlib.sha256(self._container.segment(NETWORK))
        parts.update(bytes(self._container.segment(INTEGRITY)))
        return parts.hexdigest()

    def constants_segment(self) -> Any:
        """The bytes of `constants.bin`, memory-mapped."""
        return self._container.segment(CONSTANTS)

    def io_descriptor(self) -> bytes:
        """A serialized `aicapi.IoDesc`, byte for byte what the open runtime makes of this QPC."""
        desc = aicapi.IoDesc()
        default = desc.io_sets.add(name="default")
        for b in self.bindings:
            _add_binding(default, b, b.dims)
        desc.selected_set.CopyFrom(default)
        carried = desc.io_sets.add(name="dma") if self.dma_buffers else None
        numbers = {buffer.binding: number for number, buffer in enumerate(self.dma_buffers)}
        for b in self.bindings if carried else ():
            number = numbers.get(b.index)
            if number is None:
                _add_binding(carried, b, b.dims).is_valid = False
                continue
            binding = _add_binding(carried, b, self.dma_buffers[number].dims)
            binding.dma_buf_info.add(dma_buf_index=number, dma_size=b.size)
        for number, buffer in enumerate(self.dma_buffers):
            desc.dma_buf.add(index=number, size=buffer.size, dir=int(not buffer.is_input))
        for shapes in self.allowed_shapes:
            entry = desc.allowed_shapes.add()
            for type_, dims in shapes:
                entry.shapes.add(type=type_, dims=dims)
        return bytes(desc.SerializeToString())


def _add_binding(io_set: Any, b: netdesc.Binding, dims: Sequence[int]) -> Any:
    return io_set.bindings.add(
        name=b.name,
        index=b.index,
        type=b.type,
        dir=aicapi.BUFFER_IO_TYPE_INPUT if b.is_input else aicapi.BUFFER_IO_TYPE_OUTPUT,
        quant_scale=1.0,
        dims=dims,
        size=b.size & 0xFFFFFFFF,
        is_partial_buf_allowed=b.is_partial_buf_allowed,
        is_valid=True,
    )
