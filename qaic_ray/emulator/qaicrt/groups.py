"""`qaicrt` classes over many inferences: sets in flight, and groups of programs that take turns."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Callable, Deque, Dict, List, Optional, Sequence, Tuple, Union

from ..card import Claim, Demand, Exhausted, NoDevice
from .buffers import BufferMapping, QBuffer
from .context import Context, Qpc
from .exec_obj import ExecObj, Queue
from .program import Program
from .types import Properties, QStatus, incompatible, to_uint


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
    """A place in an InferenceSet: an ExecObj, its buffers and the id it was submitted with."""

    def __init__(self, exec_obj: ExecObj, instance: int) -> None:
        self._exec_obj = exec_obj
        self.instance = instance
        self.id: Optional[int] = None

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
                InferenceHandle(ExecObj(context, self._program, instance), instance)
                for _ in range(max(1, to_uint(set_size, "InferenceSet")))
            ]
        self._queues = [Queue(context, self._program.qids[0]) for _ in self._program.instances]
        self._available: Deque[InferenceHandle] = deque(handles)
        self._submitted: Dict[int, InferenceHandle] = {}
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
            self.putCompleted(handle)
            return status
        with self._changed:
            self._submitted[handle.id] = handle
            self._changed.notify_all()
        return status

    def getCompleted(self) -> Tuple[QStatus, InferenceHandle]:
        """The handle that was submitted first, when its inference has ended."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._submitted))
            first = next(iter(self._submitted))
        return self.getCompletedId(first)

    def getCompletedId(self, id: int) -> Tuple[QStatus, InferenceHandle]:
        """The handle that was submitted with `id`, when its inference has ended."""
        with self._changed:
            self._changed.wait_for(lambda: id in self._submitted)
            handle = self._submitted.pop(id)
        return handle.execObj().waitForCompletion(), handle

    def putCompleted(self, handle: InferenceHandle) -> QStatus:
        """Give a handle back."""
        if not isinstance(handle, InferenceHandle):
            raise incompatible("putCompleted")
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
    """Runs the same buffers again and again and tells the rate."""

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
        self._batch_size = qpc.getInfo().batchSize
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
        submitted = 0
        while goes_on(submitted, time.monotonic() - start):
            if len(pending) == self._set.num_handles:
                statuses.append(self._complete(self._set, pending.popleft()))
            _, handle = self._set.getAvailable()
            status = handle.setBuffers(self._buffers)
            if status is QStatus.QS_SUCCESS:
                status = self._set.submit(handle, submitted)
            else:
                self._set.putCompleted(handle)
            if status is not QStatus.QS_SUCCESS:
                statuses.append(status)
                break
            pending.append(submitted)
            submitted += 1
        statuses += [self._complete(self._set, id) for id in pending]
        seconds = max(time.monotonic() - start, 1e-9)
        completed = statuses.count(QStatus.QS_SUCCESS)
        self._completed += completed
        self._last = (completed, completed / seconds, round(seconds * 1e6), self._batch_size)
        return QStatus.QS_SUCCESS if completed == len(statuses) else QStatus.QS_ERROR

    @staticmethod
    def _complete(inferences: InferenceSet, id: int) -> QStatus:
        status, handle = inferences.getCompletedId(id)
        inferences.putCompleted(handle)
        return status

    def getLastRunStats(self) -> Tuple[int, float, int, int]:
        """Inferences completed, inferences a second, microseconds, batch size."""
        return self._last

    def getInfCompleted(self) -> List[int]:
        """Inferences completed since `enable`."""
        return [self._completed]


class ProgramGroup:
    """Programs that take turns on the same NSPs of one card.

    Holds the NSPs of its largest program; every program keeps its own DRAM and channel.
    """

    def __init__(
        self, context: Context, dev: int, name: str, properties: Optional[Properties] = None
    ) -> None:
        if not isinstance(context, Context) or not isinstance(name, str):
            raise incompatible("ProgramGroup")
        self._context = context
        self._qid = to_uint(dev, "ProgramGroup")
        self._queue = Queue(context, self._qid)
        self._turn = threading.Lock()
        self._claim: Optional[Claim] = None
        self._programs: List[Program] = []
        self._num_nsps = 0

    def enable(self) -> QStatus:
        """Start the group; programs are added afterwards."""
        if self._claim is None:
            self._claim = self._context.machine.claim({self._qid: Demand()})
        return QStatus.QS_SUCCESS

    def addProgram(self, qpc: Qpc) -> Tuple[QStatus, Optional[Program]]:
        """Load and activate a program in the group."""
        if not isinstance(qpc, Qpc):
            raise incompatible("addProgram")
        if self._claim is None:
            return QStatus.QS_INVAL, None
        num_nsps = max(self._num_nsps, qpc.contents.num_cores)
        try:
            self._claim.change({self._qid: Demand(num_nsps=num_nsps)})
        except (Exhausted, NoDevice) as error:
            self._context.log.failure(f"Program group: {error}")
            return QStatus.QS_ERROR, None
        self._num_nsps = num_nsps
        program = Program(self._context, self._qid, qpc)
        program.group_lock = self._turn
        status = program.activate()
        if status is not QStatus.QS_SUCCESS:
            return status, None
        self._programs.append(program)
        return status, program

    def enqueue(self, execObj: ExecObj) -> QStatus:
        """Start an inference when the group's NSPs are free for it."""
        return self._queue.enqueue(execObj)

    def disable(self, force: bool = False, timeoutMs: int = 0) -> QStatus:
        """Release everything; QS_INVAL while an ExecObj lives, unless forced."""
        statuses = [program.deactivate() for program in self._programs]
        if not force and any(status is not QStatus.QS_SUCCESS for status in statuses):
            return QStatus.QS_INVAL
        for program in self._programs:
            program.unload()
        self._programs = []
        if self._claim is not None:
            self._claim.release()
            self._claim = None
        self._num_nsps = 0
        return QStatus.QS_SUCCESS
