"""A QPC's bindings: what it says of them, and memory to them and back through qaicrt.

qaicrt has had two ways for memory, behind the same two calls here:

    PositionalBuffers   every SDK: one QBuffer a binding, and their dimensions; outputs are copied
    ListedBuffers       from Apps 1.20 on: (binding, array) for what changed; outputs land in place

Both set once what does not change. A binding that is neither given nor asked for is passed as
nothing, which leaves it on the card: that is how the KV cache stays there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray import contract
from qaic_ray.contract import IoContract, Specialization, Specializations
from qaic_ray.errors import UsageError

LISTED_SINCE = (1, 20)
"""First Apps version whose `setData` takes (binding, array) pairs."""

Array = npt.NDArray[np.generic]
Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]
Output = Logits | TokenIds
"""Of a program: logits [rows, columns, vocab], or the most likely token ids [rows, columns]."""
Dims = Mapping[str, tuple[int, ...]]

# QAicApi's element types; BFLOAT16 (11) is missing from older modules.
_DTYPES: dict[str, type[np.generic]] = {
    "FLOAT_TYPE": np.float32,
    "FLOAT_16_TYPE": np.float16,
    "INT8_Q_TYPE": np.int8,
    "UINT8_Q_TYPE": np.uint8,
    "INT16_Q_TYPE": np.int16,
    "INT32_Q_TYPE": np.int32,
    "INT32_I_TYPE": np.int32,
    "INT64_I_TYPE": np.int64,
    "INT8_TYPE": np.int8,
}
_BYTES: np.dtype[np.generic] = np.dtype(np.uint8)

# Inputs of which only the shape counts.
_LASTING = (contract.NUM_LOGITS_TO_KEEP, contract.COMP_CTX_LENGTHS)

_INPUTS = {
    contract.INPUT_IDS,
    contract.POSITION_IDS,
    contract.BATCH_INDEX,
    contract.ATTENTION_MASK,
    contract.CACHE_INDEX,
    *_LASTING,
}
Key = tuple[Specialization, tuple[str, ...]]

_NOTHING = (1, [0])


@dataclass(frozen=True)
class ProgramInterface:
    """The bindings of one program, by name.

    `output` is `logits` or `next_tokens`; `output_dims` has its shape in every specialization,
    `lasting` the inputs that are the same in every execution of one.
    """

    contract: IoContract
    specializations: Specializations
    index: dict[str, int]
    dtype: dict[str, np.dtype[np.generic]]
    output: str
    output_dims: dict[Specialization, tuple[int, ...]]
    lasting: dict[Specialization, dict[str, Array]]

    @property
    def num_bindings(self) -> int:
        """How many positions a list of all buffers has."""
        return max(self.index.values(), default=-1) + 1

    @property
    def emits_tokens(self) -> bool:
        """Whether the output is token ids in place of logits."""
        return self.output == contract.NEXT_TOKENS


def read_interface(api: ModuleType, descriptor: bytes, qpc: Path) -> ProgramInterface:
    """Read a program's descriptor.

    Args:
        api: the SDK's QAicApi_pb2.
        descriptor: a serialized IoDesc.
        qpc: named in errors.

    Raises:
        UsageError: when the program is not a language model that this tool can run.
        SpecializationError: when its shapes do not belong together.
    """
    io = api.IoDesc()
    io.ParseFromString(descriptor)
    bindings = list(io.selected_set.bindings)
    known = {
        getattr(api, name): np.dtype(kind) for name, kind in _DTYPES.items() if hasattr(api, name)
    }
    dtype = {b.name: known.get(b.type, _BYTES) for b in bindings}
    index = {b.name: b.index for b in bindings}
    inputs = [b.name for b in bindings if b.dir == api.BUFFER_IO_TYPE_INPUT]
    # A program of one specialization has no list of them.
    entries: list[Dims] = [
        {b.name: tuple(entry.shapes[b.index].dims) for b in bindings} for entry in io.allowed_shapes
    ] or [{b.name: tuple(b.dims) for b in bindings}]
    _check_bindings(index, inputs, qpc)
    is_lockstep = contract.CACHE_INDEX in index
    io_contract = IoContract.CACHE_INDEX if is_lockstep else IoContract.POSITION_IDS
    shapes = {_specialization(dims, qpc): dims for dims in entries}
    output = contract.NEXT_TOKENS if contract.NEXT_TOKENS in index else contract.LOGITS
    lasting = [name for name in _LASTING if name in index]
    return ProgramInterface(
        contract=io_contract,
        specializations=Specializations(tuple(shapes)),
        index=index,
        dtype=dtype,
        output=output,
        output_dims={shape: dims[output] for shape, dims in shapes.items()},
        lasting={
            shape: {name: np.zeros(dims[name], dtype[name]) for name in lasting}
            for shape, dims in shapes.items()
        },
    )


def _check_bindings(index: Mapping[str, int], inputs: Iterable[str], qpc: Path) -> None:
    needed = {contract.INPUT_IDS, contract.POSITION_IDS, contract.past_key(0)}
    missing = sorted(needed - set(index))
    if not {contract.LOGITS, contract.NEXT_TOKENS} & set(index):
        missing.append(contract.LOGITS)
    if missing:
        raise UsageError(
            f"{qpc} is not the QPC of a language model this tool runs: "
            f"it has no binding {' or '.join(missing)}."
        )
    unknown = [name for name in inputs if name not in _INPUTS and not contract.is_past(name)]
    if unknown:
        raise UsageError(
            f"{qpc} has the input {' and '.join(unknown)}, which this tool does not feed: export "
            "without what adds it."
        )


def _specialization(dims: Dims, qpc: Path) -> Specialization:
    ids = dims[contract.INPUT_IDS]
    if len(ids) != 2:
        raise UsageError(f"{qpc}: input_ids must be [batch, seq_len], not {ids}.")
    slots, _, ctx_len, _ = dims[contract.past_key(0)]
    kept, computed = dims.get(contract.NUM_LOGITS_TO_KEEP), dims.get(contract.COMP_CTX_LENGTHS)
    return Specialization(
        *ids,
        ctx_len,
        full_batch_size=slots if contract.BATCH_INDEX in dims else None,
        num_logits_to_keep=kept[0] if kept else None,
        comp_ctx_lengths=computed[0] if computed else None,
    )


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
        self._prepared: dict[Key, tuple[list[Any], Any]] = {}
        self._reads_in_place = _has_buffer_protocol(runtime)

    def send(self, shape: Specialization, inputs: Mapping[str, Array]) -> Any:
        """Set everything for an execution in `shape`; the runtime's status."""
        key = (shape, tuple(inputs))
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = self._prepare(shape, inputs)
        buffers, dims = prepared
        new_buffer, index = self._rt.QBuffer, self._interface.index
        for name, array in inputs.items():
            buffers[index[name]] = new_buffer(array.tobytes())
        return self._exec_obj.setData(buffers, dims)

    def receive(self, shape: Specialization) -> tuple[Any, Output]:
        """Status and output of the execution; the array is good until the next `send`."""
        interface = self._interface
        status, results = self._exec_obj.getData()
        if status != self._rt.QStatus.QS_SUCCESS:
            return status, np.empty(0, np.float32)
        buffer = results[interface.index[interface.output]]
        memory = buffer if self._reads_in_place else bytes(buffer)
        output = np.asarray(_Unlocked(np.frombuffer(memory, interface.dtype[interface.output])))
        return status, output.reshape(interface.output_dims[shape])

    def _prepare(self, shape: Specialization, inputs: Mapping[str, Array]) -> tuple[list[Any], Any]:
        """Buffers and dimensions of all bindings, for one shape and one set of inputs."""
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
        return buffers, self._rt.BufferDimensionsVecRef(dims)


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
        """See `PositionalBuffers.send`."""
        index = self._interface.index
        entries = [(index[name], array) for name, array in inputs.items()]
        key = (shape, tuple(inputs))
        if key != self._last:
            entries += self._others(shape, inputs)
            self._last = key
        return self._exec_obj.setData(entries)

    def receive(self, shape: Specialization) -> tuple[Any, Output]:
        """See `PositionalBuffers.receive`; the runtime has written the array already."""
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


Buffers = PositionalBuffers | ListedBuffers


class _Unlocked:
    """The same memory without the read-only flag; nothing here writes to it.

    numpy's argmax copies a read-only array, which for logits costs more than the search itself.
    """

    def __init__(self, array: Array) -> None:
        self._array = array  # keeps the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _has_buffer_protocol(runtime: ModuleType) -> bool:
    """Whether a QBuffer can be read in place; else `bytes(qbuffer)` copies it."""
    try:
        memoryview(runtime.QBuffer(b"\0"))
    except TypeError:
        return False
    return True
