"""`qaicrt` classes over many inferences in flight: sets, and benchmarks of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Set, Tuple, Union

from .buffers import BufferMapping, QBuffer
from .context import Context, Qpc
from .exec_obj import ExecObj, Queue
from .program import Program
from .types import ExecObjInfo, Properties, QStatus, incompatible, to_uint

_MAX_REFUSED = 1024
"""Failed submissions that a set remembers: nobody has to ask for them."""


class InferenceVector:
    """One QBuffer a binding, at full size until they are replaced."""

    def __init__(self, mappings: Sequence[BufferMapping]) -> None:
        if not all(isinstance(mapping, BufferMapping) for mapping in mappings):
            raise incompatible("InferenceVector")
        self._buffers = [QBuffer(bytes(mapping.size)) for mapping in mappings]

    def getVector(self) -> List[QBuffer]:
        """The buffers; assign to an item to replace it."""
        return self._buffers

    def setBuffers(self, buffers: Sequence[QBuffer]) -> QStatus:
        """Replace all buffers."""
        if len(buffers) != len(self._buffers):
            return QStatus.QS_INVAL
        self._buffers[:] = buffers
        return QStatus.QS_SUCCESS


class InferenceHandle:
    """A place in an InferenceSet: an ExecObj, its buffers and the id it was submitted with.

    `index` counts the places of one activation. One that `is_refused` stands for a submission that
    failed; its place is free again.
    """

    def __init__(self, exec_obj: ExecObj, instance: int, index: int = 0) -> None:
        self._exec_obj = exec_obj
        self.instance = instance
        self.index = index
        self.id: Optional[int] = None
        self.is_refused = False

    def setBuffers(self, buffers: Sequence[QBuffer]) -> QStatus:
        """Buffers of the next inference."""
        return self._exec_obj.setData(list(buffers))

    def getBuffers(self) -> Tuple[QStatus, List[QBuffer]]:
        """Buffers after the inference."""
        return self._exec_obj.getData()

    def execObj(self) -> ExecObj:
        """The ExecObj behind it."""
        return self._exec_obj


class InferenceSet:
    """`num_activations` instances of a program with `set_size` inferences in flight on each."""

    def __init__(  # noqa: PLR0917 - the vendor's signature
        self,
        context: Context,
        qpc: Qpc,
        dev: Optional[int] = None,
        set_size: int = 1,
        num_activations: int = 1,
    ) -> None:
        self._program = Program(context, dev, qpc)
        self._program.num_activations = max(1, to_uint(num_activations, "InferenceSet"))
        handles = []
        for instance in range(self._program.num_activations):
            handles += [
                InferenceHandle(ExecObj(context, self._program, instance), instance, index)
                for index in range(max(1, to_uint(set_size, "InferenceSet")))
            ]
        self._queues = [Queue(context, self._program.qids[0]) for _ in self._program.instances]
        self._available: Deque[InferenceHandle] = deque(handles)
        self._submitted: Dict[int, InferenceHandle] = {}
        self._refused: Dict[int, Tuple[QStatus, InferenceHandle]] = {}
        self.num_handles = len(handles)
        self._changed = threading.Condition()

    def getAvailable(self) -> Tuple[QStatus, InferenceHandle]:
        """A free handle; waits until one was put back."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._available))
            return QStatus.QS_SUCCESS, self._available.popleft()

    def submit(self, work: Union[InferenceHandle, InferenceVector], id: int) -> QStatus:
        """Start an inference under an id of the caller's."""
        if isinstance(work, InferenceVector):
            _, handle = self.getAvailable()
            status = handle.setBuffers(work.getVector())
        elif isinstance(work, InferenceHandle):
            handle, status = work, QStatus.QS_SUCCESS
        else:
            raise incompatible("submit")
        handle.id = to_uint(id, "submit")
        if status is QStatus.QS_SUCCESS:
            status = self._queues[handle.instance].enqueue(handle.execObj())
        if status is not QStatus.QS_SUCCESS:
            self._refuse(handle, status)
            self.putCompleted(handle)
            return status
        with self._changed:
            self._refused.pop(handle.id, None)
            self._submitted[handle.id] = handle
            self._changed.notify_all()
        return status

    def _refuse(self, handle: InferenceHandle, status: QStatus) -> None:
        """Keep a failed submission for who waits for its id, as programs do from other threads."""
        refused = InferenceHandle(handle.execObj(), handle.instance, handle.index)
        refused.id, refused.is_refused = handle.id, True
        with self._changed:
            self._refused[to_uint(handle.id, "submit")] = (status, refused)
            if len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._changed.notify_all()

    def getCompleted(self) -> Tuple[QStatus, InferenceHandle]:
        """The handle that was submitted first, when its inference has ended."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._submitted))
            first = next(iter(self._submitted))
        return self.getCompletedId(first)

    def getCompletedId(self, id: int) -> Tuple[QStatus, InferenceHandle]:
        """The handle that was submitted with `id`, when its inference has ended.

        Waits for a submission that is still to come. One that failed gives the status that `submit`
        gave, and a handle that may be put back like any other.
        """
        with self._changed:
            self._changed.wait_for(lambda: id in self._submitted or id in self._refused)
            if id in self._refused:
                return self._refused.pop(id)
            handle = self._submitted.pop(id)
        return handle.execObj().waitForCompletion(), handle

    def putCompleted(self, handle: InferenceHandle) -> QStatus:
        """Give a handle back."""
        if not isinstance(handle, InferenceHandle):
            raise incompatible("putCompleted")
        if handle.is_refused:
            return QStatus.QS_SUCCESS
        with self._changed:
            self._available.append(handle)
            self._changed.notify_all()
        return QStatus.QS_SUCCESS

    def waitForCompletion(self) -> QStatus:
        """Wait for every submitted inference; the first status that is no success."""
        with self._changed:
            handles = list(self._submitted.values())
        statuses = [handle.execObj().waitForCompletion() for handle in handles]
        return next((s for s in statuses if s is not QStatus.QS_SUCCESS), QStatus.QS_SUCCESS)


class InferenceBenchmarkSet:
    """Runs inferences again and again and tells the rate.

    Each ExecObj keeps its buffers from one inference to the next; a completion callback may give it
    others.
    """

    def __init__(  # noqa: PLR0917 - the vendor's signature
        self,
        context: Context,
        qpc: Qpc,
        dev: Optional[int] = None,
        setSize: int = 1,
        numActivations: int = 1,
        inferenceDataVector: Sequence[QBuffer] = (),
        properties: Optional[Properties] = None,
    ) -> None:
        self._arguments = (context, qpc, dev, setSize, numActivations)
        self._buffers = list(inferenceDataVector)
        self._set: Optional[InferenceSet] = None
        self._filled: Set[Tuple[int, int]] = set()
        self._on_completion: Optional[Callable[[ExecObj, ExecObjInfo], None]] = None
        self._name = str(qpc.contents.name)
        self._batch_size = qpc.getInfo().batchSize
        self._submitted = 0
        self._completed = 0
        self._last = (0, 0.0, 0, self._batch_size)

    def enable(self) -> QStatus:
        """Load and activate every instance."""
        try:
            self._set = self._set or InferenceSet(*self._arguments)
        except RuntimeError as error:
            self._arguments[0].log.failure(str(error))
            return QStatus.QS_ERROR
        return QStatus.QS_SUCCESS

    def disable(self) -> QStatus:
        """Release every instance."""
        self._set = None
        self._filled = set()
        return QStatus.QS_SUCCESS

    def enableExecObjCompletionCallback(
        self, callback: Callable[[ExecObj, ExecObjInfo], None]
    ) -> None:
        """Have `callback` called with each ExecObj that ended, in the thread that runs them.

        There its results can be read, and `setData` gives the buffers of its next inference.
        """
        if not callable(callback):
            raise incompatible("enableExecObjCompletionCallback")
        self._on_completion = callback

    def disableExecObjCompletionCallback(self) -> None:
        """Call nothing when an ExecObj ends."""
        self._on_completion = None

    def enableOpStatsCallback(
        self,
        callback: Callable[..., None],
        initialSampleIndex: int,
        numSamplesPerProgramInstance: int,
        format: Any,
    ) -> QStatus:
        """QS_UNSUPPORTED: an emulated card measures no operators."""
        if not callable(callback):
            raise incompatible("enableOpStatsCallback")
        for number in (initialSampleIndex, numSamplesPerProgramInstance):
            to_uint(number, "enableOpStatsCallback")
        self._arguments[0].log.failure("OpStats: this emulated SDK measures no operators")
        return QStatus.QS_UNSUPPORTED

    def disableOpStatsCallback(self) -> QStatus:
        """Nothing to do: no statistics are collected."""
        return QStatus.QS_SUCCESS

    def run(self, numInferencesToRun: int) -> QStatus:
        """Run so many inferences and wait for them."""
        count = to_uint(numInferencesToRun, "run")
        return self._run(lambda done, _: done < count) if count else QStatus.QS_INVAL

    def runForDuration(self, duration: int) -> QStatus:
        """Submit inferences for `duration` seconds and wait for them."""
        seconds = to_uint(duration, "runForDuration")
        return self._run(lambda _, passed: passed < seconds) if seconds else QStatus.QS_INVAL

    def _run(self, goes_on: Callable[[int, float], bool]) -> QStatus:
        if self._set is None:
            return QStatus.QS_ERROR
        start = time.monotonic()
        pending: Deque[int] = deque()
        statuses: List[QStatus] = []
        number = 0
        try:
            while goes_on(number, time.monotonic() - start):
                if len(pending) == self._set.num_handles:
                    statuses.append(self._complete(self._set, pending.popleft()))
                status = self._submit(self._set)
                if status is not QStatus.QS_SUCCESS:
                    statuses.append(status)
                    break
                pending.append(self._submitted)
                number += 1
        except BaseException:  # a callback's own error: what is on its way is waited for
            for id in pending:
                self._complete(self._set, id, tells=False)
            raise
        while pending:
            statuses.append(self._complete(self._set, pending.popleft()))
        seconds = max(time.monotonic() - start, 1e-9)
        completed = statuses.count(QStatus.QS_SUCCESS)
        self._completed += completed
        self._last = (completed, completed / seconds, round(seconds * 1e6), self._batch_size)
        return QStatus.QS_SUCCESS if completed == len(statuses) else QStatus.QS_ERROR

    def _submit(self, inferences: InferenceSet) -> QStatus:
        """Start one more inference, under the number that `_submitted` is afterwards."""
        _, handle = inferences.getAvailable()
        place = handle.instance, handle.index
        if place not in self._filled:
            status = handle.setBuffers(self._buffers)
            if status is not QStatus.QS_SUCCESS:
                inferences.putCompleted(handle)
                return status
            self._filled.add(place)
        self._submitted += 1
        return inferences.submit(handle, self._submitted)

    def _complete(self, inferences: InferenceSet, id: int, *, tells: bool = True) -> QStatus:
        status, handle = inferences.getCompletedId(id)
        try:
            if tells and self._on_completion is not None:
                instance = handle.instance
                info = ExecObjInfo(handle.index, instance, instance, self._name, status)
                self._on_completion(handle.execObj(), info)
        finally:
            inferences.putCompleted(handle)
        return status

    def getLastRunStats(self) -> Tuple[int, float, int, int]:
        """Inferences completed, inferences a second, microseconds, batch size."""
        return self._last

    def getInfCompleted(self) -> List[int]:
        """Inferences completed since `enable`."""
        return [self._completed]
