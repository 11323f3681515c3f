"""Memory to the runtime and back: the two ways that qaicrt has had, behind the same two calls.

    PositionalBuffers   every SDK: one QBuffer a binding, and their dimensions; outputs are copied
    ListedBuffers       from Apps 1.20 on: (binding, array) for what changed; outputs land in place

Both set what does not change once and use it again. A binding that is neither given nor asked for
travels as nothing, which leaves it on the card: that is how the KV cache stays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qaic_ray.contract import Specialization
from qaic_ray.engine.interface import ProgramInterface

LISTED_SINCE = (1, 20)
"""First Apps version whose `setData` takes (binding, array) pairs."""

Array = npt.NDArray[Any]
Key = tuple[Specialization, tuple[str, ...]]

_NOTHING = (1, [0])


class Buffers(Protocol):
    """What a session asks for, around an execution."""

    def send(self, shape: Specialization, inputs: Mapping[str, Array]) -> Any:
        """Set everything for an execution in `shape`; the runtime's status."""

    def receive(self, shape: Specialization) -> tuple[Any, Array]:
        """Status and output of the execution; the array is good until the next `send`."""


@dataclass
class _Positions:
    """All bindings of one shape with one set of given inputs."""

    buffers: list[Any]
    dims: Any


class PositionalBuffers:
    """One QBuffer a binding, in the order of the bindings.

    Args:
        runtime: the qaicrt module.
        exec_obj: on which the buffers are set.
        interface: the program's bindings.
    """

    def __init__(self, runtime: ModuleType, exec_obj: Any, interface: ProgramInterface) -> None:
        self._rt = runtime
        self._exec_obj = exec_obj
        self._interface = interface
        self._prepared: dict[Key, _Positions] = {}
        self._reads_in_place = _has_buffer_protocol(runtime)

    def send(self, shape: Specialization, inputs: Mapping[str, Array]) -> Any:
        """See `Buffers.send`."""
        key = (shape, tuple(inputs))
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = self._prepare(shape, inputs)
        new_buffer, index, buffers = self._rt.QBuffer, self._interface.index, prepared.buffers
        for name, array in inputs.items():
            buffers[index[name]] = new_buffer(array.tobytes())
        return self._exec_obj.setData(buffers, prepared.dims)

    def receive(self, shape: Specialization) -> tuple[Any, Array]:
        """See `Buffers.receive`."""
        interface = self._interface
        status, results = self._exec_obj.getData()
        if status != self._rt.QStatus.QS_SUCCESS:
            return status, np.empty(0)
        buffer = results[interface.index[interface.output]]
        memory = buffer if self._reads_in_place else bytes(buffer)
        output = np.asarray(_Unlocked(np.frombuffer(memory, interface.dtype[interface.output])))
        return status, output.reshape(interface.output_dims[shape])

    def _prepare(self, shape: Specialization, inputs: Mapping[str, Array]) -> _Positions:
        interface, new_buffer = self._interface, self._rt.QBuffer
        given: dict[str, Array] = {**interface.lasting[shape], **inputs}
        given[interface.output] = np.zeros(
            interface.output_dims[shape], interface.dtype[interface.output]
        )
        buffers: list[Any] = [new_buffer(b"") for _ in range(interface.num_bindings)]
        dims: list[tuple[int, Any]] = [_NOTHING] * interface.num_bindings
        for name, array in given.items():
            at = interface.index[name]
            buffers[at] = new_buffer(array.tobytes())
            dims[at] = (array.itemsize, list(array.shape))
        return _Positions(buffers, self._rt.BufferDimensionsVecRef(dims))


class ListedBuffers:
    """Pairs of binding and array; what is not listed stays as it was set before.

    Args:
        exec_obj: on which the arrays are set.
        interface: the program's bindings.
        success: the runtime's status for it.
    """

    def __init__(self, exec_obj: Any, interface: ProgramInterface, success: Any) -> None:
        self._exec_obj = exec_obj
        self._interface = interface
        self._success = success
        self._last: Key | None = None
        dtype = interface.dtype[interface.output]
        self._outputs = {
            shape: np.zeros(dims, dtype) for shape, dims in interface.output_dims.items()
        }

    def send(self, shape: Specialization, inputs: Mapping[str, Array]) -> Any:
        """See `Buffers.send`."""
        index = self._interface.index
        entries = [(index[name], array) for name, array in inputs.items()]
        key = (shape, tuple(inputs))
        if key != self._last:
            entries += self._others(shape, inputs)
            self._last = key
        return self._exec_obj.setData(entries)

    def receive(self, shape: Specialization) -> tuple[Any, Array]:
        """See `Buffers.receive`; the runtime has written the array already."""
        return self._success, self._outputs[shape]

    def _others(
        self, shape: Specialization, inputs: Mapping[str, Array]
    ) -> list[tuple[int, Array]]:
        """Every binding that is not among the inputs of this execution."""
        interface = self._interface
        given: dict[str, Array] = {
            **interface.lasting[shape],
            interface.output: self._outputs[shape],
        }
        return [
            (at, given.get(name, np.zeros(0, interface.dtype[name])))
            for name, at in interface.index.items()
            if name not in inputs
        ]


class _Unlocked:
    """The same memory without the mark that it must not be written to.

    numpy's argmax copies an array that is so marked, which for logits costs more than finding the
    largest; nobody here writes to them.
    """

    def __init__(self, array: Array) -> None:
        self._array = array  # keeps the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _has_buffer_protocol(runtime: ModuleType) -> bool:
    """Whether a QBuffer can be read where it is; else `bytes(qbuffer)` makes a copy."""
    try:
        memoryview(runtime.QBuffer(b"\0"))
    except TypeError:
        return False
    return True
