"""A program of the vendor's API: the calls of the public LLM clients, in their order."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

TYPES = {
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


class Sdk:
    """The modules and commands of an installed SDK folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.qaicrt = _load(root / "dev" / "lib" / platform.machine() / "qaicrt.py")
        self.aicapi = _load(root / "dev" / "python" / "QAicApi_pb2.py")

    def compile(self, command: str, *argv: str, cwd: Path) -> None:
        """Run the compiler; its log is in the error when it fails."""
        done = subprocess.run(
            [str(self.root / "exec" / command), *argv],
            capture_output=True,
            text=True,
            cwd=cwd,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def _load(path: Path) -> ModuleType:
    name = f"{path.stem}_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Session:
    """A loaded QPC.

    `device_ids` empty lets the runtime choose. The clients differ in the name of the `timeout` and
    in whether they give Program the id of a single device.
    """

    def __init__(
        self,
        sdk: Sdk,
        qpc: Path,
        device_ids: list[int],
        *,
        timeout: str = "SubmitRetryTimeoutMs",
        names_device: bool = False,
    ) -> None:
        rt, api = sdk.qaicrt, sdk.aicapi
        self._success = rt.QStatus.QS_SUCCESS
        self._rt = rt
        if device_ids:
            self._context = rt.Context(rt.QIDList(device_ids))
        else:
            self._context = rt.Context()
        self._queue = rt.Queue(self._context, device_ids[0] if device_ids else 0)
        container = rt.Qpc(str(qpc))
        status, data = container.getIoDescriptor()
        assert status == self._success
        descriptor = api.IoDesc()
        descriptor.ParseFromString(bytes(data))
        self._dtypes = {getattr(api, name): np.dtype(kind) for name, kind in TYPES.items()}
        self.bindings = descriptor.selected_set.bindings
        self.index = {b.name: b.index for b in self.bindings}
        self.allowed_shapes = [
            [(self._dtypes[s.type].itemsize, list(s.dims)) for s in entry.shapes]
            for entry in descriptor.allowed_shapes
        ]
        self._is_input = {b.name: b.dir == api.BUFFER_IO_TYPE_INPUT for b in self.bindings}
        properties = rt.QAicProgramProperties()
        setattr(properties, timeout, 60_000)
        if len(device_ids) > 1:
            properties.devMapping = ":".join(map(str, device_ids))
        single = device_ids[0] if names_device and len(device_ids) == 1 else None
        self._program = rt.Program(self._context, single, container, properties)
        assert self._program.load() == self._success
        self._program.activate()
        self._exec_obj = rt.ExecObj(self._context, self._program)
        self._buffers = [rt.QBuffer(bytes(b.size)) for b in self.bindings]
        self.dims = rt.BufferDimensionsVecRef(
            [(self._dtypes[b.type].itemsize, list(b.dims)) for b in self.bindings]
        )

    def close(self) -> None:
        """Give the card back."""
        del self._exec_obj
        assert self._program.deactivate() == self._success
        del self._program

    def names(self, *, inputs: bool) -> list[str]:
        """Names of all inputs, or of all outputs."""
        return [name for name, is_input in self._is_input.items() if is_input is inputs]

    def put(self, arrays: Mapping[str, Any]) -> None:
        """Set buffers; those of names that the program has not are left out, as clients do."""
        for name, array in arrays.items():
            if name in self.index:
                self._buffers[self.index[name]] = self._rt.QBuffer(array.tobytes())
                self.dims[self.index[name]] = (array.itemsize, array.shape)

    def skip(self, names: Iterable[str]) -> None:
        """Leave buffers on the card."""
        self.put({name: np.array([]) for name in names})

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One inference; ValueError where its status says that it failed."""
        self.put(inputs)
        assert self._exec_obj.setData(self._buffers, self.dims) == self._success
        assert self._queue.enqueue(self._exec_obj) == self._success
        if self._exec_obj.waitForCompletion() != self._success:
            raise ValueError("Failed to run")
        status, results = self._exec_obj.getData()
        assert status == self._success
        outputs = {}
        for name in self.names(inputs=False):
            index = self.index[name]
            if self.dims[index][1][0] == 0:
                continue
            raw = np.frombuffer(bytes(results[index]), self._dtypes[self.bindings[index].type])
            outputs[name] = raw.reshape(self.dims[index][1])
        return outputs
