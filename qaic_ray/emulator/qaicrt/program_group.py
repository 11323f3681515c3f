"""`qaicrt.ProgramGroup`: programs that take turns on the NSPs of one card."""

from __future__ import annotations

import threading
from typing import List, Optional, Tuple

from ..card import Claim, Demand, Exhausted, NoDevice
from .context import Context, Qpc
from .exec_obj import ExecObj, Queue
from .program import Program
from .types import Properties, QStatus, incompatible, to_uint


class ProgramGroup:
    """Programs that take turns on the same NSPs of one card.

    While it is enabled it holds the NSPs of its largest program; every program keeps its own DRAM
    and channel. Programs may be added before `enable`, which then activates them, or after it.
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
        """Take the NSPs, and load and activate what was added; all or nothing."""
        if self._claim is not None:
            return QStatus.QS_SUCCESS
        self._claim = self._context.machine.claim({self._qid: Demand()})
        status = QStatus.QS_SUCCESS
        for program in self._programs:
            status = self._activate(program)
            if status is not QStatus.QS_SUCCESS:
                self._release()
                break
        return status

    def addProgram(self, qpc: Qpc) -> Tuple[QStatus, Optional[Program]]:
        """A program of the group: activated at once, or by `enable` where that is still to come."""
        if not isinstance(qpc, Qpc):
            raise incompatible("addProgram")
        program = Program(self._context, self._qid, qpc)
        program.group_lock = self._turn
        program.waits_for_group = True
        if self._claim is not None:
            status = self._activate(program)
            if status is not QStatus.QS_SUCCESS:
                return status, None
        self._programs.append(program)
        return QStatus.QS_SUCCESS, program

    def _activate(self, program: Program) -> QStatus:
        assert self._claim is not None
        num_nsps = max(self._num_nsps, program.qpc.contents.num_cores)
        try:
            self._claim.change({self._qid: Demand(num_nsps=num_nsps)})
        except (Exhausted, NoDevice) as error:
            self._context.log.failure(f"Program group: {error}")
            return QStatus.QS_ERROR
        self._num_nsps = num_nsps
        program.waits_for_group = False
        status = program.activate()
        if status is not QStatus.QS_SUCCESS:
            program.waits_for_group = True
        return status

    def enqueue(self, execObj: ExecObj) -> QStatus:
        """Start an inference when the group's NSPs are free for it."""
        return self._queue.enqueue(execObj)

    def disable(self, force: bool = False, timeoutMs: int = 0) -> QStatus:
        """Release everything; QS_INVAL while an ExecObj lives, unless forced."""
        if not force and any(program.has_exec_objs for program in self._programs):
            self._context.log.failure("Program group: a program has active ExecObj")
            return QStatus.QS_INVAL
        self._release()
        return QStatus.QS_SUCCESS

    def _release(self) -> None:
        """Deactivate and unload; the programs stay in the group, which may be enabled again."""
        for program in self._programs:
            program.waits_for_group = True
            program.withdraw()
        if self._claim is not None:
            self._claim.release()
            self._claim = None
        self._num_nsps = 0
