"""A parsed QPC: its bindings, specializations and states, and its constants as they lie on disk."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from . import (
    CONSTANTS,
    CONSTANTS_DESC,
    CRC,
    NETWORK,
    NETWORK_DESC,
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
        allowed_shapes: per specialization (type, dims) in binding order; empty when there is one.
        states: retained input -> its output.
        constants_bytes: DRAM that loading takes.
        activation_bytes: DRAM that an activation takes on top: its states and its buffers.
    """

    def __init__(self, container: Container) -> None:
        self.path = container.path
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
        self._check_states()
        self.constants_bytes = len(container.segment(CONSTANTS))
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

    def digest(self) -> str:
        """What tells this program from any other."""
        parts = hashlib.sha256(self._container.segment(NETWORK))
        parts.update(bytes(self._container.segment(CRC)))
        return parts.hexdigest()

    def constants_segment(self) -> Any:
        """The bytes of `constants.bin`, memory-mapped."""
        return self._container.segment(CONSTANTS)

    def io_descriptor(self) -> bytes:
        """A serialized `aicapi.IoDesc`."""
        desc = aicapi.IoDesc(program_name=self.name)
        default = desc.io_sets.add(name="default")
        for b in self.bindings:
            default.bindings.add(
                name=b.name,
                index=b.index,
                type=b.type,
                dir=aicapi.BUFFER_IO_TYPE_INPUT if b.is_input else aicapi.BUFFER_IO_TYPE_OUTPUT,
                quant_scale=1.0,
                dims=b.dims,
                size=b.size & 0xFFFFFFFF,
                is_partial_buf_allowed=b.is_partial_buf_allowed,
                is_valid=True,
            )
        desc.selected_set.CopyFrom(default)
        for shapes in self.allowed_shapes:
            entry = desc.allowed_shapes.add()
            for type_, dims in shapes:
                entry.shapes.add(type=type_, dims=dims)
        return bytes(desc.SerializeToString())
