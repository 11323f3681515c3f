"""A QPC at work on its device: instances, places for inferences, and groups that share NSPs.

`qaic.Session` and `qaic-runner` both stand on it; below it is `qaicrt` alone.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .. import qaicrt
from ..container.netdesc import Binding
from ..qaicrt.types import DEFAULT_NUM_QUEUE_THREADS

SUCCESS = qaicrt.QStatus.QS_SUCCESS
DEFAULT_SET_SIZE = 10
"""As `qaic-runner` documents it."""

Dims = Tuple[int, ...]


class Hosting(NamedTuple):
    """Where a program runs, and how many inferences of it are under way.

    `group` names programs that share NSPs; `qids` are several for a program over several devices,
    and none where the runtime is to choose.
    """

    qids: Tuple[int, ...] = (0,)
    num_activations: int = 1
    set_size: int = DEFAULT_SET_SIZE
    group: str = ""
    num_threads: int = DEFAULT_NUM_QUEUE_THREADS
    measures_operators: bool = False


class Times(NamedTuple):
    """Moments of one inference, in seconds of `time.perf_counter`, and the thread that ran it."""

    begun: float
    prepared: float
    enqueued: float
    started: float
    ended: float
    woken: float
    finished: float
    thread: int


class Place(NamedTuple):
    """An ExecObj on one instance of the program, and who runs it."""

    exec_obj: Any
    instance: int
    enqueue: Callable[[Any], Any]


class Flight:
    """One inference under way.

    Attributes:
        instance: the instance that runs it.
        number: how many the instance had before.
        in_queue: how many others were under way when it began.
        times: valid after `finish`.
    """

    def __init__(
        self, host: HostedProgram, place: Place, number: int, dims: Dict[str, Dims]
    ) -> None:
        self.instance = place.instance
        self.number = number
        self.in_queue = 0
        self.begun_s = self.prepared_s = self.enqueued_s = 0.0
        self.times: Optional[Times] = None
        self._host = host
        self._place = place
        self._dims = dims

    def finish(self) -> Dict[str, np.ndarray]:
        """Wait for its outputs, by name; those that stay on the device are not among them.

        Raises:
            RuntimeError: where the inference failed.
        """
        exec_obj = self._place.exec_obj
        try:
            status = exec_obj.waitForCompletion()
            woken = time.perf_counter()
            if status is not SUCCESS:
                raise RuntimeError(f"Inference run failed: {status}")
            _, buffers = exec_obj.getData()
            results = {
                b.name: np.frombuffer(buffers[b.index], b.dtype).reshape(self._dims[b.name])
                for b in self._host.outputs
                if b.name in self._dims
            }
            last = exec_obj.last
            self.times = Times(
                self.begun_s, self.prepared_s, self.enqueued_s,
                last.started_s, last.ended_s, woken, time.perf_counter(), last.thread,
            )  # fmt: skip
            return results
        finally:
            self._host.give_back(self._place)


class SharedGroup:
    """A program group that lives as long as one of its programs does."""

    _known: Dict[Tuple[str, int], SharedGroup] = {}  # noqa: RUF012 - of the whole process
    _lock = threading.Lock()

    def __init__(self, name: str, qid: int) -> None:
        self._key = (name, qid)
        self._num_users = 0
        self.context = qaicrt.Context(qaicrt.QIDList([qid]))
        self.group = qaicrt.ProgramGroup(self.context, qid, name)
        if self.group.enable() is not SUCCESS:
            raise RuntimeError(f"Failed to enable program group {name}")

    @classmethod
    def join(cls, name: str, qid: int) -> SharedGroup:
        """The group of that name on the device, made for its first program."""
        with cls._lock:
            shared = cls._known.get((name, qid))
            if shared is None:
                shared = cls._known[name, qid] = cls(name, qid)
            shared._num_users += 1
            return shared

    def leave(self, places: Deque[Place]) -> None:
        """One program less, with its places; after the last one the NSPs are free."""
        places.clear()  # an ExecObj that lives forbids to deactivate
        with self._lock:
            self._num_users -= 1
            if not self._num_users:
                del self._known[self._key]
                self.group.disable(True, 0)


class HostedProgram:
    """A QPC that is loaded and activated, with `num_activations` times `set_size` places.

    May be used from several threads; who finds no place free waits.

    Raises:
        RuntimeError: where the QPC or the device cannot be used, in the runtime's words.
    """

    def __init__(self, path: str, hosting: Hosting) -> None:
        self.qpc = qaicrt.Qpc(path)
        self._set_up(hosting)

    def _set_up(self, hosting: Hosting) -> None:
        self.inputs: List[Binding] = [b for b in self.qpc.bindings if b.is_input]
        self.outputs: List[Binding] = [b for b in self.qpc.bindings if not b.is_input]
        states = self.qpc.contents.states
        self.states = frozenset([*states, *states.values()])
        self._changed = threading.Condition()
        self._free: Deque[Place] = deque()
        self._begun = [0] * hosting.num_activations
        self._num_flying = 0
        self._leave: Callable[[], Any] = lambda: None
        self._program: Any = None
        self.num_places = hosting.num_activations * hosting.set_size
        try:
            if hosting.group:
                self._in_group(hosting)
            else:
                self._alone(hosting)
        except BaseException:
            self.close()
            raise

    def _alone(self, hosting: Hosting) -> None:
        qids = hosting.qids
        context = qaicrt.Context(qaicrt.QIDList(qids) if qids else None)
        properties = qaicrt.QAicProgramProperties()
        if len(qids) > 1:
            properties.devMapping = ":".join(map(str, qids))  # type: ignore[attr-defined]
        first = qids[0] if len(qids) == 1 else None
        program = qaicrt.Program(context, first, self.qpc, properties)  # type: ignore[arg-type]
        program.num_activations = hosting.num_activations
        program.measures_operators = hosting.measures_operators
        self._program = program
        queues = []
        for _ in range(hosting.num_activations):
            settings = qaicrt.QAicQueueProperties()
            settings.numThreadsPerQueue = hosting.num_threads  # type: ignore[attr-defined]
            queues.append(qaicrt.Queue(context, program.qids[0]))
            queues[-1].initProperties(settings)
        # In turn, so that a few inferences already use every instance.
        for _ in range(hosting.set_size):
            for instance, queue in enumerate(queues):
                exec_obj = qaicrt.ExecObj(context, program, instance)
                self._free.append(Place(exec_obj, instance, queue.enqueue))

    def _in_group(self, hosting: Hosting) -> None:
        shared = SharedGroup.join(hosting.group, hosting.qids[0])
        # Also for who forgets to close: a group would live as long as the process.
        self._leave = weakref.finalize(self, shared.leave, self._free)
        status, program = shared.group.addProgram(self.qpc)
        if program is None:
            raise RuntimeError(
                f"Failed to add program to group {hosting.group}: {status}; qaic-util -q shows "
                "what is free on the device"
            )
        self._program = program
        for _ in range(hosting.set_size):
            exec_obj = qaicrt.ExecObj(shared.context, program)
            self._free.append(Place(exec_obj, 0, shared.group.enqueue))

    def shapes(self, inputs: Mapping[str, np.ndarray]) -> Dict[str, Dims]:
        """Dims of every binding in the first specialization that has the shapes of `inputs`.

        Raises:
            ValueError: where none has.
        """
        entries = self.specializations()
        for entry in entries:
            if all(entry[name] == array.shape for name, array in inputs.items()):
                return entry
        given = ", ".join(f"{name}{list(array.shape)}" for name, array in inputs.items())
        allowed = " or ".join(
            ", ".join(f"{name}{list(entry[name])}" for name in inputs) for entry in entries
        )
        raise ValueError(f"No matching dimension found for {given}; the program takes {allowed}")

    def specializations(self) -> List[Dict[str, Dims]]:
        """Dims of every binding, by name, for each specialization of the program."""
        bindings = self.qpc.bindings
        rows = self.qpc.contents.allowed_shapes
        if not rows:
            return [{b.name: b.dims for b in bindings}]
        return [{b.name: tuple(dims) for b, (_, dims) in zip(bindings, row)} for row in rows]

    def checked(self, inputs: Mapping[str, Any]) -> Dict[str, np.ndarray]:
        """The inputs as contiguous arrays of their bindings' types, retained ones maybe left out.

        Raises:
            ValueError: for a name that is no input, a missing input, or a wrong type.
        """
        names = [b.name for b in self.inputs]
        for name in inputs:
            if name not in names:
                raise ValueError(f"'{name}' is no input of the model; they are {', '.join(names)}")
        arrays = {}
        for binding in self.inputs:
            if binding.name in inputs:
                arrays[binding.name] = _of_type(binding, inputs[binding.name])
            elif binding.name not in self.states:
                raise ValueError(
                    f"input '{binding.name}' is missing; the model takes {', '.join(names)}"
                )
        return arrays

    def begin(
        self, inputs: Mapping[str, np.ndarray], wanted: Optional[Sequence[str]] = None
    ) -> Flight:
        """Start an inference with inputs that `checked` gave; waits while no place is free.

        Args:
            inputs: arrays by name; a retained one that is missing stays as it is on the device.
            wanted: names of the outputs to fetch; None means all.

        Raises:
            ValueError: where no specialization has these shapes.
            RuntimeError: where the device refuses.
        """
        dims = self.shapes(inputs)
        with self._changed:
            if self._program is None:
                raise RuntimeError("The program was released")
            self._changed.wait_for(lambda: bool(self._free))
            place = self._free.popleft()
            number = self._begun[place.instance]
            self._begun[place.instance] += 1
            others = self._num_flying
            self._num_flying += 1
        fetched = {b.name: dims[b.name] for b in self.outputs if wanted is None or b.name in wanted}
        flight = Flight(self, place, number, fetched)
        flight.in_queue = others
        try:
            flight.begun_s = time.perf_counter()
            self._prepare(place, inputs, fetched)
            flight.prepared_s = time.perf_counter()
            status = place.enqueue(place.exec_obj)
            flight.enqueued_s = time.perf_counter()
            if status is not SUCCESS:
                raise RuntimeError(f"Failed to enqueue data: {status}")
        except BaseException:
            self.give_back(place)
            raise
        return flight

    def _prepare(
        self, place: Place, inputs: Mapping[str, np.ndarray], fetched: Mapping[str, Dims]
    ) -> None:
        buffers, dims = [], qaicrt.BufferDimensionsVecRef()
        for binding in self.qpc.bindings:
            array = inputs.get(binding.name)
            itemsize = binding.dtype.itemsize
            if array is not None:
                buffers.append(qaicrt.QBuffer(array))
                dims.append((itemsize, array.shape))
            elif binding.name in fetched:
                shape = fetched[binding.name]
                buffers.append(_target(itemsize * int(np.prod(shape, dtype=np.int64))))
                dims.append((itemsize, shape))
            else:
                buffers.append(qaicrt.QBuffer(b""))
                dims.append((itemsize, (0,)))
        status = place.exec_obj.setData(buffers, dims)
        if status is not SUCCESS:
            raise RuntimeError(f"ExecObj set data failed: {status}")

    def operator_profiles(self) -> List[str]:
        """What was measured of operators until now, where `Hosting` says so."""
        return list(self._program.operator_profiles())

    def give_back(self, place: Place) -> None:
        """The place is free again."""
        with self._changed:
            self._num_flying -= 1
            self._free.append(place)
            self._changed.notify_all()

    def close(self) -> None:
        """Release the device, after the inferences that are under way."""
        with self._changed:
            program, self._program = self._program, None
            self._changed.wait_for(lambda: not self._num_flying)
            # An ExecObj that lives forbids to deactivate.
            self._free.clear()
        if program is not None:
            program.deactivate()
            program.unload()
        self._leave()


def _target(num_bytes: int) -> Any:
    """Memory of that size for an output, none of it written yet."""
    return qaicrt.QBuffer(np.empty(num_bytes, np.uint8))


def _of_type(binding: Binding, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype == np.bool_ and binding.dtype == np.int8:
        array = array.view(np.int8)
    if array.dtype.kind == binding.dtype.kind:
        same = array.astype(binding.dtype, copy=False)  # samples give float64 for float32
        array = same if same.dtype.kind == "f" or np.array_equal(same, array) else array
    if array.dtype != binding.dtype:
        raise ValueError(
            f"input '{binding.name}' must be {binding.dtype}, not {array.dtype}; convert it with "
            f"astype('{binding.dtype}')"
        )
    return np.ascontiguousarray(array).reshape(array.shape)
