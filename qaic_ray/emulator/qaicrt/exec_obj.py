"""`qaicrt.ExecObj` and `qaicrt.Queue`: buffers in, one inference, buffers out.

An ExecObj keeps references to the caller's memory; nothing is copied on the way in. A Queue runs
the inferences of one activation in the order in which they were enqueued.
"""

from __future__ import annotations

import math
import queue
import threading
import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..card import faults
from ..container.netdesc import Binding
from .buffers import (
    BufferDimensionsVecRef,
    Dimensions,
    QBuffer,
    SlicingSpec,
    SpecError,
    Wiring,
    wire,
)
from .context import Context, init_error
from .inference import Inference
from .program import Instance, Program
from .types import (
    DEFAULT_NUM_QUEUE_THREADS,
    Properties,
    QStatus,
    QueueProperties,
    incompatible,
    to_uint,
)

_EMPTY = QBuffer(b"")
_NO_DIMS: Tuple[int, ...] = (0,)


class ExecObj:
    """The buffers of one inference on an activated program; its lifetime is Python's."""

    def __init__(self, context: Context, program: Program, instance: int = 0) -> None:
        if not isinstance(context, Context) or not isinstance(program, Program):
            raise incompatible("ExecObj")
        program.enter_exec_obj()
        self._finalizer = weakref.finalize(self, program.leave_exec_obj)
        self._finalizer.atexit = False
        self.context = context
        self.program = program
        self.instance: Instance = program.instances[instance]
        bindings = program.qpc.bindings
        self._bindings = bindings
        self._buffers: List[Any] = [None] * len(bindings)
        self._dims: List[Optional[Dimensions]] = [None] * len(bindings)
        self._inputs: Dict[str, np.ndarray] = {}
        self._outputs: Dict[str, Tuple[int, ...]] = {}
        self._targets: Dict[str, np.ndarray] = {}
        self._wirings: List[Tuple[Binding, Wiring]] = []
        self._mismatched: Dict[str, str] = {}
        self._last: Optional[Inference] = None

    def setData(
        self, buffers: Sequence[Any], dimensions: Optional[BufferDimensionsVecRef] = None
    ) -> QStatus:
        """Take the buffers of the next inference.

        `buffers` is one QBuffer a binding (with `dimensions`, or each at its full size), or a list
        of `(binding index, array)` that changes only these bindings.
        """
        if not isinstance(buffers, (list, tuple)):
            raise incompatible("setData")
        if dimensions is not None and not isinstance(dimensions, BufferDimensionsVecRef):
            raise incompatible("setData")
        if not self.program.is_active:
            self.context.log.failure("setData: Invalid program state, not activated")
            return QStatus.QS_INVAL
        if buffers and isinstance(buffers[0], tuple):
            if self.context.machine.folder.version < (1, 20) or dimensions is not None:
                raise incompatible("setData")
            return self._set_listed(buffers)
        count = len(self._bindings)
        dims: Sequence[Optional[Dimensions]] = [None] * count if dimensions is None else dimensions
        if len(buffers) != count or len(dims) != count:
            self.context.log.failure(f"setData: {len(buffers)} buffers for {count} bindings")
            return QStatus.QS_INVAL
        for binding, buffer, dim in zip(self._bindings, buffers, dims):
            index = binding.index
            if buffer is self._buffers[index] and dim is self._dims[index]:
                continue
            if not isinstance(buffer, QBuffer):
                raise incompatible("setData")
            if not self._set_binding(binding, buffer, dim):
                return QStatus.QS_ERROR
        return QStatus.QS_SUCCESS

    def _set_binding(self, binding: Binding, buffer: QBuffer, dim: Optional[Dimensions]) -> bool:
        """Use `buffer` for a binding; False where it does not fit."""
        num_bytes = buffer.size
        if num_bytes == 0 or (dim is not None and 0 in dim[1]):
            if dim is None and not binding.is_partial_buf_allowed:
                self.context.log.failure(f"Partial buffer not allowed for: {binding.name}")
                return False
            self._forget(binding)
        elif num_bytes > binding.size:
            self._reject(binding, num_bytes, binding.size)
            return False
        elif dim is None:
            whole = self._whole(binding, buffer)
            if whole is None:
                return False
            buffer = whole
            self._use(binding, buffer, binding.dims, binding.dtype.itemsize)
        else:
            element_bytes, shape = dim
            expected = element_bytes * math.prod(shape)
            if num_bytes != expected:
                self._reject(binding, num_bytes, expected)
                return False
            self._use(binding, buffer, tuple(shape), element_bytes)
        self._buffers[binding.index] = buffer
        self._dims[binding.index] = dim
        return True

    def _whole(self, binding: Binding, buffer: QBuffer) -> Optional[QBuffer]:
        """The bytes on the card after `buffer`, which may be shorter, was sent to it."""
        if buffer.size == binding.size:
            return buffer
        if not binding.is_partial_buf_allowed:
            self.context.log.failure(f"Partial buffer not allowed for: {binding.name}")
            return None
        before = self._buffers[binding.index]
        keeps = before is not None and before.size == binding.size
        whole = QBuffer(np.array(before) if keeps else np.zeros(binding.size, np.uint8))
        whole[: buffer.size] = buffer
        return whole

    def _reject(self, binding: Binding, num_bytes: int, expected: int) -> None:
        self.context.log.failure(
            f"Unexpected buffer size at index {binding.index}, buffer size {num_bytes}, "
            f"expected size {expected}"
        )

    def _forget(self, binding: Binding) -> None:
        for table in (self._inputs, self._outputs, self._targets, self._mismatched):
            table.pop(binding.name, None)
        if binding.is_input and not binding.is_partial_buf_allowed:
            self._mismatched[binding.name] = f"Partial buffer not allowed for: {binding.name}"

    def _use(
        self, binding: Binding, data: np.ndarray, shape: Tuple[int, ...], element_bytes: int
    ) -> None:
        self._forget(binding)
        self._mismatched.pop(binding.name, None)
        if element_bytes != binding.dtype.itemsize:
            self._mismatched[binding.name] = "No matching dimension found"
        elif binding.is_input:
            self._inputs[binding.name] = data.view(np.ndarray).view(binding.dtype).reshape(shape)
        else:
            self._outputs[binding.name] = shape

    def _set_listed(self, entries: Sequence[Tuple[int, np.ndarray]]) -> QStatus:
        for index, array in self._checked(entries, "setData"):
            binding = self._bindings[index]
            if not array.flags.c_contiguous:
                raise incompatible("setData")
            if array.nbytes > binding.size:
                self._reject(binding, array.nbytes, binding.size)
                return QStatus.QS_ERROR
            self._buffers[index] = self._dims[index] = None
            if array.size == 0:
                self._forget(binding)
                continue
            if not binding.is_input and not array.flags.writeable:
                raise incompatible("setData")
            shape = array.shape or (1,)
            self._use(binding, array.reshape(-1).view(np.uint8), shape, array.itemsize)
            if not binding.is_input:
                self._targets[binding.name] = array
        return QStatus.QS_SUCCESS

    def _checked(
        self, entries: Sequence[Tuple[int, np.ndarray]], call: str
    ) -> List[Tuple[int, np.ndarray]]:
        for entry in entries:
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise incompatible(call)
            index, array = entry
            if not isinstance(array, np.ndarray):
                raise incompatible(call)
            if to_uint(index, call) >= len(self._bindings):
                raise incompatible(call)
        return list(entries)

    def setDataWithSlices(
        self,
        buffers: Sequence[Tuple[int, np.ndarray]],
        handle: SlicingSpec,
        parameters: Sequence[Tuple[str, int]],
    ) -> Tuple[QStatus, Optional[SlicingSpec]]:
        """Wire arrays to parts of the card's buffers, for the next inference only.

        Calls add up until then, so that several parts of one buffer can be wired. Bindings that
        the specification does not name are set whole, as with `setData`.
        """
        if not isinstance(handle, SlicingSpec):
            raise incompatible("setDataWithSlices")
        if not self.program.is_active:
            self.context.log.failure("setDataWithSlices: Invalid program state, not activated")
            return QStatus.QS_INVAL, None
        values = {name: to_uint(value, "setDataWithSlices") for name, value in parameters}
        whole = []
        for index, array in self._checked(buffers, "setDataWithSlices"):
            binding = self._bindings[index]
            spec = handle.find(binding.name)
            if spec is None or array.size == 0:
                whole.append((index, array))
                continue
            try:
                self._wirings.append((binding, wire(spec, array, binding.dims, values)))
            except SpecError as error:
                self.context.log.failure(f"{binding.name}: {error}")
                return QStatus.QS_INVAL, None
        return self._set_listed(whole), handle

    @property
    def last(self) -> Optional[Inference]:
        """The inference that was enqueued last; the emulator's own, not the vendor's."""
        return self._last

    def run(self, buffers: Optional[Sequence[QBuffer]] = None) -> QStatus:
        """Run one inference and wait for it, on `buffers` when given."""
        if buffers is not None:
            known = [dim for dim in self._dims if dim is not None]
            is_complete = len(known) == len(self._bindings)
            status = self.setData(buffers, BufferDimensionsVecRef(known) if is_complete else None)
            if status is not QStatus.QS_SUCCESS:
                return status
        status = self.submit()
        if status is not QStatus.QS_SUCCESS:
            return status
        self.instance.run_next()
        return self.waitForCompletion()

    def submit(self) -> QStatus:
        """Queue an inference with the present buffers on the activation."""
        if not self.program.is_active or self.instance not in self.program.instances:
            self.context.log.failure("Invalid program state, not activated")
            return QStatus.QS_INVAL
        if self._last is not None and not self._last.is_done:
            return QStatus.QS_BUSY
        machine = self.context.machine
        for firing in machine.faults.firing(faults.ENQUEUE, self.program.qids):
            self.context.log.notice(f"Dev {firing.qid} Enqueue data failed, try again")
            return QStatus.QS_AGAIN
        if not all(machine.is_ready(qid) for qid in self.program.qids):
            self.context.log.failure("Failed to enqueue data")
            return QStatus.QS_DEV_ERROR
        self._last = Inference(
            self.program,
            self.instance,
            inputs=dict(self._inputs),
            outputs=dict(self._outputs),
            wirings=self._wirings,
            refusal=next(iter(self._mismatched.values()), None),
        )
        self._wirings = []
        self.instance.jobs.append(self._last)
        return QStatus.QS_SUCCESS

    def waitForCompletion(self) -> QStatus:
        """Wait for the inference that was enqueued last; its status."""
        if self._last is None:
            return QStatus.QS_INVAL
        status = self._last.wait()
        if status is QStatus.QS_SUCCESS:
            for name, target in self._targets.items():
                result = self._last.results.pop(name, None)
                if result is not None:
                    target.reshape(-1).view(np.uint8)[:] = result.reshape(-1).view(np.uint8)
        return status

    def getData(self) -> Tuple[QStatus, List[QBuffer]]:
        """Status and one QBuffer a binding; skipped ones and arrays of the caller's are empty."""
        if self._last is None or not self._last.is_done:
            return QStatus.QS_INVAL, []
        results = self._last.results
        buffers = []
        for binding, given in zip(self._bindings, self._buffers):
            if binding.is_input:
                buffers.append(_EMPTY if given is None else given)
            else:
                result = results.get(binding.name)
                buffers.append(_EMPTY if result is None else QBuffer(result))
        return self._last.status, buffers


class _Workers:
    """Threads of a queue, started as they are needed; they hold no reference to the queue."""

    def __init__(self) -> None:
        self.limit = DEFAULT_NUM_QUEUE_THREADS
        self._waiting: queue.SimpleQueue[Optional[Instance]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = 0
        self._num_waiting = 0

    def put(self, instance: Instance) -> None:
        """Have a thread run the instance's next inference."""
        with self._lock:
            self._num_waiting += 1
            self._start_if_needed()
        self._waiting.put(instance)

    def close(self) -> None:
        """End the threads when they have run what is waiting."""
        for _ in range(self._num_threads):
            self._waiting.put(None)

    def _start_if_needed(self) -> None:
        if self._num_waiting > self._num_threads < self.limit:
            self._num_threads += 1
            threading.Thread(target=self._work, name="qaic-queue", daemon=True).start()

    def _work(self) -> None:
        try:
            while True:
                instance = self._waiting.get()
                if instance is None:
                    return
                try:
                    instance.run_next()
                finally:
                    # A reference kept while waiting would keep the program alive.
                    del instance
                    with self._lock:
                        self._num_waiting -= 1
        finally:  # also where an inference broke this thread: another goes on with the rest
            with self._lock:
                self._num_threads -= 1
                self._start_if_needed()


class Queue:
    """Runs inferences in the background, on up to `numThreadsPerQueue` threads."""

    def __init__(self, context: Context, qid: int) -> None:
        if not isinstance(context, Context):
            raise incompatible("Queue")
        if to_uint(qid, "Queue") not in {card.qid for card in context.machine.cards()}:
            context.log.failure(f"Invalid Device {qid}")
            raise init_error("Queue", "Failed to create Queue")
        self.context = context
        self.qid = qid
        self._workers = _Workers()
        weakref.finalize(self, self._workers.close)

    def initProperties(self, properties: Properties) -> QStatus:
        """Set `numThreadsPerQueue`, before the first inference."""
        if not isinstance(properties, QueueProperties):
            raise incompatible("Queue.initProperties")
        self._workers.limit = max(1, properties.value("numThreadsPerQueue", 1))
        return QStatus.QS_SUCCESS

    def enqueue(self, execObj: ExecObj) -> QStatus:
        """Start an inference with the buffers that the ExecObj holds."""
        if not isinstance(execObj, ExecObj):
            raise incompatible("enqueue")
        status = execObj.submit()
        if status is QStatus.QS_SUCCESS:
            self._workers.put(execObj.instance)
        return status
