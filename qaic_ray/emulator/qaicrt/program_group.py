"""`qaicrt.ProgramGroup`: programs that take turns on the same NSPs of one card."""

from __future__ import annotations

import threading
from typing import List, Optional, Tuple

from ..card import Claim, Demand, Exhausted, NoDevice
from .context import Context, Qpc
from .exec_obj import ExecObj, Queue
from .program import Program
from .types import Properties, QStatus, incompatible, to_uint


class ProgramGroup:
    """Holds the NSPs of its largest program; every program keeps its own DRAM and channel."""

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
