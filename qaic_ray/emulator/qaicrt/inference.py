"""One inference: enqueued on an activation, run with the faults that fire, ended with results."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..card import ERROR, faults
from ..card.faults import Firing
from ..card.timing import Stopwatch
from ..container.netdesc import Binding
from .buffers import Wiring
from .program import RETAINED_SUFFIX, Instance, Program
from .recording import RecordingError
from .types import QStatus


class Inference:
    """What an ExecObj enqueued; `results` and `status` are valid once it is done.

    `started_s` and `ended_s` are when a queue began and ended it, as `time.perf_counter` says, and
    `thread` is the system's id of the queue's thread that did.
    """

    def __init__(
        self,
        program: Program,
        instance: Instance,
        *,
        inputs: Dict[str, np.ndarray],
        outputs: Dict[str, Tuple[int, ...]],
        wirings: Sequence[Tuple[Binding, Wiring]],
        refusal: Optional[str],
    ) -> None:
        self.status = QStatus.QS_ERROR
        self.results: Dict[str, np.ndarray] = {}
        self.started_s = 0.0
        self.ended_s = 0.0
        self.thread = 0
        self._program = program
        self._instance = instance
        self._inputs = inputs
        self._outputs = outputs
        self._wirings = wirings
        self._refusal = refusal
        self._running = threading.Lock()
        self._running.acquire()

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return not self._running.locked()

    def wait(self) -> QStatus:
        """Wait until it has ended; its status."""
        with self._running:
            return self.status

    def execute(self) -> None:
        """Run it; it is done afterwards, also where this raises."""
        self.started_s = time.perf_counter()
        self.thread = threading.get_native_id()
        try:
            self.status = self._execute()
        finally:
            self.ended_s = time.perf_counter()
            self._inputs = {}
            self._running.release()

    def _execute(self) -> QStatus:
        program = self._program
        fired = program.context.machine.faults.firing(faults.INFERENCE, program.qids)
        status = self._fail(fired)
        if status is not QStatus.QS_SUCCESS:
            return status
        if self._refusal is not None:
            program.context.log.failure(self._refusal)
            return QStatus.QS_ERROR
        started = time.monotonic()
        stopwatch = Stopwatch(program.context.timing)
        status = self._compute()
        stopwatch.wait_inference(self._inputs, program.weight_bytes)
        for firing in fired:
            if firing.fault.kind == "slow":
                time.sleep((firing.fault.factor - 1) * (time.monotonic() - started))
            elif firing.fault.kind == "corrupt":
                self._corrupt(firing)
        return status

    def _compute(self) -> QStatus:
        from ..container import execution

        inputs, wanted = dict(self._inputs), dict(self._outputs)
        inputs.update(self._patched())
        mirrored = self._instance.mirrored
        wanted.update(
            (binding.name, binding.dims) for binding, _ in self._wirings if not binding.is_input
        )
        for name in mirrored:
            output = self._program.qpc.name_to_binding[name + RETAINED_SUFFIX]
            wanted.setdefault(output.name, output.dims)
        try:
            results = self._instance.activation.run(inputs, wanted)
        except (execution.NoMatchingDimension, execution.ShapeError) as error:
            self._program.context.log.failure(str(error))
            return QStatus.QS_ERROR
        for name in mirrored:
            mirrored[name] = results[name + RETAINED_SUFFIX]
        for binding, wiring in self._wirings:
            if not binding.is_input:
                part = results[binding.name][wiring.card]
                wiring.array[wiring.host] = part.view(wiring.array.dtype)
        self.results = {name: results[name] for name in self._outputs}
        if self._instance.recorder is not None:
            wired = [binding.name for binding, _ in self._wirings if not binding.is_input]
            self._record(inputs, {name: results[name] for name in (*self._outputs, *wired)})
        return QStatus.QS_SUCCESS

    def _record(self, inputs: Dict[str, np.ndarray], outputs: Dict[str, np.ndarray]) -> None:
        recorder = self._instance.recorder
        try:
            if recorder is not None:
                recorder.add(inputs, outputs)
        except RecordingError as error:
            self._program.context.log.failure(str(error))

    def _patched(self) -> Dict[str, np.ndarray]:
        """Retained inputs that slices are written into, whole."""
        patched: Dict[str, np.ndarray] = {}
        for binding, wiring in self._wirings:
            if not binding.is_input:
                continue
            if binding.name not in patched:
                given = self._inputs.get(binding.name, self._instance.mirrored.get(binding.name))
                zero = np.zeros(binding.dims, binding.dtype)
                patched[binding.name] = zero if given is None else np.array(given)
            patched[binding.name][wiring.card] = wiring.array[wiring.host].view(binding.dtype)
        return patched

    def _fail(self, fired: List[Firing]) -> QStatus:
        """Apply the faults that come before the compute; what they leave as status."""
        machine, log = self._program.context.machine, self._program.context.log
        for firing in fired:
            kind = firing.fault.kind
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "hang":
                threading.Event().wait()
            elif kind == "error":
                machine.set_status(firing.qid, ERROR)
                log.failure(f"Dev {firing.qid} went to error state")
                return QStatus.QS_DEV_ERROR
            elif kind == "data_path_timeout":
                return self._time_out(firing)
        return QStatus.QS_SUCCESS

    def _time_out(self, firing: Firing) -> QStatus:
        log = self._program.context.log
        wait_ms: float
        wait_ms, num_retries = self._program.timeout_ms()
        if firing.fault.wait_ms is not None:
            wait_ms, num_retries = firing.fault.wait_ms, 0
        for retry in range(num_retries + 1):
            time.sleep(wait_ms / 1e3)
            log.notice(
                f"Dev {firing.qid} VC 0 wait handle 0 Kernel wait timeout, "
                f"retries:{retry} of {num_retries}"
            )
        log.failure("failed to receive response from NW: Connection timed out")
        return QStatus.QS_ERROR

    def _corrupt(self, firing: Firing) -> None:
        for offset, name in enumerate(sorted(self.results)):
            noise = np.random.default_rng((firing.seed + offset) % 2**63)
            result = self.results[name]
            if result.dtype.kind == "f":
                self.results[name] = noise.standard_normal(result.shape).astype(result.dtype)
            else:
                self.results[name] = noise.integers(0, 100, result.shape).astype(result.dtype)
