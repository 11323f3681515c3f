"""A QPC loaded on a card through qaicrt: bindings, buffers, retained state, status -> error.

The only file that touches qaicrt, and only with calls that public programs make. Knows shapes and
dtypes; knows nothing of sequences or text. The KV cache never leaves the card: its bindings travel
as zero-size buffers, in and out.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qaic_ray import contract
from qaic_ray.contract import IoContract, Specialization, Specializations
from qaic_ray.errors import DeviceBusy, DeviceError, DeviceLost, SdkNotFound, UsageError
from qaic_ray.sdk import Sdk

DATA_PATH_TIMEOUT_MS = 60_000
"""How long the runtime may wait for one inference; QEfficient's value."""

# Set in this process by the emulated SDK, as its documented sign.
_SIMULATED_TIME_VARIABLE = "QAIC_EMULATOR_TIMING_ACTIVE"

_BUSY = {"QS_NOMEM", "QS_NOSPC", "QS_BUSY"}
_LOST = {"QS_NODEV", "QS_DEV_ERROR"}
_NO_NSPS = "too few free NSPs"

# QAicApi's element types; BFLOAT16 (11) is missing from older modules.
_DTYPES: dict[str, Any] = {
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

_INPUTS = {
    contract.INPUT_IDS,
    contract.POSITION_IDS,
    contract.BATCH_INDEX,
    contract.ATTENTION_MASK,
    contract.CACHE_INDEX,
}

Array = npt.NDArray[Any]
_BYTES: np.dtype[Any] = np.dtype(np.uint8)
_NOTHING = (1, [0])


class Session:
    """A program loaded and activated on one card or device group.

    Args:
        sdk: the SDK folder whose runtime is used.
        qpc: folder that holds programqpc.bin.
        device_ids: explicit ids; several mean one tensor-sliced program over a device group.

    Raises:
        UsageError: when the QPC is not one of a language model we can run.
        DeviceBusy: when the card has too few NSPs or too little DRAM left.
        DeviceError: when the runtime refuses otherwise.
    """

    def __init__(self, sdk: Sdk, qpc: Path, device_ids: Iterable[int]) -> None:
        self.device_ids = tuple(device_ids)
        self.qpc = qpc
        self._rt, api = _import_runtime(sdk)
        # Each may stay None when a later call of the constructor fails: close() copes.
        self._program: Any = None
        self._exec_obj: Any = None
        try:
            self._open(api)
        except BaseException:
            self.close()
            raise

    def _open(self, api: ModuleType) -> None:
        rt = self._rt
        with _runtime_errors(f"Cannot open {self.qpc} on device {self._devices_text}"):
            self._context = rt.Context(rt.QIDList(list(self.device_ids)))
            self._queue = rt.Queue(self._context, self.device_ids[0])
            program_file = rt.Qpc(str(self.qpc))
            status, descriptor = program_file.getIoDescriptor()
        self._check(status, "read the descriptor of")
        self._describe(api, descriptor)
        properties = _properties(rt, self.device_ids)
        single = self.device_ids[0] if len(self.device_ids) == 1 else None
        with _runtime_errors(f"Cannot load {self.qpc} on device {self._devices_text}"):
            self._program = rt.Program(self._context, single, program_file, properties)
            self._check(self._program.load(), "load", busy="too little free DRAM")
            self._check(self._program.activate(), "activate", busy=_NO_NSPS)
            self._exec_obj = rt.ExecObj(self._context, self._program)

    def _describe(self, api: ModuleType, descriptor: Any) -> None:
        io = api.IoDesc()
        io.ParseFromString(bytes(descriptor))
        bindings = list(io.selected_set.bindings)
        dtypes = {
            getattr(api, name): np.dtype(kind)
            for name, kind in _DTYPES.items()
            if hasattr(api, name)
        }
        self._index = {b.name: b.index for b in bindings}
        self._dtype: dict[str, np.dtype[Any]] = {
            b.name: dtypes.get(b.type, _BYTES) for b in bindings
        }
        self._num_bindings = max(self._index.values(), default=-1) + 1
        shapes = [
            {b.name: tuple(entry.shapes[b.index].dims) for b in bindings}
            for entry in io.allowed_shapes
        ] or [{b.name: tuple(b.dims) for b in bindings}]
        self.contract = _contract(self._index, self.qpc)
        _refuse_unknown_inputs(
            [b.name for b in bindings if b.dir == api.BUFFER_IO_TYPE_INPUT], self.qpc
        )
        self._shapes = {_seq_len(shape, self.qpc): shape for shape in shapes}
        self.specializations = Specializations(
            tuple(_specialization(shape) for shape in self._shapes.values())
        )
        self.vocab_size = shapes[0][contract.LOGITS][-1]
        self._slots = {seq_len: self._buffers(shape) for seq_len, shape in self._shapes.items()}

    def _buffers(self, shape: Mapping[str, tuple[int, ...]]) -> tuple[list[Any], Any]:
        """Buffers and dims of one specialization: nothing for what stays on the card."""
        rt = self._rt
        buffers: list[Any] = [rt.QBuffer(b"") for _ in range(self._num_bindings)]
        dims: list[tuple[int, Any]] = [_NOTHING] * self._num_bindings
        for name, index in self._index.items():
            if not contract.is_past(name):
                size = self._dtype[name].itemsize
                buffers[index] = rt.QBuffer(bytes(size * int(np.prod(shape[name]))))
                dims[index] = (size, list(shape[name]))
        return buffers, rt.BufferDimensionsVecRef(dims)

    @property
    def prefill_rows(self) -> int:
        """Rows of the prefill shape."""
        return self.specializations.prefill.batch_size

    @property
    def simulated_time(self) -> str:
        """What the emulated SDK says of a time model that is on; empty for real times."""
        return os.environ.get(_SIMULATED_TIME_VARIABLE, "")

    @property
    def _devices_text(self) -> str:
        return ",".join(map(str, self.device_ids))

    def run(self, seq_len: int, inputs: Mapping[str, Array], output: str) -> Array:
        """Execute once in the specialization of `seq_len`.

        Args:
            seq_len: 1 for decode, the prompt length for prefill.
            inputs: every input but the KV cache, in the binding's shape and dtype.
            output: name of the output to bring back.

        Returns:
            The output, shaped as the specialization says; read-only memory of the runtime.

        Raises:
            DeviceError: with the vendor's status and, for a refused shape, both shapes.
        """
        rt = self._rt
        buffers, dims = self._slots[seq_len]
        for name, array in inputs.items():
            buffers[self._index[name]] = rt.QBuffer(array.tobytes())
        with _runtime_errors(f"Cannot run {self.qpc} on device {self._devices_text}"):
            self._check(self._exec_obj.setData(buffers, dims), "set the buffers of")
            self._check(self._queue.enqueue(self._exec_obj), "enqueue")
            self._check(self._exec_obj.waitForCompletion(), "run", shapes=inputs)
            status, results = self._exec_obj.getData()
        self._check(status, "read the outputs of")
        raw = np.frombuffer(bytes(results[self._index[output]]), dtype=self._dtype[output])
        return raw.reshape(self._shapes[seq_len][output])

    def input_dtype(self, name: str) -> np.dtype[Any]:
        """dtype of a binding."""
        return self._dtype[name]

    def close(self) -> None:
        """Give the card back; safe to call twice, and after a constructor that failed."""
        self._exec_obj = None  # the runtime refuses to deactivate under a live ExecObj
        program, self._program = self._program, None
        if program is not None:
            # Statuses are not looked at: the runtime frees the card with the process anyway.
            program.deactivate()
            program.unload()

    def _check(
        self,
        status: Any,
        action: str,
        *,
        busy: str = "",
        shapes: Mapping[str, Array] | None = None,
    ) -> None:
        if status == self._rt.QStatus.QS_SUCCESS:
            return
        name = getattr(status, "name", str(status))
        message = f"Device {self._devices_text} could not {action} {self.qpc}: {name}"
        if busy:
            message += f" (the card may have {busy})"
        if shapes is not None:
            passed = {key: tuple(value.shape) for key, value in shapes.items()}
            message += f"; passed shapes {passed}"
        kind = _error_kind(name, busy)
        raise kind(message + ".", status=name)


def _error_kind(status: str, busy: str) -> type[DeviceError]:
    if busy or status in _BUSY:
        return DeviceBusy
    return DeviceLost if status in _LOST else DeviceError


@contextmanager
def _runtime_errors(what: str) -> Iterator[None]:
    """Border to qaicrt: its RuntimeErrors become ours, once, with the vendor's words kept."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        busy = "NSP" in text or "suitable device" in text
        raise (DeviceBusy if busy else DeviceError)(f"{what}: {text}") from error


def _import_runtime(sdk: Sdk) -> tuple[ModuleType, ModuleType]:
    for path in map(str, sdk.python_paths):
        if path not in sys.path:
            sys.path.append(path)
    try:
        runtime = importlib.import_module("qaicrt")
        api = importlib.import_module("QAicApi_pb2")
    except ImportError as error:
        raise SdkNotFound(
            f"The runtime of the SDK at {sdk.root} cannot be imported: {error}."
        ) from error
    except TypeError as error:  # protoc-generated code older than the protobuf package
        raise UsageError(
            "QAicApi_pb2 of this SDK needs an older protobuf: set "
            "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python, or install protobuf 3.20."
        ) from error
    origin = Path(str(runtime.__file__)).resolve()
    if sdk.root not in origin.parents:
        raise UsageError(
            f"This process has already loaded qaicrt from {origin.parent}, not from {sdk.root}: "
            "use one SDK in a process."
        )
    return runtime, api


def _properties(rt: ModuleType, device_ids: tuple[int, ...]) -> Any:
    properties = rt.QAicProgramProperties()
    # The attribute changed its name with Apps 1.22, and pybind refuses unknown ones.
    if hasattr(properties, "dataPathTimeoutMs"):
        properties.dataPathTimeoutMs = DATA_PATH_TIMEOUT_MS
    else:
        properties.SubmitRetryTimeoutMs = DATA_PATH_TIMEOUT_MS
    if len(device_ids) > 1:
        properties.devMapping = ":".join(map(str, device_ids))
    return properties


def _contract(index: Mapping[str, int], qpc: Path) -> IoContract:
    needed = {contract.INPUT_IDS, contract.POSITION_IDS, contract.past_key(0), contract.LOGITS}
    missing = sorted(needed - set(index))
    if missing:
        raise UsageError(
            f"{qpc} is not the QPC of a language model this tool runs: "
            f"it has no binding {' or '.join(missing)}."
        )
    if contract.CACHE_INDEX in index:
        return IoContract.CACHE_INDEX
    return IoContract.POSITION_IDS


def _refuse_unknown_inputs(names: Iterable[str], qpc: Path) -> None:
    unknown = [name for name in names if name not in _INPUTS and not contract.is_past(name)]
    if unknown:
        raise UsageError(
            f"{qpc} has the input {' and '.join(unknown)}, which this tool does not feed: export "
            "without what adds it."
        )


def _seq_len(shape: Mapping[str, tuple[int, ...]], qpc: Path) -> int:
    dims = shape[contract.INPUT_IDS]
    if len(dims) != 2:
        raise UsageError(f"{qpc}: input_ids must be [batch, seq_len], not {dims}.")
    return dims[1]


def _specialization(shape: Mapping[str, tuple[int, ...]]) -> Specialization:
    batch_size, seq_len = shape[contract.INPUT_IDS]
    slots, _, ctx_len, _ = shape[contract.past_key(0)]
    continuous = contract.BATCH_INDEX in shape
    return Specialization(batch_size, seq_len, ctx_len, slots if continuous else None)
