"""A QPC loaded on a card through qaicrt: load, activate, execute, status -> error.

Only this file and `bindings.py` call qaicrt, and only as public programs do.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qaic_ray.bundles.record import BundleWriter, Recording
from qaic_ray.contract import Specialization
from qaic_ray.engine.bindings import (
    LISTED_SINCE,
    Array,
    Buffers,
    ListedBuffers,
    Output,
    PositionalBuffers,
    read_interface,
)
from qaic_ray.errors import DeviceBusy, DeviceError, DeviceLost, SdkNotFound, UsageError
from qaic_ray.sdk import Sdk

DATA_PATH_TIMEOUT_MS = 60_000
"""How long the runtime may wait for one inference; QEfficient's value."""

# Set in this process by the emulated SDK, as its documented sign.
_SIMULATED_TIME_VARIABLE = "QAIC_EMULATOR_TIMING_ACTIVE"

_BUSY = {"QS_NOMEM", "QS_NOSPC", "QS_BUSY"}
_LOST = {"QS_NODEV", "QS_DEV_ERROR"}
_UNSAID = "QS_ERROR"
"""Of load and activate: DRAM or NSPs that others hold, and all that has no status of its own."""

# The runtime's texts, from its sources and from logs of real cards.
_BUSY_TEXTS = ("NSP_ALLOC_FAILED", "allocate NSP", "Not enough NSPs", "suitable device")
_LOST_TEXTS = ("Failed to create Context", "Invalid Device")

_log = logging.getLogger(__name__)

Runtime = tuple[ModuleType, ModuleType]
StrPath = Path | str


class Session:
    """A program loaded and activated on one card or device group.

    Args:
        sdk: the SDK folder whose runtime is used.
        qpc: folder that holds programqpc.bin.
        device_ids: explicit ids; several mean one tensor-sliced program over a device group.
        runtime: the modules qaicrt and QAicApi_pb2, where not those of `sdk`.

    Raises:
        UsageError: when the QPC is not one of a language model we can run.
        DeviceBusy: when the card has too few NSPs or too little DRAM left.
        DeviceError: when the runtime refuses otherwise.
    """

    def __init__(
        self, sdk: Sdk, qpc: StrPath, device_ids: Iterable[int], *, runtime: Runtime | None = None
    ) -> None:
        self.device_ids = tuple(device_ids)
        self.qpc = Path(qpc)
        self._rt, api = runtime or load_runtime(sdk)
        # Each may stay None when a later call of the constructor fails: close() copes.
        self._program: Any = None
        self._exec_obj: Any = None
        self._buffers: Buffers | None = None
        self._bundle: BundleWriter | None = None
        self._label = sdk.label
        try:
            self._open(api, sdk.version)
        except BaseException:
            self.close()
            raise

    def _open(self, api: ModuleType, version: tuple[int, ...]) -> None:
        rt = self._rt
        with _runtime_errors(f"Cannot open {self.qpc} on device {self._devices_text}"):
            self._context = rt.Context(rt.QIDList(list(self.device_ids)))
            self._queue = rt.Queue(self._context, self.device_ids[0])
            program_file = rt.Qpc(str(self.qpc))
            status, descriptor = program_file.getIoDescriptor()
        self._check(status, "read the descriptor of")
        interface = read_interface(api, bytes(descriptor), self.qpc)
        self.contract = interface.contract
        self.specializations = interface.specializations
        self.emits_tokens = interface.emits_tokens
        self._interface = interface
        properties = _properties(rt, self.device_ids)
        single = self.device_ids[0] if len(self.device_ids) == 1 else None
        with _runtime_errors(f"Cannot load {self.qpc} on device {self._devices_text}"):
            self._program = rt.Program(self._context, single, program_file, properties)
            self._check(self._program.load(), "load", resource="DRAM")
            self._check(self._program.activate(), "activate", resource="NSPs")
            self._exec_obj = rt.ExecObj(self._context, self._program)
        if version >= LISTED_SINCE:
            self._buffers = ListedBuffers(self._exec_obj, interface, rt.QStatus.QS_SUCCESS)
        else:
            self._buffers = PositionalBuffers(rt, self._exec_obj, interface)

    def record(self, recording: Recording, role: str = "") -> None:
        """Dump the executions from here on, into a folder called by the cards below `recording`'s.

        Called before the first one, so that a program that was just activated replays them: what
        stays on the card is not dumped.

        Args:
            recording: how many, and where.
            role: of a program that is not the main one of its cards; the folder's name ends with
                it.

        Raises:
            UsageError: the folder cannot be made.
        """
        name = "-".join(["card", *map(str, self.device_ids), *filter(None, [role])])
        place = Path(recording.folder) / name
        facts = {"qpc": str(self.qpc), "sdk": self._label}
        try:
            self._bundle = BundleWriter(place, recording.most, facts)
        except OSError as error:
            raise UsageError(f"Cannot write {place}: {error.strerror}.") from error

    @property
    def simulated_time(self) -> str:
        """The emulated SDK's description of the time model that is on; empty for real times."""
        return os.environ.get(_SIMULATED_TIME_VARIABLE, "")

    @property
    def _devices_text(self) -> str:
        return ",".join(map(str, self.device_ids))

    def run(
        self,
        shape: Specialization,
        inputs: Mapping[str, Array],
        meanwhile: Callable[[], None] | None = None,
    ) -> Output:
        """Execute once.

        Args:
            shape: one of `specializations`.
            inputs: contiguous, in the bindings' dtypes; what is not among them (the KV cache, and
                a mask that stays on the card) is taken from the card.
            meanwhile: called while the card works.

        Returns:
            Logits [rows, tokens, vocab], or token ids [rows, tokens] of a program that
            `emits_tokens`; valid until the next run, and not to be written to.

        Raises:
            DeviceError: with the vendor's status and, for a refused shape, the shapes.
        """
        buffers, bundle = self._buffers, self._bundle
        assert buffers is not None, "the session is closed"
        if bundle is not None:
            given = {**self._interface.lasting[shape], **inputs}
            given = {name: np.array(array) for name, array in given.items()}
        with _runtime_errors(f"Cannot run {self.qpc} on device {self._devices_text}"):
            status = buffers.send(shape, inputs)
            self._check(status, "set the buffers of")
            self._check(self._queue.enqueue(self._exec_obj), "enqueue")
            if meanwhile is not None:
                meanwhile()
            self._check(self._exec_obj.waitForCompletion(), "run", shapes=inputs)
            status, output = buffers.receive(shape)
        self._check(status, "read the outputs of")
        if bundle is not None:
            self._dump(bundle, given, output)
        if self.emits_tokens:
            return output.reshape(output.shape[0], -1)
        return output if output.ndim == 3 else output[:, np.newaxis]

    def _dump(self, bundle: BundleWriter, given: Mapping[str, Array], output: Output) -> None:
        try:
            bundle.add(given, {self._interface.output: output})
        except OSError as error:
            _log.warning("Cannot record in %s: %s; no more is.", bundle.folder, error.strerror)
            bundle.close()
        if bundle.is_full:
            self._bundle = None

    @property
    def vocab_size(self) -> int | None:
        """Width of the logits; None for a program of token ids."""
        if self.emits_tokens:
            return None
        return self._interface.output_dims[self.specializations.decode][-1]

    @property
    def keeps_prompt_logits(self) -> bool:
        """Whether every token of a prompt has logits, and not the last of a chunk alone."""
        dims = self._interface.output_dims
        columns = {shape: dims[shape][1] if len(dims[shape]) == 3 else 1 for shape in dims}
        return not self.emits_tokens and all(n == shape.seq_len for shape, n in columns.items())

    def input_dtype(self, name: str) -> np.dtype[np.generic]:
        """dtype of a binding."""
        return self._interface.dtype[name]

    def close(self) -> None:
        """Give the card back; safe to call twice, and after a constructor that failed."""
        self._buffers = None  # it holds the ExecObj too
        bundle, self._bundle = self._bundle, None
        if bundle is not None:
            bundle.close()
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
        shapes: Mapping[str, Array] | None = None,
        resource: str = "",
    ) -> None:
        """Raise for any status but success.

        Args:
            status: of the runtime.
            action: what it refused, for the message.
            shapes: the inputs of an execution, for the message.
            resource: what the call needs of the card; where the status does not say whether that
                is short, the card is asked.
        """
        if status == self._rt.QStatus.QS_SUCCESS:
            return
        name = getattr(status, "name", str(status))
        message = f"Device {self._devices_text} could not {action} {self.qpc}: {name}"
        kind: type[DeviceError] = DeviceError
        if name in _BUSY:
            kind = DeviceBusy
        elif name in _LOST:
            kind = DeviceLost
        elif resource and name == _UNSAID:
            kind, found = self._state(resource)
            message += f" ({found})"
        if shapes is not None:
            passed = {key: tuple(value.shape) for key, value in shapes.items()}
            message += f"; passed shapes {passed}"
        raise kind(message + ".", status=name)

    def _state(self, resource: str) -> tuple[type[DeviceError], str]:
        """Whether a card that refused without a reason is gone, full, or neither."""
        util, rt = self._rt.Util(), self._rt
        said = []
        is_free = True
        for qid in self.device_ids:
            status, info = util.getDeviceInfo(qid)
            if status != rt.QStatus.QS_SUCCESS or info.devStatus != rt.QDevStatus.QDS_READY:
                return DeviceLost, f"card {qid} is not ready"
            status, free = util.getResourceInfo(qid)
            if status != rt.QStatus.QS_SUCCESS:
                return DeviceLost, f"card {qid} does not tell what is free"
            said.append(f"card {qid} has {free.nspFree} of {free.nspTotal} NSPs free")
            is_free = is_free and free.nspFree == free.nspTotal
        if resource == "NSPs" and is_free:  # so another program is not the reason
            return DeviceError, ", ".join(said)
        return DeviceBusy, f"too little free {resource}, it seems: {', '.join(said)}"


@contextmanager
def _runtime_errors(what: str) -> Iterator[None]:
    """Border to qaicrt: its RuntimeErrors become ours, once, with the vendor's words kept."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        kind: type[DeviceError] = DeviceError
        if any(words in text for words in _BUSY_TEXTS):
            kind = DeviceBusy
        elif any(words in text for words in _LOST_TEXTS):
            kind = DeviceLost
        raise kind(f"{what}: {text}") from error


def load_runtime(sdk: Sdk) -> Runtime:
    """Import qaicrt and QAicApi_pb2 of an SDK; a process has those of one SDK.

    Raises:
        SdkNotFound: where they cannot be imported.
        UsageError: where they do not fit this process.
    """
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
