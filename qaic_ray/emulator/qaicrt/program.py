"""`qaicrt.Program`: where a QPC is placed, what it holds of the cards, and the state it is in.

INIT -> LOADED (DRAM is taken) -> FULLY_ACTIVATED (NSPs, channels and more DRAM are taken).
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Deque, Dict, Iterable, List, Optional, Tuple

import numpy as np

from ..card import Claim, Demand, Exhausted, NoDevice, faults, timing
from ..card.cores import cores_of
from ..container import AI100, QpcError
from .buffers import SlicingSpec, SpecError
from .context import Context, Qpc, init_error
from .recording import ActivationRecorder
from .types import (
    DEFAULT_NUM_RETRIES,
    DEFAULT_TIMEOUT_MS,
    ProgramProperties,
    QAicProgramStatus,
    QStatus,
    incompatible,
    to_uint,
)

INIT = QAicProgramStatus.QAIC_PROGRAM_INIT
LOADED = QAicProgramStatus.QAIC_PROGRAM_LOADED
ACTIVE = QAicProgramStatus.QAIC_PROGRAM_FULLY_ACTIVATED
LOAD_ERROR = QAicProgramStatus.QIAC_PROGRAM_LOAD_ERROR
ACTIVATE_ERROR = QAicProgramStatus.QIAC_PROGRAM_ACTIVATE_ERROR

_RESOURCE_TO_TEXT = {
    "nsp": "Failed to allocate NSP resources",
    "dram": "Memory resource exhausted",
    "vc": "Failed to allocate virtual channel",
}


RETAINED_SUFFIX = "_RetainedState"


class Instance:
    """One activation of a program, and the inferences waiting for it, in order.

    `mirrored` holds the present state of each retained input that slices may be written into
    (None: still all zero).
    """

    def __init__(
        self, activation: Any, lock: Optional[threading.Lock], mirrored: Iterable[str]
    ) -> None:
        self.activation = activation
        self.lock = lock or threading.Lock()
        self.jobs: Deque[Any] = deque()
        self.has_run = False
        self.recorder: Optional[ActivationRecorder] = None
        self.mirrored: Dict[str, Optional[np.ndarray]] = dict.fromkeys(mirrored)

    def run_next(self) -> None:
        """Run the inference that has waited longest."""
        with self.lock:
            self.has_run = True
            self.jobs.popleft().execute()


class Program:
    """A QPC on a device, or on a group of devices when `devMapping` names one."""

    def __init__(
        self,
        context: Context,
        dev: Optional[int] = None,
        qpcObj: Optional[Qpc] = None,
        properties: Optional[ProgramProperties] = None,
    ) -> None:
        if not isinstance(context, Context) or not isinstance(qpcObj, Qpc):
            raise incompatible("Program")
        self.context = context
        self.qpc = qpcObj
        self.properties = properties
        self.num_activations = 1
        self.measures_operators = False
        self.group_lock: Optional[threading.Lock] = None
        self.waits_for_group = False
        self.instances: List[Instance] = []
        self.failure = ""
        self._lock = threading.RLock()
        self._state = INIT
        self._claim: Optional[Claim] = None
        self._loaded: Any = None
        self._num_exec_objs = 0
        self._is_auto_activated = False
        self._mirrored: List[str] = []
        if properties is not None:
            self.initProperties(properties)
        self.qids = self._place(dev)

    def _place(self, dev: Optional[int]) -> Tuple[int, ...]:
        mapping = "" if self.properties is None else self.properties.value("devMapping", "")
        num_devices = self.qpc.contents.num_devices
        if mapping:
            parts = mapping.split(":")
            qids = tuple(int(part) if part.isdigit() else -1 for part in parts)
        elif dev is not None:
            qids = (to_uint(dev, "Program"),)
        elif num_devices > 1:
            qids = self.context.qids or tuple(self.context.machine.physical_qids[:num_devices])
        else:
            qids = (self.context.findDevice(self.qpc),)
        for qid in qids:
            self.context.checkDevice(qid)
        if len(set(qids)) != num_devices:
            self.context.log.failure(
                f"Program needs {num_devices} devices, {len(set(qids))} are mapped"
            )
            raise init_error("Program", "Failed to create program with Qpc Buffer")
        return qids

    def initProperties(self, properties: ProgramProperties) -> QStatus:
        """Set timeouts; `devMapping` only counts before the program is placed."""
        if not isinstance(properties, ProgramProperties):
            raise incompatible("Program.initProperties")
        self.properties = properties
        return QStatus.QS_SUCCESS

    @property
    def is_active(self) -> bool:
        """Whether inferences can run."""
        return self._state is ACTIVE

    @property
    def has_exec_objs(self) -> bool:
        """Whether an ExecObj of it lives."""
        return self._num_exec_objs > 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of constants, over all devices."""
        return int(self.qpc.contents.constants_bytes)

    def timeout_ms(self) -> Tuple[int, int]:
        """How long one wait for the device lasts, and how many times it is repeated."""
        if self.properties is None:
            return DEFAULT_TIMEOUT_MS, DEFAULT_NUM_RETRIES
        wait = self.properties.value("dataPathTimeoutMs", None)
        if wait is not None:
            return wait, 0
        return (
            self.properties.value("SubmitRetryTimeoutMs", DEFAULT_TIMEOUT_MS),
            self.properties.value("SubmitNumRetries", DEFAULT_NUM_RETRIES),
        )

    def getStatus(self) -> QAicProgramStatus:
        """The state of the program."""
        return self._state

    def load(self) -> QStatus:
        """Copy the constants to the device: takes DRAM."""
        with self._lock:
            if self._state in {LOADED, ACTIVE, ACTIVATE_ERROR}:
                return QStatus.QS_SUCCESS
            hardware = self.qpc.contents.hardware
            if hardware != AI100:
                self.failure = f"The program was compiled for {hardware}, and the device is {AI100}"
                self.context.log.failure(f"Failed to load program: {self.failure}")
                self._state = LOAD_ERROR
                return QStatus.QS_ERROR
            stopwatch = timing.Stopwatch(self.context.timing)
            status = self._take(faults.LOAD, 0)
            if status is QStatus.QS_SUCCESS:
                status = self._open()
            if status is QStatus.QS_SUCCESS:
                self._state = LOADED
                stopwatch.wait_load(self.weight_bytes)
            elif status is not QStatus.QS_AGAIN:
                self._state = LOAD_ERROR
                self._release()
            return status

    def _open(self) -> QStatus:
        from ..container import execution
        from ..container.steps import numerics_of_environment

        contents, model = self.qpc.contents, self.context.timing
        machine = self.context.machine
        if model is not None and model.mode == timing.REPLACE:
            self._loaded = timing.SimulatedProgram(contents, model, execution.NoMatchingDimension)
            return QStatus.QS_SUCCESS
        try:
            self._loaded = execution.LoadedProgram(
                contents,
                execution.num_threads_of_environment(),
                numerics=numerics_of_environment(machine.folder.numerics),
                cores=cores_of(machine.state),
                measures_operators=self.measures_operators,
            )
        except (QpcError, ValueError) as error:
            self.context.log.failure(f"Failed to load program: {error}")
            return QStatus.QS_ERROR
        return QStatus.QS_SUCCESS

    def operator_profiles(self) -> List[str]:
        """As `LoadedProgram.operator_profiles`; nothing where it was not to be measured."""
        return self._loaded.operator_profiles() if self.measures_operators else []

    def unload(self) -> QStatus:
        """Give the DRAM back; QS_ERROR while active."""
        with self._lock:
            if self._state is ACTIVE:
                self.context.log.failure("Failed to Unload, invalid state detected in program")
                return QStatus.QS_ERROR
            self._release()
            self._state = INIT
            return QStatus.QS_SUCCESS

    def activate(self) -> QStatus:
        """Bind NSPs and a DMA channel; loads first where that was not done."""
        with self._lock:
            if self._state is ACTIVE:
                return QStatus.QS_SUCCESS
            if self.waits_for_group:
                self.failure = "The program's group is not enabled"
                self.context.log.failure(self.failure)
                return QStatus.QS_INVAL
            status = self.load()
            if status is not QStatus.QS_SUCCESS:
                return status
            status = self._take(faults.ACTIVATE, self.num_activations)
            if status is QStatus.QS_SUCCESS:
                self._make_instances()
            elif status is not QStatus.QS_AGAIN:
                self._state = ACTIVATE_ERROR
            return status

    def _make_instances(self) -> None:
        asked = self.context.recording
        try:
            for _ in range(self.num_activations):
                activation = self._loaded.activate()
                self.instances.append(Instance(activation, self.group_lock, self._mirrored))
                if asked is not None:
                    sdk = f"emulated SDK {self.context.machine.folder.apps_version}"
                    recorder = ActivationRecorder(asked, self.qpc.contents.name, sdk)
                    self.instances[-1].recorder = recorder
        except BaseException:
            self._deactivate()
            raise
        self._state = ACTIVE

    def deactivate(self) -> QStatus:
        """Give NSPs and channel back; QS_INVAL while an ExecObj lives."""
        with self._lock:
            if self._num_exec_objs:
                self.context.log.failure("Cannot deactivate program, it has active ExecObj")
                return QStatus.QS_INVAL
            if self._state is ACTIVATE_ERROR:
                self._state = LOADED
            if self._state is ACTIVE:
                self._deactivate()
            return QStatus.QS_SUCCESS

    def withdraw(self) -> None:
        """Deactivate and unload, whatever ExecObjs live: a group was disabled by force.

        They refuse to enqueue from then on, also after the program was activated again.
        """
        with self._lock:
            if self._state is ACTIVE:
                self._deactivate()
            self._release()
            self._state = INIT

    def _deactivate(self) -> None:
        self.instances = []
        self._is_auto_activated = False
        self._state = LOADED
        if self._claim is not None and self._claim.held:
            self._claim.change(self._demands(0))

    def createSlicingSpecHandle(self, spec: str) -> Tuple[QStatus, Optional[SlicingSpec]]:
        """Read a slicing specification (JSON text) for `ExecObj.setDataWithSlices`."""
        if not isinstance(spec, str):
            raise incompatible("createSlicingSpecHandle")
        try:
            handle = SlicingSpec.parse(spec)
        except SpecError as error:
            self.context.log.failure(f"Invalid slicing spec: {error}")
            return QStatus.QS_INVAL, None
        if any(instance.has_run for instance in self.instances):
            self.context.log.failure("Slicing specs must be made before the first inference")
            return QStatus.QS_UNSUPPORTED, None
        known = self.qpc.name_to_binding
        self._mirrored += [n for n in known if n + RETAINED_SUFFIX in known and handle.find(n)]
        for instance in self.instances:
            instance.mirrored = dict.fromkeys(self._mirrored)
        return QStatus.QS_SUCCESS, handle

    def enter_exec_obj(self) -> None:
        """One more ExecObj; activates when needed, RuntimeError when that fails."""
        with self._lock:
            was_active = self.is_active
            status = self.activate()
            if status is not QStatus.QS_SUCCESS:
                if self.failure == _RESOURCE_TO_TEXT["nsp"]:
                    raise RuntimeError(f"QAIC_ERROR_NSP_ALLOC_FAILED: {self.failure}")
                raise init_error("ExecObj", "Failed to create execObj")
            self._is_auto_activated = self._is_auto_activated or not was_active
            self._num_exec_objs += 1

    def leave_exec_obj(self) -> None:
        """One ExecObj less; the last one deactivates what was activated for it."""
        with self._lock:
            self._num_exec_objs -= 1
            if not self._num_exec_objs and self._is_auto_activated and self.is_active:
                self._deactivate()

    def _demands(self, num_activations: int) -> Dict[int, Demand]:
        contents = self.qpc.contents
        share = len(self.qids)
        # A program of a group runs on the group's NSPs.
        num_cores = 0 if self.group_lock else contents.num_cores
        each = Demand(
            num_nsps=num_cores * num_activations,
            dram_bytes=-(-contents.constants_bytes // share)
            + num_activations * -(-contents.activation_bytes // share),
            num_vcs=num_activations,
        )
        return dict.fromkeys(self.qids, each)

    def _take(self, event: str, num_activations: int) -> QStatus:
        """Hold what the program needs with so many activations, unless a fault forbids it."""
        log = self.context.log
        resource = None
        for firing in self.context.machine.faults.firing(event, self.qids):
            if firing.fault.kind == "again":
                log.notice(f"Dev {firing.qid} {event} failed: subsystem restart, try again")
                return QStatus.QS_AGAIN
            resource = "dram" if event == faults.LOAD else "nsp"
        not_ready = [qid for qid in self.qids if not self.context.machine.is_ready(qid)]
        if not_ready:
            self.failure = f"Device {not_ready[0]} is not ready"
            log.failure(self.failure)
            return QStatus.QS_DEV_ERROR
        demands = self._demands(num_activations)
        try:
            if resource is not None:
                raise Exhausted(self.qids[0], resource)
            if self._claim is None or not self._claim.held:
                self._claim = self.context.machine.claim(demands)
            else:
                self._claim.change(demands)
        except Exhausted as error:
            self.failure = _RESOURCE_TO_TEXT[error.resource]
            log.failure(f"Device {error.qid} {event} failed: {self.failure}")
            return QStatus.QS_ERROR
        except NoDevice as error:
            self.failure = f"Invalid Device {error}"
            log.failure(self.failure)
            return QStatus.QS_NODEV
        return QStatus.QS_SUCCESS

    def _release(self) -> None:
        self._loaded = None
        if self._claim is not None:
            self._claim.release()
            self._claim = None
