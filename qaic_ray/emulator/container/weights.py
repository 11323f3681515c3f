"""Weights of a loaded program in memory, and the onnxruntime sessions over them.

A weight that only ever is a MatMul's right operand is packed by onnxruntime into a copy of its
own; what it was packed from is then given back to the system. A float16 table that is only
looked up in stays a view of the file. Knows nothing of activations.
"""

from __future__ import annotations

import functools
import math
import mmap
from typing import Any, Dict, List, Mapping, Set

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from ..lowering.view import ORT_ERRORS
from . import QpcError
from .constants import Constant, read_constant, stored_view


class Weights:
    """Decoded constants of one graph.

    Args:
        model: a graph whose initializers without bytes are constants.
        constants: the table of them, by name.
        segment: the bytes of `constants.bin`, memory-mapped.
    """

    def __init__(self, model: Any, constants: Mapping[str, Constant], segment: Any) -> None:
        self._constants = constants
        self._segment = segment
        self._packed = _packed_by_onnxruntime(model)
        self._maps: Dict[str, mmap.mmap] = {}
        self.arrays: Dict[str, Any] = {}
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                self.arrays[tensor.name] = self._load(tensor.name, tensor.data_type)

    def _load(self, name: str, data_type: int) -> Any:
        constant = self._constants[name]
        view = stored_view(self._segment, constant)
        dtype = helper.tensor_dtype_to_np_dtype(data_type)
        if view is not None and view.dtype == dtype:
            return view
        if name not in self._packed:
            return read_constant(self._segment, constant)
        size = math.prod(constant.shape) * dtype.itemsize
        self._maps[name] = mmap.mmap(-1, size)
        out = np.frombuffer(self._maps[name], dtype).reshape(constant.shape)
        return read_constant(self._segment, constant, out)

    def release(self) -> None:
        """Give the memory of packed weights back; their arrays read as zeros from now on."""
        for memory in self._maps.values():
            memory.madvise(mmap.MADV_DONTNEED)

    def restore(self) -> None:
        """Undo `release`."""
        for name in self._maps:
            read_constant(self._segment, self._constants[name], self.arrays[name])

    def session(self, model: Any, num_threads: int) -> Any:
        """An onnxruntime session over these weights; they have to live as long as it."""
        return _open(model, _options(num_threads), self.arrays)


def _options(num_threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open(model: Any, options: Any, arrays: Mapping[str, Any]) -> Any:
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except ORT_ERRORS as error:
        raise QpcError(f"the graph cannot run here: {error}") from error


@functools.lru_cache(maxsize=None)
def packs_into_its_own_memory() -> bool:
    """Whether this onnxruntime no longer reads a MatMul weight once a session is made: tried."""
    weight = np.ones((64, 64), np.float32)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w")
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "matmul", infos[:1], infos[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = _open(model, _options(1), {"w": weight})
    weight[:] = 0
    return bool(np.all(session.run(None, {"x": np.ones((1, 64), np.float32)})[0] == 64))


def _packed_by_onnxruntime(model: Any) -> Set[str]:
    uses: Dict[str, List[bool]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            fits = node.op_type == "MatMul" and not node.domain and position == 1
            uses.setdefault(name, []).append(fits)
    return {
        t.name
        for t in model.graph.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and all(uses.get(t.name, [False]))
    }
